"""The worker's loop: take commands, decide a wave, run it, take in its outcome, report.

One synchronous loop owns requests, pages and the runner; a loader thread makes chains resident
beside it. The engine is told of tokens, never asked."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch

from ext.ops import Ops
from ext.select import select_guessing, select_parking, select_replays
from workers import wire
from workers.batcher import Group, Wave, arrange, decide, follow, next_group
from workers.chains import Chains, ServedChain
from workers.gauge import Reading
from workers.guesses import Guesses
from workers.holdings import Holdings
from workers.loading import LoadedChain
from workers.memory import KvMemory
from workers.outcome import Outcomes, Send
from workers.pages import Arena
from workers.prefix import PrefixCache
from workers.provision import Provision
from workers.requests import Request, Requests, laid_out
from workers.residency import Eviction, LoadFailure, Residency
from workers.runner import Runner
from workers.sampler import Sampler, is_greedy
from workers.warmup import warm_up

_log = logging.getLogger(__name__)

_UNLOADED = "its variant is not loaded on this worker"


@dataclass(slots=True)
class Clock:
    """Where the loop's time goes, in seconds since start."""

    ops: float = 0.0
    decide: float = 0.0
    idle: float = 0.0
    started: float = field(default_factory=time.perf_counter)


class Worker:
    """All of a worker but its sockets: commands in, reports out, `step` in between. `read` gives
    the device's last reading."""

    def __init__(
        self,
        config: wire.WorkerConfig,
        ops: Ops,
        send: Send,
        read: Callable[[], Reading] = dict,
    ) -> None:
        self.config = config
        self._read = read
        self._ops = ops
        self._send = send
        arena = Arena(config.kv_bytes)
        self._memory = KvMemory(arena, page=config.page, max_sequences=config.max_sequences)
        self._cache = PrefixCache()
        self._requests = Requests(self._memory, self._cache, use_prefixes=config.prefix_cache)
        self._chains = Chains(config.max_rows)
        self._runner = Runner(ops, self._memory, self._requests, select_replays(ops))
        parking = select_parking(ops, config.parked_bytes)
        holdings = Holdings(ops, config.weight_bytes, config.weights, config.kv_dtype, parking)
        self._kv_dtype: wire.KvDtype | Literal["auto"] = holdings.kv_dtype
        self._residency = Residency(Path(config.zoo), holdings, config.load_format)
        self._provision = Provision(
            self._chains, self._runner, self._residency, send, self._warm_up
        )
        self._sampler = Sampler(ops.argmax)
        self._guesses = Guesses(config.speculative_tokens, select_guessing(ops))
        self._outcomes = Outcomes(self._requests, self._sampler, self._guesses, send, self._end)
        self._opened: dict[wire.RequestId, wire.Open] = {}
        self._turns: dict[Group, int] = {}
        self._last_wave: tuple[Wave, int] = (arrange([]), 0)
        self._greedy = False  # whether of its rows only the likeliest tokens are wanted
        self._counters = dict.fromkeys(("prompt_tokens", "dropped_messages", "failed_requests"), 0)
        self.clock = Clock()
        self.steps = 0
        self.is_draining = False

    @property
    def has_work(self) -> bool:
        """Whether a wave could run now."""
        return bool(self._requests.running or self._requests.waiting)

    @property
    def is_loading(self) -> bool:
        """Whether the loader thread has something under way."""
        return self._residency.is_busy

    @property
    def is_done(self) -> bool:
        """Whether a drain has come to its end."""
        return self.is_draining and not self.has_work and not self._provision.has_waiting

    def hello(self) -> wire.Hello:
        """Who this worker is and what it can hold."""
        return wire.Hello(
            version=wire.WIRE_VERSION,
            name=self.config.name,
            pid=os.getpid(),
            device=self.config.device,
            ops=self._ops.name,
            kv_bytes=self._memory.arena.total_bytes,
            weight_bytes=self.config.weight_bytes,
            page=self.config.page,
            max_sequences=self.config.max_sequences,
            dtype=self._ops.dtype,
            kv_dtype=self._kv_dtype,
            weights=self.config.weights,
        )

    def commit(self) -> bool:
        """Use an idle moment: see `Runner.commit`."""
        return self._runner.commit()

    def close(self) -> None:
        """End what runs beside the loop."""
        self._residency.stop()

    # ---- commands -------------------------------------------------------------------------------

    def take(self, command: wire.Command) -> None:
        """Act on one command of the engine."""
        match command:
            case wire.Load():
                self._provision.load(command)
            case wire.Evict(chain):
                for _, prompt in self._provision.evict(chain):
                    self._fail(chain, prompt.request, _UNLOADED)
            case wire.Open():
                self._opened[command.request] = command
            case wire.Prompt():
                self._begin(command)
            case wire.Close(request):
                self._close(request)
            case wire.Drain():
                self.is_draining = True

    def _begin(self, prompt: wire.Prompt) -> None:
        opened = self._opened.pop(prompt.request, None)
        if opened is None:
            self._counters["dropped_messages"] += 1
            return
        chain = self._provision.use(opened.chain)
        if chain is None:
            if not self._provision.wait(opened, prompt):
                self._fail(opened.chain, prompt.request, _UNLOADED)
            return
        known = np.frombuffer(prompt.tokens, "<i4")
        room = len(known) - prompt.emitted + opened.sampling.max_tokens
        reason = self._refusal(chain, known, room)
        if reason:
            self._fail(chain.id, prompt.request, reason)
            return
        self._requests.open(
            Request(
                id=prompt.request,
                chain=chain,
                sampling=opened.sampling,
                salt=opened.salt,
                priority=opened.priority,
                opened_at=time.monotonic(),
                tokens=laid_out(chain, known, room),
                length=chain.virtual + len(known),
                outputs=prompt.emitted,
            )
        )

    def _refusal(self, chain: ServedChain, known: np.ndarray, room: int) -> str:
        """Why a request can never run; empty if it can."""
        if len(known) == 0 or room < len(known):
            return f"{len(known)} tokens came for a request of {room}"
        if room > self._longest(chain):
            return f"{room} tokens do not fit this worker's KV memory"
        if room > chain.context - chain.virtual:
            return f"{room} tokens are more than its context of {chain.context - chain.virtual}"
        if known.min() < 0 or known.max() >= chain.vocabulary:
            return f"a token lies outside the vocabulary of {chain.vocabulary}"
        return ""

    def _longest(self, chain: ServedChain) -> int:
        """Tokens of the longest request that all pages together can hold."""
        return self._memory.largest_request(chain.kv, chain.num_layers) - chain.virtual

    def _close(self, request: wire.RequestId) -> None:
        self._opened.pop(request, None)
        self._provision.close(request)
        known = self._requests.find(request)
        if known is not None:
            self._end(known)

    def _end(self, request: Request) -> None:
        self._requests.close(request)
        self._sampler.forget(request.id)
        self._guesses.forget(request.id)
        self._provision.ended(request.chain)

    def _fail(self, chain: wire.ChainId, request: wire.RequestId, reason: str) -> None:
        self._counters["failed_requests"] += 1
        self._send(wire.Failed(chain, request, reason))

    def collect(self) -> None:
        """Take in what the loader thread has finished."""
        for outcome in self._residency.finished():
            match outcome:
                case LoadedChain(chain=chain):
                    longest = min(chain.context - chain.virtual, self._longest(chain))
                    for opened, prompt in self._provision.adopt(outcome, longest):
                        self._opened[prompt.request] = opened
                        self._begin(prompt)
                case LoadFailure(chain, reason):
                    for _, prompt in self._provision.reject(outcome):
                        self._fail(chain, prompt.request, reason)
                case Eviction():
                    self._provision.gone(outcome)

    def _warm_up(self, chain: ServedChain) -> None:
        """Where kernels are compiled when they first run, that is not to be a request's."""
        if self._ops.device.type == "cuda":
            warm_up(self._runner, self._memory, chain)

    # ---- one wave -------------------------------------------------------------------------------

    def step(self) -> bool:
        """Start what can start, run one wave, report its tokens; False if there was none to run."""
        began = time.perf_counter()
        now = time.monotonic()
        for request in self._requests.start():
            self._runner.fill(request)
            self._counters["prompt_tokens"] += request.prompt_tokens
            self._send(wire.Started(request.id, request.cached_tokens, now - request.opened_at))
        wave = self._next_wave(now)
        if wave is None:
            return False
        self.steps += 1
        # To enter it takes as long as a few operations: the process does it once for all steps.
        if torch.is_inference_mode_enabled():
            self._run(wave, began)
        else:
            with torch.inference_mode():
                self._run(wave, began)
        return True

    def _run(self, wave: Wave, began: float) -> None:
        """Run a wave that was begun then, and take in its outcome."""
        decided = time.perf_counter()
        self.clock.decide += decided - began
        try:
            logits = self._runner.run(wave, greedy=self._greedy)
            self.clock.ops += time.perf_counter() - decided
            self._outcomes.take(wave, logits)
            if wave.decodes:
                requests = [step.request for step in wave.steps]
                self._guesses.took(requests, wave.num_rows, time.perf_counter() - began)
        except (RuntimeError, MemoryError) as error:
            _log.exception("a wave of %d steps failed", len(wave.steps))
            # Raises where the device itself is lost: this worker ends, another takes its requests.
            self._ops.synchronize()
            self._abandon(wave, f"the worker could not compute it: {error}")

    def _next_wave(self, now: float) -> Wave | None:
        """What runs next: the last wave once more, while the same requests decode and nothing is
        guessed."""
        last, cuts = self._last_wave
        guesses: dict[wire.RequestId, int] = {}
        if self._guesses.may_be_made(len(self._requests.running)):
            guesses = self._guesses.make(next_group(self._requests.running.values(), self._turns))
        wave = None
        if not guesses and cuts == self._chains.cuts:
            wave = follow(last, self._requests.running)
        if wave is None:
            steps = decide(
                self._requests.running.values(),
                max_rows=self.config.max_rows,
                page=self.config.page,
                now=now,
                last_turn=self._turns,
                guesses=guesses,
            )
            wave = arrange(steps)
            self._greedy = all(is_greedy(step.request.sampling) for step in steps)
            # A wave that follows has all requests: it takes no other group's turn.
            if steps:
                self._turns[steps[0].request.chain.group] = self.steps
        self._last_wave = (wave, self._chains.cuts)
        return wave if wave.steps else None

    def _abandon(self, wave: Wave, reason: str) -> None:
        for step in wave.steps:
            if step.request.id in self._requests.running:
                self._fail(step.request.chain.id, step.request.id, reason)
                self._end(step.request)

    # ---- reports --------------------------------------------------------------------------------

    def status(self) -> wire.Status:
        """The heartbeat."""
        free, total = self._memory.usage()
        requests = self._requests
        return wire.Status(
            steps=self.steps,
            running=len(requests.running),
            waiting=len(requests.waiting),
            free_pages=free,
            cached_pages=self._cache.pages,
            total_pages=total,
            weight_bytes=self.config.weight_bytes,
            resident_bytes=self._residency.resident_bytes,
            rss_bytes=psutil.Process().memory_info().rss,
            chains=len(self._chains),
            counters={
                **self._counters,
                **self._outcomes.counters,
                "prefix_query_tokens": requests.query_tokens,
                "prefix_hit_tokens": requests.hit_tokens,
                "shared_pages": requests.shared_pages,
                "evicted_pages": self._cache.evicted_pages,
                "parked_chains": self._provision.parked_times,
                "recalled_weights": self._residency.recalled,
                **self._runner.replays,
            },
            seconds={
                "ops": self.clock.ops,
                "plan": self._runner.plans_s,
                "sample": self._outcomes.sample_s,
                "decide": self.clock.decide,
                "absorb": self._outcomes.absorb_s,
                "idle": self.clock.idle,
                "total": time.perf_counter() - self.clock.started,
            },
            blocks=self._blocks(),
            device=self._read(),
        )

    def _blocks(self) -> tuple[wire.BlockReport, ...]:
        users: dict[int, list[ServedChain]] = {}
        for chain in self._chains:
            for block in chain.blocks:
                users.setdefault(block.key, []).append(chain)
        return tuple(self._runner.report(key, chains) for key, chains in sorted(users.items()))
