"""A way into the attention of transformers' layers: whatever they would call, they call `Attend`.

Most architectures look their attention up in transformers' registry, where two names lead here; the
few that call torch's scaled_dot_product_attention themselves are caught at that call.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Names in transformers' registry: models make masks for the second alone.
SERVED, TRIED = "blockllm", "blockllm_trial"

# (q, k, v, mask, scale, extras) -> y; q and y [1, heads, rows, dim], k and v [1, KV heads, rows,
# dim]; scale None: 1 / sqrt(dim); extras: whatever else a layer asked of its attention.
Attend: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, float | None, dict[str, Any]], Tensor
]
# Arguments and results of torch functions.
Opaque: TypeAlias = Any

_SDPA = torch.nn.functional.scaled_dot_product_attention
_attend: ContextVar[Attend] = ContextVar("attend")


@contextmanager
def attending(attend: Attend, uses_registry: bool) -> Generator[None]:
    """Within it, layers of transformers attend through `attend`."""
    token = _attend.set(attend)
    try:
        if uses_registry:
            yield
        else:
            with _Caught():
                yield
    finally:
        _attend.reset(token)


def register() -> None:
    """Make both names known to transformers."""
    from transformers import AttentionInterface

    for name in (SERVED, TRIED):
        AttentionInterface.register(name, _registered)


def _registered(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **extras: Opaque,
) -> tuple[Tensor, None]:
    scale = extras.pop("scaling", None)
    attended = _attend.get()(query, key, value, attention_mask, scale, extras)
    return attended.transpose(1, 2).contiguous(), None


class _Caught(TorchFunctionMode):
    """Calls the current `Attend` in place of torch's scaled_dot_product_attention."""

    def __torch_function__(
        self,
        func: Callable[..., Opaque],
        types: Opaque,
        args: tuple[Opaque, ...] = (),
        kwargs: dict[str, Opaque] | None = None,
    ) -> Opaque:
        given = kwargs or {}
        return _caught(*args, **given) if func is _SDPA else func(*args, **given)


def _caught(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **extras: Opaque
) -> Tensor:
    return _attend.get()(query, key, value, attn_mask, extras.pop("scale", None), extras)
