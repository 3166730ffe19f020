"""llama.cpp's server, built from the sources that llama-cpp-python carries, for this CPU.

One server has one model, so a mix of variants takes a server for each, or adapters that are chosen
by request. Every slot has a cache of its own length (one cache for all is slower as it fills), and
there is no second cache of prompts in memory. Where several servers share the cores, each has one
thread, which is faster here than two servers with two threads.
"""

import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.dialects import Route
from bench.peers.environment import Workshop, own_version
from bench.peers.peer import Arrangement
from bench.peers.served import Command, Served
from bench.peers.site import Site
from bench.processes import free_ports
from bench.zoos import BASE, FULLS, LORAS

_PACKAGE, _VERSION = "llama-cpp-python", "0.3.36"
_OPTIONS = (
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF"),
    *("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF"),
)
_SLOT_TOKENS, _LONG_TOKENS = 256, 1536
_START_LIMIT_S = 120.0
_ALONE = ("one", "text", "prefill", "first", "cached")


class LlamaCpp:
    """See the module's text."""

    name = "llama.cpp"

    def __init__(self, site: Site) -> None:
        self._site = site
        self._shop: Workshop = site.workshop(self.name)
        self._sources = self._shop.folder / f"llama_cpp_python-{_VERSION}" / "vendor" / "llama.cpp"
        self._programs = self._shop.folder / "build" / "bin"

    def install(self) -> str:
        """See `Peer`."""
        pinned = [f"{name}=={own_version(name)}" for name in ("torch", "transformers", "gguf")]
        self._shop.packages(["cmake", "ninja", *pinned, "sentencepiece", "protobuf"])
        self._shop.once("built", _VERSION, self._build)
        for kind in ("f16", "q8_0"):
            self._base(kind)
        self._adapters()
        self._tunes()
        return f"{_PACKAGE} {_VERSION}'s"

    def arrangements(self) -> Sequence[Arrangement]:
        """See `Peer`."""
        cores = self._site.cores
        split = f"f16, {cores} servers of one thread"
        return [
            Arrangement("llama.cpp f16", "base", _ALONE, lambda: self._one("f16", 1)),
            Arrangement("llama.cpp q8_0", "base", _ALONE, lambda: self._one("q8_0", 1)),
            Arrangement("llama.cpp f16", "base", ("8", "32"), lambda: self._one("f16", 32)),
            Arrangement(f"llama.cpp {split}", "base", ("8", "32"), self._split),
            Arrangement(
                "llama.cpp f16, a server of one thread for each",
                "adapters",
                ("loras", "trace"),
                self._server_per_adapter,
            ),
            Arrangement(
                "llama.cpp f16, one server with all", "adapters", ("loras",), self._adapters_in_one
            ),
            Arrangement(
                "llama.cpp f16, a server of one thread for each",
                "tunes",
                ("lasts", "tunes"),
                self._server_per_tune,
            ),
        ]

    def _build(self) -> None:
        shop, environment = self._shop, {"PATH": f"{self._shop.python.parent}:{os.environ['PATH']}"}
        shop.run(
            "fetching the sources",
            [
                *(shop.python, "-m", "pip", "download", "--no-deps", "--no-binary", _PACKAGE),
                *("-d", "sdist", f"{_PACKAGE}=={_VERSION}"),
            ],
        )
        if not self._sources.exists():
            (archive,) = (shop.folder / "sdist").glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(shop.folder, filter="data")
        shop.run(
            "configuring",
            ["cmake", "-S", self._sources, "-B", "build", *_OPTIONS],
            environment,
        )
        targets = ["--target", "llama-server", "llama-quantize"]
        shop.run(
            "compiling (10 to 30 minutes)", ["cmake", "--build", "build", *targets], environment
        )

    def _base(self, kind: str) -> Path:
        models = self._site.models
        if kind == "f16":
            return self._converted("base-f16.gguf", models.base)
        return models.converted(
            f"base-{kind}.gguf",
            lambda target: self._shop.run(
                f"quantizing to {kind}",
                [self._programs / "llama-quantize", self._base("f16"), target, kind.upper()],
            ),
        )

    def _tunes(self) -> dict[str, Path]:
        folders = self._site.models.fulls
        return {name: self._converted(f"{name}-f16.gguf", folders[name]) for name in FULLS}

    def _converted(self, name: str, folder: Path) -> Path:
        script = self._sources / "convert_hf_to_gguf.py"
        return self._site.models.converted(
            name,
            lambda target: self._shop.run(
                f"converting {folder.name}",
                [self._shop.python, script, folder, "--outtype", "f16", "--outfile", target],
            ),
        )

    def _adapters(self) -> dict[str, Path]:
        script = self._sources / "convert_lora_to_gguf.py"
        models = self._site.models

        def convert(name: str, target: Path) -> None:
            words = [models.loras[name], "--base", models.base, "--outtype", "f16"]
            self._shop.run(
                f"converting {name}", [self._shop.python, script, *words, "--outfile", target]
            )

        return {
            name: models.converted(f"{name}.gguf", lambda target, name=name: convert(name, target))
            for name in LORAS
        }

    def _one(self, kind: str, slots: int) -> Served:
        tokens = _LONG_TOKENS if slots == 1 else _SLOT_TOKENS
        # Weights repacked for AMX, which are quantized ones only, end this version with a fault.
        after = () if kind == "f16" else ("--no-repack",)
        command = self._command(self._base(kind), slots=slots, tokens=tokens, after=after)
        return self._served([command], {BASE: _route([command])})

    def _split(self) -> Served:
        cores = sorted(os.sched_getaffinity(0))
        slots = -(-32 // len(cores))
        commands = [
            self._command(self._base("f16"), slots=slots, threads=1, before=_pinned(core))
            for core in cores
        ]
        return self._served(commands, {BASE: _route(commands)})

    def _server_per_adapter(self) -> Served:
        base, adapters = self._base("f16"), self._adapters()
        commands = [
            self._command(base, slots=4, threads=1, after=("--lora", adapters[name]))
            for name in LORAS
        ]
        return self._served(
            commands, {name: _route([one]) for name, one in zip(LORAS, commands, strict=True)}
        )

    def _adapters_in_one(self) -> Served:
        # A comma separates files of one option.
        files = ",".join(str(path) for path in self._adapters().values())
        command = self._command(
            self._base("f16"), slots=32, after=("--lora", files, "--lora-init-without-apply")
        )
        routes = {
            name: _route([command], {number: float(number == own) for number in range(len(LORAS))})
            for own, name in enumerate(LORAS)
        }
        return self._served([command], routes)

    def _server_per_tune(self) -> Served:
        files = {BASE: self._base("f16")} | self._tunes()
        commands = {name: self._command(file, slots=4, threads=1) for name, file in files.items()}
        routes = {name: _route([command]) for name, command in commands.items()}
        return self._served(list(commands.values()), routes)

    def _command(
        self,
        model: Path,
        *,
        slots: int,
        tokens: int = _SLOT_TOKENS,
        threads: int = 0,
        before: Sequence[str] = (),
        after: Sequence[str | Path] = (),
    ) -> Command:
        (port,) = free_ports(1)
        count = str(threads or self._site.cores)
        words = [
            *before,
            *(self._programs / "llama-server", "--model", model),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--threads", count, "--threads-batch", count),
            *("--parallel", str(slots), "--ctx-size", str(slots * tokens), "--no-kv-unified"),
            *("--cache-ram", "0"),
            *after,
        ]
        return Command(words, port)

    def _served(self, commands: Sequence[Command], routes: Mapping[str, Route]) -> Served:
        return Served(commands, routes, self._shop.folder / "server.log", _START_LIMIT_S)


def _route(commands: Sequence[Command], adapters: Mapping[int, float] | None = None) -> Route:
    urls = tuple(command.url for command in commands)
    return Route(urls=urls, dialect="llama.cpp", adapters=dict(adapters or {}))


def _pinned(core: int) -> tuple[str, ...]:
    return ("taskset", "--cpu-list", str(core))
