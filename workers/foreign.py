"""Units that are whole layers of transformers' own classes, run over the rows of a stage.

Their linear layers are ours (packed, shared by digest, patched per row) and so is their attention,
which runs over pages; norms and what else they compute stay theirs. What a model hands its layers
beside their rows, rotary tables mostly, its outline says once per wave.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ext.ops import Attention, Geometry, Linear, Matrix, Norm, Ops, Patch, Place
from workers.chains import UnservableChain
from zoo.families.attending import SERVED, attending
from zoo.families.canonical import config_of
from zoo.families.outline import Call, Outline, hidden_of, put
from zoo.manifest import ForeignSpec, ObjectDigest, Unit

# Sets of rows that meet in a wave, whose calls are remembered.
_KNOWN = 8


class Weights(Protocol):
    """Where a layer's tensors come from, in the kernels' form."""

    @property
    def ops(self) -> Ops: ...

    def weight(self, name: str, digest: ObjectDigest, transposed: bool) -> Matrix: ...

    def vector(self, digest: ObjectDigest, offset: float) -> Tensor: ...


class Guide:
    """A model's outline as a worker uses it: templates of its layers, and what it hands them."""

    def __init__(self, config: str, device: str) -> None:
        self.outline = Outline(config_of(config), SERVED, device)
        self._device = device
        self._lock = threading.Lock()
        self._known: OrderedDict[int, tuple[Geometry, list[Call]]] = OrderedDict()

    def layer(self, index: int) -> nn.Module:
        """A layer without weights, for one unit. Loading threads call it."""
        with self._lock:
            return self.outline.layer(index)

    def call(self, geometry: Geometry, index: int) -> Call:
        """What layer `index` is handed for these rows."""
        known = self._known.get(id(geometry))
        if known is None:
            positions = torch.from_numpy(_positions(geometry)).to(self._device)
            with self._lock:
                known = self._known[id(geometry)] = (geometry, self.outline.calls(positions))
            if len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        return known[1][index]


@dataclass(frozen=True, slots=True)
class ForeignUnit:
    """A layer of transformers; `linears` are ours, by their path within it. `copies`: how often the
    layer gives each KV head."""

    layer: nn.Module
    linears: Mapping[str, Linear]
    attention: Attention
    guide: Guide
    index: int
    copies: int

    @property
    def norms(self) -> dict[str, Norm]:
        """Its norms are its own: nothing takes their place."""
        return {}

    def with_norms(self, norms: Mapping[str, Norm]) -> "ForeignUnit":
        """Itself: see `norms`."""
        assert not norms
        return self


@dataclass(frozen=True, slots=True)
class _Frame:
    """What the parts of a layer need while it runs: they are called from transformers' code."""

    unit: ForeignUnit
    patches: Mapping[str, Patch]
    ops: Ops
    at: Place

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _mask: Tensor | None,
        _scale: float | None,
        _extras: dict[str, Any],
    ) -> Tensor:
        """See `zoo.families.attending.Attend`; scale and window are known since the import."""
        heads, rows, copies = q.shape[1], q.shape[2], self.unit.copies
        if copies > 1:
            k, v = k[:, ::copies], v[:, ::copies]
        q, k, v = (t[0].transpose(0, 1).reshape(rows, -1) for t in (q, k, v))
        y = self.ops.attend(q, k, v, self.unit.attention, self.at)
        return y.view(rows, heads, -1).transpose(0, 1)[None]


_frame: ContextVar[_Frame] = ContextVar("frame")


class _Packed(nn.Module):
    """One of our linear layers where a layer of transformers had its own. `weight` says the data
    type alone."""

    def __init__(self, role: str, linear: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.weight.in_features, linear.weight.out_features
        self.weight = torch.empty(0)
        self.bias = linear.bias
        self._role, self._linear = role, linear

    def forward(self, x: Tensor) -> Tensor:
        frame = _frame.get()
        rows = x.reshape(-1, self.in_features).contiguous()
        patch = frame.patches.get(self._role)
        (y,) = frame.ops.project(rows, None, (self._linear,), (patch,))
        return y.view(*x.shape[:-1], -1)


def build_foreign(unit: Unit, spec: ForeignSpec, weights: Weights) -> ForeignUnit:
    """Make a unit resident; raises UnservableChain where the transformers installed here builds
    another layer than the one that was imported."""
    guide = _guide(spec.config, str(weights.ops.device))
    layer = guide.layer(spec.layer)
    linears: dict[str, Linear] = {}
    named = {name for name, _ in layer.named_parameters()}
    if named != set(unit.tensors):
        raise UnservableChain(
            f"layer {spec.layer} of a {guide.outline.name} has other tensors in the transformers "
            "installed here than when it was added: add the model anew"
        )
    for path in spec.linears:
        bias = unit.tensors.get(f"{path}.bias")
        linears[path] = Linear(
            weights.weight(f"{path}.weight", unit.tensors[f"{path}.weight"], False),
            None if bias is None else weights.vector(bias, 0.0),
        )
        put(layer, path, _Packed(path, linears[path]))
    for name, _ in list(layer.named_parameters()):
        put(layer, name, weights.vector(unit.tensors[name], 0.0))
    attention = Attention(scale=spec.scale, window=spec.window)
    return ForeignUnit(layer, linears, attention, guide, spec.layer, spec.copies)


def foreign(
    unit: ForeignUnit, x: Tensor, patches: Mapping[str, Patch], ops: Ops, at: Place
) -> None:
    """x becomes what the layer makes of it, in place; x [rows, hidden]."""
    call = unit.guide.call(at.plan.geometry, unit.index)
    frame = _Frame(unit, patches, ops, at)
    token = _frame.set(frame)
    try:
        with torch.no_grad(), attending(frame.attend, unit.guide.outline.uses_registry):
            x.copy_(hidden_of(unit.layer(x[None], *call.args, **call.kwargs))[0])
    finally:
        _frame.reset(token)


@lru_cache(maxsize=8)
def _guide(config: str, device: str) -> Guide:
    try:
        return Guide(config, device)
    except Exception as error:
        # another version of transformers may refuse in many ways what the importing one built
        reason = " ".join(str(error).split())
        raise UnservableChain(
            f"the transformers installed here cannot build its layers: {reason}"
        ) from error


def _positions(geometry: Geometry) -> np.ndarray:
    """The position of every row, int64."""
    starts, counts = geometry.starts[:-1], np.diff(geometry.starts)
    first = np.repeat(geometry.contexts - counts - starts, counts)
    return (np.arange(geometry.num_rows) + first).astype(np.int64)
