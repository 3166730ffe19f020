"""Which positions a row may see, read from the mask functions of transformers.

While `Masks.made` holds, models ask for their masks here, and each mask is remembered with the
pattern that it stands for, judged at positions as far out as the context goes.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor

from zoo.families.attending import TRIED

MaskFunction: TypeAlias = Callable[[Any, Any, Tensor, Tensor], Tensor]

# What else transformers tells whoever makes its masks.
Told: TypeAlias = Any


class Masks:
    """The masks of one trial, and what they mean; `context` is the longest sequence."""

    def __init__(self, context: int) -> None:
        self.context = context
        self._known: dict[int, tuple[Tensor, MaskFunction]] = {}

    @contextmanager
    def made(self) -> Generator[None]:
        """Within it, models under trial make their masks here."""
        from transformers import AttentionMaskInterface

        AttentionMaskInterface.register(TRIED, _make)
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def make(self, function: MaskFunction, q_length: int, kv_length: int) -> Tensor:
        """The mask of that many rows, bool [1, 1, rows, positions]."""
        rows = torch.arange(q_length)[:, None]
        mask = _judge(function, rows, torch.arange(kv_length)[None])[None, None].clone()
        self._known[id(mask)] = (mask, function)
        return mask

    def pattern(self, mask: Tensor | None) -> str | int | None:
        """How many positions back a mask's rows see (None: all), or why it cannot be served."""
        if mask is None or not self.knows(mask):
            return "attend under a mask of their own, such as ALiBi or both directions"
        return self._judged(self._known[id(mask)][1])

    def knows(self, tensor: Tensor) -> bool:
        """Whether this is a mask made here."""
        return id(tensor) in self._known

    def _judged(self, function: MaskFunction) -> str | int | None:
        last = self.context
        window: int | None = None
        for row in (last, last - 1, last // 2 + 1, 1, 0):
            seen = _judge(function, torch.tensor(row), torch.arange(last + 1))
            count = int(seen.sum())
            if bool(seen[row + 1 :].any()):
                return "attend in both directions"
            if not bool(seen[row + 1 - count : row + 1].all()):
                return "attend to scattered positions"
            if row == last:
                window = count if count <= last else None
            if count != min(row + 1, window or row + 1):
                return "attend within chunks"
        return window


_current: ContextVar[Masks] = ContextVar("masks")


def _make(
    batch_size: int, q_length: int, kv_length: int, mask_function: MaskFunction, **_: Told
) -> Tensor:
    """What transformers calls for a mask; a trial has one sequence, without padding."""
    return _current.get().make(mask_function, q_length, kv_length)


def _judge(function: MaskFunction, row: Tensor, position: Tensor) -> Tensor:
    """A mask function at rows and positions, which are broadcast."""
    zero = torch.zeros((), dtype=torch.long)
    shape = torch.broadcast_shapes(row.shape, position.shape)
    return torch.as_tensor(function(zero, zero, row, position)).expand(shape)
