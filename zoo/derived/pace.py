"""How fast chains run through the workers' kernels, side by side so that a busy machine slows all
of them alike."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from zoo.progress import Progress

if TYPE_CHECKING:
    from zoo.door import Model

_PROMPT, _NEW = 64, 24
_BATCH = 8
_ROUNDS = 5


class Pace(msgspec.Struct, frozen=True):
    """Seconds: a decoding step of one and of eight sequences, and a prompt of 64 tokens; `work_s`
    is processor time of a decoding step of one sequence, which others on the machine disturb less.
    Each the least of five."""

    decode_1_s: float
    decode_8_s: float
    prefill_s: float
    work_s: float


def paces(models: Mapping[str, "Model"], progress: Progress) -> dict[str, Pace]:
    """The pace of each, measured in turns."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in models}
    for _ in progress.track(range(_ROUNDS), "measuring speed"):
        for name, model in models.items():
            found[name].append(_round(model))
    return {
        name: Pace(*(min(column) for column in zip(*rows, strict=True)))
        for name, rows in found.items()
    }


def _round(model: "Model") -> tuple[float, ...]:
    prefill, first = _seconds(model, 1, 1)
    whole, work = _seconds(model, 1, 1 + _NEW)
    many = _seconds(model, _BATCH, 1 + _NEW)[0] - _seconds(model, _BATCH, 1)[0]
    return (whole - prefill) / _NEW, many / _NEW, prefill, (work - first) / _NEW


def _seconds(model: "Model", batch: int, tokens: int) -> tuple[float, float]:
    """By the clock, and of the processor."""
    prompts = [[(17 * row + 31 * place) % 97 for place in range(_PROMPT)] for row in range(batch)]
    began, worked = time.perf_counter(), time.process_time()
    model.generate(prompts, tokens)
    return time.perf_counter() - began, time.process_time() - worked
