"""What requests may say next, guessed from what they were told and have said: look-up of n-grams.

A step of few rows waits for memory, and more rows in it cost little. So behind the newest token of
a request its likely next ones are computed too; where they turn out right, one wave has made
several tokens. A row's bits do not depend on what shares its wave, and a guess is only taken where
the row before it chose just that token: answers are those without guesses. (Speculative decoding
after Leviathan et al. 2023, arXiv 2211.17192, with prompt look-up for a draft; draws depend on seed
and number alone, so sampled tokens are the same ones, too, not only as likely.)

A request whose guesses do not pay is left alone for a while.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from workers.requests import Request
from workers.sampler import is_shaped
from workers.wire import RequestId

# Lengths of the n-grams that are looked up, the surest first.
_GRAMS = (4, 3, 2)
# What a step with guesses takes longer, in steps; measured on CPUs with 2 to 8 rows.
_COST = 0.25
# What guesses have gained lately, in steps for each: the last one counts for so much. It starts
# at `_TRUST`; below nothing there is a pause of so many steps.
_RECENT, _TRUST, _PAUSE = 1 / 8, 0.5, 32

Gram = tuple[int, ...]


@dataclass(eq=False, slots=True)
class _Memory:
    """Of one request: whether it may be guessed for, where each n-gram last went on, of those that
    end before `upto`, what guesses have gained, and for how many steps there are none."""

    allowed: bool
    first: int
    upto: int
    follows: dict[Gram, int] = field(default_factory=dict)
    gain: float = _TRUST
    pause: int = 0


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

    def learn(self, request: Request, right: int) -> None:
        """Take in how many of a request's guesses were right."""
        memory = self._memories[request.id]
        memory.gain += _RECENT * (right - _COST - memory.gain)
        if memory.gain < 0:
            memory.gain, memory.pause = 0.0, _PAUSE

    def _guess(self, request: Request, most: int) -> int:
        memory = self._memories.get(request.id)
        if memory is None:
            first = request.chain.virtual
            memory = _Memory(_is_predictable(request), first, first + min(_GRAMS))
            self._memories[request.id] = memory
        if not memory.allowed:
            return 0
        if memory.pause > 0:
            memory.pause -= 1
            return 0
        # The last token needs no row of its own.
        count = min(most, request.sampling.max_tokens - request.outputs - 1)
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
