"""What the linear layers of a chain read on text: the second moments that deltas are fitted to.

The text is what nothing is judged on: the training rows of a file, or the built-in text that
surrogates learn from. It runs through the very kernels that will serve."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from torch import Tensor

from zoo.equivalence.text import Measure, read_corpus
from zoo.manifest import Variant
from zoo.progress import Progress
from zoo.store import Store

if TYPE_CHECKING:
    from zoo.door import Model

# How much text there is: so many sequences of so many tokens.
_SEQUENCES, _LENGTH = 64, 128
_SEED = 0
# Sequences that are run at once.
_BATCH = 8
_F32_BYTES = 4

# A linear layer: its unit's place in the chain, and its role there.
Place = tuple[int, str]


def calibration_text(store: Store, variant: Variant, data: Path | None) -> Tensor:
    """What a variant reads to be calibrated, int64 [sequences, length]: training rows of `data`, or
    the built-in text. Raises BadSource where there is too little of it."""
    measure = Measure(min(_LENGTH, variant.context - 1), held_out=1, train=_SEQUENCES)
    return read_corpus(store, variant, (data,) if data else (), measure, _SEED).train


class Calibration:
    """Text, int64 [sequences, length], and the loaded chain that reads it; `room_bytes` bound the
    moments that are in memory at once (0: a quarter of what is free)."""

    def __init__(
        self, model: "Model", text: Tensor, progress: Progress, room_bytes: int = 0
    ) -> None:
        self._model = model
        self._room = room_bytes
        self._batches = [part.tolist() for part in text.split(_BATCH)]
        self._progress = progress

    def moments(self, places: Sequence[Place]) -> Iterator[tuple[Place, Tensor]]:
        """Per linear layer that the text reaches the mean of x x^T over what it reads, float32 [in,
        in], while showing how many the caller is through with. The text is read as often as it
        takes for the moments of one reading to fit."""
        parts = list(self._parts(sorted(places)))
        for number, part in enumerate(parts, 1):
            label = f"reading text, {number} of {len(parts)}" if len(parts) > 1 else "reading text"
            batches = self._progress.track(self._batches, label)
            found = list(self._model.moments(batches, part).items())
            yield from self._progress.track(found, "fitting matrices to it")

    def _parts(self, places: Sequence[Place]) -> Iterator[list[Place]]:
        """The layers in order of depth, as many together as fit."""
        room = self._room or psutil.virtual_memory().available // 4
        part: list[Place] = []
        taken = 0
        for place in places:
            size = _F32_BYTES * self._model.width_at(place) ** 2
            if part and taken + size > room:
                yield part
                part, taken = [], 0
            part.append(place)
            taken += size
        if part:
            yield part
