"""Bottleneck adapters of the `adapters` library (AdapterHub): a small MLP behind or beside the
output of each half-layer.

The library computes, with y what a half-layer adds to the stream x,
serial: y' = scale * up(act(down(z))) + r, z and r being y or x + y as its settings say, and adds x
where `original_ln_after` asks for it; parallel: the same beside y, reading x.
"""

import re
from typing import Any, Literal

import msgspec
import numpy as np

from zoo.adapters.adapter import HEAD_STEM, Adapter
from zoo.adapters.draft import Draft
from zoo.adapters.ground import Ground
from zoo.adapters.whole import put_tensor
from zoo.errors import BadAdapter
from zoo.manifest import Bottleneck, ObjectDigest
from zoo.sources.values import read_values

_PART = re.compile(
    r"(?P<layer>.+)\.(?P<where>attention|output)_adapters\.adapters\.[^.]+\."
    r"(?P<part>adapter_down\.0\.weight|adapter_down\.0\.bias|adapter_up\.weight|adapter_up\.bias|"
    r"scaling)"
)
_ROLES = {"attention": "o", "output": "down"}
_ACTIVATIONS: dict[str, Literal["relu", "silu", "gelu", "gelu_tanh", "tanh", "none"]] = {
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "tanh": "tanh",
    "linear": "none",
}
_REFUSED = {
    "ln_before": "a norm of its own before the bottleneck",
    "ln_after": "a norm of its own behind the bottleneck",
    "use_gating": "gates",
    "phm_layer": "hypercomplex layers (Compacter)",
    "inv_adapter": "an invertible adapter on the embedding",
}


class BottleneckSettings(msgspec.Struct, frozen=True):
    """The `config` of a bottleneck adapter, as far as it changes what is computed."""

    non_linearity: str
    is_parallel: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    scaling: float | str = 1.0

    @property
    def reads(self) -> Literal["output", "stream", "input"] | None:
        """What the bottleneck reads; None where the stream would be added twice or not at all."""
        if self.is_parallel:
            return None if self.original_ln_after is False else "input"
        holds_stream = self.original_ln_before and self.residual_before_ln is False
        if holds_stream == self.original_ln_after or isinstance(self.residual_before_ln, str):
            return None
        return "stream" if self.original_ln_before else "output"


Parts = dict[tuple[str, str], dict[str, str]]


def place_bottleneck(adapter: Adapter, ground: Ground, draft: Draft) -> None:
    """Put every bottleneck on its half-layer; raises BadAdapter for the first without a place."""
    settings, found = sort_parts(adapter)
    for name in adapter.tensors:
        if name.startswith(f"{HEAD_STEM}/"):
            _place_head(adapter, ground, draft, name)
    for at, parts in found.items():
        _place(adapter, ground, draft, at, (settings, parts))


def sort_parts(adapter: Adapter) -> tuple[BottleneckSettings, Parts]:
    """Settings, and the names of each bottleneck's tensors by layer and half."""
    settings = _settings(adapter)
    found: Parts = {}
    for name in adapter.tensors:
        part = _PART.fullmatch(name)
        if part:
            found.setdefault((part["layer"], part["where"]), {})[part["part"]] = name
        elif not name.startswith(f"{HEAD_STEM}/"):
            raise BadAdapter(
                f"{adapter.source} holds {name!r}, which no supported bottleneck adapter has"
            )
    return settings, found


def _settings(adapter: Adapter) -> BottleneckSettings:
    config: dict[str, Any] = adapter.settings["config"]
    if config.get("architecture") or "non_linearity" not in config:
        kind = config.get("architecture") or "unknown"
        raise BadAdapter(
            f"{adapter.source} is of the adapters library's kind {kind!r}: only its bottleneck "
            "adapters are supported"
        )
    for key, feature in _REFUSED.items():
        if config.get(key):
            raise BadAdapter(f"{adapter.source} uses {feature} ({key}), which is not supported")
    try:
        settings = msgspec.convert(config, BottleneckSettings, strict=False)
    except msgspec.ValidationError as error:
        raise BadAdapter(f"the config of {adapter.source} is not valid: {error}") from error
    if settings.non_linearity.lower() not in _ACTIVATIONS:
        raise BadAdapter(
            f"{adapter.source} uses the activation {settings.non_linearity!r}: supported are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    if settings.reads is None:
        raise BadAdapter(
            f"{adapter.source} adds the stream twice or not at all (original_ln_before, "
            "original_ln_after, residual_before_ln), which is not supported"
        )
    return settings


def _place(
    adapter: Adapter,
    ground: Ground,
    draft: Draft,
    at: tuple[str, str],
    what: tuple[BottleneckSettings, dict[str, str]],
) -> None:
    (layer, where), (settings, parts) = at, what
    role = _ROLES[where]
    table = ground.family.attention if where == "attention" else ground.family.mlp
    place = ground.module(adapter.source, f"{layer}.{table[role]}")
    missing = {"adapter_down.0.weight", "adapter_up.weight"} - parts.keys()
    if missing:
        present = next(iter(parts.values()))
        raise BadAdapter(f"{adapter.source} holds {present!r} without its {missing.pop()}")
    down, up = parts["adapter_down.0.weight"], parts["adapter_up.weight"]
    size = (*adapter.tensors[down].shape, 0)[0]
    for name, shape in ((down, (size, ground.hidden)), (up, (ground.hidden, size))):
        if adapter.tensors[name].shape != shape:
            raise ground.misfit(adapter.source, name, adapter.tensors[name].shape, str(list(shape)))
    reads = settings.reads
    assert reads is not None, "`_settings` has seen it"
    scale, ups = _scaled(adapter, draft, settings, parts)
    inner = parts.get("adapter_down.0.bias")
    draft.attach(
        place.unit,
        Bottleneck(
            role=place.role,
            down=ObjectDigest(down),
            up=ups[0],
            activation=_ACTIVATIONS[settings.non_linearity.lower()],
            reads=reads,
            scale=scale,
            down_bias=None if inner is None else ObjectDigest(inner),
            up_bias=ups[1],
        ),
    )


def _scaled(
    adapter: Adapter, draft: Draft, settings: BottleneckSettings, parts: dict[str, str]
) -> tuple[float, tuple[ObjectDigest, ObjectDigest | None]]:
    """The scale, and up's weight and bias; a learned scale per channel is multiplied into them."""
    weight, bias = parts["adapter_up.weight"], parts.get("adapter_up.bias")
    plain = ObjectDigest(weight), None if bias is None else ObjectDigest(bias)
    if not isinstance(settings.scaling, str):
        return settings.scaling, plain
    if "scaling" not in parts:
        raise BadAdapter(f"{adapter.source} learned its scales and does not hold them")
    scales = read_values(adapter.tensors[parts["scaling"]]).reshape(-1)
    if len(scales) == 1:
        return float(scales[0]), plain
    up = draft.derive(f"{weight}.scaled", scales[:, None] * read_values(adapter.tensors[weight]))
    if bias is None:
        return 1.0, (up, None)
    scaled = np.multiply(scales, read_values(adapter.tensors[bias]))
    return 1.0, (up, draft.derive(f"{bias}.scaled", scaled))


def _place_head(adapter: Adapter, ground: Ground, draft: Draft, name: str) -> None:
    """A saved head: what the base has already leaves no trace."""
    path = name.removeprefix(f"{HEAD_STEM}/")
    place = ground.family.tensor(path, ground.num_layers)
    if place is None or place.unit != ground.head:
        raise ground.stranger(adapter.source, path)
    tensor = adapter.tensors[name]
    known = ground.shapes[place.unit].get(place.role)
    if tensor.shape != known:
        raise ground.misfit(adapter.source, name, tensor.shape, str(list(known or ())))
    put_tensor(ground, draft, place, name, tensor)
