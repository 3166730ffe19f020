"""Patches as the native CPU kernels read them: laid out once, at their first use.

The kernels want A of a low-rank piece in rows and B in panels, which is how `ext.packing` keeps
matrices that are wide and tall. What lies otherwise is turned here.
"""

from dataclasses import dataclass

from torch import Tensor

from ext import native
from ext.ops import Finish, LoraSegment, Patch
from ext.packing import CpuMatrix, Packing


@dataclass(eq=False, slots=True)
class PreparedPatch:
    """The record, the tensors it points at, and how many rows a batch must have."""

    record: native.Record
    tensors: list[Tensor]
    rows: int


@dataclass(frozen=True, slots=True)
class _Factors:
    """A and B as kernels want them, and how a record names them."""

    tensors: tuple[Tensor, Tensor]
    fields: tuple[int, int, int, int]
    rank: int


def patch_address(patch: Patch | None, rows: int, matrix: CpuMatrix, packing: Packing) -> int:
    """The address of the record of a linear layer's patch; 0 where there is nothing to do."""
    if patch is None or not (patch.segments or patch.finishes):
        return 0
    prepared: PreparedPatch | None = patch.prepared
    if prepared is None:
        prepared = patch.prepared = _prepare(patch, matrix, packing)
    if prepared.rows > rows:
        raise ValueError(f"a patch up to row {prepared.rows} for {rows} rows")
    return prepared.record.address


def _prepare(patch: Patch, matrix: CpuMatrix, packing: Packing) -> PreparedPatch:
    tensors: list[Tensor] = []
    parts: list[bytes] = []
    offset = 0
    for segment in patch.segments:
        first, last = segment.first, segment.last
        if not 0 <= first < last:
            raise ValueError(f"rows {first} to {last} of a low-rank piece are empty or outside")
        factors = _known_factors(segment, matrix, packing)
        tensors += factors.tensors
        parts.append(
            native.SEGMENT.pack(first, last, *factors.fields, factors.rank, offset, segment.scale)
        )
        offset += (last - first) * factors.rank
    last = max(run.last for run in (*patch.segments, *patch.finishes))
    native.check_runs(patch.finishes, last)
    for finish in patch.finishes:
        parts.append(_finish(finish, matrix.out_features))
        tensors += (vector for vector in (finish.gain, finish.bias) if vector is not None)
    head = native.PATCH.pack(len(patch.segments), len(patch.finishes), offset)
    return PreparedPatch(native.Record(head + b"".join(parts)), tensors, last)


def _known_factors(segment: LoraSegment, matrix: CpuMatrix, packing: Packing) -> _Factors:
    """What was made of a segment's factors before, or is now."""
    if segment.prepared is None:
        factors = _factors(segment, matrix, packing)
        _check_factors(segment, factors, matrix, packing)
        return factors
    known: _Factors | None = segment.prepared.value
    factors = known or _factors(segment, matrix, packing)
    _check_factors(segment, factors, matrix, packing)
    segment.prepared.value = factors
    return factors


def _factors(segment: LoraSegment, matrix: CpuMatrix, packing: Packing) -> _Factors:
    """A in rows and B in panels."""
    a, b = segment.a, segment.b
    if b.dim() == 2 and len(b) == matrix.out_features:
        b = packing.panels(b)
    rank = b.shape[1]
    if a.dim() == 3:
        a = packing.rows(a, rank)
    a = a.contiguous()
    fields = (a.data_ptr(), native.STORAGE[a.dtype], b.data_ptr(), native.STORAGE[b.dtype])
    return _Factors((a, b), fields, rank)


def _check_factors(
    segment: LoraSegment, factors: _Factors, matrix: CpuMatrix, packing: Packing
) -> None:
    a, b = factors.tensors
    panels = -(-matrix.out_features // packing.panel)
    if b.dim() != 3 or len(b) != panels or a.shape != (factors.rank, matrix.in_features):
        raise ValueError(
            f"a low-rank piece of {tuple(segment.a.shape)} and {tuple(segment.b.shape)} for a layer"
            f" of {matrix.in_features} inputs and {matrix.out_features} outputs"
        )


def _finish(finish: Finish, out: int) -> bytes:
    gain = native.vector_address(finish.gain, out, "gain")
    bias = native.vector_address(finish.bias, out, "bias")
    return native.FINISH.pack(finish.first, finish.last, gain, bias)
