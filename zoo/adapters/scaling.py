"""Rank and scale of a LoRA's modules, their patterns matched as peft matches them."""

import math
import re
from collections.abc import Mapping

import msgspec

from zoo.errors import BadAdapter


class Scaling(msgspec.Struct, frozen=True):
    """What a LoRA's settings say of ranks and scales."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    def of(self, path: str) -> tuple[int, float]:
        """Rank and scale of the module at `path`."""
        rank = _by_pattern(self.rank_pattern, path, self.r)
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        if rank < 1:
            raise BadAdapter(f"the rank of {path!r} is {rank}: it must be at least 1")
        return int(rank), alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
    except re.error as error:
        raise BadAdapter(f"a rank or alpha pattern of the adapter is not valid: {error}") from error
    return default
