"""Chains run in this process, for whoever measures: a worker's units, kernels, pages and batches
without its loop, sockets and sampling.

Whatever chains are given, their rows meet in shared batches just as they do when served, so what is
measured here is what clients get. Nothing needs to be in a catalog, only objects in the store."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, cast

import torch
from torch import Tensor

from ext.ops import Dtype, Ops
from ext.select import select_ops, select_replays
from workers.batcher import Group, Step, Wave, arrange, decide
from workers.chains import Chains
from workers.holdings import Holdings
from workers.listening import Listener
from workers.loading import LoadedChain, load, time_load
from workers.memory import KvMemory
from workers.packer import packer_for
from workers.pages import Arena
from workers.prefix import PrefixCache
from workers.requests import Request, Requests, Span, laid_out
from workers.runner import Runner
from workers.weights import StoredWeights
from workers.wire import ChainId, KvDtype, Precision, RequestId, Sampling
from zoo.manifest import Manifests, Unit, UnitDigest
from zoo.store import Store

_PAGE = 16
# They bound what runs at once, not how much can be asked.
_MAX_ROWS, _MAX_SEQUENCES, _KV_BYTES = 512, 256, 1 << 30
# A linear layer: its unit's place in the chain, and its role there.
Place = tuple[int, str]
# Sequences of token ids that run together.
Batch = Sequence[Sequence[int]]

# No token is sampled, every position's logits are wanted.
_EVERY_POSITION = Sampling(max_tokens=0, prompt_logprobs=0)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded chain: `Offline`'s calls for it alone."""

    offline: "Offline"
    loaded: LoadedChain

    @property
    def nbytes(self) -> int:
        """Resident bytes that it stands on, those it shares with others included."""
        return self.loaded.chain_bytes

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per sequence float32 [n, vocabulary]: row i is for the token after position i."""
        return self.offline.logits([(self, tokens) for tokens in sequences])

    def hidden(self, sequences: Sequence[Sequence[int]], depth: int) -> list[Tensor]:
        """Per sequence what leaves units [0, depth): float32 [n, hidden], 0 < depth < units."""
        return self.offline.hidden(self, sequences, depth)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, eos: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy continuations of up to `max_tokens`; one of `eos` ends its answer, and is in
        it."""
        return self.offline.generate([(self, prompt) for prompt in prompts], max_tokens, eos)

    def moments(self, batches: Iterable[Batch], places: Sequence[Place]) -> dict[Place, Tensor]:
        """What the linear layers at `places` read; see `Offline.moments`."""
        return self.offline.moments(self, batches, places)

    def width_at(self, place: Place) -> int:
        """How wide a linear layer's input is."""
        unit, role = place
        return self.loaded.units[unit].linears[role].weight.in_features

    def clock(
        self, spans: Sequence[tuple[int, int]], shape: tuple[int, int, int], repeats: int
    ) -> list[float]:
        """Seconds that the units [first, last) of each span take; see `Offline.clock`."""
        return self.offline.clock(self, spans, shape, repeats)


class Offline:
    """Loads chains over the objects of the zoo at `root` and runs them. `threads` 0: torch's
    number; the other settings are those of a worker."""

    def __init__(
        self,
        root: Path,
        *,
        ops: str = "auto",
        threads: int = 0,
        dtype: Dtype = "auto",
        kv_dtype: KvDtype | Literal["auto"] = "auto",
        weights: Precision = "exact",
    ) -> None:
        self._ops: Ops = select_ops("cpu", ops, threads, dtype)
        self._weights = StoredWeights(Store(root))
        self._holdings = Holdings(self._ops, precision=weights, kv_dtype=kv_dtype)
        self._packer = packer_for(self._ops)
        self._memory = KvMemory(Arena(_KV_BYTES), page=_PAGE, max_sequences=_MAX_SEQUENCES)
        self._requests = Requests(self._memory, PrefixCache(), use_prefixes=False)
        self._chains = Chains(_MAX_ROWS)
        replays = select_replays(self._ops)
        self._runner = Runner(self._ops, self._memory, self._requests, replays)
        self._turns: dict[Group, int] = {}
        self._numbers = itertools.count(1)

    def __enter__(self) -> "Offline":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for chain in list(self._chains):
            self._runner.remove(chain.id)
            self._chains.remove(chain.id)
        if self._packer is not None:
            self._packer.close()

    @property
    def kernels(self) -> str:
        """What the kernels call themselves."""
        return self._ops.name

    @property
    def resident_bytes(self) -> int:
        """Bytes of the distinct tensors of all loaded models."""
        return self._holdings.resident_bytes

    def load(self, manifests: Manifests) -> Model:
        """Make a chain resident, sharing by digest what is resident already. Raises ZooError, and
        UnservableChain where no worker could run it either."""
        number = ChainId(next(self._numbers))
        loaded = load(self._holdings, self._weights, number, manifests, self._packer)
        self._chains.add(loaded.chain)
        self._runner.add(loaded)
        return Model(self, loaded)

    def drop(self, model: Model) -> None:
        """Free what only this model uses."""
        self._chains.remove(model.loaded.chain.id)
        self._runner.remove(model.loaded.chain.id)
        self._holdings.release(model.loaded.keys)

    def logits(self, sequences: Iterable[tuple[Model, Sequence[int]]]) -> list[Tensor]:
        """Every position's logits, all models in one batch: per sequence [n, vocabulary]."""
        requests = [self._request(m, tokens, _EVERY_POSITION) for m, tokens in sequences]
        rows: dict[RequestId, list[Tensor]] = {r.id: [] for r in requests}

        def run(wave: Wave) -> None:
            for part in self._runner.run(wave):
                assert part.data is not None
                data = part.data.cpu()
                for i, step in enumerate(part.steps):
                    rows[step.request.id].append(data[i : i + 1])

        self._drive(requests, run)
        return [torch.cat(rows[r.id])[:, : r.chain.vocabulary] for r in requests]

    def generate(
        self,
        prompts: Iterable[tuple[Model, Sequence[int]]],
        max_tokens: int,
        eos: Sequence[int] = (),
    ) -> list[list[int]]:
        """Greedy continuations, all models in one batch; see `Model.generate`."""
        sampling = Sampling(max_tokens=max_tokens)
        requests = [self._request(m, prompt, sampling) for m, prompt in prompts]
        answers: dict[RequestId, list[int]] = {r.id: [] for r in requests}

        def run(wave: Wave) -> None:
            for part in self._runner.run(wave, greedy=True):
                assert part.best is not None
                for step, token in zip(part.steps, part.best.tolist(), strict=True):
                    answers[step.request.id].append(token)
                    if len(answers[step.request.id]) < max_tokens and token not in eos:
                        self._requests.append(step.request, token)

        self._drive(requests, run)
        return [answers[r.id] for r in requests]

    def hidden(self, model: Model, sequences: Sequence[Sequence[int]], depth: int) -> list[Tensor]:
        """What leaves units [0, depth) of one model; see `Model.hidden`."""
        units = len(model.loaded.chain.units)
        if not 0 < depth < units:
            raise ValueError(f"depth {depth} is not between 0 and the {units} units of the chain")
        requests = [self._request(model, tokens, _EVERY_POSITION) for tokens in sequences]
        rows: dict[RequestId, list[Tensor]] = {r.id: [] for r in requests}

        def run(wave: Wave) -> None:
            x = self._runner.carry(wave, depth).cpu()
            for i, step in enumerate(wave.steps):
                rows[step.request.id].append(x[wave.starts[i] : wave.starts[i + 1]])

        self._drive(requests, run, (depth,))
        soft = model.loaded.chain.virtual - model.loaded.chain.seeded
        return [torch.cat(rows[r.id])[soft:] for r in requests]

    def moments(
        self, model: Model, batches: Iterable[Batch], places: Sequence[Place]
    ) -> dict[Place, Tensor]:
        """Second moments of what linear layers read over all given positions: the mean of x x^T,
        float32 [in, in]. Layers that read the same (q, k and v) share a tensor; those that nothing
        reached have none."""
        units = model.loaded.units
        matrices = {place: units[place[0]].linears[place[1]].weight for place in places}
        listener = Listener(self._ops, matrices.values())
        runner = Runner(cast("Ops", listener), self._memory, self._requests)
        runner.add(model.loaded)
        depth = 1 + max(unit for unit, _ in places)
        cuts = (depth,) if depth < len(units) else ()

        def run(wave: Wave) -> None:
            if cuts:
                runner.carry(wave, depth)
            else:
                runner.run(wave)

        for batch in batches:
            requests = [self._request(model, tokens, _EVERY_POSITION) for tokens in batch]
            self._drive(requests, run, cuts, whole=True)
        heard = listener.moments()
        return {place: heard[id(m)] for place, m in matrices.items() if id(m) in heard}

    def clock(
        self,
        model: Model,
        spans: Sequence[tuple[int, int]],
        shape: tuple[int, int, int],
        repeats: int,
    ) -> list[float]:
        """Seconds that the units [first, last) of each span take for one step, the least of
        `repeats`. `shape` is the number of sequences, how many positions each has after the step,
        and how many rows of the step are its own. What stands in its pages before does not change
        the time, so nothing is computed for it."""
        batch, context, rows = shape
        requests = [
            self._request(model, [0] * context, Sampling(max_tokens=0)) for _ in range(batch)
        ]
        cuts = sorted({edge for span in spans for edge in span})
        try:
            for request in requests:
                self._requests.open(request)
            if len(list(self._requests.start())) < batch:
                raise ValueError(f"{batch} sequences of {context} positions do not fit at once")
            span = Span(0, context - rows, context)
            steps = [Step(request, span, rows) for request in requests]
            wave = arrange(steps, cuts, whole=True)
            with torch.inference_mode():
                times = [self._runner.time(wave) for _ in range(repeats)]
        finally:
            for request in requests:
                self._requests.close(request)
        least = [min(column) for column in zip(*times, strict=True)]
        places = [(stage.first, stage.last) for stage in wave.stages]
        return [
            sum(t for (low, high), t in zip(places, least, strict=True) if first <= low < last)
            for first, last in spans
        ]

    def time_load(self, units: Sequence[tuple[UnitDigest, Unit]], context: int) -> float:
        """Seconds until units are ready to run of which nothing is resident yet."""
        return time_load(self._ops, self._weights, units, context)

    def _request(self, model: Model, tokens: Sequence[int], sampling: Sampling) -> Request:
        chain = model.loaded.chain
        room = len(tokens) + sampling.max_tokens
        longest = min(chain.context, self._memory.largest_request(chain.kv, chain.num_layers))
        longest -= chain.virtual
        if not tokens or room > longest:
            raise ValueError(f"a sequence of {room} tokens was asked for, 1 to {longest} can run")
        if min(tokens) < 0 or max(tokens) >= chain.vocabulary:
            raise ValueError(f"a token lies outside the vocabulary of {chain.vocabulary}")
        return Request(
            id=RequestId(next(self._numbers)),
            chain=chain,
            sampling=sampling,
            salt=0,
            priority=0,
            opened_at=0.0,
            tokens=laid_out(chain, tokens, room),
            length=chain.virtual + len(tokens),
            outputs=0,
        )

    def _drive(
        self,
        opened: Sequence[Request],
        run: Callable[[Wave], None],
        cuts: Sequence[int] = (),
        *,
        whole: bool = False,
    ) -> None:
        """Run waves until every request has ended; none is left behind whatever happens. If
        `whole`, soft prompts, too, pass every layer."""
        requests = self._requests
        try:
            for request in opened:
                requests.open(request)
            while steps := self._decide():
                with torch.inference_mode():
                    run(arrange(steps, cuts, whole=whole))
                for step in steps:
                    requests.advance(step.request, step.span, step.count)
                    if step.request.computed == step.request.length:
                        requests.close(step.request)
        finally:
            for request in [*requests.running.values(), *requests.waiting]:
                requests.close(request)

    def _decide(self) -> list[Step]:
        """The next wave's steps; none when every request has ended."""
        for request in self._requests.start():
            self._runner.fill(request)
        steps = decide(
            self._requests.running.values(),
            max_rows=_MAX_ROWS,
            page=_PAGE,
            now=0.0,
            last_turn=self._turns,
        )
        if steps:
            self._turns[steps[0].request.chain.group] = next(self._numbers)
        return steps
