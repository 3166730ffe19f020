"""Libraries that are no servers: a process in their environment computes the batches of a load.

The load's requests go through a pipe, all at once, and what comes back is when each token was
there.
"""

import os
import subprocess
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from bench.job import Job, Outcome, asks
from bench.peers.peer import PeerMissing
from bench.processes import end, family
from bench.spread import spread

SCRIPT = Path(__file__).parent / "hosts" / "batches.py"
_VARIABLES = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Answer(msgspec.Struct):
    """Seconds from the sending of a load to each token of each request."""

    times: list[list[float]]


class Hosted:
    """`with Hosted(...) as playing` keeps the process until the block ends."""

    def __init__(self, command: Sequence[str | Path], log: Path) -> None:
        self._command = [str(word) for word in command]
        self._log = log
        self.start_s = 0.0

    def __enter__(self) -> Self:
        """Start it and wait for its models. Raises PeerMissing."""
        began = time.perf_counter()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=dict(os.environ) | _VARIABLES,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        try:
            self._read()
        except PeerMissing:
            end(self._process)
            raise
        self.start_s = time.perf_counter() - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        end(self._process)

    @property
    def pids(self) -> tuple[int, ...]:
        """See `Playing`."""
        return family(self._process.pid)

    def play(self, job: Job) -> Outcome:
        """See `Playing`."""
        todo = asks(job)
        batch = {
            "prompts": [ask.prompt for ask in todo],
            "models": [ask.model for ask in todo],
            "new": job.output_tokens[1],
        }
        pipe = self._process.stdin
        assert pipe is not None
        began = time.perf_counter()
        try:
            pipe.write(msgspec.json.encode(batch) + b"\n")
            pipe.flush()
        except OSError as error:
            raise PeerMissing(f"a library's process ended: see {self._log}") from error
        answer = msgspec.json.decode(self._read(), type=Answer)
        return outcome_of(answer, job, time.perf_counter() - began)

    def spent(self) -> dict[str, float]:
        """See `Playing`."""
        return {}

    def _read(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerMissing(f"a library's process ended: see {self._log}")
        return line


def outcome_of(answer: Answer, job: Job, seconds: float) -> Outcome:
    """What a client of a server would have seen, had there been one. Pure."""
    tokens = sum(len(times) for times in answer.times)
    gaps = [b - a for times in answer.times for a, b in pairwise(times)]
    firsts = [times[0] for times in answer.times]
    ends = [times[-1] for times in answer.times]
    ttft, itl, e2e = (spread([1000 * one for one in many]) for many in (firsts, gaps, ends))
    return Outcome(
        requests=job.requests,
        finished={"length": len(answer.times)},
        left=0,
        refused={},
        mismatched=sum(len(times) != job.output_tokens[1] for times in answer.times),
        prompt_tokens=job.requests * job.prompt_tokens[1],
        output_tokens=tokens,
        left_tokens=0,
        told_tokens=tokens,
        cached_tokens=0,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        cpu_s=0.0,
        ttft_ms=ttft,
        itl_ms=itl,
        e2e_ms=e2e,
        lag_ms=spread([]),
    )
