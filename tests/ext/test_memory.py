"""Memory of pages: taken as it is written, or before."""

import ctypes
import mmap
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from ext.memory import commit, host_memory, reserve


def resident(memory: torch.Tensor) -> int:
    """Bytes of whole pages of memory that the system backs; what a mapping beside it, which it may
    list as one with this, has does not count."""
    pages = ctypes.create_string_buffer(-(-memory.nbytes // mmap.PAGESIZE))
    at, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes)
    assert ctypes.CDLL(None).mincore(at, size, pages) == 0
    return mmap.PAGESIZE * sum(page & 1 for page in pages.raw)


KERNEL = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


@pytest.mark.skipif(KERNEL < (5, 14), reason="needs Linux 5.14")
def test_memory_is_backed_part_by_part_and_keeps_what_it_holds():
    nbytes = 9 << 20
    memory = torch.from_numpy(np.frombuffer(reserve(nbytes), np.uint8, nbytes))
    memory[5] = 7
    assert resident(memory) < 4 << 20
    assert commit(memory, 0, 4 << 20)
    assert 4 << 20 <= resident(memory) < 8 << 20
    assert commit(memory, 4 << 20, 12 << 20)
    assert resident(memory) >= nbytes
    assert (int(memory[5]), int(memory.sum())) == (7, 7)


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    whole = host_memory(tmp_path)
    assert 0 < whole.available <= whole.total
    files = {
        "memory.max": "1000000",
        "memory.current": "600000",
        "memory.stat": "anon 5\ninactive_file 50000\nactive_file 7000\nslab_reclaimable 300\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert host_memory(tmp_path) == (1_000_000, 457_300)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path).total == whole.total
