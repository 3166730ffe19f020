"""A worker without its sockets, driven by hand in this process: its real loop, step by step."""

import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ext.ops import Ops
from workers import wire
from workers.worker import Worker
from zoo.catalog import Catalog

_LOADING_S = 0.01


class WorkerFailed(Exception):
    """The worker did not do what was asked of it; the message says why."""


class Loop:
    """`with Loop(config, ops) as loop` drives one worker over the zoo of its config."""

    def __init__(self, config: wire.WorkerConfig, ops: Ops) -> None:
        self._reports: list[wire.Report] = []
        self._zoo = Path(config.zoo)
        self._chains: dict[str, wire.ChainId] = {}
        self._next = 0
        self.worker = Worker(config, ops, self._reports.append)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of all weights."""
        for chain in self._chains.values():
            self.worker.take(wire.Evict(chain))
        self._settle()

    def load(self, names: Iterable[str], context: int = 0) -> None:
        """Make variants resident, for sequences of up to `context` tokens (0: what they have).
        Raises WorkerFailed."""
        with closing(Catalog(self._zoo)) as catalog:
            for name in names:
                variant = catalog.variant(name)
                number = self._chains[name] = wire.ChainId(len(self._chains) + 1)
                units = len(catalog.chain(variant.chain).units)
                longest = min(context or variant.context, variant.context)
                self.worker.take(wire.Load(number, variant.chain, 0, units, longest))
        self._settle()
        self.tokens()

    def open(self, model: str, prompt: Sequence[int], max_tokens: int) -> wire.RequestId:
        """Ask for a greedy answer."""
        self._next += 1
        number = wire.RequestId(self._next)
        sampling = wire.Sampling(max_tokens=max_tokens)
        self.worker.take(wire.Open(number, self._chains[model], (), sampling, len(prompt)))
        self.worker.take(wire.Prompt(number, np.asarray(prompt, "<i4").tobytes()))
        return number

    def close(self, numbers: Iterable[wire.RequestId]) -> None:
        """Forget requests, ended or not."""
        for number in numbers:
            self.worker.take(wire.Close(number))
        self.tokens()

    def step(self) -> None:
        """Run one wave. Raises WorkerFailed if there is none to run."""
        if not self.worker.step():
            raise WorkerFailed("the worker in this process has requests and runs none")

    def start(self, numbers: Iterable[wire.RequestId]) -> None:
        """Step until each of the requests has its first token. Raises WorkerFailed."""
        waiting = set(numbers)
        while waiting:
            self.step()
            for report in self.tokens():
                waiting.difference_update(report.requests)

    def tokens(self) -> list[wire.Tokens]:
        """Tokens since the last call. Raises WorkerFailed."""
        reports, self._reports[:] = list(self._reports), []
        for report in reports:
            if isinstance(report, wire.Failed):
                raise WorkerFailed(f"the worker in this process failed: {report.reason}")
        return [report for report in reports if isinstance(report, wire.Tokens)]

    def _settle(self) -> None:
        while self.worker.is_loading:
            self.worker.collect()
            time.sleep(_LOADING_S)
