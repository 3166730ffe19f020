"""LoRA and what peft builds on it: DoRA, biases inside the pieces, low-rank embeddings and heads,
trained rows of single tokens, whole modules beside them."""

import re
from dataclasses import dataclass, field

import msgspec
import numpy as np

from zoo.adapters.adapter import Adapter, module_path
from zoo.adapters.draft import Draft
from zoo.adapters.ground import Ground
from zoo.adapters.scaling import Scaling
from zoo.adapters.tokens import TOKEN_ROWS, place_token_rows
from zoo.adapters.whole import bias_values, place_whole, put_bias
from zoo.errors import BadAdapter
from zoo.families.family import TOKENS, Place
from zoo.manifest import EmbedSpec, Gain, LowRank, ObjectDigest
from zoo.sources.values import read_values
from zoo.sources.weights import is_zero

_PART = re.compile(
    r"(?P<path>.+)\.lora_(?:embedding_)?(?P<half>[AB])(?:\.default)?(?:\.(?P<kind>weight|bias))?"
)
_MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
# A DoRA starts at gain 1, up to the rounding of the norm that was saved.
_NO_GAIN = 1e-6


class LoraSettings(msgspec.Struct, frozen=True):
    """Settings of a LoRA that say where its pieces go."""

    use_dora: bool = False
    ensure_weight_tying: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


@dataclass(slots=True)
class _Module:
    """The adapter's names of what it holds for one module."""

    halves: dict[str, str] = field(default_factory=dict)
    bias: str | None = None
    magnitude: str | None = None


@dataclass(frozen=True, slots=True)
class _Delta:
    """Low-rank pieces at their place."""

    place: Place
    path: str
    a: str
    b: str
    rank: int
    scale: float


def place_lora(adapter: Adapter, ground: Ground, draft: Draft) -> None:
    """Put every tensor of a LoRA on its base; raises BadAdapter for the first without a place."""
    settings = adapter.read(LoraSettings)
    modules: dict[str, _Module] = {}
    for name in adapter.tensors:
        path = module_path(name)
        part, magnitude = _PART.fullmatch(path), _MAGNITUDE.fullmatch(path)
        if part and part["kind"] == "bias":
            modules.setdefault(part["path"], _Module()).bias = name
        elif part:
            modules.setdefault(part["path"], _Module()).halves[part["half"]] = name
        elif magnitude:
            modules.setdefault(magnitude["path"], _Module()).magnitude = name
        elif path.endswith(TOKEN_ROWS):
            place_token_rows(adapter, ground, draft, name, settings.trainable_token_indices)
        elif "lora_" in path:
            raise BadAdapter(f"{adapter.source} holds {name!r}, which no LoRA of peft has")
        else:
            place_whole(adapter, ground, draft, name)
    for path, module in modules.items():
        _place_module(adapter, ground, draft, path, module)


def _place_module(
    adapter: Adapter, ground: Ground, draft: Draft, path: str, module: _Module
) -> None:
    delta = _read_delta(adapter, ground, path, module)
    if module.magnitude is not None:
        _place_dora(adapter, ground, draft, delta, module.magnitude)
    elif not _is_zero(adapter, delta):
        draft.attach(delta.place.unit, _low_rank(ground, delta))
        if delta.place.role == "tokens" and _follows(adapter, ground):
            _place_tied(adapter, ground, draft, delta)
    if module.bias is not None and not is_zero(adapter.tensors[module.bias]):
        own = bias_values(adapter, ground, draft, delta.place)
        added = np.float32(delta.scale) * read_values(adapter.tensors[module.bias])
        name = draft.derive(f"{path}.bias", added if own is None else own + added)
        put_bias(draft, delta.place.unit, delta.place.role, name)


def _read_delta(adapter: Adapter, ground: Ground, path: str, module: _Module) -> _Delta:
    if len(module.halves) != 2:
        found = [*module.halves.values(), module.bias, module.magnitude]
        present = next(name for name in found if name is not None)
        raise BadAdapter(f"{adapter.source} holds {present!r} without its other half")
    place = ground.module(adapter.source, path)
    if len(ground.shapes[place.unit][f"{place.role}.weight"]) != 2:
        raise ground.stranger(adapter.source, path)
    rank, scale = adapter.read(Scaling).of(path)
    wide, out = ground.widths(place)
    expected = {"A": (rank, wide), "B": (out, rank)}
    for half, shape in expected.items():
        name = module.halves[half]
        found = adapter.tensors[name].shape
        if found != shape:
            wanted = f"{list(shape)} at rank {rank}"
            raise ground.misfit(adapter.source, name, found, wanted)
    return _Delta(place, path, module.halves["A"], module.halves["B"], rank, scale)


def _low_rank(ground: Ground, delta: _Delta) -> LowRank:
    """The piece itself; a scaled embedding scales its low-rank rows too."""
    spec = ground.specs[delta.place.unit]
    times = spec.scale if isinstance(spec, EmbedSpec) else 1.0
    a, b = ObjectDigest(delta.a), ObjectDigest(delta.b)
    return LowRank(delta.place.role, a, b, delta.rank, delta.scale * times)


def _place_tied(adapter: Adapter, ground: Ground, draft: Draft, delta: _Delta) -> None:
    """The same change of a table that the head reads too: there its halves lie the other way."""
    a = draft.derive(f"{delta.path}.head_a", read_values(adapter.tensors[delta.b]).T)
    b = draft.derive(f"{delta.path}.head_b", read_values(adapter.tensors[delta.a]).T)
    draft.attach(ground.head, LowRank("head", a, b, delta.rank, delta.scale))


def _follows(adapter: Adapter, ground: Ground) -> bool:
    return adapter.read(LoraSettings).ensure_weight_tying and ground.is_tied


def _place_dora(
    adapter: Adapter, ground: Ground, draft: Draft, delta: _Delta, magnitude: str
) -> None:
    """y = m / |W + scale B A| * (W x + scale B A x), the norm over each output's weights."""
    low = read_values(adapter.tensors[delta.b]) @ read_values(adapter.tensors[delta.a])
    base = ground.matrix(delta.place)
    tuned = (base.T if delta.place.role == "tokens" else base) + np.float32(delta.scale) * low
    wanted = read_values(adapter.tensors[magnitude]).reshape(-1)
    if wanted.shape != tuned.shape[:1]:
        found = adapter.tensors[magnitude].shape
        raise ground.misfit(adapter.source, magnitude, found, f"[{tuned.shape[0]}]")
    gain = wanted / np.linalg.norm(tuned, axis=1)
    silent = _is_zero(adapter, delta)
    if silent and np.abs(gain - 1).max() < _NO_GAIN:
        return
    if delta.place.role == "tokens":
        # A gain on the embedding is a gain on each of its columns: the table itself is kept.
        table = draft.derive(f"{delta.path}.weight", (gain[:, None] * tuned).T)
        draft.replace(delta.place.unit, TOKENS, table)
        return
    if not silent:
        draft.attach(delta.place.unit, _low_rank(ground, delta))
    vector = draft.derive(f"{delta.path}.gain", gain)
    draft.attach(delta.place.unit, Gain(delta.place.role, vector))


def _is_zero(adapter: Adapter, delta: _Delta) -> bool:
    return is_zero(adapter.tensors[delta.a]) or is_zero(adapter.tensors[delta.b])
