"""How the layers of an architecture attend, heard from what they say in a trial."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from zoo.families.masks import Masks

# What layers may say to their attention without changing what it computes. Windows are read off the
# masks, as transformers' own default attention does.
_HARMLESS = {
    "cache_position",
    "dropout",
    "dropout_p",
    "enable_gqa",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "sliding_window",
    "use_cache",
}
_FEATURES = {
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias on attention scores",
}


@dataclass(frozen=True, slots=True)
class Heads:
    """A layer's attention; see `zoo.manifest.ForeignSpec`."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    copies: int


class Listener:
    """Stands in for attention, every row for itself; `heard` are the layers that attended. What
    cannot be served is told to `refuse`."""

    def __init__(self, masks: Masks, refuse: Callable[[str], NoReturn]) -> None:
        self.heard: list[Heads] = []
        self._masks = masks
        self._refuse = refuse

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        extras: dict[str, Any],
    ) -> Tensor:
        """See `zoo.families.attending.Attend`."""
        self._check(q, k, v, extras)
        window = self._masks.pattern(mask)
        if isinstance(window, str):
            self._refuse(window)
        if scale is not None and not isinstance(scale, float | int):
            self._refuse("scale their attention by what they compute")
        copies = _copies(k, v) if k.shape[1] == q.shape[1] else 1
        self.heard.append(
            Heads(
                heads=q.shape[1],
                kv_heads=k.shape[1] // copies,
                head_dim=q.shape[3],
                scale=1 / math.sqrt(q.shape[3]) if scale is None else float(scale),
                window=window,
                copies=copies,
            )
        )
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        return 0.5 * q + 0.3 * k + v

    def _check(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Any]) -> None:
        for key, value in extras.items():
            if value is not None and value is not False and key not in _HARMLESS:
                self._refuse(f"use {_FEATURES.get(key, f'{key!r} in their attention')}")
        if k.shape != v.shape or q.shape[3] != k.shape[3]:
            self._refuse("have keys and values of different widths")
        if q.shape[1] % k.shape[1]:
            self._refuse(f"share {k.shape[1]} KV heads among {q.shape[1]} heads")


def _copies(k: Tensor, v: Tensor) -> int:
    """How often every KV head stands in a row: the largest number that fits keys and values."""
    heads = k.shape[1]
    for count in range(heads, 1, -1):
        if heads % count == 0 and all(
            torch.equal(t, t[:, ::count].repeat_interleave(count, dim=1)) for t in (k, v)
        ):
            return count
    return 1
