"""Fills the matrices of a chain that is loaded, in threads of a low priority: what was packed
before is taken up where it was kept, the rest is decoded and packed.

A packed form is mapped, so a chain that has them all is ready at once, and copied into memory of
our own afterwards. Weights in the 4 KiB pages of a file cost a step of one row a fifth of its speed
(on one core 12.6 GB/s, 15.3 from huge pages); the copy of a 135M model takes a core 0.2 s, or 0.8
where free memory is in pieces. What had to be packed is kept beside the zoo. One thread at a time
loads, one that runs no step meanwhile calls `move_in`; `workers.residency` and `workers.offline`
own one.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ext.ops import Matrix, Ops, PackedMatrix, PackingOps, Packs
from workers.chains import UnservableChain
from zoo.packed import Form, PackedForms

_log = logging.getLogger(__name__)
# Streams that are served beside have nearly all of a core that both want.
_NICENESS = 10
_REPORT_S = 2.0
_STOPPING = "the worker stops"
Made = TypeVar("Made")


class Packer:
    """Makes matrices for one kind of kernels; `forms` are those it may take up and keep."""

    def __init__(self, packs: Packs, forms: PackedForms | None) -> None:
        self._packs = packs
        self._forms = forms
        self._fillers = _threads(torch.get_num_threads(), "packer")
        self._keeper = _threads(1, "keeper")
        self._jobs: dict[Future[None], int] = {}  # and the bytes that are to be packed
        self._mapped: list[PackedMatrix] = []
        self._moves: deque[tuple[PackedMatrix, Future[np.ndarray]]] = deque()

    @property
    def is_moving(self) -> bool:
        """Whether matrices are still to move into memory of our own."""
        return bool(self._moves)

    def matrix(
        self, form: Form, shape: tuple[int, int], dtype: torch.dtype, weight: Callable[[], Tensor]
    ) -> Matrix:
        """A matrix [out, in], there when `settle` returns, and its size known; `weight` gives what
        to pack if need be, in a thread of ours."""
        kept = self._forms and self._forms.map(form)
        if kept is not None:
            matrix = self._packs.over(np.frombuffer(kept, np.uint8), *shape, dtype)
            self._mapped.append(matrix)
            return matrix
        matrix = self._packs.reserve(*shape, dtype)
        job = _submit(self._fillers, lambda: self._fill(matrix, form, weight))
        self._jobs[job] = shape[0] * shape[1] * dtype.itemsize
        return matrix

    def settle(self) -> None:
        """Wait until all matrices are there, and show how far that is. Raises what kept one of
        them from it, once nothing is under way any more."""
        jobs, mapped = self._jobs, self._mapped
        began = shown = time.monotonic()
        pending = set(jobs)
        while pending and not any(map(_has_failed, jobs)):
            _, pending = wait(pending, _REPORT_S, FIRST_EXCEPTION)
            if pending and time.monotonic() - shown > _REPORT_S:
                shown = time.monotonic()
                _show(jobs, pending)
        self.abandon()
        for job in jobs:
            if _has_failed(job):
                job.result()
        if any(job.cancelled() for job in jobs):
            raise UnservableChain(_STOPPING)
        if jobs:
            _log.info("packed %d weights in %.1f s", len(jobs), time.monotonic() - began)
        for matrix in mapped:
            copying = _submit(self._fillers, lambda matrix=matrix: self._packs.copy(matrix))
            self._moves.append((matrix, copying))

    def abandon(self) -> None:
        """Leave what is not filled yet; nothing is under way afterwards."""
        jobs, self._jobs, self._mapped = self._jobs, {}, []
        for job in jobs:
            job.cancel()
        wait(jobs)

    def move_in(self) -> None:
        """Let matrices lie in their copies, as far as there are any yet."""
        while self._moves and self._moves[0][1].done():
            matrix, copying = self._moves.popleft()
            if _has_failed(copying):
                _log.warning("weights stay in their file: %s", copying.exception())
            elif not copying.cancelled():
                self._packs.move(matrix, copying.result())

    def close(self) -> None:
        """End the threads; what is not written by now is not kept."""
        for threads in (self._fillers, self._keeper):
            threads.shutdown(cancel_futures=True)

    def _fill(self, matrix: PackedMatrix, form: Form, weight: Callable[[], Tensor]) -> None:
        stored = weight()
        self._packs.fill(matrix, stored.t() if form.turned else stored)
        if self._forms is not None:
            with contextlib.suppress(RuntimeError):  # no more is kept once the threads end
                self._keeper.submit(self._forms.write, form, matrix.memory.data)


def packer_for(ops: Ops, zoo: Path | None = None) -> Packer | None:
    """A packer for operations that repack weights, which takes up and keeps forms beside `zoo`."""
    if not isinstance(ops, PackingOps):
        return None
    return Packer(ops.packing, PackedForms(zoo, ops.packing.layout) if zoo else None)


def _show(jobs: dict[Future[None], int], pending: set[Future[None]]) -> None:
    left, whole = sum(jobs[job] for job in pending), sum(jobs.values())
    _log.info("packing weights: %d %% of %d MB", 100 - 100 * left // whole, whole >> 20)


def _has_failed(job: Future[Any]) -> bool:
    return job.done() and not job.cancelled() and job.exception() is not None


def _submit(threads: ThreadPoolExecutor, work: Callable[[], Made]) -> Future[Made]:
    try:
        return threads.submit(work)
    except RuntimeError as error:
        raise UnservableChain(_STOPPING) from error


def _threads(count: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=step_back)


def step_back() -> None:
    """Lower the priority of the calling thread, where threads have one of their own."""
    if sys.platform == "linux":
        own = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, own) + _NICENESS
        os.setpriority(os.PRIO_PROCESS, own, min(niceness, 19))
