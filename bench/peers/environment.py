"""Environments of peers' own: virtual environments and builds, made once, with progress."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from bench.peers.peer import PeerMissing

_LINE_EVERY_S = 15.0
# Where CPU builds of torch are, for machines whose package index has only those for GPUs.
_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
Say = Callable[[str], None]


def own_version(package: str) -> str:
    """The version that this project runs with."""
    return version(package)


class Workshop:
    """A folder in which something is installed by running commands."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self._say = say
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> Path:
        """What the commands printed."""
        return self.folder / "install.log"

    @property
    def python(self) -> Path:
        """The interpreter of its virtual environment."""
        return self.folder / "venv" / "bin" / "python"

    def say(self, text: str) -> None:
        """A remark, one line."""
        self._say(text)

    def run(
        self, label: str, command: Sequence[str | Path], variables: Mapping[str, str] | None = None
    ) -> None:
        """Run a command, saying now and then how far it is. Raises PeerMissing."""
        self._say(label)
        try:
            with self.log.open("ab") as log:
                process = subprocess.Popen(
                    [str(word) for word in command],
                    cwd=self.folder,
                    env=dict(os.environ) | dict(variables or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                assert process.stdout is not None
                told = time.monotonic()
                for line in process.stdout:
                    log.write(line)
                    if time.monotonic() - told > _LINE_EVERY_S:
                        told = time.monotonic()
                        self._say(f"{label}: {_latest(line)}")
                process.stdout.close()
        except OSError as error:
            raise PeerMissing(f"{label} failed: {error}") from error
        if process.wait() != 0:
            raise PeerMissing(f"{label} failed: see {self.log}")

    def once(self, stamp: str, key: str, work: Callable[[], None]) -> None:
        """Do `work` unless it was done before for the same `key`."""
        done = self.folder / f".{stamp}"
        if done.is_file() and done.read_text() == key:
            return
        work()
        done.write_text(key)

    def packages(self, requirements: Sequence[str]) -> None:
        """A virtual environment with these packages. Raises PeerMissing."""

        def make() -> None:
            if not self.python.exists():
                self.run("making an environment", [sys.executable, "-m", "venv", "venv"])
            pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check"]
            label = f"installing {requirements[0]}"
            try:
                self.run(label, [*pip, *requirements])
            except PeerMissing:
                self.run(label, [*pip, "--extra-index-url", _TORCH_INDEX, *requirements])

        self.once("packages", " ".join(requirements), make)


def _latest(line: bytes) -> str:
    """The last state of a bar that redraws itself, or the line."""
    return line.decode(errors="replace").strip().rpartition("\r")[2][:80]


def flags_of_cpu() -> frozenset[str]:
    """The instruction sets that the kernel names."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
