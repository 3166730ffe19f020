"""The real engine over real processes and sockets, on free ports."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from engine.client import Client

ROOT = Path(__file__).resolve().parent.parent.parent


class Running:
    """One `python -m engine launch`."""

    def __init__(self, zoo: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "engine", "launch", "--zoo", str(zoo), *flags]
        command += ["--http", "127.0.0.1:0", "--zmq", "tcp://127.0.0.1:0"]
        environment = os.environ | {"BLOCKLLM_HOME": str(zoo.parent / "home")}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"HTTP (\S+)\s+ZMQ (\S+)", line)
        if found is None:
            self.stop(signal.SIGKILL)
            self.close()
            raise AssertionError(f"it did not start: {line}{''.join(self.log)}")
        self.http, self.zmq = found.groups()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def client(self) -> Client:
        return Client(self.zmq)

    def status(self) -> dict:
        with self.client() as client:
            return client.status()

    def worker(self) -> dict:
        return self.status()["workers"][0]

    def settled(self, timeout_s: float = 20.0) -> dict:
        """The worker's state once nothing runs and a fresh heartbeat says so."""
        time.sleep(1.1)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            worker = self.worker()
            if worker.get("running") == 0 and worker.get("waiting") == 0:
                return worker
            time.sleep(0.3)
        raise AssertionError(f"requests are still running: {self.worker()}")

    def wait_for(self, name: str, present: bool = True, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        with self.client() as client:
            while time.monotonic() < deadline:
                models = {m.id: m.residency for m in client.models()}
                if (models.get(name) == "loaded") if present else (name not in models):
                    return
                time.sleep(0.1)
        raise AssertionError(f"{name} is {'not ' if present else 'still '}served")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 40.0) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        return code

    def close(self) -> None:
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def running(zoo: Path, *flags: str) -> Iterator[Running]:
    """Launch, and make sure that nothing stays behind."""
    engine = Running(zoo, *flags)
    try:
        yield engine
    finally:
        if engine.process.poll() is None:
            engine.stop()
        engine.close()
