"""Runs waves: carries the rows of a wave through its stages and returns logits.

Owns the resident units of every chain and, through `workers.caches`, the bytes behind the pages. A
wave's rows stay in one activation tensor; stages whose rows lie together work on a view of it."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ext.ops import Ops
from ext.replays import Entry, Relay, Replays
from workers import layers
from workers.attachments import Attachments, Rows
from workers.batcher import Stage, Wave
from workers.block import ResidentUnit
from workers.boundaries import Boundaries
from workers.caches import Caches
from workers.chains import ServedChain
from workers.counts import BlockCount, Tally, tallies
from workers.loading import LoadedChain
from workers.memory import KvMemory
from workers.passage import Part, Passage, Way
from workers.plans import Plans
from workers.requests import Request, Requests
from workers.running import Logits, Running
from workers.wire import BlockReport, ChainId

_KEPT_PASSAGES = 1024


@dataclass(frozen=True, slots=True)
class _Relayed:
    """A wave as one call: its captured steps, the stages that begin with tokens, those that end in
    the best of each row, and the heads that run for themselves behind it, over these streams."""

    relay: Relay
    greedy: bool
    begins: Sequence[Stage]
    heads: Sequence[Stage]
    tails: Sequence[Stage]
    streams: dict[int, Tensor]


class Runner:
    """Executes waves on one device."""

    def __init__(
        self, ops: Ops, memory: KvMemory, requests: Requests, replays: Replays | None = None
    ) -> None:
        self._ops = ops
        self._replays = replays
        self._takes_ends = replays is not None and replays.takes_ends
        self._memory = memory
        self._boundaries = Boundaries(memory, requests)
        self._attachments = Attachments()
        self._units: dict[ChainId, tuple[ResidentUnit, ...]] = {}
        self._unit_bytes: dict[ChainId, tuple[int, ...]] = {}
        self._caches = Caches(ops, memory, pads=replays is not None)
        self._passages: OrderedDict[tuple[int, int, ChainId, Rows], Passage] = OrderedDict()
        self._plans = Plans(ops, memory)
        self._ways: dict[tuple[int, int], Way] = {}  # by a stage's `id` and where it ends
        self._stages: tuple[Stage, ...] = ()
        self._tallies: list[Tally] = []
        self._ends: Stage | None = None  # of these, the last but one, if the head has its rows
        self._follows = False  # whether the steps are those of the wave before
        self._relayed: _Relayed | None = None
        self.counts: OrderedDict[int, BlockCount] = OrderedDict()

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
        self._ways.clear()
        self._relayed = None
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

    @property
    def plans_s(self) -> float:
        """The seconds that plans took since start."""
        return self._plans.spent_s

    def run(self, wave: Wave, *, greedy: bool = False) -> list[Logits]:
        """Run a wave; KV goes to the pages, logits of the rows that need them come back, or if it
        is `greedy` their likeliest tokens."""
        running = self._begin(wave, greedy=greedy)
        relayed = self._relayed
        if relayed is not None and relayed.greedy == greedy and self._plans.move(running):
            self._follow(running, relayed)
        else:
            self._run(running)
        for tally in self._tallies:
            tally.count()
        return running.logits

    def time(self, wave: Wave) -> list[float]:
        """Run a wave; the seconds that each of its stages took, plans not counted."""
        running = self._begin(wave)
        spent: list[float] = []
        for stage in wave.stages:
            self._plans.of(running, stage)
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

    def _run(self, running: Running) -> None:
        """Run a wave stage by stage. Of one among its like, where only captured steps run before
        the heads, these are noted."""
        wave, replays, self._relayed = running.wave, self._replays, None
        if replays is not None and self._follows and wave.is_bare:
            running.relay = replays.relay()
        for stage in wave.stages:
            if running.greedy and stage is self._ends and self._conclude(running, stage):
                break
            self._take(running, stage)
        if running.relay is not None and running.relay.close():
            ends = running.begins, running.heads, running.tails
            self._relayed = _Relayed(running.relay, running.greedy, *ends, running.streams)

    def _follow(self, running: Running, relayed: _Relayed) -> None:
        """Run a wave as the one before it was, all at once."""
        relayed.relay.run([self._tokens(running.wave, stage) for stage in relayed.begins])
        for head, best in zip(relayed.heads, relayed.relay.best, strict=True):
            running.logits.append(Logits(None, *running.wanted(head), best))
        running.streams = relayed.streams
        for stage in relayed.tails:
            self._finish(running, stage)

    # ---- stages ---------------------------------------------------------------------------------

    def _begin(self, wave: Wave, *, greedy: bool = False) -> Running:
        self._follows = wave.stages is self._stages
        if not self._follows:
            self._stages = wave.stages
            ends = self._takes_ends and wave.decodes
            self._ends = _before_head(wave.stages) if ends else None
            self._tallies = tallies(wave.stages, self.counts)
            self._plans.clear()
            self._ways.clear()
            self._relayed = None
        chain = wave.steps[0].request.chain
        running = Running(wave, greedy, chain, self._caches.of(chain.kv), self._ops.device)
        if not wave.decodes:
            self._boundaries.restore(running)
        return running

    def _take(self, running: Running, stage: Stage) -> None:
        if stage.last == len(stage.runs[0][0].units):
            self._finish(running, stage)
        else:
            self._advance(running, stage)

    def _advance(self, running: Running, stage: Stage) -> None:
        self._pass(running, stage)
        if not (stage.writes or running.wave.decodes):
            self._boundaries.keep(running, stage)

    def _conclude(self, running: Running, stage: Stage) -> bool:
        """Run the last stage and the head behind it as one captured step; False, and nothing done,
        if there is none for them."""
        head = running.wave.stages[-1]
        way = self._way(stage, head.last)
        if not way.captured:
            return False
        self._judge(running, (stage, head), way, self._enter(running, stage, way))
        return True

    def _judge(
        self, running: Running, stages: tuple[Stage, Stage], way: Way, rows: Tensor | Entry
    ) -> None:
        """Run a stage as a captured step that ends in the best of each row of the head."""
        stage, head = stages
        best = self._replay(running, stage, way, rows)
        assert best is not None, "what takes ends takes any batch"
        running.heads.append(head)
        running.logits.append(Logits(None, *running.wanted(head), best))

    def _pass(self, running: Running, stage: Stage) -> None:
        """Units of a stage, over its rows of x."""
        way = self._way(stage, stage.last)
        passage = way.passage
        if not (way.captured and way.keeps):
            running.relay = None
        if stage.writes:
            passage.write(running.x(way.width)[way.rows], self._context(running, stage))
            return
        rows = self._enter(running, stage, way)
        x = self._replay(running, stage, way, rows)
        if x is None:
            assert isinstance(rows, Tensor)
            written = passage.layer if stage.written else None
            x = passage.run(rows, self._context(running, stage, written))
        if isinstance(rows, Entry):
            return  # x is where it belongs
        made = stage.first == 0 or way.width != way.result
        if made and isinstance(way.rows, slice) and len(x) == running.wave.num_rows:
            running.streams[way.result] = x
        elif made or not isinstance(way.rows, slice):
            running.x(way.result)[way.rows] = x

    def _enter(self, running: Running, stage: Stage, way: Way) -> Tensor | Entry:
        """What a stage's rows bring along, or their embeddings: x [rows, hidden]; or their tokens,
        where a captured step embeds them."""
        if not way.passage.embeds:
            return running.x(way.width)[way.rows]
        tokens = self._tokens(running.wave, stage)
        if self._takes_ends and way.captured and way.keeps and way.passage.embeds_plainly:
            return Entry(tokens, running.x(way.result)[way.rows])
        running.relay = None
        return way.passage.embed(tokens, self._context(running, stage))

    def _context(
        self, running: Running, stage: Stage, written: int | None = None
    ) -> layers.Context:
        return layers.Context(self._ops, running.cache, self._plans.of(running, stage), written)

    def _way(self, stage: Stage, last: int) -> Way:
        """A stage's way through its units up to `last`."""
        way = self._ways.get((id(stage), last))
        if way is None:
            chain = _longest(stage)
            passage = self._passage(stage, chain, last)
            widths = chain.width(stage.first), chain.width(stage.last)
            captured = self._captures(stage, passage)
            way = Way(passage, self._rows(stage), *widths, captured)
            self._ways[id(stage), last] = way
        return way

    def _captures(self, stage: Stage, passage: Passage) -> bool:
        """Whether a stage is run as a captured step, if that takes so many rows."""
        replays = self._replays
        if replays is None or stage.written or not passage.replayable:
            return False
        return replays.takes_prompts or max(stage.counts) == 1

    def _passage(self, stage: Stage, chain: ServedChain, last: int) -> Passage:
        """Units from a stage's first to `last` as `chain` holds them, and what its rows wear."""
        rows = self._attachments.select(tuple((c.id, a, b) for c, a, b in stage.runs))
        key = (stage.first, last, chain.id, rows)
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
                    for i in range(stage.first, max(last, stage.first + 1))
                ]
            )
            if len(self._passages) > _KEPT_PASSAGES:
                self._passages.popitem(last=False)
        return passage

    def _replay(
        self, running: Running, stage: Stage, way: Way, rows: Tensor | Entry
    ) -> Tensor | None:
        """Run a stage as a captured step, if there is such a thing for it; what it gives."""
        if self._replays is None or not way.captured:
            return None
        cache, passage = running.cache, way.passage
        if isinstance(rows, Entry):
            running.begins.append(stage)
        return self._replays.run(
            (id(cache), passage.layer, *passage.units(rows)),
            rows,
            (self._plans.of(running, stage), len(cache.data) - 1),
            passage.patches,
            passage.step(rows, self._ops, cache),
            running.relay,
        )

    def _rows(self, stage: Stage) -> slice | Tensor:
        """The rows of a stage, to index with."""
        return stage.rows if isinstance(stage.rows, slice) else self._ops.indices(stage.rows)

    def _finish(self, running: Running, stage: Stage) -> None:
        """The head, over the rows whose logits somebody wants."""
        way = self._way(stage, stage.last)
        x = running.x(way.width)[way.rows]
        ends = running.greedy and self._takes_ends and running.wave.decodes
        if ends and way.captured and way.keeps:
            self._judge(running, (stage, stage), way, x)
            return
        running.tails.append(stage)
        at, wanted = self._context(running, stage), running.wanted(stage)
        if running.greedy:
            made = Logits(None, *wanted, way.passage.run(x, at))
        else:
            made = Logits(way.passage.logits(x, at), *wanted)
        running.logits.append(made)

    def _tokens(self, wave: Wave, stage: Stage) -> np.ndarray:
        """Token ids of a stage's rows, int64."""
        if wave.is_bare:
            steps = (wave.steps[i] for i in stage.steps)
            newest = (step.request.tokens[step.span.first] for step in steps)
            return np.fromiter(newest, np.int64, len(stage.steps))
        parts = [
            wave.steps[i].request.tokens[wave.steps[i].span.first : wave.steps[i].end]
            for i in stage.steps
        ]
        return np.concatenate(parts).astype(np.int64)

    # ---- pages ----------------------------------------------------------------------------------

    def commit(self) -> bool:
        """See `Caches.commit`."""
        return self._caches.commit()

    def fill(self, request: Request) -> None:
        """Write into the pages of a request that starts: see `Caches.fill`."""
        chain = request.chain
        self._caches.fill(request, self._attachments.prefixes(chain.id) if chain.seeded else ())


def _longest(stage: Stage) -> ServedChain:
    """Of the chains that pass a stage, the one asked for at the greatest length: rotary tables of
    units that they share end there."""
    return max((chain for chain, _, _ in stage.runs), key=lambda chain: chain.context)


def _before_head(stages: Sequence[Stage]) -> Stage | None:
    """The last stage before the head, where the head has just its rows."""
    if len(stages) < 2:
        return None
    stage, head = stages[-2:]
    follows = (stage.last, stage.members, stage.runs) == (head.first, head.members, head.runs)
    lies = isinstance(stage.rows, slice) and stage.rows == head.rows
    return stage if follows and lies and not stage.written and not stage.writes else None
