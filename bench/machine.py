"""What a measurement ran on: the machine, the versions, the commit, and who else was busy.

`ROOT` is where the project lies.
"""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import psutil

from ext.build import supported

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "numpy", "msgspec", "pyzmq", "uvloop", "transformers", "safetensors")


class Machine(msgspec.Struct, frozen=True):
    """The hardware as far as figures depend on it. `isa` are the native kernels' instruction sets,
    best first."""

    cpu: str
    cores: int
    memory_bytes: int
    isa: tuple[str, ...]
    kernel: str

    @property
    def kind(self) -> str:
        """A short name for machines whose figures may be compared, fit for a file name."""
        return f"{self.cores}core-{self.isa[0] if self.isa else platform.machine()}"


def this_machine() -> Machine:
    """The machine this runs on."""
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        isa=supported(),
        kernel=platform.release(),
    )


def versions() -> dict[str, str]:
    """Python's and the installed packages' versions."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def commit() -> str:
    """The source's commit, with "+dirty" if the tree differs from it; "unknown" without git."""
    revision = _git("rev-parse", "HEAD")
    if not revision:
        return "unknown"
    return revision + ("+dirty" if _git("status", "--porcelain") else "")


class Busy:
    """How many cores other processes kept busy between start and `others`: above a few
    hundredths, a figure says less of what was measured."""

    def __init__(self, pids: tuple[int, ...] = ()) -> None:
        self._pids = (os.getpid(), *pids)
        self._all = _busy_s()
        self._own = self._spent_s()
        self._began = time.perf_counter()

    def others(self, ended_s: float = 0.0) -> float:
        """Cores' worth of work by others; `ended_s` is CPU time of own processes that ended."""
        elapsed = time.perf_counter() - self._began
        own = self.own_s() + ended_s
        return max(0.0, (_busy_s() - self._all - own) / elapsed)

    def own_s(self) -> float:
        """CPU time of the own processes that were named."""
        return self._spent_s() - self._own

    def _spent_s(self) -> float:
        total = 0.0
        for pid in self._pids:
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total


def _busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
