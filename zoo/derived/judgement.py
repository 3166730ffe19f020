"""How near a chain comes to the true one on held-out text, and how many of its guesses would hold.

Whoever is judged is a function from token sequences to logits: a chain behind the door, a network
in training, or a table of counts.
"""

from collections.abc import Callable, Mapping, Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.derived.network import Network
from zoo.equivalence.agreement import Agreement, Reading, log_probabilities, read, sum_up
from zoo.measured import Interval
from zoo.progress import Progress

# Per sequence float32 [tokens, vocabulary]: row i is for the token after position i.
Logits = Callable[[Sequence[Sequence[int]]], list[Tensor]]
# Per sequence a guess for the token after each position, int64 [tokens].
Guesses = Callable[[Sequence[Sequence[int]]], list[Tensor]]

DRAFT = 4
TRUE = "true"
_TOGETHER = 4


class Quality(msgspec.Struct, frozen=True):
    """Against the true chain, per predicted token of held-out text: perplexity, KL(true || this) in
    nats, and the share of positions with the same best token."""

    perplexity: Interval
    kl: Interval
    agreement: Interval


class Acceptance(msgspec.Struct, frozen=True):
    """Of greedy guesses along the true chain's own greedy answers: the share that it keeps, and how
    many tokens in a row it keeps of a draft of four."""

    share: float
    run: float
    tokens: int


def judge(
    truth: Logits, others: Mapping[str, Logits], chunks: Tensor, seed: int, progress: Progress
) -> dict[str, Quality]:
    """The quality of each; that of the true chain itself is under `TRUE`."""
    everyone = {TRUE: truth, **others}
    readings: dict[str, list[Reading]] = {name: [] for name in everyone}
    for batch in progress.track(chunks.split(_TOGETHER), "judging on held-out text"):
        sequences = batch.tolist()
        wanted = [log_probabilities(row[:-1]) for row in truth(sequences)]
        for name, other in everyone.items():
            given = wanted if name == TRUE else [row[:-1] for row in other(sequences)]
            readings[name] += map(read, wanted, given, batch[:, 1:])
    return {name: _quality(sum_up(found, seed)) for name, found in readings.items()}


def accept(
    guesses: Guesses, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Acceptance:
    """How the guesses along `answers` (the true chain's own, greedy) would have fared."""
    kept: list[Tensor] = []
    for start in range(0, len(prompts), _TOGETHER):
        pairs = list(zip(prompts, answers, strict=True))[start : start + _TOGETHER]
        found = guesses([[*prompt, *answer] for prompt, answer in pairs])
        for (prompt, answer), guess in zip(pairs, found, strict=True):
            here = guess[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            kept.append(here == torch.tensor(answer))
    share = torch.cat(kept).float().mean().item()
    runs = torch.cat([_runs(one) for one in kept])
    return Acceptance(share, runs.float().mean().item(), sum(len(one) for one in kept))


def logits_of(network: Network, dtype: torch.dtype) -> Logits:
    """A network's logits; sequences of a call have one length."""

    @torch.inference_mode()
    def logits(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        ids = torch.tensor(sequences)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return list(network.logits(ids).float())

    return logits


def best_of(logits: Logits) -> Guesses:
    """The greedy guesses of a chain."""

    def guesses(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        return [row.argmax(-1) for row in logits(sequences)]

    return guesses


def bigrams(text: Tensor, vocabulary: int) -> Guesses:
    """Guesses the token that came most often after this one in `text`; the commonest token after
    one that was never seen."""
    flat = text.flatten()
    pairs, counts = (flat[:-1] * vocabulary + flat[1:]).unique(return_counts=True)
    pairs = pairs[counts.argsort(stable=True)]
    pairs = pairs[(pairs // vocabulary).argsort(stable=True)]
    before = pairs // vocabulary
    commonest = torch.cat((before[:-1] != before[1:], torch.tensor([True])))
    following = flat.bincount(minlength=vocabulary).argmax().repeat(vocabulary)
    following[before[commonest]] = pairs[commonest] % vocabulary

    def guesses(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        return [following[torch.tensor(sequence)] for sequence in sequences]

    return guesses


def lookup(otherwise: Guesses) -> Guesses:
    """Guesses what followed the last two tokens when they last stood in the same sequence, as
    prompt look-up does, and what `otherwise` says where they never did."""

    def guesses(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        found = otherwise(sequences)
        for sequence, guess in zip(sequences, found, strict=True):
            seen: dict[tuple[int, int], int] = {}
            for place in range(1, len(sequence)):
                pair = (sequence[place - 1], sequence[place])
                if pair in seen:
                    guess[place] = sequence[seen[pair] + 1]
                seen[pair] = place
        return found

    return guesses


def _quality(found: Agreement) -> Quality:
    return Quality(found.perplexity, found.kl, found.agreement)


def _runs(kept: Tensor) -> Tensor:
    """For a draft of four from each position: how many of its tokens are kept. Drafted tokens are
    the true ones for as long as they are kept, so the marks along the true answer tell."""
    padded = F.pad(kept.long(), (0, DRAFT - 1))
    windows = padded.unfold(0, DRAFT, 1)
    return windows.cumprod(1).sum(1)
