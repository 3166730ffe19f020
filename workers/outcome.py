"""Takes in what a wave has computed: chooses tokens, moves requests on, reports.

Of a request whose next tokens were guessed, rows count for as long as each chose what the next one
was computed behind.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from workers import wire
from workers.batcher import Step, Wave
from workers.guesses import Guesses
from workers.requests import Request, Requests
from workers.running import Logits
from workers.sampler import Sampler, logprobs_of

Send = Callable[[wire.Report], None]


@dataclass(slots=True)
class _Chosen:
    """The rows whose tokens are taken, in order, and what they say."""

    rows: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)


class Outcomes:
    """What becomes of waves. `end` is told of requests that have ended; `counters` are sums since
    start, as are the seconds that sampling and all took."""

    def __init__(
        self,
        requests: Requests,
        sampler: Sampler,
        guesses: Guesses,
        send: Send,
        end: Callable[[Request], None],
    ) -> None:
        self._requests = requests
        self._sampler = sampler
        self._guesses = guesses
        self._send = send
        self._end = end
        self.counters = dict.fromkeys(("output_tokens", "draft_tokens", "accepted_tokens"), 0)
        self.sample_s = 0.0
        self.absorb_s = 0.0

    def take(self, wave: Wave, logits: Sequence[Logits]) -> None:
        """Choose tokens, advance requests, report."""
        began = time.perf_counter()
        for part in logits:
            if part.data is not None:
                self._score(part, part.data)
        for step in wave.steps:
            if not step.guesses:
                self._requests.advance(step.request, step.span, step.count)
        for part in logits:
            newest = range(len(part.steps)) if wave.is_bare else _newest(part)
            if newest:
                self._emit(part, newest)
        self.absorb_s += time.perf_counter() - began

    def _emit(self, part: Logits, newest: Sequence[int]) -> None:
        """Sample a token for each of these rows and send those that count in one message."""
        began = time.perf_counter()
        everything = len(newest) == len(part.steps)
        steps = part.steps if everything else [part.steps[i] for i in newest]
        tokens, logprobs = self._sampled(part, newest, steps)
        self.sample_s += time.perf_counter() - began
        chosen = self._choose(steps, tokens)
        self.counters["output_tokens"] += len(chosen.tokens)
        ids = tuple(request.id for request in chosen.requests)
        self._send(
            wire.Tokens(
                ids,
                tuple(chosen.tokens),
                tuple(chosen.indices),
                tuple(chosen.finished),
                {at: logprobs[row] for at, row in enumerate(chosen.rows) if row in logprobs},
            )
        )
        for request, ending in zip(chosen.requests, chosen.finished, strict=True):
            if ending != wire.CONTINUES:
                self._end(request)

    def _sampled(
        self, part: Logits, newest: Sequence[int], steps: Sequence[Step]
    ) -> tuple[list[int], dict[int, wire.Logprobs]]:
        """The next token of each of these rows, and logprobs by their place."""
        everything = len(newest) == len(part.steps)
        if part.data is None:
            assert part.best is not None
            best: list[int] = part.best.tolist()
            return best if everything else [best[i] for i in newest], {}
        requests = [step.request for step in steps]
        numbers = [
            r.outputs + part.positions[i] + 1 - r.length
            for i, r in zip(newest, requests, strict=True)
        ]
        data = part.data if everything else part.data[newest]
        return self._sampler.choose(data, requests, numbers)

    def _choose(self, steps: Sequence[Step], tokens: Sequence[int]) -> _Chosen:
        """Take the tokens of rows, up to the first of a request that ends it or that was guessed
        otherwise."""
        chosen = _Chosen()
        passed: Request | None = None  # whose further rows do not count
        for row, (step, token) in enumerate(zip(steps, tokens, strict=True)):
            request = step.request
            if request is passed:
                continue
            ending = _ending(request, token)
            chosen.rows.append(row)
            chosen.requests.append(request)
            chosen.tokens.append(token)
            chosen.indices.append(request.outputs)
            chosen.finished.append(ending)
            goes_on = ending == wire.CONTINUES
            if not goes_on or (step.guesses and not request.is_guessed(token)):
                passed = request
            if goes_on:
                self._requests.append(request, token)
        for step in dict.fromkeys(step for step in steps if step.guesses):
            self._check(step, chosen.requests.count(step.request))
        return chosen

    def _check(self, step: Step, rows: int) -> None:
        """Of a step with guesses so many rows count."""
        self._requests.advance(step.request, step.span, rows)
        self._guesses.learn(step.request, step.guesses, rows - 1)
        self.counters["draft_tokens"] += step.guesses
        self.counters["accepted_tokens"] += rows - 1

    def _score(self, part: Logits, data: Tensor) -> None:
        """Report logprobs of prompt tokens where they are wanted: row i scores the token after
        it."""
        by_request: dict[wire.RequestId, list[int]] = {}
        for i, step in enumerate(part.steps):
            if step.request.sampling.prompt_logprobs >= 0 and step.request.is_prefilling:
                by_request.setdefault(step.request.id, []).append(i)
        for request_id, known in by_request.items():
            request = part.steps[known[0]].request
            rows = [i for i in known if part.positions[i] + 1 < request.length]
            if rows:
                nexts = [int(request.tokens[part.positions[i] + 1]) for i in rows]
                scored = logprobs_of(data[rows], nexts, request.sampling.prompt_logprobs)
                first = part.positions[rows[0]] + 1 - request.chain.virtual
                self._send(wire.Scored(request_id, first, tuple(scored)))


def _newest(part: Logits) -> list[int]:
    """The rows behind which no token of their request is known."""
    known = zip(part.positions, part.steps, strict=True)
    return [i for i, (at, step) in enumerate(known) if at + 1 >= step.request.length]


def _ending(request: Request, token: int) -> int:
    """Whether a request goes on after its next token."""
    done = request.outputs + 1
    if token in request.sampling.stop_token_ids and done > request.sampling.min_tokens:
        return wire.STOPPED
    return wire.LENGTH if done >= request.sampling.max_tokens else wire.CONTINUES
