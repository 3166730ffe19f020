"""What requests may say next, guessed from what they were told and have said: look-up of n-grams.

A step of few rows waits for memory, and more rows in it cost little. So behind the newest token of
a request its likely next ones are computed too; where they turn out right, one wave has made
several tokens. A row's bits do not depend on what shares its wave, and a guess is only taken where
the row before it chose just that token: answers are those without guesses. (Speculative decoding
after Leviathan et al. 2023, arXiv 2211.17192, with prompt look-up for a draft; draws depend on seed
and number alone, so sampled tokens are the same ones, too, not only as likely.)

Each request is guessed for as far as its last guesses held, and is left alone for a while where
they did not.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from workers.requests import Request
from workers.sampler import is_shaped
from workers.wire import RequestId

_GRAM = 3
_FIRST_REACH = 2
_LONGEST_PAUSE = 64

Gram = tuple[int, ...]


@dataclass(eq=False, slots=True)
class _Memory:
    """Of one request: whether it may be guessed for, where each n-gram before `upto` last went on,
    how many tokens to guess, and for how many steps none after so many misses in a row."""

    allowed: bool
    upto: int
    follows: dict[Gram, int] = field(default_factory=dict)
    reach: int = _FIRST_REACH
    pause: int = 0
    misses: int = 0


class Guesses:
    """Guesses for requests that decode: at most `most` tokens for each, in waves of at most `rows`
    rows in all."""

    def __init__(self, most: int, rows: int) -> None:
        self._most = most
        self._rows = rows
        self._memories: dict[RequestId, _Memory] = {}

    def forget(self, request: RequestId) -> None:
        """Drop what is remembered of a request."""
        self._memories.pop(request, None)

    def make(self, running: Collection[Request]) -> dict[RequestId, int]:
        """Lay guesses behind the known tokens of these requests; how many of each. None while a
        prompt is computed: then rows are dear."""
        if not running or self._most == 0 or 2 * len(running) > self._rows:
            return {}
        if any(request.is_prefilling for request in running):
            return {}
        most = min(self._most, self._rows // len(running) - 1)
        made = {request.id: self._guess(request, most) for request in running}
        return {number: count for number, count in made.items() if count > 0}

    def learn(self, request: Request, guessed: int, right: int) -> None:
        """Take in how many of a request's guesses were right."""
        memory = self._memories[request.id]
        if right > 0:
            memory.misses = 0
            memory.reach = min(2 * memory.reach, self._most) if right == guessed else right
        else:
            memory.misses += 1
            memory.reach = 1
            memory.pause = min(1 << memory.misses, _LONGEST_PAUSE)

    def _guess(self, request: Request, most: int) -> int:
        memory = self._memories.get(request.id)
        if memory is None:
            first = request.chain.virtual + _GRAM
            memory = self._memories[request.id] = _Memory(_is_predictable(request), first)
        if not memory.allowed:
            return 0
        if memory.pause > 0:
            memory.pause -= 1
            return 0
        # The last token needs no row of its own.
        left = request.sampling.max_tokens - request.outputs - 1
        count = min(most, memory.reach, left)
        at = _last_time(request, memory) if count > 0 else None
        if at is None:
            return 0
        request.guess(np.resize(request.tokens[at : request.length], count))
        return count


def _is_predictable(request: Request) -> bool:
    """Whether rows of a request can be computed together: none is chosen by tokens before it but
    through the model, whose layers are known not to mind what shares their wave."""
    return not is_shaped(request.sampling) and not request.chain.is_foreign


def _last_time(request: Request, memory: _Memory) -> int | None:
    """Where a request went on when it last stood behind its last n-gram; takes in the n-grams
    before that."""
    if request.length < memory.upto:
        return None
    tokens = request.tokens[memory.upto - _GRAM : request.length].tolist()
    grams = list(zip(*(tokens[i:] for i in range(_GRAM)), strict=False))
    newest = grams.pop()
    memory.follows.update(zip(grams, range(memory.upto, request.length), strict=True))
    memory.upto = request.length
    return memory.follows.get(newest)
