"""A PEFT LoRA adapter as a source: its config checked, each of its tensors put on a unit of its
base.

What peft would do with a feature must be done exactly or be refused: every setting that changes
the arithmetic is either computed here (rank, alpha, their patterns, rank-stabilized scaling, whole
modules) or named in a refusal.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from zoo.errors import BadAdapter
from zoo.families.family import HEAD, TOKENS, Family
from zoo.manifest import AttentionSpec, MlpSpec, ParallelSpec, Spec
from zoo.sidefiles import read_side_files
from zoo.weights import FLOATS, SourceTensor, is_zero, read_weights

CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_([AB])(\.default)?\.weight")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save\.default|modules_to_save)(?=\.)")
_LINEAR_ROLES = {"q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"}

# Settings of peft's LoraConfig that change what is computed and are not computed here.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases inside the low-rank pieces",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trainable single tokens",
    "target_parameters": "low-rank pieces on bare parameters",
    "alora_invocation_tokens": "activation by invocation tokens (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron layers",
}
# Initializations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, ...) shift it.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterConfig(msgspec.Struct, frozen=True):
    """What counts of an adapter_config.json; `_refuse` looks at the rest."""

    peft_type: str
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    base_model_name_or_path: str | None = None
    task_type: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as it was read."""

    source: str
    config: AdapterConfig
    tensors: Mapping[str, SourceTensor]
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Ground:
    """What an adapter is put upon: its base's family, and spec and tensor shapes of each unit."""

    name: str
    family: Family
    specs: tuple[Spec, ...]
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]

    @property
    def num_layers(self) -> int:
        """Transformer layers of the base."""
        return self.family.num_layers(len(self.specs))


@dataclass(frozen=True, slots=True)
class Target:
    """Low-rank pieces of one linear layer: the adapter's names of A [rank, in], B [out, rank]."""

    role: str
    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Fit:
    """An adapter, placed: per unit its low-rank targets, and whole tensors by role -> adapter's
    name.

    `vocabulary` is what embedding and head have once the whole tensors took their place.
    """

    vocabulary: int
    targets: dict[int, list[Target]] = field(default_factory=dict)
    whole: dict[int, dict[str, str]] = field(default_factory=dict)


def read_adapter(folder: Path, source: str) -> Adapter:
    """Read a PEFT folder; raises a ZooError that names what is wrong with it or not supported."""
    files = read_side_files(folder)
    try:
        settings = msgspec.json.decode(files[CONFIG_NAME], type=dict[str, Any])
        config = msgspec.convert(settings, AdapterConfig, strict=False)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise BadAdapter(f"the {CONFIG_NAME} of {source} is not valid: {error}") from error
    _refuse(source, config, settings)
    adapter = Adapter(source, config, read_weights(folder, "adapter_model"), files)
    for name, tensor in adapter.tensors.items():
        if tensor.dtype not in FLOATS:
            raise BadAdapter(f"tensor {name!r} of {source} has the data type {tensor.dtype}")
    return adapter


def fit(adapter: Adapter, ground: Ground) -> Fit:
    """Put every tensor of the adapter on its base; raises BadAdapter for the first that has no
    place."""
    fitted = Fit(vocabulary=0)
    pairs: dict[str, dict[str, str]] = {}
    for name in adapter.tensors:
        path = name.removeprefix(_PREFIX)
        low_rank = _LORA.fullmatch(path)
        if low_rank:
            pairs.setdefault(low_rank[1], {})[low_rank[2]] = name
        elif "lora_" in path:
            raise BadAdapter(
                f"{adapter.source} holds {name!r}: low-rank pieces are supported on attention "
                "and MLP projections only"
            )
        else:
            _place_whole(adapter, ground, fitted, name, _WRAPPERS.sub("", path))
    for path, pair in pairs.items():
        _place_pair(adapter, ground, fitted, path, pair)
    return replace(fitted, vocabulary=_vocabulary(adapter, ground, fitted))


def _refuse(source: str, config: AdapterConfig, settings: dict[str, Any]) -> None:
    if config.peft_type != "LORA":
        raise BadAdapter(
            f"{source} is an adapter of type {config.peft_type!r}: this version supports LORA"
        )
    if config.task_type not in {None, "CAUSAL_LM"}:
        raise BadAdapter(
            f"{source} was made for the task {config.task_type}: only CAUSAL_LM is supported"
        )
    for key, feature in _REFUSED.items():
        if settings.get(key):
            raise BadAdapter(
                f"{source} uses {feature} ({key}), which this version does not support"
            )
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise BadAdapter(
            f"{source} was started with init_lora_weights={start!r}, which shifts the base's "
            "weights: convert it to a plain LoRA with peft first"
        )
    if settings.get("ensure_weight_tying") and settings.get("modules_to_save"):
        raise BadAdapter(
            f"{source} ties the modules it saves (ensure_weight_tying), which this version does "
            "not support"
        )


def _place_pair(
    adapter: Adapter, ground: Ground, fitted: Fit, path: str, pair: dict[str, str]
) -> None:
    if len(pair) != 2:
        (present,) = pair.values()
        raise BadAdapter(f"{adapter.source} holds {present!r} without its other half")
    place = ground.family.module(path, ground.num_layers)
    if place is None:
        raise _stranger(adapter, ground, path)
    if place.role not in _LINEAR_ROLES:
        raise BadAdapter(
            f"{adapter.source} has low-rank pieces on {path!r}: they are supported on attention "
            "and MLP projections only"
        )
    rank, scale = _scaling(adapter.config, path)
    wide, out = _widths(ground, place.unit, place.role)
    expected = {"A": (rank, wide), "B": (out, rank)}
    for half, shape in expected.items():
        found = adapter.tensors[pair[half]].shape
        if found != shape:
            raise BadAdapter(
                f"tensor {pair[half]!r} of {adapter.source} has the shape {list(found)}, but rank "
                f"{rank} on {ground.name!r} asks for {list(shape)}: was it made for another base?"
            )
    if is_zero(adapter.tensors[pair["A"]]) or is_zero(adapter.tensors[pair["B"]]):
        return
    target = Target(place.role, pair["A"], pair["B"], rank, scale)
    fitted.targets.setdefault(place.unit, []).append(target)


def _place_whole(adapter: Adapter, ground: Ground, fitted: Fit, name: str, path: str) -> None:
    place = ground.family.tensor(path, ground.num_layers)
    known = ground.shapes[place.unit].get(place.role) if place else None
    if place is None or known is None:
        raise _stranger(adapter, ground, path)
    shape = adapter.tensors[name].shape
    # An embedding or a head may have gained tokens; everything else keeps its shape.
    fixed = 1 if place.role in {TOKENS, HEAD} else 0
    if len(shape) != len(known) or shape[fixed:] != known[fixed:]:
        raise BadAdapter(
            f"tensor {name!r} of {adapter.source} has the shape {list(shape)}, but "
            f"{ground.name!r} has {list(known)} there: was it made for another base?"
        )
    fitted.whole.setdefault(place.unit, {})[place.role] = name


def _scaling(config: AdapterConfig, path: str) -> tuple[int, float]:
    """Rank and scale of a module, patterns first, matched as peft matches them."""
    rank = _by_pattern(config.rank_pattern, path, config.r)
    alpha = _by_pattern(config.alpha_pattern, path, config.lora_alpha)
    if rank < 1:
        raise BadAdapter(f"the rank of {path!r} is {rank}: it must be at least 1")
    return int(rank), alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
    except re.error as error:
        raise BadAdapter(f"a rank or alpha pattern of the adapter is not valid: {error}") from error
    return default


def _widths(ground: Ground, unit: int, role: str) -> tuple[int, int]:
    """(in, out) of a linear layer of the base."""
    spec, shape = ground.specs[unit], ground.shapes[unit][f"{role}.weight"]
    if isinstance(spec, AttentionSpec | MlpSpec | ParallelSpec) and spec.transposed:
        return shape[0], shape[1]
    return shape[1], shape[0]


def _vocabulary(adapter: Adapter, ground: Ground, fitted: Fit) -> int:
    """Tokens of embedding and head, which must still agree."""
    sizes: list[int] = []
    for unit, role in ((0, TOKENS), (len(ground.specs) - 1, HEAD)):
        name = fitted.whole.get(unit, {}).get(role)
        shape = adapter.tensors[name].shape if name else ground.shapes[unit][role]
        sizes.append(shape[0])
    if sizes[0] != sizes[1]:
        raise BadAdapter(
            f"{adapter.source} would leave an embedding of {sizes[0]} tokens and a head of "
            f"{sizes[1]}: save both in modules_to_save"
        )
    return sizes[0]


def _stranger(adapter: Adapter, ground: Ground, path: str) -> BadAdapter:
    return BadAdapter(
        f"{adapter.source} changes {path!r}, which {ground.name!r} (a {ground.family.name} of "
        f"{ground.num_layers} layers) does not have: was it made for another base?"
    )


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (folder / CONFIG_NAME).is_file()
