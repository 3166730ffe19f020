"""What implementations that keep their weights as torch tensors do alike: the parts of
`ext.ops.Ops` that are a few torch calls on any device."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ext.ops import Activation, Detour, Linear, Norm, Patch, RowGain

CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "none": lambda x: x,
}


@dataclass(eq=False, slots=True)
class DenseMatrix:
    """A resident weight as a tensor [out, in]; the implementation says in which precision."""

    data: Tensor

    @property
    def out_features(self) -> int:
        return self.data.shape[0]

    @property
    def in_features(self) -> int:
        return self.data.shape[1]

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()


class PlainOps(ABC):
    """The common part of `ext.reference.TorchOps` and `ext.cuda.ops.CudaOps`."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    @abstractmethod
    def project(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
    ) -> list[Tensor]: ...

    @abstractmethod
    def activate(self, gate: Tensor | None, up: Tensor, kind: Activation) -> Tensor: ...

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.default_stream(self.device).synchronize()

    def vector(self, weight: Tensor) -> Tensor:
        return weight.to(self.device, torch.float32, copy=True).contiguous()

    def factor(self, weight: Tensor) -> Tensor:
        return weight.to(self.device, copy=True).contiguous()

    def memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def indices(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)).to(self.device)

    def project_gated(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
        kind: Activation,
    ) -> Tensor:
        gate, up = self.project(x, norm, linears, patches)
        return self.activate(gate, up, kind)

    def split(self, y: Tensor, groups: int, widths: Sequence[int]) -> list[Tensor]:
        grouped = y.unflatten(1, (groups, -1))
        return [part.flatten(1).contiguous() for part in grouped.split(list(widths), dim=2)]

    def scale(self, x: Tensor, gains: Sequence[RowGain]) -> None:
        for gain in gains:
            x[gain.first : gain.last] *= gain.vector

    def detour(self, x: Tensor, z: Tensor, detours: Sequence[Detour]) -> None:
        for d in detours:
            (inner,) = self.project(z[d.first : d.last], None, (d.down,), (None,))
            (out,) = self.project(CURVES[d.activation](inner), None, (d.up,), (None,))
            x[d.first : d.last] += out * d.scale

    def best(self, x: Tensor, norm: Norm | None, linear: Linear, patch: Patch | None) -> Tensor:
        return self.argmax(self.project(x, norm, (linear,), (patch,))[0])

    def argmax(self, logits: Tensor) -> Tensor:
        # On every device torch takes the first of equals.
        return logits.argmax(dim=1)
