"""Runs chains over held-out text beside a reference chain, with the units, kernels and batches that
serve clients."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.equivalence.agreement import Agreement, Reading, log_probabilities, read, sum_up
from zoo.equivalence.chains import bounded
from zoo.equivalence.corpus import Corpus, Passage
from zoo.manifest import Manifests
from zoo.progress import Progress

if TYPE_CHECKING:
    from zoo.door import Model, Offline

SEED = 0
# Logits of so many positions are in memory at once, and so many bytes of the reference's are kept.
_BATCH_TOKENS = 512
_KEPT_BYTES = 1 << 30


class Probe:
    """One reference chain and one corpus; any number of other chains is measured against them.

    Vocabularies may differ in what no text uses: padding at the end is left out."""

    def __init__(
        self, offline: "Offline", corpus: Corpus, reference: Manifests, progress: Progress
    ) -> None:
        self._offline = offline
        self._corpus = corpus
        self._progress = progress
        self._context = max(len(passage.ids) for passage in corpus.passages) + 1
        self._reference = offline.load(bounded(reference, self._context))
        self._kept: dict[int, Tensor] = {}
        self._room = _KEPT_BYTES

    def agreement(self, chain: Manifests, label: str) -> Agreement:
        """How a chain agrees with the reference. Raises ZooError."""
        model = self._offline.load(bounded(chain, self._context))
        try:
            readings: list[Reading] = []
            batches = list(_batches(self._corpus.passages))
            for batch in self._progress.track(batches, label):
                readings += self._read(model, batch)
        finally:
            self._offline.drop(model)
        return sum_up(readings, SEED)

    def close(self) -> None:
        """Free the reference."""
        self._kept.clear()
        self._offline.drop(self._reference)

    def _read(self, model: "Model", batch: Sequence[int]) -> list[Reading]:
        passages = [self._corpus.passages[place] for place in batch]
        known = self._references(batch)
        asked = model.logits([passage.ids for passage in passages])
        readings: list[Reading] = []
        for passage, reference, logits in zip(passages, known, asked, strict=True):
            width = min(reference.shape[1], logits.shape[1])
            targets = torch.tensor(passage.ids[passage.first :])
            readings.append(
                read(_cut(reference, width), _answer(passage, logits)[:, :width], targets)
            )
        return readings

    def _references(self, batch: Sequence[int]) -> list[Tensor]:
        """Log-probabilities of the reference at the predicted positions, kept while there is
        room."""
        missing = [place for place in batch if place not in self._kept]
        passages = [self._corpus.passages[place] for place in missing]
        made: dict[int, Tensor] = {}
        if missing:
            asked = self._reference.logits([passage.ids for passage in passages])
            for place, passage, logits in zip(missing, passages, asked, strict=True):
                made[place] = log_probabilities(_answer(passage, logits))
        for place, known in made.items():
            if known.nbytes <= self._room:
                self._room -= known.nbytes
                self._kept[place] = known
        return [self._kept[place] if place in self._kept else made[place] for place in batch]


def _batches(passages: Sequence[Passage]) -> Iterator[list[int]]:
    """Places of passages, at most `_BATCH_TOKENS` together where one alone is not longer."""
    batch: list[int] = []
    size = 0
    for place in sorted(range(len(passages)), key=lambda place: len(passages[place].ids)):
        length = len(passages[place].ids)
        if batch and size + length > _BATCH_TOKENS:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += length
    if batch:
        yield batch


def _answer(passage: Passage, logits: Tensor) -> Tensor:
    """The rows that predict the passage's answer."""
    return logits[passage.first - 1 : len(passage.ids) - 1]


def _cut(reference: Tensor, width: int) -> Tensor:
    """Log-probabilities over the first `width` tokens."""
    if reference.shape[1] == width:
        return reference
    return log_probabilities(reference[:, :width])
