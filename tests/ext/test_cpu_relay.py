"""Recorded steps of a wave as one call: it gives what they give one by one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from ext.build import supported
from ext.cpu import CpuOps
from ext.ops import Geometry, Patch
from ext.plan import CpuPlan
from ext.recordings import Recordings
from ext.relay import Relay
from ext.replays import Entry
from tests.ext.layered import (
    HIDDEN,
    LAYERS,
    PAGES,
    POSITIONS,
    Headed,
    Layer,
    Stack,
    adapters,
    nothing,
    random,
)

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")

ROWS, OWN = 7, ((0, 3), (3, 7))


@pytest.fixture(scope="module", params=[False, True], ids=["exact", "rounding"])
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(threads=2, rounding=request.param)


class Bottom(Stack):
    """Layers behind the embedding of tokens."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.table = self.ops.matrix(random(100, HIDDEN))

    def read(
        self, tokens: np.ndarray | Tensor, plan: CpuPlan, patches: Sequence[Patch | None]
    ) -> Tensor:
        assert isinstance(tokens, np.ndarray)
        return self.step(self.ops.embed(tokens, self.table, 1.0, None, plan, 0), plan, patches)


@dataclass
class Places:
    """Where some rows stand, moved on a position at a time."""

    ops: CpuOps
    contexts: np.ndarray
    plan: CpuPlan | None = None

    def __post_init__(self) -> None:
        count = len(self.contexts)
        ids = np.arange(count * LAYERS * 8, dtype=np.int32) + int(self.contexts[0])
        self.starts, self.tables = np.arange(count + 1, dtype=np.int32), ids % PAGES
        self.tables = self.tables.reshape(count, LAYERS, 8)

    def move(self) -> CpuPlan:
        self.contexts = self.contexts + 1
        place = Geometry(self.starts, self.contexts, self.tables)
        self.plan = self.ops.plan(place, self.plan)
        return self.plan

    def anew(self) -> CpuPlan:
        return self.ops.plan(Geometry(self.starts, self.contexts, self.tables))


class Wave:
    """Rows that share their bottom and their head, and have layers of their own in between."""

    def __init__(self, ops: CpuOps) -> None:
        def layer() -> Layer:
            return Layer(ops, fused=False)

        self.ops = ops
        self.bottom = Bottom([layer(), layer()])
        self.own = [Stack([layer()]) for _ in OWN]
        self.head = Headed([layer()])
        self.cache = self.bottom.cache
        for stack in (*self.own, self.head):
            for one in (stack, *stack.layers):
                one.cache = self.cache
        self.worn = [adapters(stack, [(0, 2, 5)]) for stack in (self.bottom, *self.own)]
        self.bare = nothing(self.head)
        self.x = torch.full((ROWS, HIDDEN), torch.nan)

    def alone(self, tokens: np.ndarray, plans: Sequence[CpuPlan]) -> Tensor:
        """The best of each row, by calls that nobody records."""
        x = self.bottom.read(tokens, plans[0], self.worn[0])
        for (first, last), stack, plan, worn in self._parts(plans):
            stack.step(x[first:last], plan, worn)
        return self.head.step(x, plans[0], self.bare)

    def run(
        self, recordings: Recordings, tokens: np.ndarray, plans: Sequence[CpuPlan], relay: Relay
    ) -> Tensor:
        """The same by recordings."""
        whole = (plans[0], 0)
        entry = Entry(tokens, self.x)
        recordings.run((1,), entry, whole, self.worn[0], self.bottom.read, relay)
        for i, ((first, last), stack, plan, worn) in enumerate(self._parts(plans)):
            recordings.run((2, i), self.x[first:last], (plan, 0), worn, stack.step, relay)
        return recordings.run((3,), self.x, whole, self.bare, self.head.step, relay)

    def _parts(self, plans: Sequence[CpuPlan]):
        return zip(OWN, self.own, plans[1:], self.worn[1:], strict=True)


def test_a_relay_gives_what_its_steps_give(ops: CpuOps) -> None:
    wave, recordings = Wave(ops), Recordings(ops)
    contexts = np.arange(20, 20 + 9 * ROWS, 9, dtype=np.int32)
    places = [Places(ops, contexts), *(Places(ops, contexts[a:b]) for a, b in OWN)]
    plans = [place.move() for place in places]
    relay = recordings.relay()
    draw = np.random.default_rng(0)
    wave.run(recordings, draw.integers(0, 100, ROWS), plans, relay)
    assert relay.close()
    for runs in range(1, 5):
        assert all(a is b.move() for a, b in zip(plans, places, strict=True))
        tokens, before = draw.integers(0, 100, ROWS), wave.cache.data.clone()
        expected = wave.alone(tokens, [place.anew() for place in places])
        pages = wave.cache.data.clone()
        wave.cache.data.copy_(before)
        relay.run([tokens])
        assert torch.equal(relay.best[0], expected)
        assert torch.equal(wave.cache.data, pages)
        assert recordings.counts.replayed == 4 * runs


def test_a_step_that_is_there_twice_cannot_be_relayed(ops: CpuOps) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=False)
    relay = recordings.relay()
    for start in (20, 30):
        plan = Places(ops, np.array([start, start + 5], np.int32)).move()
        recordings.run((1,), random(2, HIDDEN), (plan, 0), nothing(layer), layer.step, relay)
    assert not relay.close()


def test_a_relay_ends_where_positions_do(ops: CpuOps) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=False)
    places = Places(ops, np.array([POSITIONS - 1], np.int32))
    places.tables = np.arange(LAYERS * 40, dtype=np.int32).reshape(1, LAYERS, 40) % PAGES
    plan, relay = places.move(), recordings.relay()
    recordings.run((1,), random(1, HIDDEN), (plan, 0), nothing(layer), layer.step, relay)
    assert relay.close()
    relay.run([])
    places.move()
    with pytest.raises(ValueError, match="lies beyond"):
        relay.run([])
