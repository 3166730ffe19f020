"""The whole model that transformers makes of a variant, with peft or the `adapters` library's own
lines on it: what our tokens and logits are judged by."""

import itertools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.activations import get_activation

from bench.adapters import names_of
from zoo.export import export
from zoo.manifest import Variant
from zoo.progress import Quiet

# What half a layer gives: attention its weights beside it.
Added: TypeAlias = Tensor | tuple[Tensor, ...]


def load(base: Path, adapter: Path) -> nn.Module:
    """The checkpoint at `base` with an adapter on it."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    if "peft_type" not in settings:
        return _with_bottlenecks(base, adapter, settings["config"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(whole(base), adapter).eval()


def whole(folder: Path) -> PreTrainedModel:
    """The checkpoint at `folder`, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class References:
    """The models of a zoo's variants, from what it exports into `scratch`."""

    def __init__(self, zoo: Path, scratch: Path) -> None:
        self._zoo = zoo
        self._scratch = scratch

    def of(self, variant: Variant) -> nn.Module:
        """The model of a variant, and of its base where it is an adapter."""
        folder = self._exported(variant.name)
        if not (folder / "adapter_config.json").exists():
            return whole(folder)
        assert variant.base is not None
        return load(self._exported(variant.base), folder)

    def _exported(self, name: str) -> Path:
        folder = self._scratch / name
        return folder if folder.exists() else export(self._zoo, name, folder, Quiet())


class _Bottleneck:
    """The library's own lines for one half-layer: `x` is the stream, `y` what the half adds."""

    def __init__(self, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self._parts = parts
        self._config = config
        self._x = torch.empty(0)

    def see(self, norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Before the half's norm."""
        del norm
        self._x = given[0]

    def change(self, half: nn.Module, given: object, added: Added) -> Added:
        """Behind the half: attention gives a tuple, an MLP a tensor."""
        del half, given
        if isinstance(added, tuple):
            return (self._adapted(added[0]), *added[1:])
        return self._adapted(added)

    def _adapted(self, y: Tensor) -> Tensor:
        x, parts, config = self._x, self._parts, self._config
        z = x if config["is_parallel"] else y + x if config["original_ln_before"] else y
        down = nn.functional.linear(
            z, parts["adapter_down.0.weight"].to(z), parts["adapter_down.0.bias"].to(z)
        )
        inner = get_activation(config["non_linearity"])(down)
        up = nn.functional.linear(
            inner, parts["adapter_up.weight"].to(z), parts["adapter_up.bias"].to(z)
        )
        scaling = config["scaling"]
        return y + up * (parts["scaling"].to(z) if "scaling" in parts else scaling)


def _with_bottlenecks(base: Path, adapter: Path, config: Mapping[str, Any]) -> nn.Module:
    model = whole(base)
    tensors = load_file(adapter / "adapter.safetensors")
    names = names_of(base)
    places = itertools.product(range(model.config.num_hidden_layers), names.halves.items())
    for layer, (half, (norm, module)) in places:
        start = f"{names.layers}{layer}.{half}_adapters.adapters.a."
        parts = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        if parts:
            beside = _Bottleneck(parts, config)
            stem = f"{names.layers}{layer}."
            model.get_submodule(stem + norm).register_forward_pre_hook(beside.see)
            model.get_submodule(stem + module).register_forward_hook(beside.change)
    return model
