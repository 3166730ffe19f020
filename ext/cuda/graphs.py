"""Decode steps captured as CUDA graphs: one per run of units, batch bucket and form of attachments.

A captured step reads activations, a plan and patches that lie at fixed addresses; each call loads
its batch there and replays. Rows that pad the bucket work on a scratch page and on zeros. Graphs
are captured when first wanted, share one memory pool, and leave by least recent use.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ext.cuda.patches import Prepared, Round, Slots, prepared
from ext.cuda.plan import CudaPlan, Layout, StaticPlan
from ext.ops import Geometry, Patch

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_FEWEST_PAGES = 16

# Some units over activations x [rows, hidden], in place, with one patch for each linear of theirs.
Step = Callable[[Tensor, CudaPlan, Sequence[Patch | None]], None]
# What of a patch is part of a graph: rank and precision of each round, and whether rows have slots.
Form = tuple[tuple[tuple[int, torch.dtype], ...], bool] | None


@dataclass(eq=False, slots=True)
class _Captured:
    """A step at fixed addresses; `loaded` are the patches that lie there now."""

    x: Tensor
    plan: StaticPlan
    patches: list[Patch | None]
    replay: Callable[[], None]
    loaded: tuple[Patch | None, ...] = field(default=())


class Graphs:
    """Captured decode steps of one device; at most `capacity` of them are kept."""

    def __init__(self, device: torch.device, capacity: int = 64) -> None:
        self._device = device
        self._capacity = capacity
        self._kept: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._kept)

    def run(
        self,
        units: Hashable,
        x: Tensor,
        batch: tuple[Geometry, int],
        patches: Sequence[Patch | None],
        step: Step,
    ) -> bool:
        """Run `step` on x [rows, hidden], in place, for a decode batch (its geometry and the page
        that padding may use). False, and nothing done, if the batch is larger than any bucket.

        `units` names what `step` computes: equal names, equal steps."""
        geometry, scratch = batch
        rows = len(x)
        bucket = next((b for b in BUCKETS if b >= rows), None)
        if bucket is None:
            return False
        _, layers, used = geometry.tables.shape
        pages = max(_FEWEST_PAGES, 1 << (used - 1).bit_length())
        laid_out = [None if p is None else prepared(p, rows, self._device) for p in patches]
        forms = tuple(_form(p) for p in laid_out)
        key = (units, bucket, layers, pages, scratch, forms)
        captured = self._kept.get(key)
        if captured is None:
            layout = Layout(bucket, bucket, bucket, layers, pages)
            captured = self._blank(x.shape[1], layout, scratch, forms)
        _load(captured, x, geometry, patches, laid_out)
        if key in self._kept:
            self._kept.move_to_end(key)
            captured.replay()
        else:
            # The first batch runs as it is, which also compiles the kernels that will be captured.
            step(captured.x, captured.plan.plan, captured.patches)
            captured.replay = self._capture(captured, step)
            self._kept[key] = captured
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        x.copy_(captured.x[:rows])
        return True

    def _blank(
        self, hidden: int, layout: Layout, scratch: int, forms: tuple[Form, ...]
    ) -> _Captured:
        x = torch.zeros((layout.rows, hidden), dtype=torch.float32, device=self._device)
        plan = StaticPlan(layout, scratch, self._device)
        patches = [None if f is None else _blank_patch(f, layout.rows, self._device) for f in forms]
        return _Captured(x, plan, patches, _not_captured)

    def _capture(self, captured: _Captured, step: Step) -> Callable[[], None]:
        def run() -> None:
            step(captured.x, captured.plan.plan, captured.patches)

        if self._pool is None:
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


def _load(
    captured: _Captured,
    x: Tensor,
    geometry: Geometry,
    patches: Sequence[Patch | None],
    laid_out: Sequence[Prepared | None],
) -> None:
    """Put a batch where the captured step reads it."""
    captured.x.zero_()
    captured.x[: len(x)].copy_(x)
    captured.plan.load(geometry)
    same = len(patches) == len(captured.loaded) and all(
        a is b for a, b in zip(patches, captured.loaded, strict=True)
    )
    if same:
        return
    cleared: list[Tensor] = []
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for fixed, source in zip(captured.patches, laid_out, strict=True):
        if fixed is None or source is None:
            continue
        for whole, part in _pairs(fixed.prepared, source):
            cleared.append(whole)
            targets.append(whole[: len(part)])
            sources.append(part)
    if cleared:
        # A few launches for all of them; torch has no public name for these.
        torch._foreach_zero_(cleared)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
    captured.loaded = tuple(patches)


def _pairs(fixed: Prepared, source: Prepared) -> list[tuple[Tensor, Tensor]]:
    pairs: list[tuple[Tensor, Tensor]] = []
    for ours, theirs in zip(fixed.rounds, source.rounds, strict=True):
        pairs += [
            (ours.tiles, theirs.tiles),
            (ours.pointers, theirs.pointers),
            (ours.ranks, theirs.ranks),
            (ours.scales, theirs.scales),
        ]
    if fixed.slots is not None and source.slots is not None:
        pairs += [
            (fixed.slots.rows, source.slots.rows),
            (fixed.slots.first, source.slots.first),
            (fixed.slots.second, source.slots.second),
        ]
    return pairs


def _form(patch: Prepared | None) -> Form:
    if patch is None:
        return None
    rounds = tuple((part.rank, part.dtype) for part in patch.rounds)
    return rounds, patch.slots is not None


def _blank_patch(
    form: tuple[tuple[tuple[int, torch.dtype], ...], bool], rows: int, device: torch.device
) -> Patch:
    """A patch with room for a segment of its own for every row; it does nothing yet."""
    rounds, slotted = form

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    made = tuple(
        Round(
            tiles=zeros(rows, 3),
            count=rows,
            pointers=zeros(rows, 2, dtype=torch.int64),
            ranks=zeros(rows),
            scales=zeros(rows, dtype=torch.float32),
            rank=rank,
            dtype=dtype,
        )
        for rank, dtype in rounds
    )
    slots = None
    if slotted:
        addresses = [zeros(rows + 1, dtype=torch.int64) for _ in range(2)]
        slots = Slots(zeros(rows), *addresses)
    return Patch((), (), Prepared(made, slots, ()))


def _not_captured() -> None:
    raise RuntimeError("a step is replayed before it was captured")
