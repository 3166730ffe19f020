"""What requests may say next, guessed from what they were told and have said: look-up of n-grams.

A step of few rows waits for memory, and more rows in it may cost little. So behind the newest token
of a request its likely next ones are computed too; where they turn out right, one wave has made
several tokens. A row's bits do not depend on what shares its wave, and a guess is only taken where
the row before it chose just that token: answers are those without guesses. (Speculative decoding
after Leviathan et al. 2023, arXiv 2211.17192, with prompt look-up for a draft; draws depend on seed
and number alone, so sampled tokens are the same ones, too, not only as likely.)

How many tokens are guessed is decided by what pays: by how often the guesses of a request were
right, and by how long waves of so many rows took.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from workers.requests import Request
from workers.sampler import is_shaped
from workers.wire import RequestId

# Lengths of the n-grams that are looked up, the surest first.
_GRAMS = (4, 3, 2)
# How far back n-grams are looked for where a request comes with more.
_LOOKBACK = 4096
# How likely a guess is right, at first; what the last one counts for; and what a step counts for
# that had none because they did not pay: the next might be as likely as the first.
_LIKELY, _RECENT, _UNTRIED = 0.5, 1 / 8, 1 / 512
# What the last wave counts for among those of as many rows. What is older than so many waves is
# measured anew: without guesses, to compare with, and with them.
_SLOWER, _FASTER = 1 / 8, 1 / 2
_OLD_BARE, _OLD = 128, 512

Gram = tuple[int, ...]


@dataclass(eq=False, slots=True)
class _Memory:
    """Of one request: whether it may be guessed for, where each n-gram last went on, of those that
    end before `upto`, and how likely a guess is right if those before it were."""

    allowed: bool
    first: int
    upto: int
    follows: dict[Gram, int] = field(default_factory=dict)
    likely: float = _LIKELY


@dataclass(eq=False, slots=True)
class _Cost:
    """What a kind of wave takes, how many of them were seen, and when the last one."""

    taken: float
    seen: int = 0
    at: int = 0


class Costs:
    """What waves of the same chains take by their requests and rows: the longer they take, the more
    tokens they have to bring. The first of a kind does not count: it may be the one that was
    captured."""

    def __init__(self) -> None:
        self._costs: dict[tuple[int, int], _Cost] = {}
        self._waves = 0

    def learn(self, requests: int, rows: int, seconds: float) -> None:
        """Take in a wave. Those with guesses are remembered by how many times as long they took as
        those without, which grow with the contexts."""
        self._waves += 1
        bare = self._known(requests, requests)
        if rows > requests and bare is None:
            return
        taken = seconds if rows == requests or bare is None else seconds / bare.taken
        cost = self._costs.setdefault((requests, rows), _Cost(taken))
        if self._is_old(cost, _OLD_BARE if rows == requests else _OLD):
            cost.taken = taken
        elif cost.seen < 2:
            cost.taken = min(cost.taken, taken)
        else:
            cost.taken += (_SLOWER if taken > cost.taken else _FASTER) * (taken - cost.taken)
        cost.seen, cost.at = cost.seen + 1, self._waves

    def of(self, requests: int, rows: int) -> float | None:
        """How many times as long as without guesses such a wave takes; where it is not known, what
        the largest smaller one takes. None: waves without guesses are to be seen first."""
        bare = self._known(requests, requests)
        if bare is None or self._is_old(bare, _OLD_BARE):
            return None
        for fewer in range(rows, requests, -1):
            cost = self._known(requests, fewer)
            if cost is not None and not self._is_old(cost, _OLD):
                return cost.taken
        return 1.0

    def _known(self, requests: int, rows: int) -> _Cost | None:
        cost = self._costs.get((requests, rows))
        return cost if cost is not None and cost.seen > 1 else None

    def _is_old(self, cost: _Cost, old: int) -> bool:
        return cost.seen > 1 and self._waves - cost.at >= old


class Guesses:
    """Guesses for requests that decode: at most `most` tokens for each, in waves of at most `rows`
    rows in all."""

    def __init__(self, most: int, rows: int) -> None:
        self._most = most
        self._rows = rows
        self._memories: dict[RequestId, _Memory] = {}
        self._costs: dict[Hashable, Costs] = {}

    def __len__(self) -> int:
        """How many requests are remembered."""
        return len(self._memories)

    def forget(self, request: RequestId) -> None:
        """Drop what is remembered of a request."""
        self._memories.pop(request, None)

    def may_be_made(self, requests: int) -> bool:
        """Whether waves of so many requests have room for guesses."""
        return self._most > 0 and 0 < requests < self._rows

    def make(self, requests: Sequence[Request]) -> dict[RequestId, int]:
        """Lay guesses behind the known tokens of the requests of the next wave; how many of each.
        None while a prompt is computed: then rows are dear."""
        if not self.may_be_made(len(requests)) or any(r.is_prefilling for r in requests):
            return {}
        found = [
            (request, memory, at)
            for request in requests
            if (memory := self._memory(request)).allowed
            and (at := _last_time(request, memory)) is not None
        ]
        if not found:
            return {}
        counts = self._choose([(r, memory) for r, memory, _ in found], requests)
        for (request, memory, at), count in zip(found, counts, strict=True):
            if count == 0:
                memory.likely += _UNTRIED * (_LIKELY - memory.likely)
            else:
                request.guess(np.resize(request.tokens[at : request.length], count))
        return {r.id: count for (r, _, _), count in zip(found, counts, strict=True) if count > 0}

    def learn(self, request: Request, guessed: int, right: int) -> None:
        """Take in how many of a request's guesses were right."""
        memory = self._memories[request.id]
        for _ in range(right):
            memory.likely += _RECENT * (1 - memory.likely)
        if right < guessed:
            memory.likely -= _RECENT * memory.likely

    def took(self, requests: Sequence[Request], rows: int, seconds: float) -> None:
        """Take in how long a wave of decoding requests took."""
        if self.may_be_made(len(requests)) and rows <= self._rows:
            self._costs_of(requests).learn(len(requests), rows, seconds)

    def _costs_of(self, requests: Sequence[Request]) -> Costs:
        """Those of waves through chains as wide and as deep."""
        depth = max(request.chain.num_layers for request in requests)
        return self._costs.setdefault((requests[0].chain.group, depth), Costs())

    def _memory(self, request: Request) -> _Memory:
        memory = self._memories.get(request.id)
        if memory is None:
            first = max(request.chain.virtual, request.length - _LOOKBACK)
            memory = _Memory(_is_predictable(request), first, first + min(_GRAMS))
            self._memories[request.id] = memory
        return memory

    def _choose(
        self, found: Sequence[tuple[Request, _Memory]], requests: Sequence[Request]
    ) -> list[int]:
        """How many tokens to guess of each, so that most tokens come in a second: row by row the
        likeliest one is added, of which no more are right than of those before it."""
        costs, number = self._costs_of(requests), len(requests)
        # The last token of an answer needs no row of its own.
        rooms = [min(self._most, r.sampling.max_tokens - r.outputs - 1) for r, _ in found]
        chances = [memory.likely for _, memory in found]
        counts = [0] * len(found)
        best, highest, expected = list(counts), float(number), float(number)
        for rows in range(number + 1, self._rows + 1):
            open_ = [i for i, count in enumerate(counts) if count < rooms[i]]
            cost = costs.of(number, rows)
            if not open_ or cost is None:
                break
            i = max(open_, key=chances.__getitem__)
            expected += chances[i]
            counts[i] += 1
            chances[i] *= found[i][1].likely
            if expected / cost > highest:
                best, highest = list(counts), expected / cost
        return best


def _is_predictable(request: Request) -> bool:
    """Whether rows of a request can be computed together: none is chosen by tokens before it but
    through the model, whose layers are known not to mind what shares their wave."""
    return not is_shaped(request.sampling) and not request.chain.is_foreign


def _last_time(request: Request, memory: _Memory) -> int | None:
    """Where a request went on when it last stood behind what it said last; takes in the n-grams
    before that."""
    begin = max(memory.first, memory.upto - max(_GRAMS))
    tokens = request.tokens[begin : request.length].tolist()
    for end in range(memory.upto - begin, len(tokens)):
        for size in _GRAMS:
            if size <= end:
                memory.follows[tuple(tokens[end - size : end])] = begin + end
    memory.upto = max(memory.upto, request.length)
    known = (memory.follows.get(tuple(tokens[-size:])) for size in _GRAMS if size <= len(tokens))
    return next((at for at in known if at is not None), None)
