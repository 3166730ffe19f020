"""Requests from their arrival to their end: queued, handed to workers, moved on, replayed, closed.

With its colleagues `provision` (chains) and `controller` (clients) the only caller of `state`,
`admission` and `planner`: an event changes the state, decisions follow, messages leave.
"""

import array
import itertools
import logging
import sys
import time
from collections.abc import Callable

from engine import api
from engine.admission import Admission, Ticket
from engine.delivery import Ask, Delivery
from engine.errors import DeadlineExceeded, EngineError, EngineFailed, Overloaded, PromptTooLong
from engine.events import Advanced, Arrived, Began, Closed, Opened, Returned
from engine.ledger import Ledger
from engine.metrics import Metrics
from engine.planner import NoPlan, plan
from engine.refusal import rejected
from engine.sampling import answer_budget, capped
from engine.state import Cluster, Live
from workers import wire
from workers.wire import ChainId, RequestId

log = logging.getLogger(__name__)

# Workers that a request may lose before it is given up: perhaps it is what kills them.
MAX_ATTEMPTS = 3


class Dispatch:
    """All live requests. `send` reaches workers, `reply` clients, `release` is told of chains that
    a request left."""

    def __init__(
        self,
        cluster: Cluster,
        admission: Admission,
        metrics: Metrics,
        send: Callable[[str, wire.Command], None],
        reply: Callable[[bytes, api.Reply], None],
        release: Callable[[ChainId], None],
    ) -> None:
        self.ledger = Ledger()
        self._cluster = cluster
        self._admission = admission
        self._metrics = metrics
        self._send = send
        self._reply = reply
        self._release = release
        self._numbers = itertools.count(1)
        self._deliveries: dict[RequestId, Delivery] = {}
        self._deadlines: dict[RequestId, float] = {}

    def number(self) -> RequestId:
        """A number that no request and no attempt ever had."""
        return RequestId(next(self._numbers))

    # ---- from clients ---------------------------------------------------------------------------

    def arrive(self, number: RequestId, delivery: Delivery) -> None:
        """Queue a checked request, or refuse it. Raises the EngineError that its client gets."""
        ask = delivery.ask
        if self._cluster.residency(ask.chain) == "failed":
            raise _not_loaded(ask.model, self._cluster.failure(ask.chain))
        ticket = _ticket(number, ask)
        refused = self._admission.admit(ticket)
        if refused is ticket:
            raise self._queue_is_full()
        self._cluster.apply(
            Arrived(number, ask.chain, ask.prompt, ask.wire_sampling, ask.salt, ask.priority)
        )
        self._deliveries[number] = delivery
        if ask.sampling.deadline_s is not None:
            self._deadlines[number] = delivery.arrived_s + ask.sampling.deadline_s
        self._metrics.arrived(delivery)
        self._reply(delivery.client, delivery.accepted())
        if refused is not None:
            self.drop(refused.request, self._queue_is_full())
        self.pump()

    def cancel(self, number: RequestId) -> None:
        """End a request because its client wants no more of it."""
        live = self._cluster.requests[number]
        self._withdraw(live)
        self._finish(live, "cancelled", None)

    def drop(self, number: RequestId, error: EngineError) -> None:
        """End a request with an error."""
        self._withdraw(self._cluster.requests[number])
        delivery = self._close(number)
        self._metrics.rejected(error.reason)
        log.info("request %d on %s is dropped: %s", number, delivery.ask.model, error)
        self._reply(delivery.client, rejected(delivery.id, error))

    def expire(self, now: float) -> None:
        """Drop requests whose deadline has passed."""
        for number in [n for n, deadline in self._deadlines.items() if deadline <= now]:
            waited = f"{self._deliveries[number].ask.sampling.deadline_s:g} s"
            message = f"The answer was not complete within its deadline of {waited}."
            self.drop(number, DeadlineExceeded(message, "deadline_s"))

    def drop_all(self, error: EngineError) -> None:
        """Drop every request."""
        for number in list(self._cluster.requests):
            self.drop(number, error)

    def has(self, number: RequestId) -> bool:
        """Whether a request waits or runs."""
        return number in self._deliveries

    # ---- to workers -----------------------------------------------------------------------------

    def pump(self) -> None:
        """Hand out waiting requests for as long as workers have room."""
        now = time.monotonic()
        while (ticket := self._admission.take(self._is_servable, now)) is not None:
            try:
                self._open(self._cluster.requests[ticket.request], now)
            except PromptTooLong as error:
                self.drop(ticket.request, error)

    def _is_servable(self, number: ChainId) -> bool:
        return not isinstance(plan(self._cluster, number), NoPlan)

    def _open(self, live: Live, now: float) -> None:
        hops = plan(self._cluster, live.chain)
        assert not isinstance(hops, NoPlan)
        delivery = self._deliveries[live.number]
        sampling = self._sampling(live, delivery)
        attempt = self.number()
        self._cluster.apply(Opened(live.number, attempt, hops, sampling))
        self._metrics.opened(delivery, now)
        prompt_tokens = len(live.prompt)
        opening = wire.Open(
            attempt, live.chain, hops, sampling, prompt_tokens, live.salt, live.priority
        )
        for worker in {hop.worker: None for hop in hops}:
            self._send(worker, opening)
        tokens = _int32(live.prompt + live.emitted)
        self._send(hops[0].worker, wire.Prompt(attempt, tokens, len(live.emitted)))

    def _sampling(self, live: Live, delivery: Delivery) -> wire.Sampling:
        """What was asked for, within what the pages hold: that is known for sure only now."""
        ask = delivery.ask
        capacity = self._cluster.capacity(live.chain)
        wanted = ask.sampling.max_tokens
        budget = answer_budget(len(live.prompt), wanted, ask.context, capacity)
        return capped(live.sampling, max(budget, 1), scores_prompt=not delivery.has_begun)

    def _withdraw(self, live: Live) -> None:
        """Take a request back from its workers."""
        if live.attempt is not None:
            for worker in {hop.worker: None for hop in live.hops}:
                self._send(worker, wire.Close(live.attempt))

    # ---- from workers ---------------------------------------------------------------------------

    def begin(self, started: wire.Started) -> None:
        """A worker computes a request now; so it can take another one to wait."""
        live = self._cluster.attempts.get(started.request)
        if live is not None:
            self._cluster.apply(Began(live.number, started.cached_tokens))
            self.pump()

    def score(self, scored: wire.Scored) -> None:
        """Probabilities of a prompt's tokens."""
        live = self._cluster.attempts.get(scored.request)
        if live is not None:
            self._deliveries[live.number].score(scored.first, scored.logprobs)

    def advance(self, wave: wire.Tokens) -> None:
        """The tokens of a wave go to their clients."""
        now = time.monotonic()
        rows, gaps = self._cluster.news(wave)
        self._cluster.apply(Advanced(wave, rows))
        has_ended = False
        for row in rows:
            live = self._cluster.attempts.get(wave.requests[row])
            if live is None:
                # A stop string ended it at an earlier row.
                continue
            delivery = self._deliveries[live.number]
            message, reason, stop = delivery.push(
                wave.tokens[row], wave.finished[row], wave.logprobs.get(row)
            )
            self._metrics.token(delivery, now)
            self._admission.charge(delivery.ask.tenant, 1)
            self._reply(delivery.client, message)
            if reason is not None:
                has_ended = True
                if wave.finished[row] == wire.CONTINUES:
                    self._withdraw(live)
                self._finish(live, reason, stop)
        for number in gaps & self._cluster.requests.keys():
            live = self._cluster.requests[number]
            self._withdraw(live)
            self._replay(live, "a token of it was lost")
        if has_ended or gaps:
            self.pump()

    def fail(self, attempt: RequestId, reason: str) -> None:
        """A worker cannot serve a request."""
        live = self._cluster.attempts.get(attempt)
        if live is not None:
            self.drop(live.number, EngineFailed(reason))
            self.pump()

    def abandon(self, worker: str) -> None:
        """Replay every request of a worker that is lost."""
        for number in list(self._cluster.workers[worker].opened):
            self._replay(self._cluster.requests[number], f"worker {worker} is lost")

    def drop_unserved(self, number: ChainId) -> None:
        """Drop the waiting requests of a chain that no worker can load."""
        if self._cluster.residency(number) != "failed":
            return
        reason = self._cluster.failure(number)
        for request in list(self._cluster.chains[number].requests):
            if self._cluster.requests[request].attempt is None:
                model = self._deliveries[request].ask.model
                self.drop(request, _not_loaded(model, reason))

    def _replay(self, live: Live, reason: str) -> None:
        """Continue elsewhere from the tokens that are known, or give up."""
        delivery = self._deliveries[live.number]
        self._cluster.apply(Returned(live.number))
        self._metrics.returned(delivery)
        if live.attempts >= MAX_ATTEMPTS:
            message = f"The request failed {live.attempts} times, at last because {reason}."
            self.drop(live.number, EngineFailed(message))
            return
        log.warning(
            "request %d on %s is replayed from its token %d: %s",
            live.number,
            delivery.ask.model,
            len(live.emitted),
            reason,
        )
        self._admission.put_back(_ticket(live.number, delivery.ask))

    # ---- the end --------------------------------------------------------------------------------

    def _finish(self, live: Live, reason: api.FinishReason, stop: str | int | None) -> None:
        delivery = self._close(live.number)
        finished = delivery.finished(reason, stop, live.cached_tokens or 0)
        self._metrics.finished(delivery, reason, time.monotonic())
        log.debug(
            "request %d on %s: %s after %d + %d tokens",
            live.number,
            delivery.ask.model,
            reason,
            finished.prompt_tokens,
            finished.completion_tokens,
        )
        self._reply(delivery.client, finished)

    def _close(self, number: RequestId) -> Delivery:
        live = self._cluster.requests[number]
        delivery = self._deliveries.pop(number)
        self._metrics.ended(delivery, was_open=live.attempt is not None)
        self._cluster.apply(Closed(number))
        self._admission.remove(number)
        self._deadlines.pop(number, None)
        self.ledger.remove(number)
        self._release(live.chain)
        return delivery

    def _queue_is_full(self) -> Overloaded:
        wait_s = self._admission.retry_after_s()
        message = f"The queue of {self._admission.limit} requests is full: try again later."
        return Overloaded(message, retry_after_s=wait_s)


def _ticket(number: RequestId, ask: Ask) -> Ticket:
    return Ticket(number, ask.tenant, ask.chain, len(ask.prompt), ask.priority)


def _not_loaded(model: str, reason: str) -> EngineFailed:
    return EngineFailed(f"The model {model} cannot be loaded: {reason.rstrip('.')}.")


def _int32(tokens: list[int]) -> bytes:
    """Little endian, as the wire has it."""
    packed = array.array("i", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
