"""Which units make a block: the longest runs that every chain using them uses whole.

Pure. Blocks follow from the chains alone, so adding a variant splits them where chains part and
removing it merges them again, without anything being rewritten. Called by the zoo's listings, the
engine's planner and the workers' residency.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Unit = TypeVar("Unit", bound=Hashable)


def partition(chains: Iterable[Sequence[Unit]]) -> list[tuple[Unit, ...]]:
    """Blocks of all chains, in the order in which the chains first use them.

    Two units stand in one block when each is always the other's only neighbour on that side.
    """
    known = [chain for chain in map(tuple, chains) if chain]
    before: dict[Unit, set[Unit | None]] = {}
    after: dict[Unit, set[Unit | None]] = {}
    for chain in known:
        for left, unit, right in zip((None, *chain[:-1]), chain, (*chain[1:], None), strict=True):
            before.setdefault(unit, set()).add(left)
            after.setdefault(unit, set()).add(right)
    blocks: dict[Unit, list[Unit]] = {}
    home: dict[Unit, Unit] = {}
    for chain in known:
        left = None
        for unit in chain:
            if unit not in home:
                joined = left is not None and before[unit] == {left} and after[left] == {unit}
                home[unit] = home[left] if joined and left is not None else unit
                blocks.setdefault(home[unit], []).append(unit)
            left = unit
    return [tuple(block) for block in blocks.values()]


def cut(chain: Sequence[Unit], blocks: Iterable[tuple[Unit, ...]]) -> list[tuple[int, int]]:
    """Where the blocks lie in a chain: [first, last) per block. Raises ValueError if they do not
    fit."""
    by_first = {block[0]: block for block in blocks}
    spans: list[tuple[int, int]] = []
    position = 0
    while position < len(chain):
        block = by_first.get(chain[position])
        if block is None or tuple(chain[position : position + len(block)]) != block:
            raise ValueError(f"no block starts at position {position} of the chain")
        spans.append((position, position + len(block)))
        position += len(block)
    return spans
