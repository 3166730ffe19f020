"""How long each kernel takes: a clock around the calls of any `ext.ops.Ops`."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ext.ops import Ops

STEP_OPS = (
    "plan",
    "embed",
    "project",
    "project_gated",
    "best",
    "attend",
    "split",
    "activate",
    "accumulate",
    "add_norm",
    "scale",
    "detour",
    "replay",
)


class OpsClock:
    """Clocks the operations of a step of `ops`, from now on: `seconds` and `calls` by operation."""

    def __init__(self, ops: Ops) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STEP_OPS, 0.0)
        self.calls: Counter[str] = Counter()
        # Operations that are made of others count once, as themselves.
        self._is_within = False
        for name in STEP_OPS:
            if hasattr(ops, name):
                setattr(ops, name, self._timed(name, getattr(ops, name)))

    def reset(self) -> None:
        """Begin anew."""
        self.seconds.update(dict.fromkeys(STEP_OPS, 0.0))
        self.calls.clear()

    def _timed(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.perf_counter

        def call(*given: object, **named: object) -> object:
            if self._is_within:
                return operation(*given, **named)
            self._is_within = True
            began = clock()
            try:
                return operation(*given, **named)
            finally:
                self.seconds[name] += clock() - began
                self.calls[name] += 1
                self._is_within = False

        return call
