"""Runs waves: carries the rows of a wave through its stages and returns logits.

Owns the bytes behind the pages (one arena per device) and the resident units of every chain. A
wave's rows stay in one activation tensor; stages whose rows lie together work on a view of it."""

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ext.ops import Cache, Geometry, Ops, Place, Plan
from workers import layers, vocabulary
from workers.attachments import Attachments
from workers.batcher import Stage, Step, Wave
from workers.block import (
    AttentionUnit,
    EmbedUnit,
    HeadUnit,
    MlpUnit,
    ParallelUnit,
    ResidentUnit,
    StitchUnit,
)
from workers.chains import KvShape, ServedChain
from workers.foreign import ForeignUnit, foreign
from workers.loading import LoadedChain
from workers.memory import KvMemory
from workers.requests import Request, Requests
from workers.wire import BlockReport, ChainId, KvDtype

_KV_DTYPES: dict[KvDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Logits:
    """What a wave leaves: row i of `data` [n, vocabulary], float32 in host memory, belongs to step
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
    plans: dict[tuple[int, ...], Plan] = field(default_factory=dict)
    logits: list[Logits] = field(default_factory=list)

    def x(self, width: int) -> Tensor:
        """The stream of that width [rows, width]."""
        if width not in self.streams:
            self.streams[width] = torch.empty(self.wave.num_rows, width, device=self.device)
        return self.streams[width]


class Runner:
    """Executes waves on one device."""

    def __init__(self, ops: Ops, memory: KvMemory, requests: Requests) -> None:
        self._ops = ops
        self._memory = memory
        self._requests = requests
        self._attachments = Attachments()
        self._units: dict[ChainId, tuple[ResidentUnit, ...]] = {}
        self._unit_bytes: dict[ChainId, tuple[int, ...]] = {}
        self._arena = ops.memory(memory.arena.total_bytes)
        self._caches: dict[KvShape, Cache] = {}
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
            self._plan(running, stage.steps)
            began = time.perf_counter()
            self._take(running, stage)
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
        chain = wave.steps[0].request.chain
        running = _Running(wave, chain, self._cache(chain.kv), self._ops.device)
        self._restore(running)
        return running

    def _take(self, running: _Running, stage: Stage) -> None:
        if stage.last == len(stage.runs[0][0].units):
            self._count(stage)
            self._finish(running, stage)
        else:
            self._advance(running, stage)

    def _advance(self, running: _Running, stage: Stage) -> None:
        self._count(stage)
        self._pass(running, stage)
        self._keep(running, stage)

    def _pass(self, running: _Running, stage: Stage) -> None:
        """Units of a stage, over its rows of x."""
        at = layers.Context(self._ops, running.cache, self._plan(running, stage.steps))
        # Chains that share units may be asked for at different lengths: rotary tables end there.
        chain = max((c for c, _, _ in stage.runs), key=lambda c: c.context)
        units = self._units[chain.id]
        rows = self._attachments.select(tuple((c.id, a, b) for c, a, b in stage.runs))
        x = running.x(chain.width(stage.first))[stage.rows]
        for index in range(stage.first, stage.last):
            unit, worn = self._attachments.dress(index, chain.id, units[index], rows)
            match unit:
                case AttentionUnit():
                    layers.attention(unit, x, chain.layers[index], worn, at)
                case MlpUnit():
                    layers.mlp(unit, x, worn, at)
                case ParallelUnit():
                    layers.parallel(unit, x, chain.layers[index], worn, at)
                case ForeignUnit():
                    layer = Place(running.cache, chain.layers[index], at.plan)
                    foreign(unit, x, worn.linears, self._ops, layer)
                case EmbedUnit():
                    x = vocabulary.embed(unit, self._tokens(running.wave, stage), worn, at)
                case StitchUnit():
                    x = layers.stitch(unit, x, worn, at)
                case HeadUnit():
                    raise AssertionError("a head stands alone in its stage")
        made = stage.first == 0 or chain.width(stage.first) != chain.width(stage.last)
        if made or not isinstance(stage.rows, slice):
            running.x(chain.width(stage.last))[stage.rows] = x

    def _finish(self, running: _Running, stage: Stage) -> None:
        """The head, over the rows whose logits somebody wants."""
        starts = running.wave.starts
        rows: list[int] = []
        steps: list[Step] = []
        positions: list[int] = []
        runs: list[tuple[ChainId, int, int]] = []
        for i in stage.steps:
            step = running.wave.steps[i]
            wanted = _wanted_rows(step)
            chain = step.request.chain.id
            if runs and runs[-1][0] == chain:
                runs[-1] = (chain, runs[-1][1], len(rows) + len(wanted))
            elif wanted:
                runs.append((chain, len(rows), len(rows) + len(wanted)))
            rows.extend(int(starts[i]) + r for r in wanted)
            steps.extend([step] * len(wanted))
            positions.extend(step.span.first + r for r in wanted)
        if not rows:
            return
        chain = stage.runs[0][0]
        unit, worn = self._attachments.dress(
            stage.first,
            chain.id,
            self._units[chain.id][stage.first],
            self._attachments.select(tuple(runs)),
        )
        assert isinstance(unit, HeadUnit)
        at = layers.Context(self._ops, running.cache, self._plan(running, stage.steps))
        everything = len(rows) == running.wave.num_rows
        x = running.x(chain.width(stage.first))
        x = x if everything else x[torch.tensor(rows, device=x.device)]
        data = vocabulary.head(unit, x, worn, at).cpu()
        running.logits.append(Logits(data, tuple(steps), tuple(positions)))

    def _tokens(self, wave: Wave, stage: Stage) -> np.ndarray:
        """Token ids of a stage's rows, int64."""
        parts = [
            wave.steps[i].request.tokens[wave.steps[i].span.first : wave.steps[i].end]
            for i in stage.steps
        ]
        return np.concatenate(parts).astype(np.int64)

    def _plan(self, running: _Running, members: tuple[int, ...]) -> Plan:
        """The attention plan of these steps, made once per wave."""
        plan = running.plans.get(members)
        if plan is None:
            began = time.perf_counter()
            steps = [running.wave.steps[i] for i in members]
            starts = np.zeros(len(steps) + 1, np.int32)
            np.cumsum([s.count for s in steps], out=starts[1:])
            contexts = np.array([s.end for s in steps], np.int32)
            tables = self._memory.tables(
                [s.request.slot for s in steps],
                max(s.request.chain.num_layers for s in steps),
                self._memory.pages(int(contexts.max())),
            )
            plan = running.plans[members] = self._ops.plan(Geometry(starts, contexts, tables))
            self.prepare_s += time.perf_counter() - began
        return plan

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

    @torch.inference_mode()
    def seed(self, request: Request) -> None:
        """Write the given keys and values of a request that starts, but for those it found."""
        chain, page = request.chain, self._memory.page
        first, last = request.found, chain.seeded
        if first >= last:
            return
        positions = np.arange(first, last)
        table = self._memory.table(request.slot, chain.num_layers, self._memory.pages(last))
        data = self._cache(chain.kv).data
        offsets = torch.from_numpy(positions % page)
        for layer, prefix in enumerate(self._attachments.prefixes(chain.id)):
            pages = torch.from_numpy(table[layer, positions // page].astype(np.int64))
            data[pages, 0, offsets] = prefix.keys[first:last].to(data.dtype)
            data[pages, 1, offsets] = prefix.values[first:last].to(data.dtype)

    def _cache(self, shape: KvShape) -> Cache:
        """The arena seen as pages of a shape."""
        if shape not in self._caches:
            count = self._memory.arena.total_bytes // self._memory.page_bytes(shape)
            data = self._arena[: count * self._memory.page_bytes(shape)]
            page = self._memory.page
            data = data.view(_KV_DTYPES[self._memory.dtype])
            data = data.view(count, 2, page, shape.kv_heads, shape.head_dim)
            self._caches[shape] = Cache(data, page)
        return self._caches[shape]

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


def _wanted_rows(step: Step) -> list[int]:
    """Rows of a step whose logits are wanted: the newest token's, or for logprobs of the prompt all
    but virtual ones."""
    if step.request.sampling.prompt_logprobs >= 0 and step.request.is_prefilling:
        return list(range(max(0, step.request.chain.virtual - step.span.first), step.count))
    return [step.count - 1] if step.is_last else []
