"""A worker without its sockets: the real loop driven by hand over a real zoo."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ext.ops import Dtype, Ops
from ext.select import select_ops
from workers import wire
from workers.worker import Worker
from zoo.catalog import Catalog


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    finished: int = wire.CONTINUES
    cached: int = 0
    logprobs: list[wire.Logprobs] = field(default_factory=list)
    scored: list[wire.Logprobs] = field(default_factory=list)
    failed: str = ""

    @property
    def is_done(self) -> bool:
        return bool(self.failed) or self.finished != wire.CONTINUES


def kernels(name: str, dtype: Dtype = "auto") -> Ops:
    """Those of a CPU by name; "cuda": a device's, in Triton's interpreter where there is none."""
    if name != "cuda":
        return select_ops("cpu", name, 2, dtype)
    if torch.cuda.is_available():
        return select_ops("cuda:0", "native", 0, dtype)
    from ext.cuda.ops import CudaOps

    return CudaOps("cpu", dtype)


class LocalWorker:
    def __init__(self, zoo: Path, ops: str = "auto", **config: object) -> None:
        settings = {"kv_bytes": 64 << 20, "threads": 2, "max_rows": 256, **config}
        self.config = wire.WorkerConfig("w", "", str(zoo), ops=ops, **settings)
        self.worker = Worker(self.config, kernels(ops, self.config.dtype), self.reports_append)
        self.reports: list[wire.Report] = []
        self.answers: dict[int, Answer] = {}
        self.chains: dict[str, int] = {}
        self._zoo = zoo
        self._next = 0

    def reports_append(self, report: wire.Report) -> None:
        self.reports.append(wire.decode_report(wire.encode(report)))

    def load(self, *names: str) -> None:
        catalog = Catalog(self._zoo)
        for name in names:
            variant = catalog.variant(name)
            number = 1 + max(self.chains.values(), default=0)
            self.chains[name] = number
            units = len(catalog.chain(variant.chain).units)
            self.worker.take(wire.Load(number, variant.chain, 0, units, variant.context))
        while self.worker.is_loading:
            self.worker.collect()
            time.sleep(0.002)
        failures = [r.reason for r in self.reports if isinstance(r, wire.Failed)]
        assert not failures, failures

    def evict(self, name: str) -> None:
        self.worker.take(wire.Evict(self.chains.pop(name)))
        while self.worker.is_loading:
            self.worker.collect()

    def open(self, name: str, prompt: Sequence[int], **options: object) -> Answer:
        salt = options.pop("salt", 0)
        emitted = options.pop("emitted", 0)
        sampling = wire.Sampling(**options)
        self._next += 1
        self.worker.take(wire.Open(self._next, self.chains[name], (), sampling, len(prompt), salt))
        tokens = np.asarray(prompt, "<i4").tobytes()
        self.worker.take(wire.Prompt(self._next, tokens, emitted))
        answer = self.answers[self._next] = Answer()
        return answer

    def close(self, answer: Answer) -> None:
        number = next(n for n, a in self.answers.items() if a is answer)
        self.worker.take(wire.Close(number))

    def step(self) -> bool:
        ran = self.worker.step()
        self.absorb()
        return ran

    def run(self) -> None:
        while self.worker.has_work:
            assert self.step(), "requests wait and nothing runs"

    def absorb(self) -> None:
        reports, self.reports = self.reports, []
        for report in reports:
            match report:
                case wire.Tokens():
                    for i, request in enumerate(report.requests):
                        answer = self.answers[request]
                        assert report.indices[i] == len(answer.tokens)
                        answer.tokens.append(report.tokens[i])
                        answer.finished = report.finished[i]
                        if i in report.logprobs:
                            answer.logprobs.append(report.logprobs[i])
                case wire.Started():
                    self.answers[report.request].cached = report.cached_tokens
                case wire.Scored():
                    self.answers[report.request].scored.extend(report.logprobs)
                case wire.Failed():
                    self.answers[report.request].failed = report.reason
                case _:
                    pass

    @property
    def status(self) -> wire.Status:
        return self.worker.status()
