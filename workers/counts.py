"""How often blocks ran and what they carried."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from workers.batcher import Stage


@dataclass(eq=False, slots=True)
class BlockCount:
    """How often a block ran and what it carried: `merged` runs had rows of several chains."""

    runs: int = 0
    rows: int = 0
    sequences: int = 0
    merged: int = 0


class Tally:
    """What a stage adds to its block's count each time that it runs."""

    def __init__(self, total: BlockCount, stage: Stage) -> None:
        self._total = total
        self._rows = sum(last - first for _, first, last in stage.runs)
        self._sequences = len(stage.steps)
        self._merged = len(stage.runs) > 1

    def count(self) -> None:
        """The stage has run."""
        self._total.runs += 1
        self._total.rows += self._rows
        self._total.sequences += self._sequences
        self._total.merged += self._merged


def tallies(stages: Sequence[Stage], counts: MutableMapping[int, BlockCount]) -> list[Tally]:
    """What some stages add to the counts of their blocks, by key, each time that they run."""
    begun = [stage for stage in stages if _is_first(stage)]
    return [Tally(counts.setdefault(stage.block, BlockCount()), stage) for stage in begun]


def _is_first(stage: Stage) -> bool:
    """Whether a stage begins its block, whose other pieces carry the same rows on."""
    begins = (block.first for block in stage.runs[0][0].blocks if block.key == stage.block)
    return stage.first == next(begins) and not stage.written
