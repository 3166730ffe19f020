"""Folders of long jobs under way, <zoo>/work/<key>: a training that was killed goes on from there.

The key names everything that the result depends on, so that another job is not mistaken for it. A
job writes to its folder every minute and removes it at its end; what nobody wrote to for a week is
left over of a job that nobody went on with, and goes with the next sweep.
"""

import math
import shutil
import time
from pathlib import Path

from zoo.manifest import digest

_FOLDER = "work"
_STALE_S = 7 * 24 * 3600.0


def work_folder(root: Path, *facts: object) -> Path:
    """Where the work that these facts define is kept while it is under way."""
    return root / _FOLDER / digest(facts)[:24]


def stale_work(root: Path) -> list[Path]:
    """The folders that nobody wrote to for a week."""
    before = time.time() - _STALE_S
    return sorted(path for path in (root / _FOLDER).glob("*") if _written(path) < before)


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def forget(folder: Path) -> None:
    """Remove a folder; whoever goes on with its job begins anew."""
    shutil.rmtree(folder, ignore_errors=True)


def _written(folder: Path) -> float:
    """When a file was last put into a folder, in seconds since the epoch; what a job has removed
    meanwhile is not stale."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return math.inf
