"""One writer at a time: an advisory lock on a file beside the catalog, freed by the kernel at
death."""

import contextlib
import fcntl
import time
from collections.abc import Callable, Generator
from pathlib import Path

from zoo.errors import StoreFailure, ZooBusy

FILE_NAME = "lock"
_POLL_S = 0.05


@contextlib.contextmanager
def writing(root: Path, wait_s: float, say: Callable[[str], None]) -> Generator[None]:
    """Hold the zoo's writer lock. If another process has it, `say` so once and queue up for at most
    `wait_s` seconds; then raises ZooBusy."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / FILE_NAME).open("ab")
    except OSError as error:
        raise StoreFailure(f"{root} cannot be written: {error.strerror}") from error
    with file:
        if not _try(file.fileno()):
            say(f"another process is changing {root}: waiting for it to finish")
            _queue(file.fileno(), root, wait_s)
        yield


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _queue(descriptor: int, root: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not _try(descriptor):
        if time.monotonic() >= deadline:
            raise ZooBusy(
                f"another process has been changing {root} for {wait_s:g} s: try again later"
            )
        time.sleep(_POLL_S)
