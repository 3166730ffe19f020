"""transformers and peft: static batches, continuous batching, a mixed batch over adapters, and
eight whole models one after the other.

They compute in float32, and static batches also in bfloat16 where the CPU multiplies that.
"""

from collections.abc import Sequence
from pathlib import Path

from bench.peers.environment import Workshop, flags_of_cpu, own_version
from bench.peers.hosted import SCRIPT, Hosted
from bench.peers.peer import Arrangement
from bench.peers.site import Site

_PACKAGES = ("torch", "transformers", "peft", "accelerate")
_CELLS = ("one", "text", "8", "32", "prefill", "first")


class Libraries:
    """See the module's text."""

    name = "transformers"

    def __init__(self, site: Site) -> None:
        self._site = site
        self._shop: Workshop = site.workshop(self.name)

    def install(self) -> str:
        """See `Peer`."""
        self._shop.packages([f"{name}=={own_version(name)}" for name in _PACKAGES])
        models = self._site.models
        _ = models.base, models.loras, models.fulls
        return f"{own_version('transformers')}, peft {own_version('peft')}"

    def arrangements(self) -> Sequence[Arrangement]:
        """See `Peer`."""
        models = self._site.models
        found = [
            Arrangement("transformers f32", "base", _CELLS, lambda: self._hosted("static")),
            Arrangement(
                "transformers f32, continuous batching",
                "base",
                ("8",),
                lambda: self._hosted("continuous"),
            ),
            Arrangement(
                "peft f32, mixed batch",
                "adapters",
                ("loras",),
                lambda: self._hosted("mixed", models.loras),
            ),
            Arrangement(
                "transformers f32, all loaded",
                "tunes",
                ("lasts", "tunes"),
                lambda: self._hosted("whole", models.fulls),
            ),
        ]
        if flags_of_cpu() & {"avx512_bf16", "amx_bf16"}:
            found.append(
                Arrangement(
                    "transformers bf16",
                    "base",
                    _CELLS,
                    lambda: self._hosted("static", dtype="bfloat16"),
                )
            )
        return found

    def _hosted(
        self, mode: str, variants: dict[str, Path] | None = None, *, dtype: str = "float32"
    ) -> Hosted:
        words = [
            *(self._shop.python, SCRIPT, "--mode", mode, "--model", self._site.models.base),
            *("--dtype", dtype, "--threads", str(self._site.cores)),
        ]
        for name, folder in (variants or {}).items():
            words += ["--variant", f"{name}={folder}"]
        return Hosted(words, self._shop.folder / "host.log")
