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

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from workers.requests import Request
from workers.sampler import is_shaped
from workers.wire import RequestId

# Lengths of the n-grams that are looked up, the surest first.
_GRAMS = (4, 3, 2)
# How far back n-grams are looked for where a request comes with more.
_LOOKBACK = 4096
# Guesses that a wave may have of each request.
_REACHES = (1, 3, 7, 15)
# How likely a guess is right, at first; what the last one counts for; and what a step counts for
# that had none because they did not pay: the next might be as likely as the first.
_LIKELY, _RECENT, _UNTRIED = 0.5, 1 / 8, 1 / 512
# What the last wave counts for among those of as many rows; after so many waves without one they
# are tried anew.
_SLOWER, _FASTER, _OLD = 1 / 8, 1 / 2, 1024

Gram = tuple[int, ...]


@dataclass(eq=False, slots=True)
class _Memory:
    """Of one request: whether it may be guessed for, where each n-gram last went on, of those that
    end before `upto`, and how likely a guess is right."""

    allowed: bool
    first: int
    upto: int
    follows: dict[Gram, int] = field(default_factory=dict)
    likely: float = _LIKELY

    def right(self, count: int) -> float:
        """How many of so many guesses are right, if one that follows a wrong one is wrong."""
        return sum(self.likely**i for i in range(1, count + 1))


@dataclass(eq=False, slots=True)
class _Cost:
    """What a kind of wave takes: seconds, of how many of them, when it last ran."""

    seconds: float
    seen: int
    at: int


class Costs:
    """What waves take by their requests and rows. The first of a kind does not count: it may have
    been the one that was captured."""

    def __init__(self) -> None:
        self._costs: dict[tuple[int, int], _Cost] = {}
        self._waves = 0

    def learn(self, requests: int, rows: int, seconds: float) -> None:
        """Take in a wave."""
        self._waves += 1
        cost = self._costs.setdefault((requests, rows), _Cost(seconds, 0, 0))
        cost.seen, cost.at = cost.seen + 1, self._waves
        if cost.seen <= 2:
            cost.seconds = min(cost.seconds, seconds)
        else:
            weight = _SLOWER if seconds > cost.seconds else _FASTER
            cost.seconds += weight * (seconds - cost.seconds)

    def of(self, requests: int, rows: int) -> float:
        """Seconds of such a wave; where it is not known, those of the largest smaller one."""
        for fewer in range(rows, requests - 1, -1):
            cost = self._costs.get((requests, fewer))
            if cost is None or cost.seen < 2:
                continue
            if fewer == requests or self._waves - cost.at < _OLD:
                return cost.seconds
        return 1.0


class Guesses:
    """Guesses for requests that decode: at most `most` tokens for each, in waves of at most `rows`
    rows in all."""

    def __init__(self, most: int, rows: int) -> None:
        self._most = most
        self._rows = rows
        self._memories: dict[RequestId, _Memory] = {}
        self._costs = Costs()

    def forget(self, request: RequestId) -> None:
        """Drop what is remembered of a request."""
        self._memories.pop(request, None)

    def make(self, running: Collection[Request]) -> dict[RequestId, int]:
        """Lay guesses behind the known tokens of these requests; how many of each. None while a
        prompt is computed: then rows are dear."""
        if not running or self._most == 0 or len(running) >= self._rows:
            return {}
        if any(request.is_prefilling for request in running):
            return {}
        found = [
            (request, memory, at)
            for request in running
            if (memory := self._memory(request)).allowed
            and (at := _last_time(request, memory)) is not None
        ]
        counts = self._choose([(r, memory) for r, memory, _ in found], len(running))
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

    def took(self, requests: int, rows: int, seconds: float) -> None:
        """Take in how long a wave of decoding requests took."""
        if rows <= self._rows:
            self._costs.learn(requests, rows, seconds)

    def _memory(self, request: Request) -> _Memory:
        memory = self._memories.get(request.id)
        if memory is None:
            first = max(request.chain.virtual, request.length - _LOOKBACK)
            memory = _Memory(_is_predictable(request), first, first + min(_GRAMS))
            self._memories[request.id] = memory
        return memory

    def _choose(self, found: Sequence[tuple[Request, _Memory]], requests: int) -> list[int]:
        """How many tokens to guess of each, so that most tokens come in a second."""
        best = [0] * len(found)
        highest = requests / self._costs.of(requests, requests)
        for reach in _REACHES if found else ():
            # The last token needs no row of its own.
            counts = [
                max(0, min(reach, self._most, r.sampling.max_tokens - r.outputs - 1))
                for r, _ in found
            ]
            rows = requests + sum(counts)
            if rows > self._rows or counts == best:
                break
            right = sum(m.right(count) for (_, m), count in zip(found, counts, strict=True))
            rate = (requests + right) / self._costs.of(requests, rows)
            if rate > highest:
                best, highest = counts, rate
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
