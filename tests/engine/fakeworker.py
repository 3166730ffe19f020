"""A worker without weights: it speaks the whole wire protocol and makes tokens by a rule.

    python fakeworker.py '<WorkerConfig JSON>'

Output token number n of a request is `token_at(first prompt token, n)`, whoever makes it, so a
replay shows whether any token was lost or sent twice. FAKEWORKER holds a `Script` as JSON.
"""

import contextlib
import os
import sys
import time

import msgspec
import zmq

from workers import wire

FIRST_TOKEN, NUM_TOKENS = 32, 90


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What this worker does out of the ordinary."""

    interval_s: float = 0.002
    load_s: float = 0.0
    capacity: int = 512
    version: int = wire.WIRE_VERSION
    exits_at_once: bool = False
    refuses: tuple[str, ...] = ()
    silent_after_s: float = 0.0


def token_at(first: int, index: int) -> int:
    """The rule: printable characters of the tests' tokenizer."""
    return FIRST_TOKEN + (first * 7 + index * 13) % NUM_TOKENS


class Running:
    """One request."""

    def __init__(self, opening: wire.Open, first: int, emitted: int) -> None:
        self.opening = opening
        self.first = first
        self.made = emitted


class FakeWorker:
    """The loop: take commands, make a wave of tokens, tell the engine."""

    def __init__(self, config: wire.WorkerConfig, script: Script) -> None:
        self.config = config
        self.script = script
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, config.name.encode())
        self.socket.setsockopt(zmq.LINGER, 200)
        self.socket.connect(config.endpoint)
        self.chains: dict[int, str] = {}
        self.opened: dict[int, wire.Open] = {}
        self.waiting: list[Running] = []
        self.running: dict[int, Running] = {}
        self.counters = dict.fromkeys(("loads", "evicts", "opens", "closes", "replays"), 0)
        self.is_draining = False
        self.steps = 0

    def run(self) -> None:
        """Serve until drained or until stdin closes."""
        began = beat = time.monotonic()
        self.say(self.hello())
        os.set_blocking(0, False)
        while not (self.is_draining and not self.running and not self.waiting):
            if self.socket.poll(int(self.script.interval_s * 1000)):
                self.take_all()
            if os.read(0, 1) == b"" if _stdin_is_ready() else False:
                return
            silent = self.script.silent_after_s
            if silent and time.monotonic() - began > silent:
                time.sleep(3600)
            self.wave()
            if time.monotonic() - beat > 0.05:
                beat = time.monotonic()
                self.say(self.status())
        self.say(wire.Drained())

    def say(self, report: wire.Report) -> None:
        """Send a report."""
        self.socket.send(wire.encode(report))

    def take_all(self) -> None:
        """Take every command that has come."""
        with contextlib.suppress(zmq.Again):
            while True:
                self.take(wire.decode_command(self.socket.recv(zmq.NOBLOCK)))

    def take(self, command: wire.Command) -> None:
        """Act on one command."""
        match command:
            case wire.Load(chain, digest):
                self.counters["loads"] += 1
                time.sleep(self.script.load_s)
                if digest in self.script.refuses:
                    self.say(wire.Failed(chain, wire.RequestId(-1), "its weights are refused"))
                    return
                self.chains[chain] = digest
                self.say(wire.Loaded(chain, 10, 100, 0.01, self.script.capacity))
            case wire.Evict(chain):
                self.counters["evicts"] += 1
                del self.chains[chain]
                self.say(wire.Evicted(chain, 10))
            case wire.Open(request):
                self.counters["opens"] += 1
                self.opened[request] = command
            case wire.Prompt(request, tokens, emitted):
                self.counters["replays"] += emitted > 0
                opening = self.opened.pop(request)
                assert opening.chain in self.chains
                known = memoryview(tokens).cast("i")
                assert len(known) == opening.prompt_tokens + emitted
                self.waiting.append(Running(opening, known[0], emitted))
            case wire.Close(request):
                self.counters["closes"] += 1
                self.running.pop(request, None)
                self.waiting = [w for w in self.waiting if w.opening.request != request]
            case wire.Drain():
                self.is_draining = True

    def wave(self) -> None:
        """A token for each running request."""
        while self.waiting and len(self.running) < self.config.max_sequences:
            started = self.waiting.pop(0)
            self.running[started.opening.request] = started
            self.say(wire.Started(started.opening.request, 1, 0.0))
            self.score(started.opening)
        if not self.running:
            return
        self.steps += 1
        rows = [(running.opening, *self.next(running)) for running in self.running.values()]
        logprobs = {
            row: wire.Logprobs(token, -0.5, 1, (token,), (-0.5,))
            for row, (opening, token, _, _) in enumerate(rows)
            if opening.sampling.logprobs >= 0
        }
        self.say(
            wire.Tokens(
                tuple(opening.request for opening, *_ in rows),
                tuple(token for _, token, _, _ in rows),
                tuple(index for _, _, index, _ in rows),
                tuple(ended for *_, ended in rows),
                logprobs,
            )
        )
        for opening, _, _, ended in rows:
            if ended:
                del self.running[opening.request]

    def next(self, running: Running) -> tuple[int, int, int]:
        """Token, its index, and whether the request ends with it."""
        sampling, index = running.opening.sampling, running.made
        token = token_at(running.first, index)
        running.made += 1
        if token in sampling.stop_token_ids and running.made > sampling.min_tokens:
            return token, index, wire.STOPPED
        ended = wire.LENGTH if running.made >= sampling.max_tokens else wire.CONTINUES
        return token, index, ended

    def score(self, opening: wire.Open) -> None:
        """Logprobs of the prompt, where wanted."""
        if opening.sampling.prompt_logprobs >= 0:
            scores = [wire.Logprobs(40, -1.0, 2) for _ in range(1, opening.prompt_tokens)]
            self.say(wire.Scored(opening.request, 1, tuple(scores)))

    def hello(self) -> wire.Hello:
        """The greeting."""
        config = self.config
        return wire.Hello(
            version=self.script.version,
            name=config.name,
            pid=os.getpid(),
            device=config.device,
            ops="fake",
            kv_bytes=1 << 20,
            weight_bytes=1 << 20,
            page=config.page,
            max_sequences=config.max_sequences,
            weights=config.weights,
            dtype="float32" if config.dtype == "auto" else config.dtype,
            kv_dtype="float32" if config.kv_dtype == "auto" else config.kv_dtype,
        )

    def status(self) -> wire.Status:
        """The heartbeat."""
        block = wire.BlockReport("b" * 64, 0, 3, 100, len(self.chains), self.steps, 0, 0, 0)
        return wire.Status(
            steps=self.steps,
            running=len(self.running),
            waiting=len(self.waiting),
            free_pages=64 - len(self.running),
            cached_pages=0,
            total_pages=64,
            weight_bytes=1 << 20,
            resident_bytes=100,
            rss_bytes=1 << 20,
            chains=len(self.chains),
            counters=dict(self.counters),
            seconds={},
            blocks=(block,),
            device={
                "utilization": 0.5,
                "memory_used_bytes": 3e9,
                "memory_total_bytes": 8e9,
                "power_w": 321.0,
                "nvlinks": 4.0,
            },
        )


def _stdin_is_ready() -> bool:
    return bool(zmq.select([sys.stdin.fileno()], [], [], 0)[0])


def main() -> None:
    """One worker process."""
    script = msgspec.json.decode(os.environ.get("FAKEWORKER", "{}"), type=Script)
    if script.exits_at_once:
        sys.exit(3)
    config = msgspec.json.decode(sys.argv[1], type=wire.WorkerConfig)
    FakeWorker(config, script).run()


if __name__ == "__main__":
    main()
