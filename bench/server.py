"""The real server as a child process: `python -m engine launch` on free ports over some zoo."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.machine import ROOT
from bench.memory import Footprint, footprints
from engine.client import Client

_READY = re.compile(r"BlockLLM is ready: HTTP (\S+)  ZMQ (\S+)\n")
_START_LIMIT_S, _STOP_LIMIT_S = 600.0, 60.0
# A worker's heartbeat and its longest sleep: after so long a quiet worker's status is of now.
_FRESH_S = 1.5


class ServerFailed(Exception):
    """The server did not start or stop as it should; the message names its log."""


class Server:
    """`with Server(zoo, log, *flags) as server` serves `zoo` until the block ends.

    `ready_s` is the time from the start of the process to its ready line; `stop_s`, afterwards, the
    time from the interrupt to the exit.
    """

    def __init__(self, zoo: Path, log: Path, *flags: str) -> None:
        self._log = log
        self._command = [
            *(sys.executable, "-m", "engine", "launch", "--zoo", str(zoo.absolute())),
            *("--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", *flags),
        ]
        self.url, self.endpoint = "", ""
        self.ready_s = self.stop_s = 0.0

    def __enter__(self) -> Self:
        """Start it and wait until it is ready. Raises ServerFailed."""
        began = time.perf_counter()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        watchdog = threading.Timer(_START_LIMIT_S, self._process.kill)
        watchdog.start()
        try:
            ready = _READY.fullmatch(self._process.stdout.readline())
        finally:
            watchdog.cancel()
        if ready is None:
            self._kill()
            raise ServerFailed(f"the server did not start: see {self._log}")
        self.ready_s = time.perf_counter() - began
        self.url, self.endpoint = ready[1], ready[2]
        self._client = Client(self.endpoint, timeout_s=60)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Interrupt it and wait for its end. Raises ServerFailed unless it exits with 0."""
        self._client.__exit__()
        began = time.perf_counter()
        self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        self.stop_s = time.perf_counter() - began
        self._kill()
        if error is None and code != 0:
            how = "did not stop" if code is None else f"stopped with exit status {code}"
            raise ServerFailed(f"the server {how}: see {self._log}")

    @property
    def pids(self) -> tuple[int, ...]:
        """The engine's process and its children."""
        return tuple(one.pid for one in self.memory())

    def memory(self) -> list[Footprint]:
        """Memory of each process."""
        return footprints(self._process.pid)

    def status(self, *, fresh: bool = True) -> dict[str, Any]:
        """The engine's status; `fresh` waits until the workers' part of it is of now."""
        if fresh:
            time.sleep(_FRESH_S)
        return self._client.status()

    def metrics(self) -> dict[str, float]:
        """Sums of the metrics over their labels, by sample name; finished requests also by reason,
        as `blockllm_requests_total:length` and so on."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self._client.metrics()):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
                if "finish_reason" in sample.labels:
                    name = f"{sample.name}:{sample.labels['finish_reason']}"
                    sums[name] = sums.get(name, 0.0) + sample.value
        return sums

    def _kill(self) -> None:
        """Leave no process behind."""
        family = [self._process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            family += [child.pid for child in parent.children(recursive=True)]
        for pid in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
