"""Kernels with an ear at the linear layers: the second moments of what these read while chains run.

`workers.offline` runs text through them to learn what deltas have to get right; what serves has no
ear."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ext.ops import Activation, Linear, Matrix, Norm, Ops, Patch
from workers.layers import normed


class Listener:
    """The kernels `ops`, which besides add up x x^T over the rows x that some matrices read, norm
    applied. Matrices that read the same at once share the sum."""

    def __init__(self, ops: Ops, wanted: Iterable[Matrix]) -> None:
        self._ops = ops
        self._wanted = {id(matrix) for matrix in wanted}
        self._shared: dict[int, int] = {}
        self._sums: dict[int, Tensor] = {}
        self._rows: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 whatever else the kernels have
        return getattr(self._ops, name)

    def moments(self) -> dict[int, Tensor]:
        """The mean of x x^T, float32 [in, in], by the matrix's `id`; shared where the sum was."""
        means = {key: total / self._rows[key] for key, total in self._sums.items()}
        return {matrix: means[key] for matrix, key in self._shared.items()}

    def project(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
    ) -> list[Tensor]:
        """See `ext.ops.Ops.project`."""
        self._hear(x, norm, linears)
        return self._ops.project(x, norm, linears, patches)

    def project_gated(
        self,
        x: Tensor,
        norm: Norm | None,
        linears: Sequence[Linear],
        patches: Sequence[Patch | None],
        kind: Activation,
    ) -> Tensor:
        """See `ext.ops.Ops.project_gated`."""
        self._hear(x, norm, linears)
        return self._ops.project_gated(x, norm, linears, patches, kind)

    def accumulate(self, x: Tensor, y: Tensor, linear: Linear, patch: Patch | None) -> None:
        """See `ext.ops.Ops.accumulate`."""
        self._hear(y, None, (linear,))
        self._ops.accumulate(x, y, linear, patch)

    def best(self, x: Tensor, norm: Norm | None, linear: Linear, patch: Patch | None) -> Tensor:
        """See `ext.ops.Ops.best`."""
        self._hear(x, norm, (linear,))
        return self._ops.best(x, norm, linear, patch)

    def _hear(self, x: Tensor, norm: Norm | None, linears: Sequence[Linear]) -> None:
        heard = [id(one.weight) for one in linears if id(one.weight) in self._wanted]
        if not heard:
            return
        key = heard[0]
        self._shared.update(dict.fromkeys(heard, key))
        rows = x if norm is None else normed(x, norm, self._ops)
        product = rows.T @ rows
        if key in self._sums:
            self._sums[key] += product
        else:
            self._sums[key] = product
        self._rows[key] = self._rows.get(key, 0) + len(rows)
