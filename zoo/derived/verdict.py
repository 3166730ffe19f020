"""What a surrogate is worth: nearness to the true chain, guesses kept, speed; beside what costs
nothing."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from zoo.derived.judgement import (
    Acceptance,
    Guesses,
    Logits,
    Quality,
    accept,
    best_of,
    bigrams,
    judge,
    logits_of,
    lookup,
)
from zoo.derived.network import Network
from zoo.derived.pace import Pace, paces
from zoo.derived.subject import Subject, fast_dtype
from zoo.door import offline
from zoo.equivalence.text import Corpus
from zoo.progress import Progress

if TYPE_CHECKING:
    from zoo.door import Model

# Prompts that the true chain answers, tokens of each, and tokens of each answer.
_PROMPTS, _ASKED, _ANSWERED = 24, 48, 48
SURROGATE = "surrogate"


class Verdict(msgspec.Struct, frozen=True):
    """`quality` is of "true", "surrogate", "untrained" (pruned by importance alone) and "random"
    (pruned blindly, untrained); `acceptance` of the last three and of guesses by "bigram" and
    "lookup"; `pace` of "true" and "surrogate"."""

    corpus: str
    corpus_digest: str
    quality: dict[str, Quality]
    acceptance: dict[str, Acceptance]
    pace: dict[str, Pace]

    @property
    def speedup(self) -> float:
        """How many decoding steps of one sequence the surrogate makes for the processor time of
        one of the true chain."""
        return self.pace["true"].work_s / self.pace[SURROGATE].work_s


def weigh(
    true: Subject,
    surrogate: Subject,
    trivial: Mapping[str, Network],
    text: tuple[Corpus, int],
    progress: Progress,
) -> Verdict:
    """Judge a stored surrogate through the workers' kernels, and networks that cost nothing to
    make beside it; `text` is a corpus and a seed."""
    corpus, seed = text
    untaught = {name: logits_of(network, fast_dtype()) for name, network in trivial.items()}
    with offline(true.store.root) as door:
        models = {"true": door.load(true.manifests), SURROGATE: door.load(surrogate.manifests)}
        others: dict[str, Logits] = {SURROGATE: models[SURROGATE].logits, **untaught}
        quality = judge(models["true"].logits, others, corpus.held_out, seed, progress)
        guessers = {name: best_of(logits) for name, logits in others.items()}
        bigram = bigrams(corpus.train, true.variant.vocabulary)
        guessers |= {"bigram": bigram, "lookup": lookup(bigram)}
        acceptance = _accepted(models["true"], corpus, guessers, progress)
        return Verdict(corpus.name, corpus.digest, quality, acceptance, paces(models, progress))


def _accepted(
    true: "Model", corpus: Corpus, guessers: Mapping[str, Guesses], progress: Progress
) -> dict[str, Acceptance]:
    """Whose guesses the true chain keeps along its own answers to held-out text."""
    asked = min(_ASKED, corpus.held_out.shape[1] // 2)
    prompts = corpus.held_out[:_PROMPTS, :asked].tolist()
    progress.say(f"letting the true chain answer {len(prompts)} prompts")
    answers = true.generate(prompts, _ANSWERED)
    tracked = progress.track(list(guessers), "counting kept guesses")
    return {name: accept(guessers[name], prompts, answers) for name in tracked}
