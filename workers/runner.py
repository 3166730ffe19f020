"""Runs waves: carries the rows of a wave through its stages and returns logits.

Owns the resident units of every chain and, through `workers.caches`, the bytes behind the pages. A
wave's rows stay in one activation tensor; stages whose rows lie together work on a view of it."""

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ext.ops import Cache, Geometry, Ops, Plan
from ext.replays import Replays
from workers import layers, vocabulary
from workers.attachments import Attachments, Rows
from workers.batcher import Members, Stage, Step, Wave
from workers.block import HeadUnit, ResidentUnit
from workers.caches import Caches
from workers.chains import ServedChain
from workers.loading import LoadedChain
from workers.memory import KvMemory
from workers.passage import Part, Passage
from workers.requests import Request, Requests
from workers.wire import BlockReport, ChainId

_KEPT_PASSAGES = 1024


@dataclass(frozen=True, slots=True)
class Logits:
    """What a wave leaves: row i of `data` [n, vocabulary], float32 on the device, belongs to step
    `steps[i]` at position `positions[i]`; rows of narrower variants end in -inf."""

    data: Tensor
    steps: tuple[Step, ...]
    positions: tuple[int, ...]


@dataclass(eq=False, slots=True)
class BlockCount:
    """How often a block ran and what it carried: `merged` runs had rows of several chains."""

    runs: int = 0
    rows: int = 0
    sequences: int = 0
    merged: int = 0


@dataclass(eq=False, slots=True)
class _Running:
    """A wave on its way: activations by the width of the stream, a row for each of the wave's, the
    plans made so far, logits collected."""

    wave: Wave
    chain: ServedChain
    cache: Cache
    device: torch.device
    streams: dict[int, Tensor] = field(default_factory=dict)
    plans: dict[Members, Plan] = field(default_factory=dict)
    logits: list[Logits] = field(default_factory=list)

    def x(self, width: int) -> Tensor:
        """The stream of that width [rows, width]."""
        if width not in self.streams:
            self.streams[width] = torch.empty(self.wave.num_rows, width, device=self.device)
        return self.streams[width]


@dataclass(frozen=True, slots=True)
class _Laid:
    """What stays of some steps while they decode: page tables of so many columns, first rows, and
    the last plan that was made of them."""

    columns: int
    starts: np.ndarray
    tables: np.ndarray
    plan: Plan


class Runner:
    """Executes waves on one device."""

    def __init__(
        self, ops: Ops, memory: KvMemory, requests: Requests, replays: Replays | None = None
    ) -> None:
        self._ops = ops
        self._replays = replays
        self._memory = memory
        self._requests = requests
        self._attachments = Attachments()
        self._units: dict[ChainId, tuple[ResidentUnit, ...]] = {}
        self._unit_bytes: dict[ChainId, tuple[int, ...]] = {}
        self._caches = Caches(ops, memory, pads=replays is not None)
        self._passages: OrderedDict[tuple[int, int, ChainId, Rows], Passage] = OrderedDict()
        self._laid: dict[Members, _Laid] = {}
        self._stages: tuple[Stage, ...] = ()
        self.counts: OrderedDict[int, BlockCount] = OrderedDict()
        self.prepare_s = 0.0

    def add(self, loaded: LoadedChain) -> None:
        """Take in a resident chain."""
        self._units[loaded.chain.id] = loaded.units
        self._unit_bytes[loaded.chain.id] = loaded.unit_bytes
        self._attachments.add(loaded.chain.id, loaded.attachments)

    def remove(self, chain: ChainId) -> None:
        """Forget a chain."""
        self._units.pop(chain, None)
        self._unit_bytes.pop(chain, None)
        self._attachments.remove(chain)
        # What rows wore holds weights, too.
        self._passages.clear()
        if self._replays is not None:
            alive = {id(unit) for units in self._units.values() for unit in units}
            self._replays.retain(lambda name: alive.issuperset(name[2:]))

    @property
    def replays(self) -> dict[str, int]:
        """How often steps were captured and replayed, where the kernels have that."""
        if self._replays is None:
            return {}
        counts = self._replays.counts
        return {"captured_steps": counts.captured, "replayed_steps": counts.replayed}

    def run(self, wave: Wave) -> list[Logits]:
        """Run a wave; KV goes to the pages, logits of the rows that need them come back."""
        running = self._begin(wave)
        for stage in wave.stages:
            self._take(running, stage)
        return running.logits

    def time(self, wave: Wave) -> list[float]:
        """Run a wave; the seconds that each of its stages took, plans not counted."""
        running = self._begin(wave)
        spent: list[float] = []
        for stage in wave.stages:
            self._plan(running, stage)
            self._ops.synchronize()
            began = time.perf_counter()
            self._take(running, stage)
            self._ops.synchronize()
            spent.append(time.perf_counter() - began)
        return spent

    def carry(self, wave: Wave, depth: int) -> Tensor:
        """Run a wave of one chain, cut at `depth`, through units [0, depth): x [rows, hidden]."""
        running = self._begin(wave)
        for stage in wave.stages:
            if stage.last <= depth:
                self._advance(running, stage)
        return running.x(running.chain.width(depth))

    def report(self, key: int, chains: list[ServedChain]) -> BlockReport:
        """What a block has done since start; `chains` are those that use it."""
        block = next(b for b in chains[0].blocks if b.key == key)
        digests = chains[0].unit_digests[block.first : block.last]
        count = self.counts.get(key, BlockCount())
        return BlockReport(
            digest=hashlib.sha256("".join(digests).encode()).hexdigest(),
            first=block.first,
            units=block.last - block.first,
            bytes=sum(self._unit_bytes[chains[0].id][block.first : block.last]),
            chains=len(chains),
            runs=count.runs,
            rows=count.rows,
            sequences=count.sequences,
            merged_runs=count.merged,
        )

    # ---- stages ---------------------------------------------------------------------------------

    def _begin(self, wave: Wave) -> _Running:
        if wave.stages is not self._stages:  # other steps: they do not follow the last wave's
            self._stages = wave.stages
            self._laid.clear()
        chain = wave.steps[0].request.chain
        running = _Running(wave, chain, self._caches.of(chain.kv), self._ops.device)
        if not wave.decodes:
            self._restore(running)
        return running

    def _take(self, running: _Running, stage: Stage) -> None:
        if stage.last == len(stage.runs[0][0].units):
            self._count(stage)
            self._finish(running, stage)
        else:
            self._advance(running, stage)

    def _advance(self, running: _Running, stage: Stage) -> None:
        if not stage.written:
            self._count(stage)
        self._pass(running, stage)
        if not stage.writes:
            self._keep(running, stage)

    def _pass(self, running: _Running, stage: Stage) -> None:
        """Units of a stage, over its rows of x."""
        # Chains that share units may be asked for at different lengths: rotary tables end there.
        chain = max((c for c, _, _ in stage.runs), key=lambda c: c.context)
        passage = self._passage(stage, chain)
        at = layers.Context(
            self._ops,
            running.cache,
            self._plan(running, stage),
            passage.layer if stage.written else None,
        )
        rows = self._rows(stage)
        if stage.writes:
            passage.write(running.x(chain.width(stage.first))[rows], at)
            return
        if passage.embed is not None:
            unit, worn = passage.embed
            x = vocabulary.embed(unit, self._tokens(running.wave, stage), worn, at)
        else:
            x = running.x(chain.width(stage.first))[rows]
        if not self._replay(running, stage, passage, x):
            x = passage.run(x, at)
        width = chain.width(stage.last)
        made = stage.first == 0 or chain.width(stage.first) != width
        if made and isinstance(stage.rows, slice) and len(x) == running.wave.num_rows:
            running.streams[width] = x
        elif made or not isinstance(stage.rows, slice):
            running.x(width)[rows] = x

    def _passage(self, stage: Stage, chain: ServedChain) -> Passage:
        """A stage's units as `chain` holds them, and what its rows wear."""
        rows = self._attachments.select(tuple((c.id, a, b) for c, a, b in stage.runs))
        key = (stage.first, stage.last, chain.id, rows)
        passage = self._passages.get(key)
        if passage is None:
            units = self._units[chain.id]
            passage = self._passages[key] = Passage(
                [
                    Part(
                        units[i],
                        *self._attachments.dress(i, chain.id, units[i], rows),
                        chain.layers[i],
                    )
                    for i in range(stage.first, max(stage.last, stage.first + 1))
                ]
            )
            if len(self._passages) > _KEPT_PASSAGES:
                self._passages.popitem(last=False)
        return passage

    def _replay(self, running: _Running, stage: Stage, passage: Passage, x: Tensor) -> bool:
        """Run a stage as a captured step, if there is such a thing for it."""
        replays = self._replays
        if replays is None or not passage.replayable or stage.written:
            return False
        if not replays.takes_prompts and max(stage.counts) > 1:
            return False
        cache = running.cache
        return replays.run(
            (id(cache), passage.layer, *passage.units),
            x,
            (self._plan(running, stage), len(cache.data) - 1),
            passage.patches,
            passage.step(self._ops, cache),
        )

    def _rows(self, stage: Stage) -> slice | Tensor:
        """The rows of a stage, to index with."""
        return stage.rows if isinstance(stage.rows, slice) else self._ops.indices(stage.rows)

    def _finish(self, running: _Running, stage: Stage) -> None:
        """The head, over the rows whose logits somebody wants."""
        steps: list[Step] = []
        positions: list[int] = []
        for i in stage.steps:
            step, wanted = running.wave.steps[i], running.wave.wanted[i]
            steps += [step] * len(wanted)
            positions += [step.span.first + row for row in wanted]
        chain = stage.runs[0][0]
        unit, worn = self._attachments.dress(
            stage.first,
            chain.id,
            self._units[chain.id][stage.first],
            self._attachments.select(tuple((c.id, a, b) for c, a, b in stage.runs)),
        )
        assert isinstance(unit, HeadUnit)
        at = layers.Context(self._ops, running.cache, self._plan(running, stage))
        x = running.x(chain.width(stage.first))[self._rows(stage)]
        data = vocabulary.head(unit, x, worn, at)
        running.logits.append(Logits(data, tuple(steps), tuple(positions)))

    def _tokens(self, wave: Wave, stage: Stage) -> np.ndarray:
        """Token ids of a stage's rows, int64."""
        parts = [
            wave.steps[i].request.tokens[wave.steps[i].span.first : wave.steps[i].end]
            for i in stage.steps
        ]
        return np.concatenate(parts).astype(np.int64)

    def _plan(self, running: _Running, stage: Stage) -> Plan:
        """The attention plan of a stage's rows, made once per wave."""
        plan = running.plans.get(stage.members)
        if plan is None:
            began = time.perf_counter()
            plan = running.plans[stage.members] = self._lay(running.wave, stage).plan
            self.prepare_s += time.perf_counter() - began
        return plan

    def _lay(self, wave: Wave, stage: Stage) -> _Laid:
        """Tables and plan of some rows of a wave, from those of the wave that it follows."""
        steps = [wave.steps[i] for i in stage.steps]
        contexts = np.array([s.end for s in steps], np.int32)
        columns = self._memory.pages(int(contexts.max()))
        last = self._laid.get(stage.members)
        if last is not None and last.columns == columns:
            starts, tables = last.starts, last.tables
        else:
            starts = np.zeros(len(steps) + 1, np.int32)
            np.cumsum(stage.counts, out=starts[1:])
            layers = max(s.request.chain.num_layers for s in steps)
            tables = self._memory.tables([s.request.slot for s in steps], layers, columns)
            last = None
        geometry = Geometry(starts, contexts, tables)
        plan = self._ops.plan(geometry, None if last is None else last.plan)
        made = self._laid[stage.members] = _Laid(columns, starts, tables, plan)
        return made

    def _count(self, stage: Stage) -> None:
        count = self.counts.setdefault(stage.block, BlockCount())
        first_piece = stage.first == next(
            b.first for b in stage.runs[0][0].blocks if b.key == stage.block
        )
        if first_piece:
            count.runs += 1
            count.rows += sum(last - first for _, first, last in stage.runs)
            count.sequences += len(stage.steps)
            count.merged += len(stage.runs) > 1

    # ---- pages ----------------------------------------------------------------------------------

    def commit(self) -> bool:
        """See `Caches.commit`."""
        return self._caches.commit()

    def fill(self, request: Request) -> None:
        """Write into the pages of a request that starts: see `Caches.fill`."""
        chain = request.chain
        self._caches.fill(request, self._attachments.prefixes(chain.id) if chain.seeded else ())

    def _keep(self, running: _Running, stage: Stage) -> None:
        """Keep the activations of full prompt pages where other chains part from this one."""
        page = self._memory.page
        for i in stage.steps:
            step = running.wave.steps[i]
            chain = step.request.chain
            if not step.request.is_prefilling or stage.last not in chain.branches:
                continue
            if stage.last >= chain.full_depth:
                continue
            first = -(-step.span.first // page)
            for column in range(first, step.end // page):
                row = int(running.wave.starts[i]) + column * page - step.span.first
                self._store(running, step, stage.last, column, row)

    def _store(self, running: _Running, step: Step, depth: int, column: int, row: int) -> None:
        flat = _as_floats(running.cache)
        width = step.request.chain.width(depth)
        x = running.x(width)[row : row + self._memory.page].reshape(-1)
        pages = -(-x.numel() // flat.shape[1])
        ids = self._requests.keep_boundary(step.request, column, depth, pages)
        if ids is not None:
            padded = x.new_zeros(pages * flat.shape[1])
            padded[: x.numel()] = x
            flat[torch.from_numpy(ids).long()] = padded.view(pages, -1)

    def _restore(self, running: _Running) -> None:
        """Put kept activations where steps enter above the bottom."""
        page = self._memory.page
        flat = _as_floats(running.cache)
        for i, step in enumerate(running.wave.steps):
            if step.span.depth == 0:
                continue
            width = step.request.chain.width(step.span.depth)
            x = running.x(width)
            for column in range(step.span.first // page, step.end // page):
                ids = step.request.held[column].boundaries[step.span.depth]
                row = int(running.wave.starts[i]) + column * page - step.span.first
                kept = flat[torch.from_numpy(ids).long()].view(-1)[: page * width]
                x[row : row + page] = kept.view(page, -1)


def _as_floats(cache: Cache) -> Tensor:
    """Pages as float32 [pages, floats of a page], whatever KV they hold: activations stay exact."""
    return cache.data.view(len(cache.data), -1).view(torch.float32)
