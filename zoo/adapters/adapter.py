"""An adapter as a source: what peft or the `adapters` library saved, read and checked but not yet
put upon a base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from zoo.errors import BadAdapter
from zoo.sources.patterns import check_patterns
from zoo.sources.sidefiles import read_side_files
from zoo.sources.strictjson import check_json
from zoo.sources.weights import SourceTensor, read_weights

CONFIG_NAME = "adapter_config.json"
# What the weights of peft and of the `adapters` library are called.
STEM, LIBRARY_STEM = "adapter_model", "adapter"
# Where a saved head of the `adapters` library lies, and how its tensors are told from the others.
HEAD_STEM = "model_head"

_MODULE_PREFIX = "base_model.model."
Kind = TypeVar("Kind", bound=msgspec.Struct)


class _Head(msgspec.Struct, frozen=True):
    """What any adapter_config.json may say; both libraries' names."""

    peft_type: str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    model_name: str | None = None
    config: dict[str, Any] | str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as it was read. `method` is peft's name of its type, or BOTTLENECK for an adapter
    of the `adapters` library. `settings` is its whole adapter_config.json; `wanted` the base it
    names, if any."""

    source: str
    folder: Path
    method: str
    wanted: str | None
    settings: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    files: Mapping[str, bytes]

    def read(self, kind: type[Kind]) -> Kind:
        """What counts of the settings; raises BadAdapter where a value is of the wrong type."""
        return _convert(self.settings, kind, self.source)


def read_adapter(folder: Path, source: str) -> Adapter:
    """Read an adapter's folder; raises a ZooError that names what is wrong with it."""
    files = read_side_files(folder)
    try:
        settings = msgspec.convert(check_json(files[CONFIG_NAME]), dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadAdapter(f"the {CONFIG_NAME} of {source} is not valid: {error}") from error
    check_patterns(settings, source)
    head = _convert(settings, _Head, source)
    if head.task_type not in {None, "CAUSAL_LM"}:
        raise BadAdapter(
            f"{source} was made for the task {head.task_type}: only CAUSAL_LM is supported"
        )
    if head.peft_type:
        tensors = read_weights(folder, STEM)
        method, wanted = head.peft_type, head.base_model_name_or_path
    elif isinstance(head.config, dict):
        tensors = _read_library(folder)
        method, wanted = "BOTTLENECK", head.model_name or None
    else:
        raise BadAdapter(
            f"the {CONFIG_NAME} of {source} is not valid: it has neither peft's peft_type nor the "
            "config of the adapters library"
        )
    return Adapter(source, folder, method, wanted, settings, tensors, files)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter."""
    return (folder / CONFIG_NAME).is_file()


def module_path(name: str) -> str:
    """A tensor's name without what peft puts before it."""
    return name.removeprefix(_MODULE_PREFIX)


def _read_library(folder: Path) -> dict[str, SourceTensor]:
    """The tensors of a folder of the `adapters` library, those of a saved head as "model_head/"."""
    tensors = read_weights(folder, LIBRARY_STEM)
    if (folder / f"{HEAD_STEM}.safetensors").is_file():
        head = read_weights(folder, HEAD_STEM)
        tensors |= {f"{HEAD_STEM}/{name}": tensor for name, tensor in head.items()}
    return tensors


def _convert(settings: Mapping[str, Any], kind: type[Kind], source: str) -> Kind:
    try:
        return msgspec.convert(settings, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BadAdapter(f"the {CONFIG_NAME} of {source} is not valid: {error}") from error
