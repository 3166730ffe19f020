"""What a variant that is not in the zoo yet would add to memory: for a kind, or for a source.

A kind is weighed on the shapes of a base in the catalog; a source is read and hashed, and what the
zoo has already costs nothing.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from zoo.adding.options import AddOptions
from zoo.catalog import Catalog
from zoo.errors import BadSource, UnsupportedOption
from zoo.keeping.fit import Prospect
from zoo.keeping.reach import Reach
from zoo.manifest import AttentionSpec, EmbedSpec, MlpSpec, ParallelSpec, Unit, attention_of
from zoo.progress import Progress
from zoo.store import ObjectInfo, tensor_digest

KINDS = "full, delta, last:K, lora:RANK, ia3, bias, norm, prefix:LENGTH, prompt:LENGTH"

_KIND = re.compile(r"([a-z0-9]+)(?::(\d{1,6}))?")


@dataclass(frozen=True, slots=True)
class _Ground:
    """A base's units, each with the shapes of its tensors; `width` are the bytes of an element."""

    units: tuple[Unit, ...]
    infos: tuple[Mapping[str, ObjectInfo], ...]
    width: int

    def linears(self) -> Iterator[tuple[int, int]]:
        """Inputs and outputs of every linear layer of attention and MLP."""
        for unit, infos in zip(self.units, self.infos, strict=True):
            if isinstance(unit.spec, AttentionSpec | MlpSpec | ParallelSpec):
                matrices = (info.shape for info in infos.values() if len(info.shape) == 2)
                yield from ((b, a) if unit.spec.transposed else (a, b) for b, a in matrices)

    def norms(self) -> Iterator[int]:
        """Elements of every norm."""
        for infos in self.infos:
            for role, info in infos.items():
                if role.split(".")[0].endswith("norm"):
                    yield math.prod(info.shape)

    def layers(self, count: int) -> int:
        """Bytes of the last layers, without the head."""
        inner = list(zip(self.units, self.infos, strict=True))[1:-1]
        per_layer = 1 if isinstance(inner[0][0].spec, ParallelSpec) else 2
        last = inner[-count * per_layer :] if count else []
        return sum(info.nbytes for _, infos in last for info in infos.values())

    def whole(self) -> int:
        """Bytes of all distinct tensors."""
        sizes = {
            digest: infos[role].nbytes
            for unit, infos in zip(self.units, self.infos, strict=True)
            for role, digest in unit.tensors.items()
        }
        return sum(sizes.values())

    def per_position(self) -> int:
        """Elements of keys and values that one position takes."""
        found = (attention_of(unit.spec) for unit in self.units)
        return sum(2 * one.kv_heads * one.head_dim for one in found if one)

    def hidden(self) -> int:
        """Width of the stream."""
        spec = self.units[0].spec
        return spec.hidden if isinstance(spec, EmbedSpec) else 0

    def gains(self) -> int:
        """Elements of IA3's vectors on keys, values and what the MLP's output layer reads."""
        found = 0
        for unit in self.units:
            attention = attention_of(unit.spec)
            found += 2 * attention.kv_heads * attention.head_dim if attention else 0
            mlp = unit.spec.mlp if isinstance(unit.spec, ParallelSpec) else unit.spec
            found += mlp.intermediate if isinstance(mlp, MlpSpec) else 0
        return found


_Weigher = Callable[[_Ground, int], int]
_WEIGHERS: dict[str, tuple[bool, _Weigher]] = {
    "full": (False, lambda ground, _: ground.whole()),
    "delta": (False, lambda ground, _: int(AddOptions().delta_budget * ground.whole())),
    "last": (True, lambda ground, count: ground.layers(count)),
    "lora": (True, lambda ground, rank: rank * ground.width * sum(map(sum, ground.linears()))),
    "ia3": (False, lambda ground, _: ground.width * ground.gains()),
    "bias": (False, lambda ground, _: ground.width * sum(out for _, out in ground.linears())),
    "norm": (False, lambda ground, _: ground.width * sum(ground.norms())),
    "prefix": (True, lambda ground, length: length * ground.width * ground.per_position()),
    "prompt": (True, lambda ground, length: length * ground.width * ground.hidden()),
}


def prospect(root: Path, what: str, base: str | None, progress: Progress) -> Prospect:
    """What a variant of that kind upon `base`, or from that source, would add; raises a
    ZooError."""
    match = _KIND.fullmatch(what)
    if match and match[1] in _WEIGHERS and not Path(what).exists():
        has_number, weigh = _WEIGHERS[match[1]]
        if has_number != (match[2] is not None):
            raise UnsupportedOption(f"--add {what!r} is no kind: use one of {KINDS}")
        return Prospect(what, weigh(_ground(root, base), int(match[2] or 0)))
    return Prospect(what, _of_source(root, what, progress))


def _ground(root: Path, base: str | None) -> _Ground:
    with Catalog(root).snapshot() as catalog:
        bases = [variant.name for variant in catalog.variants() if variant.kind == "base"]
        if base is None and len(bases) != 1:
            there = f"one of {', '.join(bases)}" if bases else "one that the zoo has"
            raise UnsupportedOption(
                f"say upon which base a new variant would stand: --base, {there}"
            )
        chain = Reach(catalog).footprint(catalog.variant(base or bases[0])).chain
        infos = catalog.objects()
        units = tuple(catalog.unit(unit) for unit in chain.units)
    shapes = tuple({role: infos[digest] for role, digest in unit.tensors.items()} for unit in units)
    widest = max((info for table in shapes for info in table.values()), key=lambda i: i.nbytes)
    return _Ground(units, shapes, widest.nbytes // max(math.prod(widest.shape), 1))


def _of_source(root: Path, source: str, progress: Progress) -> int:
    """Bytes of a source's tensors that the zoo does not have."""
    # Reads weights, so it brings numpy; kinds need none.
    from zoo.adding.source import read_source

    try:
        tensors = read_source(source, "float32").tensors
    except BadSource as error:
        raise BadSource(f"--add takes a source or a kind ({KINDS}): {error}") from error
    with Catalog(root).snapshot() as catalog:
        known = catalog.objects()
    new: dict[str, int] = {}
    for tensor in progress.track(list(tensors.values()), f"hashing {source}"):
        digest = tensor_digest(tensor.dtype, tensor.shape, tensor.data)
        if digest not in known:
            new[digest] = len(tensor.data)
    return sum(new.values())
