"""Memory of the host: what is left of it, and large mappings that the system backs with huge pages.

Resident weights lie in these side by side: reading one of a megabyte or two through 4 KiB pages
costs a quarter of the bandwidth. What operations give is freed soon and asked for again: it stays
with the C library in between.
"""

import ctypes
import mmap
import threading
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from torch import Tensor

_CHUNK = 32 << 20
_HUGE_PAGE = 2 << 20
_POPULATE = 23  # MADV_POPULATE_WRITE of Linux 5.14
_LINE = 64
_LIBC = ctypes.CDLL(None)
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
# mallopt's parameters in glibc's malloc.h: what is smaller than the one is no mapping of its own,
# and so much of what was freed at the heap's end is kept.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 128 << 20


def keep_freed() -> None:
    """Let the C library keep freed memory, where it can be told to. Results of a megabyte or more
    would otherwise be given back to the system, and at the next operation come back page by page,
    zeroed: up to half of the time that it takes to multiply a thousand rows."""
    mallopt = getattr(_LIBC, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class HostMemory(NamedTuple):
    """Bytes that this process and its siblings may have, and what is left of them."""

    total: int
    available: int


def host_memory(group: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """The machine's memory, or what a container may have of it (cgroup v2). Memory that holds
    files, or what the kernel can rebuild, is left, too."""
    memory = psutil.virtual_memory()
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        kept = sum(int(stat[name]) for name in _RECLAIMABLE)
    except (OSError, ValueError, KeyError):  # no container, or without a limit ("max")
        return HostMemory(memory.total, memory.available)
    left = max(0, limit - used + kept)
    return HostMemory(min(memory.total, limit), min(memory.available, left))


def reserve(nbytes: int) -> mmap.mmap:
    """Zeroed private memory: committed as it is written, returned to the system when dropped."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def commit(memory: Tensor, first: int, last: int) -> bool:
    """Back the bytes [first, last) of host memory before they are written, which leaves what they
    hold; False where the system does not do that."""
    begin = (memory.data_ptr() + first) // mmap.PAGESIZE * mmap.PAGESIZE
    end = memory.data_ptr() + min(last, memory.nbytes)
    return _LIBC.madvise(*map(ctypes.c_size_t, (begin, end - begin)), _POPULATE) == 0


class Arena:
    """Hands out arrays of bytes, in any thread. A dropped array's pages go back to the system at
    once; its addresses stay unused until its whole mapping is dropped."""

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = _CHUNK
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> np.ndarray:
        """`nbytes` zero bytes, uint8, aligned to a cache line."""
        if nbytes > _CHUNK // 4:
            return np.frombuffer(reserve(nbytes), dtype=np.uint8)
        with self._lock:
            if self._chunk is None or self._used + nbytes > _CHUNK:
                self._chunk, self._used = reserve(_CHUNK), 0
            chunk, begin = self._chunk, self._used
            self._used += -(-nbytes // _LINE) * _LINE
        array = np.frombuffer(chunk, dtype=np.uint8, count=nbytes, offset=begin)
        finalizer = weakref.finalize(array, _release, chunk, begin, begin + nbytes)
        finalizer.atexit = False
        return array


def _release(chunk: mmap.mmap, begin: int, end: int) -> None:
    """Gives back the pages that lie wholly within [begin, end)."""
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        chunk.madvise(mmap.MADV_DONTNEED, first, length)
