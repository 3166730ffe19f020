"""A whole model as a source: its config read by its family, its tensors sorted into units.

Every tensor must be accounted for: one that the family does not know, one that is missing, and one
of the wrong shape are each refused by name. Nothing is written here.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from zoo.errors import BadCheckpoint, UnsupportedFamily, ZooError
from zoo.families.family import HEAD, TOKENS, Config, Design, Family, Place
from zoo.families.registry import family_of
from zoo.manifest import Spec
from zoo.sources.bounds import MAX_LAYERS, check_bounds
from zoo.sources.sidefiles import read_side_files
from zoo.sources.strictjson import check_json
from zoo.sources.weights import FLOATS, SourceTensor, read_weights

MAX_TYPE_NAME = 100
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class _ConfigHead(msgspec.Struct, frozen=True):
    """What must be known of a config.json before transformers is asked to read it."""

    model_type: str
    quantization_config: dict[str, Any] | None = None


class _Ending(msgspec.Struct, frozen=True):
    """What counts of a generation_config.json, or of a config.json without one beside it."""

    eos_token_id: int | list[int] | None = None


Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as it was read: all tensors under their own names, and the files beside them."""

    source: str
    family: Family
    design: Design
    tensors: Mapping[str, SourceTensor]
    files: Mapping[str, bytes]
    eos: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The data type that most of the weights have."""
        weight: Counter[str] = Counter()
        for tensor in self.tensors.values():
            weight[tensor.dtype] += len(tensor.data)
        return DTYPE_NAMES[weight.most_common(1)[0][0]]


@dataclass(frozen=True, slots=True)
class UnitSource:
    """A unit to be: its spec and, by role, the checkpoint's names of its tensors."""

    spec: Spec
    names: dict[str, str]


def read_checkpoint(folder: Path, source: str) -> Checkpoint:
    """Read a transformers folder; raises a ZooError that names what is wrong with it."""
    files = read_side_files(folder)
    family, design = read_config(folder, source)
    return Checkpoint(source, family, design, read_weights(folder, "model"), files, read_eos(files))


def read_config(folder: Path, source: str) -> tuple[Family, Design]:
    """The family of the folder's config.json and what the config asks of it."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadCheckpoint(f"{source} has no config.json")
    data = path.read_bytes()
    head = _decode(data, _ConfigHead, "config.json", source)
    check_bounds(check_json(data), source)
    if len(head.model_type) > MAX_TYPE_NAME:
        raise BadCheckpoint(f"the model_type that {source} names has no name's length")
    if head.quantization_config:
        raise UnsupportedFamily(
            f"{source} is quantized ({head.quantization_config.get('quant_method', 'unknown')}): "
            "give a float32, bfloat16 or float16 checkpoint"
        )
    family = family_of(head.model_type)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return family, design_of(family, config)
    except ZooError:
        raise
    except Exception as error:
        # transformers refuses configs with errors of many types
        raise BadCheckpoint(f"the config.json of {source} is not valid: {_line(error)}") from error


def design_of(family: Family, config: Config) -> Design:
    """What a family makes of a transformers config; bounds are checked before anything is built."""
    layers = config.num_hidden_layers
    if not 1 <= layers <= MAX_LAYERS:
        raise BadCheckpoint(f"a model of {layers} layers cannot be: 1 to {MAX_LAYERS} are expected")
    return family.design(config)


def read_eos(files: Mapping[str, bytes]) -> tuple[int, ...]:
    """The token ids that end an answer: generation_config.json's word, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        if name in files:
            eos = _decode(files[name], _Ending, name, "the source").eos_token_id
            if eos is not None:
                return (eos,) if isinstance(eos, int) else tuple(eos)
    return ()


def sort_units(checkpoint: Checkpoint) -> list[UnitSource]:
    """Every tensor at its place, in chain order; raises BadCheckpoint for one that has none."""
    family, design = checkpoint.family, checkpoint.design
    num_layers = len(design.layers)
    shapes = family.shapes(design)
    names: list[dict[str, str]] = [{} for _ in shapes]
    for name, tensor in checkpoint.tensors.items():
        place = family.tensor(name, num_layers)
        if place is None or place.role not in shapes[place.unit]:
            if family.is_ignored(name):
                continue
            raise BadCheckpoint(
                f"{checkpoint.source} holds {name!r}, which a {family.name} of {num_layers} layers "
                "does not have"
            )
        if place.role in names[place.unit]:
            other = names[place.unit][place.role]
            raise BadCheckpoint(f"{checkpoint.source} holds one tensor twice: {other!r}, {name!r}")
        _check_tensor(checkpoint.source, name, tensor, shapes[place.unit][place.role])
        names[place.unit][place.role] = name
    if design.tied:
        _tie(names)
    _check_complete(checkpoint, shapes, names)
    return [UnitSource(spec, roles) for spec, roles in zip(design.specs, names, strict=True)]


def _tie(names: list[dict[str, str]]) -> None:
    """Let the absent side of a tied head be the side that is there."""
    tokens, head = names[0].get(TOKENS), names[-1].get(HEAD)
    if tokens and not head:
        names[-1][HEAD] = tokens
    if head and not tokens:
        names[0][TOKENS] = head


def _check_tensor(source: str, name: str, tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise BadCheckpoint(
            f"tensor {name!r} of {source} has the shape {list(tensor.shape)}, but its config.json "
            f"asks for {list(shape)}"
        )
    if tensor.dtype not in FLOATS:
        raise BadCheckpoint(
            f"tensor {name!r} of {source} has the data type {tensor.dtype}: {', '.join(FLOATS)} "
            "are supported"
        )


def _check_complete(
    checkpoint: Checkpoint, shapes: list[dict[str, tuple[int, ...]]], names: list[dict[str, str]]
) -> None:
    missing = [
        checkpoint.family.tensor_name(Place(unit, role), len(checkpoint.design.layers))
        for unit, roles in enumerate(shapes)
        for role in roles
        if role not in names[unit]
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadCheckpoint(f"{checkpoint.source} lacks the tensor {missing[0]!r}{more}")


def _decode(data: bytes, kind: type[Kind], name: str, source: str) -> Kind:
    try:
        return msgspec.convert(check_json(data), kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"the {name} of {source} is not valid: {error}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
