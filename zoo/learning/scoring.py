"""How well an answer matches its references: pure functions, 0 is all wrong and 1 all right."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_CHRF_ORDER = 6
_CHRF_BETA = 2.0
_WORD = re.compile(r"[\w-]+")


@dataclass(frozen=True, slots=True)
class Metric:
    """A score with the name it is reported under."""

    name: str
    score: Callable[[str, Sequence[str]], float]

    def mean(self, answers: Iterable[str], references: Iterable[Sequence[str]]) -> float:
        """The mean over rows, of which there is at least one."""
        scores = [self.score(a, r) for a, r in zip(answers, references, strict=True)]
        return sum(scores) / len(scores)


def exact(answer: str, references: Sequence[str]) -> float:
    """Equal to a reference, but for spaces, case and double quotes.

    The references of WikiSQL quote and capitalize the same value now one way, now another.
    """
    return float(any(_bare(answer) == _bare(reference) for reference in references))


def mention(answer: str, references: Sequence[str]) -> float:
    """The first reference is a word of the answer, however wordy the answer is."""
    return float(references[0].lower() in _WORD.findall(answer.lower()))


def fields(answer: str, references: Sequence[str]) -> float:
    """F1 over the `key : value` pairs between bars, with the reference that fits best."""
    return max(_f1(_pairs(answer), _pairs(reference)) for reference in references)


def chrf(answer: str, references: Sequence[str]) -> float:
    """chrF2 (Popović 2015): F-score, beta 2, of character 1- to 6-grams without spaces."""
    return max(_chrf(answer, reference) for reference in references)


def choice(*labels: str) -> Metric:
    """The share of answers that name the right label and no other, however wordy they are."""

    def score(answer: str, references: Sequence[str]) -> float:
        named = set(_WORD.findall(answer.lower())) & set(labels)
        return float(named == set(references))

    return Metric("accuracy", score)


EXACT = Metric("exact match", exact)
MENTION = Metric("accuracy", mention)
FIELDS = Metric("field F1", fields)
CHRF = Metric("chrF", chrf)


def _bare(text: str) -> str:
    return "".join(text.replace('"', "").lower().split())


def _pairs(text: str) -> Counter[str]:
    return Counter("".join(part.lower().split()) for part in text.split("|") if ":" in part)


def _grams(text: str, order: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[i : i + order] for i in range(len(letters) - order + 1))


def _f1(found: Counter[str], wanted: Counter[str]) -> float:
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total()) if shared else 0.0


def _chrf(answer: str, reference: str) -> float:
    precisions: list[float] = []
    recalls: list[float] = []
    for order in range(1, _CHRF_ORDER + 1):
        found, wanted = _grams(answer, order), _grams(reference, order)
        shared = (found & wanted).total()
        if found:
            precisions.append(shared / found.total())
        if wanted:
            recalls.append(shared / wanted.total())
    if not any(precisions) or not any(recalls):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    weight = _CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall)
