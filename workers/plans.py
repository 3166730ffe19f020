"""Where the rows of stages stand: page tables and plans for attention, laid out when steps change
and moved on while they decode."""

import time
from dataclasses import dataclass

import numpy as np

from ext.ops import Geometry, Ops, Plan
from workers.batcher import Members, Stage
from workers.memory import KvMemory
from workers.running import Running

# Page tables have a multiple of so many columns: so long they serve rows that decode.
_COLUMNS = 8


@dataclass(slots=True)
class _Laid:
    """What stays of some steps while they decode: which of the wave's these are, their first rows,
    page tables, and the last plan that was made of them."""

    at: slice | tuple[int, ...]
    starts: np.ndarray
    tables: np.ndarray
    plan: Plan


class Plans:
    """The plans of one wave at a time, and of those that follow it."""

    def __init__(self, ops: Ops, memory: KvMemory) -> None:
        self._ops = ops
        self._memory = memory
        self._laid: dict[Members, _Laid] = {}
        self.spent_s = 0.0

    def clear(self) -> None:
        """Other steps come."""
        self._laid.clear()

    def of(self, running: Running, stage: Stage) -> Plan:
        """The plan of a stage's rows, made once per wave."""
        plan = running.plans.get(stage.members)
        if plan is None:
            began = time.perf_counter()
            laid = self._laid.get(stage.members)
            if laid is None or not self._moves(running, laid):
                laid = self._laid[stage.members] = self._lay(running, stage)
            plan = running.plans[stage.members] = laid.plan
            self.spent_s += time.perf_counter() - began
        return plan

    def move(self, running: Running) -> bool:
        """Move all plans on to where a wave that follows stands; False: some must be made anew."""
        began = time.perf_counter()
        plans = [(laid, laid.plan) for laid in self._laid.values()]
        moved = all(self._moves(running, laid) and laid.plan is plan for laid, plan in plans)
        self.spent_s += time.perf_counter() - began
        return moved

    def _moves(self, running: Running, laid: _Laid) -> bool:
        """Move a plan on, unless its tables end before."""
        ends = _at(running.ends, laid.at)
        if self._memory.pages(max(ends)) > laid.tables.shape[2]:
            return False
        place = Geometry(laid.starts, np.array(ends, np.int32), laid.tables)
        laid.plan = self._ops.plan(place, laid.plan)
        return True

    def _lay(self, running: Running, stage: Stage) -> _Laid:
        at = _together(stage.steps)
        ends = _at(running.ends, at)
        requests = [running.wave.steps[i].request for i in stage.steps]
        starts = np.zeros(len(requests) + 1, np.int32)
        np.cumsum(stage.counts, out=starts[1:])
        layers = max(request.chain.num_layers for request in requests)
        columns = -(-self._memory.pages(max(ends)) // _COLUMNS) * _COLUMNS
        tables = self._memory.tables([request.slot for request in requests], layers, columns)
        place = Geometry(starts, np.array(ends, np.int32), tables)
        return _Laid(at, starts, tables, self._ops.plan(place))


def _together(steps: tuple[int, ...]) -> slice | tuple[int, ...]:
    """Numbers of steps, which rise: a slice where they lie together."""
    lie = steps[-1] - steps[0] == len(steps) - 1
    return slice(steps[0], steps[-1] + 1) if lie else steps


def _at(ends: list[int], at: slice | tuple[int, ...]) -> list[int]:
    return ends[at] if isinstance(at, slice) else [ends[i] for i in at]
