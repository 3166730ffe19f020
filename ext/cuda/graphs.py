"""Decode steps captured as CUDA graphs: one per run of units, batch bucket and form of attachments.

A captured step reads activations, a plan and patches that lie at fixed addresses; each call loads
its batch there and replays. Rows that pad the bucket work on a scratch page and on zeros. Graphs
are captured when first wanted, share one memory pool, and leave by least recent use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ext.cuda.parcel import Parcel
from ext.cuda.patches import Form, as_prepared, drafted, room
from ext.cuda.plan import CudaPlan, Layout, StaticPlan
from ext.ops import Geometry, Patch
from ext.replays import Counts, Entry, Input, Shelf

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_FEWEST_PAGES = 16

# Some units over activations x [rows, hidden], in place, with one patch for each linear of theirs.
Step = Callable[[Input, CudaPlan, Sequence[Patch | None]], Tensor]
Forms = tuple[Form | None, ...]


class _Captured:
    """A step at fixed addresses, over a blank batch until one is loaded."""

    def __init__(
        self, hidden: int, layout: Layout, scratch: int, forms: Forms, device: torch.device
    ) -> None:
        self.x = torch.zeros((layout.rows, hidden), dtype=torch.float32, device=device)
        self.plan = StaticPlan(layout, scratch, device)
        rooms = [[] if form is None else room(form, layout.rows) for form in forms]
        self._parcel = Parcel([spec for specs in rooms for spec in specs], device)
        self._loaded: tuple[Patch | None, ...] | None = None
        self.patches: list[Patch | None] = []
        self.replay: Callable[[], None] = _not_captured
        arrays = iter(self._parcel.outside)
        for form, specs in zip(forms, rooms, strict=True):
            own = list(islice(arrays, len(specs)))
            self.patches.append(None if form is None else Patch((), (), as_prepared(form, own)))

    def load(self, x: Tensor, geometry: Geometry, patches: Sequence[Patch | None]) -> None:
        """Put a batch where the step reads it."""
        rows = len(x)
        self.x[:rows].copy_(x)
        self.x[rows:].zero_()
        self.plan.load(geometry)
        given = tuple(patches)
        # Patches are compared as objects: a caller keeps them while the same rows decode.
        if self._loaded is not None and all(map(_is, given, self._loaded)):
            return
        self._loaded = given
        self._parcel.clear()
        places = iter(self._parcel.inside)
        for patch in given:
            for array in () if patch is None else drafted(patch, rows).arrays:
                next(places)[: len(array)] = array
        self._parcel.send()

    def forget(self) -> None:
        """Let go of the attachments that were loaded last."""
        self._loaded = None

    def run(self, step: Step) -> None:
        """The step itself, launch by launch."""
        step(self.x, self.plan.plan, self.patches)


@dataclass(frozen=True, slots=True)
class _Key:
    units: tuple[int, ...]
    layout: Layout
    scratch: int
    forms: Forms


class Graphs:
    """Captured decode steps of one device; at most `capacity` of them are kept. See
    `ext.replays.Replays`."""

    takes_prompts = takes_ends = False

    def __init__(self, device: torch.device, capacity: int = 64) -> None:
        self.device = device
        self._shelf: Shelf[_Key, _Captured] = Shelf(capacity)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._shelf)

    @property
    def counts(self) -> Counts:
        """See `ext.replays.Replays.counts`."""
        return self._shelf.counts

    def run(
        self,
        units: tuple[int, ...],
        rows: Tensor | Entry,
        batch: tuple[CudaPlan, int],
        patches: Sequence[Patch | None],
        step: Step,
        relay: None = None,
    ) -> Tensor | None:
        """See `ext.replays.Replays.run`."""
        assert isinstance(rows, Tensor), "graphs begin with activations"
        x, (plan, scratch) = rows, batch
        geometry = plan.geometry
        bucket = next((b for b in BUCKETS if b >= len(x)), None)
        if bucket is None:
            return None
        _, layers, used = geometry.tables.shape
        pages = max(_FEWEST_PAGES, 1 << (used - 1).bit_length())
        forms = tuple(None if p is None else drafted(p, len(x)).form for p in patches)
        layout = Layout(bucket, bucket, bucket, layers, pages)
        key = _Key(units, layout, scratch, forms)
        captured = self._shelf.find(key)
        if captured is None:
            captured = _Captured(x.shape[1], layout, scratch, forms, self.device)
            captured.load(x, geometry, patches)
            # The first batch runs as it is, which also compiles the kernels to be captured.
            captured.run(step)
            captured.replay = self._capture(captured, step)
            self._shelf.keep(key, captured)
        else:
            captured.load(x, geometry, patches)
            captured.replay()
            self.counts.replayed += 1
        return x.copy_(captured.x[: len(x)])

    def relay(self) -> None:
        """See `ext.replays.Replays.relay`: a graph is one launch."""

    def retain(self, keeps: Callable[[tuple[int, ...]], bool]) -> None:
        """See `ext.replays.Replays.retain`."""
        self._shelf.retain(keeps)

    def _capture(self, captured: _Captured, step: Step) -> Callable[[], None]:
        if self._pool is None:
            return lambda: captured.run(step)
        graph = torch.cuda.CUDAGraph()
        # Another thread may be loading weights meanwhile: its calls are no part of this.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            captured.run(step)
        return graph.replay


def _is(one: object, other: object) -> bool:
    return one is other


def _not_captured() -> None:
    raise RuntimeError("a step is replayed before it was captured")
