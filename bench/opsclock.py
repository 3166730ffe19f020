"""How long each kernel takes: a clock around the calls of any `ext.ops.Ops`."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ext.ops import Ops

STEP_OPS = ("plan", "embed", "project", "attend", "activate", "accumulate", "add_norm")


class OpsClock:
    """Clocks the operations of a step of `ops`, from now on: `seconds` and `calls` by operation."""

    def __init__(self, ops: Ops) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STEP_OPS, 0.0)
        self.calls: Counter[str] = Counter()
        for name in STEP_OPS:
            setattr(ops, name, self._timed(name, getattr(ops, name)))

    def reset(self) -> None:
        """Begin anew."""
        self.seconds.update(dict.fromkeys(STEP_OPS, 0.0))
        self.calls.clear()

    def _timed(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.perf_counter

        def call(*given: object, **named: object) -> object:
            began = clock()
            result = operation(*given, **named)
            self.seconds[name] += clock() - began
            self.calls[name] += 1
            return result

        return call
