"""FlashInfer's attention over our pages, where it is installed and has the shape.

One of its wrappers is planned once for a batch and serves every layer of it: what differs between
layers, the ids of their pages, is exchanged under it. A captured step has wrappers of its own, over
memory that stays, planned anew before every replay. Which kernels a shape gets is decided once,
when it is first met (`workers.warmup` sees to that before a chain is served), and logged.
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ext.cuda import pagelists
from ext.cuda.parcel import staged
from ext.cuda.plan import CudaPlan
from ext.ops import Attention, Cache, Geometry, Place

_log = logging.getLogger(__name__)

_DIMS = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)
# Query rows of a tile of the library's, at most; a captured step's wrapper keeps its tables in a
# megabyte.
_LARGEST_TILE = 128
_CAPTURED_BYTES = 1 << 20
_BLOCKS_PER_MULTIPROCESSOR = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """What wrappers are planned for. `window` counts positions, the row's own included; 0: all."""

    heads: int
    kv_heads: int
    dim: int
    page: int
    dtype: torch.dtype
    scale: float
    window: int

    @property
    def kernels(self) -> tuple[int, torch.dtype, bool]:
        """What the library compiles kernels for."""
        return self.dim, self.dtype, self.window > 0


def shape_of(q: Tensor, how: Attention, at: Place) -> Shape:
    """The shape of an `attend`."""
    data = at.cache.data
    kv_heads, dim = data.shape[3:]
    heads = q.shape[1] // dim
    return Shape(heads, kv_heads, dim, at.cache.page, data.dtype, how.scale, how.window or 0)


def workspace_bytes(shape: Shape, rows: int, multiprocessors: int) -> int:
    """Memory for partial results of contexts that are split, by the library's own arithmetic: of a
    captured step over `rows` single rows, and of any other batch."""
    group = shape.heads // shape.kv_heads
    split = _BLOCKS_PER_MULTIPROCESSOR * multiprocessors // shape.kv_heads
    tile = 16 if group <= 16 else 64 if group <= 64 else _LARGEST_TILE
    captured = max(split, math.ceil(rows * group / tile) + rows - 1) * tile
    tiles = max(captured, split * _LARGEST_TILE)
    return 4 * shape.heads * tiles * (shape.dim + 1) + 4096


@dataclass(eq=False, slots=True)
class _Seat:
    """A wrapper and the page lists that it reads; `holds` is the plan it was last planned for."""

    wrapper: Any
    shape: Shape
    fixed: Tensor | None
    sent: torch.cuda.Event | None
    pages: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int32))
    holds: CudaPlan | None = None

    def take(self, plan: CudaPlan) -> None:
        """Plan for the batch that `plan` holds now."""
        shape, bound = self.shape, pagelists.bounds(plan.contexts, self.shape.page)
        tables = plan.parts.tables
        room = self.fixed
        if room is None:
            room = pagelists.room(tables.shape[1], bound.total, tables.device)
        self.pages = pagelists.listed(tables, bound, room)
        if self.sent is not None:
            # The copy of what was planned before may still read the wrapper's host memory.
            self.sent.synchronize()
        lists = (
            staged(bound.starts, tables.device),
            # A captured step's lists are in place already.
            self.pages[0] if self.fixed is None else self.pages[0, :0],
            staged(bound.last, tables.device),
        )
        sizes = (shape.heads, shape.kv_heads, shape.dim, shape.page)
        asked = {
            "sm_scale": shape.scale,
            "window_left": shape.window - 1,
            "q_data_type": shape.dtype,
            "kv_data_type": shape.dtype,
        }
        if len(plan.chunks):
            starts = staged(plan.geometry.starts, tables.device)
            self.wrapper.plan(starts, *lists, *sizes, causal=True, **asked)
        else:
            self.wrapper.plan(*lists, *sizes, **asked)
        if self.sent is not None:
            self.sent.record()
        self.holds = plan

    def run(self, q: Tensor, at: Place) -> Tensor:
        """Attention of rows q [rows, heads * dim] over the pages of a layer."""
        # Plans know how many pages a sequence has, not which: those are read when kernels run.
        self.wrapper._paged_kv_indices_buf = self.pages[at.layer]
        rows = q.view(len(q), self.shape.heads, self.shape.dim)
        return self.wrapper.run(rows, at.cache.data, out=torch.empty_like(rows)).view(q.shape)


class FlashAttention:
    """Attention of one device by `library`, the module flashinfer."""

    def __init__(self, library: Any, device: torch.device) -> None:  # noqa: ANN401 - not typed
        self._library = library
        self._device = device
        self._multiprocessors = 1
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._multiprocessors = properties.multi_processor_count
        self._served: dict[Shape, bool] = {}
        self._compiled: dict[tuple[int, torch.dtype, bool], bool] = {}
        self._seats: dict[tuple[Shape, bool], _Seat] = {}
        self._workspace = torch.zeros(0, dtype=torch.uint8, device=device)
        self._listed = pagelists.room(1, 0, device)

    def serves(self, shape: Shape) -> bool:
        """Whether the library has kernels for a shape; the first call for one may compile them."""
        if shape not in self._served:
            fits = shape.dim in _DIMS and shape.dtype in _DTYPES
            self._served[shape] = fits and self._works(shape)
            _log.info(
                "attention of %d heads on %d, %d wide, %s%s: %s",
                shape.heads,
                shape.kv_heads,
                shape.dim,
                str(shape.dtype).removeprefix("torch."),
                f", window {shape.window}" if shape.window else "",
                "FlashInfer" if self._served[shape] else "Triton",
            )
        return self._served[shape]

    def attend(self, q: Tensor, how: Attention, at: Place) -> Tensor:
        """As `ext.cuda.paged.attend`, for a shape that is served."""
        plan: CudaPlan = at.plan
        shape = shape_of(q, how, at)
        seat = self._static_seat(shape, plan) if plan.is_static else self._seat(shape, plan)
        if seat.holds is not plan:
            seat.take(plan)
        return seat.run(q, at)

    def _seat(self, shape: Shape, plan: CudaPlan) -> _Seat:
        """The wrapper for batches that run as they are."""
        key = (shape, len(plan.chunks) > 0)
        if key not in self._seats:
            workspace = self._room(shape, 0)
            if key[1]:
                wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            else:
                wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
                    workspace, "NHD", use_tensor_cores=True
                )
            self._seats[key] = self._seated(wrapper, shape, None)
        return self._seats[key]

    def _static_seat(self, shape: Shape, plan: CudaPlan) -> _Seat:
        """The wrapper of a plan that stays: it lives as long, and follows from batch to batch."""
        seat = plan.followers.get(shape)
        if not isinstance(seat, _Seat):
            sequences, layers, pages = plan.parts.tables.shape
            fixed = self._lists(layers, sequences * pages)
            workspace = self._room(shape, sequences)
            wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
                workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=_numbers(sequences + 1, self._device),
                paged_kv_indices_buffer=fixed[0],
                paged_kv_last_page_len_buffer=_numbers(sequences, self._device),
            )
            tables = torch.empty(_CAPTURED_BYTES, dtype=torch.uint8, device=self._device)
            wrapper.reset_workspace_buffer(workspace, tables)
            seat = plan.followers[shape] = self._seated(wrapper, shape, fixed)
        return seat

    def _seated(self, wrapper: Any, shape: Shape, fixed: Tensor | None) -> _Seat:  # noqa: ANN401
        sent = torch.cuda.Event() if self._device.type == "cuda" else None
        return _Seat(wrapper, shape, fixed, sent)

    def _room(self, shape: Shape, rows: int) -> Tensor:
        """One workspace for all, since they run one after the other; wrappers made before it grew
        keep what they have."""
        wanted = workspace_bytes(shape, rows, self._multiprocessors)
        if wanted > len(self._workspace):
            self._workspace = torch.zeros(wanted, dtype=torch.uint8, device=self._device)
        return self._workspace

    def _lists(self, layers: int, pages: int) -> Tensor:
        """One memory for the lists of all captured steps: each fills it before it runs."""
        if layers * pages > self._listed.numel():
            self._listed = pagelists.room(1, layers * pages, self._device)
        return self._listed.view(-1)[: layers * pages].view(layers, pages)

    def _works(self, shape: Shape) -> bool:
        """Whether kernels for a shape are compiled and run: tried once on a few rows."""
        if shape.kernels not in self._compiled:
            _log.info("FlashInfer's kernels for heads of %d are made ready", shape.dim)
            try:
                self._try(shape)
                self._compiled[shape.kernels] = True
            except Exception as error:  # noqa: BLE001 - whatever it is, other kernels serve
                self._compiled[shape.kernels] = False
                _log.warning(
                    "FlashInfer cannot run heads of %d (%s): Triton's kernels do; "
                    "--attention-backend triton does not try",
                    shape.dim,
                    str(error).partition("\n")[0] or type(error).__name__,
                )
        return self._compiled[shape.kernels]

    def _try(self, shape: Shape) -> None:
        """A row, and a few rows, over two layers: one's page holds zeros, the other's ones."""
        size = (2, 2, shape.page, shape.kv_heads, shape.dim)
        data = torch.zeros(size, dtype=shape.dtype, device=self._device)
        data[1] = 1
        for rows in (1, min(3, shape.page)):
            starts, contexts = np.array([0, rows], np.int32), np.array([rows], np.int32)
            tables = np.arange(2, dtype=np.int32).reshape(1, 2, 1)
            plan = CudaPlan(Geometry(starts, contexts, tables), self._device)
            seat = self._seat(shape, plan)
            seat.take(plan)
            q = torch.zeros(rows, shape.heads * shape.dim, dtype=shape.dtype, device=self._device)
            for layer in range(2):
                made = seat.run(q, Place(Cache(data, shape.page), layer, plan))
                if not bool((made == layer).all()):
                    raise RuntimeError("it does not find the pages of a layer")


def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
