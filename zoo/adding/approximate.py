"""The ways of storing a fine-tune that are not exact, `delta` and `equivalent`: each is measured
beside the exact chain on held-out text before it is published."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from zoo.adding.options import AddOptions
from zoo.catalog import Publication
from zoo.compose import Tuned, chain_digest, publication_of
from zoo.deltas.calibration import Calibration, calibration_text
from zoo.deltas.delta import compress
from zoo.door import offline
from zoo.equivalence.agreement import Agreement, mean_interval
from zoo.equivalence.chains import (
    bounded,
    differing,
    digest_of,
    manifests_of,
    swapped,
    tensors_of,
    written_out,
)
from zoo.equivalence.corpus import Corpus, read_corpus, tokenizer_of
from zoo.equivalence.distance import together, unit_sums
from zoo.equivalence.probe import SEED, Probe
from zoo.equivalence.score import scores
from zoo.equivalence.swaps import Budget, choose
from zoo.families.family import HEAD, TOKENS
from zoo.learning.tasks import Question, Task, task_of
from zoo.manifest import Chain, Manifests, ObjectDigest, Unit, Variant, objects_of
from zoo.measured import Interval, Measured
from zoo.progress import Progress
from zoo.zoo import Zoo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zoo.door import Offline

# How many chains the search for swaps may measure.
_ATTEMPTS = 24


@dataclass(frozen=True, slots=True)
class Exact:
    """A fine-tune as it is, all of its tensors in the store: `names` are its checkpoint's, per unit
    by role."""

    variant: Variant
    units: Sequence[Unit]
    names: Sequence[Mapping[str, str]]
    base: Variant


@dataclass(frozen=True, slots=True)
class _Trial:
    """What a way of storing is tried with."""

    zoo: Zoo
    exact: Exact
    options: AddOptions
    progress: Progress
    offline: "Offline"
    tokenizer: "PreTrainedTokenizerBase"
    corpus: Corpus
    probe: Probe
    base: Manifests
    whole: Manifests


@dataclass(frozen=True, slots=True)
class _Found:
    """A chain to serve in place of the exact one, and how it agrees with it."""

    chain: Manifests
    agreement: Agreement


def approximate(zoo: Zoo, exact: Exact, options: AddOptions, progress: Progress) -> Publication:
    """Find the approximate chain, measure it, and say all that the catalog has to know. What only
    the exact one needed is taken back."""
    tokenizer = tokenizer_of(zoo.store, exact.variant)
    corpus = read_corpus(tokenizer, options.data, options.rows, exact.variant.context)
    whole = written_out(exact.units, [None] * len(exact.units), exact.variant.context)
    with offline(zoo.store.root) as runner:
        probe = Probe(runner, corpus, whole, progress)
        base = manifests_of(zoo.catalog, exact.base)
        trial = _Trial(zoo, exact, options, progress, runner, tokenizer, corpus, probe, base, whole)
        found = _WAYS[options.store](trial)
        probe.close()
        measured = _measured(trial, found)
    publication = _publication(trial, found, measured)
    zoo.store.take_back(keep=publication.objects)
    return publication


def _delta(trial: _Trial) -> _Found:
    """The base's units, with low-rank differences upon them."""
    base = [unit for _, unit in trial.base.units]
    store, share = trial.zoo.store, trial.options.delta_budget
    text = calibration_text(store, trial.exact.variant, trial.options.text)
    model = trial.offline.load(bounded(trial.whole, text.shape[1] + 1))
    calibration = Calibration(model, text, trial.progress)
    delta = compress(store, base, trial.exact.units, share, trial.progress, calibration)
    trial.offline.drop(model)
    chain = written_out(delta.units, delta.attachments, trial.whole.context)
    return _Found(chain, trial.probe.agreement(chain, "measuring the delta"))


def _equivalent(trial: _Trial) -> _Found:
    """The base's units where that changes little enough, all of them together."""
    budget = Budget(trial.options.agreement_bound, trial.options.budget)
    order = sorted(differing(trial.whole, trial.base), key=lambda place: _relative(trial, place))
    tied = _tied(trial.whole)
    order = [place for place in order if place != tied]

    def served(places: frozenset[int]) -> Manifests:
        return swapped(trial.whole, trial.base, places | {tied} if 0 in places and tied else places)

    def measure(places: frozenset[int]) -> Agreement:
        return trial.probe.agreement(served(places), f"measuring {len(places)} swaps")

    choice = choose(order, measure, budget, _ATTEMPTS)
    chain = served(choice.places)
    trial.progress.say(
        f"{len(choice.places)} of {len(order)} units that differ are the base's, "
        f"{choice.attempts} chains were measured"
    )
    return _Found(chain, choice.measured or trial.probe.agreement(chain, "measuring"))


_WAYS: Mapping[str, Callable[[_Trial], _Found]] = {"delta": _delta, "equivalent": _equivalent}


def _tied(chain: Manifests) -> int | None:
    """The place of the head if it is the embedding's own table: they can only be swapped
    together."""
    table, head = chain.units[0][1].tensors[TOKENS], chain.units[-1][1].tensors[HEAD]
    return len(chain.units) - 1 if table == head else None


def _relative(trial: _Trial, place: int) -> float:
    """How far a unit moved; what cannot be compared comes last."""
    pair = trial.whole.units[place][1], trial.base.units[place][1]
    sums = unit_sums(trial.zoo.store, *pair)
    return float("inf") if sums is None else together(sums).relative


def _measured(trial: _Trial, found: _Found) -> Measured:
    agreement = found.agreement
    own, exact = (_own_bytes(trial, chain) for chain in (found.chain, trial.whole))
    task, score, exact_score = _scored(trial, found.chain)
    return Measured(
        corpus=trial.corpus.digest,
        name=trial.corpus.name,
        sequences=agreement.sequences,
        tokens=agreement.tokens,
        created=time.time(),
        kl=agreement.kl,
        agreement=agreement.agreement,
        perplexity=agreement.perplexity,
        exact_perplexity=agreement.exact_perplexity,
        task=task,
        score=score,
        exact_score=exact_score,
        kept_bytes=own,
        saved_bytes=exact - own,
    )


def _scored(trial: _Trial, chain: Manifests) -> tuple[str | None, Interval | None, Interval | None]:
    """The task's score of a chain and of the exact one, where a task was given."""
    if trial.options.task is None:
        return None, None, None
    task = task_of(trial.options.task)
    asked: tuple[Task, Sequence[Question]] = (
        task,
        task.questions(trial.options.data, trial.options.rows),
    )
    served, exact = (
        mean_interval(scores(trial.offline, one, trial.tokenizer, asked, trial.progress), SEED)
        for one in (chain, trial.whole)
    )
    return task.name, served, exact


def _own_bytes(trial: _Trial, chain: Manifests) -> int:
    """Bytes of the tensors of a chain that its base does not have."""
    own = tensors_of(chain) - tensors_of(trial.base)
    return sum(trial.zoo.store.info(digest).nbytes for digest in own)


def _publication(trial: _Trial, found: _Found, measured: Measured) -> Publication:
    exact, chain = trial.exact, found.chain
    theirs = [digest for digest, _ in trial.base.units]
    shared = sum(digest in theirs for digest, _ in chain.units)
    variant = msgspec.structs.replace(
        exact.variant,
        chain=digest_of(chain),
        store=trial.options.store,
        tensors=_tensors_of(exact, chain, trial.whole),
        report={
            "shared": shared,
            "changed": len(chain.units) - shared,
            "attached": sum(a is not None for a in chain.attachments),
        },
        measured=measured,
        bound=trial.options.agreement_bound if trial.options.store == "equivalent" else None,
    )
    tuned = Tuned([unit for _, unit in chain.units], [a and a[1] for a in chain.attachments])
    manifest = Chain(
        tuple(digest for digest, _ in chain.units),
        tuple(a and a[0] for a in chain.attachments),
    )
    assert chain_digest(manifest) == variant.chain
    return publication_of(trial.zoo.store, variant, manifest, tuned)


def _tensors_of(exact: Exact, chain: Manifests, whole: Manifests) -> dict[str, ObjectDigest]:
    """The checkpoint's names and what is kept of each: its own tensor where that is in the chain,
    else the base's, upon which a low-rank piece may stand."""
    tensors = dict(exact.variant.tensors)
    for place, names in enumerate(exact.names):
        attachment = chain.attachments[place]
        kept = set(objects_of(attachment[1])) if attachment else set()
        kept.update(chain.units[place][1].tensors.values())
        for role, name in names.items():
            own = whole.units[place][1].tensors[role]
            tensors[name] = own if own in kept else chain.units[place][1].tensors[role]
    return tensors
