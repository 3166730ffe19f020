"""The formula of bottleneck adapters as hooks on transformers' own modules: what the `adapters`
library makes of a model, for the golden check."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import get_activation

from zoo.adapters.adapter import HEAD_STEM, Adapter
from zoo.adapters.bottleneck import BottleneckSettings, sort_parts
from zoo.adapters.ground import Ground
from zoo.sources.values import read_values


class _Detour(nn.Module):
    """One bottleneck: sees the stream before the half-layer's norm, changes what it adds."""

    def __init__(self, parts: dict[str, Tensor], settings: BottleneckSettings) -> None:
        super().__init__()
        self._parts = parts
        self._settings = settings
        self._act = get_activation(settings.non_linearity.lower())
        self._stream = torch.empty(0)

    def see(self, norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Before the half-layer's norm: keep the stream."""
        del norm
        self._stream = given[0]

    def change(self, half: nn.Module, given: tuple[Any, ...], added: Any) -> Any:  # noqa: ANN401
        """Behind the half-layer: attention gives a tuple, an MLP a tensor."""
        del half, given
        first = added[0] if isinstance(added, tuple) else added
        changed = first + self._bottleneck(first)
        return (changed, *added[1:]) if isinstance(added, tuple) else changed

    def _bottleneck(self, added: Tensor) -> Tensor:
        if self._settings.is_parallel:
            read = self._stream
        else:
            read = added + self._stream if self._settings.original_ln_before else added
        inner = self._act(self._linear("adapter_down.0", read))
        scale = self._settings.scaling
        factor = self._parts["scaling"].to(added.dtype) if isinstance(scale, str) else scale
        return factor * self._linear("adapter_up", inner)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        bias = self._parts.get(f"{name}.bias")
        # The golden check also runs the model in float64.
        return nn.functional.linear(
            x,
            self._parts[f"{name}.weight"].to(x.dtype),
            None if bias is None else bias.to(x.dtype),
        )


def hook_bottlenecks(model: nn.Module, adapter: Adapter, ground: Ground) -> None:
    """Put the adapter on the model, in place."""
    settings, found = sort_parts(adapter)
    for (layer, where), names in found.items():
        family = ground.family
        table = family.attention if where == "attention" else family.mlp
        role = "o" if where == "attention" else "down"
        parts = {
            part: torch.from_numpy(read_values(adapter.tensors[name]))
            for part, name in names.items()
        }
        detour = _Detour(parts, settings)
        half = table[role].rpartition(".")[0]
        model.get_submodule(f"{layer}.{table['norm']}").register_forward_pre_hook(detour.see)
        model.get_submodule(f"{layer}.{half}").register_forward_hook(detour.change)
    for name, tensor in adapter.tensors.items():
        if name.startswith(f"{HEAD_STEM}/"):
            module, _, part = name.removeprefix(f"{HEAD_STEM}/").rpartition(".")
            own = torch.from_numpy(read_values(tensor))
            setattr(model.get_submodule(module), part, nn.Parameter(own, requires_grad=False))
