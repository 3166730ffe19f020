"""Stitches: trained maps that let a request begin in one chain and end in another of any width.

Both chains stay as they are; what the stitch learns is to make the joined chain say what the first
one, which the client asked for, would have said. Judged at several joins beside what needs no
training, and kept as a finding; the best join becomes a variant if a name is given for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from zoo.derived.cut import layers_of
from zoo.derived.distillation import POSITION_STEP, divergence
from zoo.derived.join import Join, fitted, identity, joined, read_joins, streams, untrained
from zoo.derived.judgement import TRUE, Logits, Quality, judge, logits_of
from zoo.derived.network import Part
from zoo.derived.pace import Pace, paces
from zoo.derived.publishing import Draft, opened, publish, put
from zoo.derived.subject import Subject, check_free, fast_dtype, read_subject
from zoo.derived.training import Course, Loss, Training, pick
from zoo.door import offline
from zoo.equivalence.corpus import tokenizer_print
from zoo.equivalence.text import Measure, read_corpus
from zoo.errors import UnsupportedOption
from zoo.findings import Findings
from zoo.manifest import ObjectDigest, StitchSpec, Unit, attention_of
from zoo.names import checked_name
from zoo.progress import Progress
from zoo.store import Store
from zoo.work import work_folder
from zoo.zoo import Zoo

KIND = "stitch"
TRAINED, OTHER = "trained", "B"
# Batches of text that the least-squares fit, which the training begins with, looks at.
_FITTED = 12


@dataclass(frozen=True, slots=True)
class StitchOptions:
    """`at` names joins in layers (see `zoo.derived.join`); `name` is for the best joined chain."""

    at: str | None = None
    data: tuple[Path, ...] = ()
    measure: Measure = field(default_factory=lambda: Measure(held_out=24))
    course: Course = field(default_factory=lambda: Course(steps=80, batch=4, rate=3e-4))
    name: str | None = None
    wait_s: float = 600.0


class Stitched(msgspec.Struct, frozen=True):
    """A stitch at one join: the first `below` layers of A, the layers of B from `above` on.
    `quality` against A on held-out text: "trained"; "fitted" by least squares; "untrained";
    "identity"; and "B", the other chain alone."""

    below: int
    above: int
    spec: StitchSpec
    tensors: dict[str, ObjectDigest]
    quality: dict[str, Quality]
    losses: tuple[float, float]


class StitchFinding(msgspec.Struct, frozen=True):
    """All joins of two chains; `name` and `pace` ("A", "B", "joined") are there if the best one was
    published."""

    a: str
    b: str
    a_chain: str
    b_chain: str
    corpus: str
    corpus_digest: str
    steps: int
    seed: int
    true: Quality
    joins: tuple[Stitched, ...]
    name: str | None = None
    pace: dict[str, Pace] | None = None

    @property
    def best(self) -> Stitched:
        """The join that is nearest to A."""
        return min(self.joins, key=lambda one: one.quality[TRAINED].kl.value)


def make_stitch(
    root: Path, names: tuple[str, str], options: StitchOptions, progress: Progress
) -> StitchFinding:
    """Train, judge and keep stitches from the first variant to the second. What was killed goes
    on."""
    making = _Making(root, names, options, progress)
    return making.conclude([making.train(join) for join in making.joins])


@dataclass(frozen=True, slots=True)
class _Made:
    """A stitch as least squares fit it and as training left it, and its training."""

    join: Join
    fit: Part
    part: Part
    training: Training


class _Making:
    """The stitches of two chains on their way."""

    def __init__(
        self, root: Path, names: tuple[str, str], options: StitchOptions, progress: Progress
    ) -> None:
        self._root, self._options, self._progress = root, options, progress
        self._a, self._b = (read_subject(root, name) for name in names)
        _check_tokenizers(self._a, self._b)
        if options.name is not None:
            _check_pages(self._a, self._b)
            check_free(root, checked_name(options.name))
        seed = options.course.seed
        store, variant = self._a.store, self._a.variant
        self._corpus = read_corpus(store, variant, options.data, options.measure, seed)
        self._lower, self._upper = (s.network(fast_dtype()) for s in (self._a, self._b))
        self.joins = read_joins(options.at, self._lower, self._upper)

    def train(self, join: Join) -> _Made:
        """Fit and train the stitch of one join."""
        course = self._options.course
        facts = (course.steps, course.batch, course.rate, course.seed)
        chains = (self._a.variant.chain, self._b.variant.chain)
        folder = work_folder(
            self._root, KIND, chains, self._corpus.digest, (join.below, join.above), facts
        )
        fit = self._fit(join)
        tensors = {role: w.clone().requires_grad_() for role, w in fit.weights.items()}
        training = Training(tensors, course, folder)
        loss = self._loss(join, Part(fit.spec, tensors))
        label = f"training the stitch at {join}"
        training.run(self._corpus.train, loss, label, self._progress)
        part = Part(fit.spec, {role: w.detach() for role, w in tensors.items()})
        return _Made(join, fit, part, training)

    def conclude(self, made: Sequence[_Made]) -> StitchFinding:
        """Judge, store, publish the best if asked, and keep what was found."""
        judged = self._judge(made)
        with opened(self._root, self._options.wait_s, self._progress) as zoo:
            found = tuple(_kept(zoo.store, one, judged) for one in made)
            zoo.store.settle()
            finding = self._finding(found, judged[TRUE])
            _keep(zoo, finding)
        if self._options.name is not None:
            finding = self._publish(self._options.name, finding)
        for one in made:
            one.training.finish()
        return finding

    def _fit(self, join: Join) -> Part:
        """Least squares on the first batches of text."""
        course = self._options.course
        pairs: list[tuple[Tensor, Tensor]] = []
        tracked = self._progress.track(range(_FITTED), f"fitting the stitch at {join}")
        with torch.inference_mode():
            for step in tracked:
                ids = pick(self._corpus.train, course, step)
                pairs.append(streams(self._lower, self._upper, join, ids))
        fit = fitted(pairs)
        return Part(fit.spec, {role: tensor.clone() for role, tensor in fit.weights.items()})

    def _loss(self, join: Join, part: Part) -> Loss:
        """How far the joined chain is from A, at every fourth position."""
        chain = joined(self._lower, self._upper, join, part)
        at = next(i for i, known in enumerate(chain.parts) if known is part)

        def loss(ids: Tensor, step: int) -> Tensor:
            first = step % POSITION_STEP
            with torch.no_grad():
                x = self._lower.hidden(ids, at)
                wanted = self._lower.advance(x, at, len(self._lower) - 1)
                truth = self._lower.head(wanted[:, first::POSITION_STEP])
            y = chain.advance(x, at, len(chain) - 1)
            return divergence(truth, chain.head(y[:, first::POSITION_STEP]))

        return loss

    def _judge(self, made: Sequence[_Made]) -> dict[str, Quality]:
        """Everything on the same text, by "join choice"."""
        hidden, width = self._a.variant.hidden, made[0].fit.weights["map.bias"].shape[0]
        seed = self._options.course.seed
        others: dict[str, Logits] = {OTHER: logits_of(self._upper, fast_dtype())}
        for one in made:
            choices = {
                TRAINED: one.part,
                "fitted": one.fit,
                "untrained": untrained(hidden, width, seed),
                "identity": identity(hidden, width),
            }
            for choice, stitch in choices.items():
                chain = joined(self._lower, self._upper, one.join, stitch)
                others[f"{one.join} {choice}"] = logits_of(chain, fast_dtype())
        truth = logits_of(self._lower, fast_dtype())
        return judge(truth, others, self._corpus.held_out, seed, self._progress)

    def _finding(self, joins: tuple[Stitched, ...], true: Quality) -> StitchFinding:
        return StitchFinding(
            a=self._a.variant.name,
            b=self._b.variant.name,
            a_chain=self._a.variant.chain,
            b_chain=self._b.variant.chain,
            corpus=self._corpus.name,
            corpus_digest=self._corpus.digest,
            steps=self._options.course.steps,
            seed=self._options.course.seed,
            true=true,
            joins=joins,
        )

    def _publish(self, name: str, finding: StitchFinding) -> StitchFinding:
        """Serve the best joined chain under a name; the finding with its pace."""
        best = finding.best
        under = layers_of([unit.spec for unit in self._a.units])[best.below - 1].last
        over = layers_of([unit.spec for unit in self._b.units])[best.above].first
        units = [*self._a.units[:under], Unit(best.spec, best.tensors), *self._b.units[over:]]
        draft = Draft(name, "stitched", self._a, lambda _: units)
        publish(self._root, draft, self._options.wait_s, self._progress)
        with offline(self._root) as door:
            subjects = {"A": self._a, OTHER: self._b, "joined": read_subject(self._root, name)}
            models = {label: door.load(one.manifests) for label, one in subjects.items()}
            pace = paces(models, self._progress)
        finding = msgspec.structs.replace(finding, name=name, pace=pace)
        with opened(self._root, self._options.wait_s, self._progress) as zoo:
            _keep(zoo, finding)
        return finding


def _kept(store: Store, made: _Made, judged: Mapping[str, Quality]) -> Stitched:
    """A stitch whose tensors are in the store."""
    assert isinstance(made.part.spec, StitchSpec)
    here = f"{made.join} "
    quality = {k.removeprefix(here): v for k, v in judged.items() if k.startswith(here)}
    return Stitched(
        below=made.join.below,
        above=made.join.above,
        spec=made.part.spec,
        tensors={role: put(store, w, "float32") for role, w in made.part.weights.items()},
        quality=quality | {OTHER: judged[OTHER]},
        losses=(made.training.losses[0], made.training.losses[-1]),
    )


def _keep(zoo: Zoo, finding: StitchFinding) -> None:
    objects = [tensor for one in finding.joins for tensor in one.tensors.values()]
    Findings(zoo.catalog).put(KIND, f"{finding.a_chain}:{finding.b_chain}", finding, objects)


def _check_tokenizers(a: Subject, b: Subject) -> None:
    if tokenizer_print(a.store, a.variant) != tokenizer_print(b.store, b.variant):
        raise UnsupportedOption(
            f"{a.variant.name} and {b.variant.name} have different tokenizers, so no text means "
            "the same to both: choose two chains of one vocabulary"
        )


def _check_pages(a: Subject, b: Subject) -> None:
    """A chain that is served has pages of one shape."""
    shapes = {
        (attention.kv_heads, attention.head_dim)
        for unit in (*a.units, *b.units)
        if (attention := attention_of(unit.spec)) is not None
    }
    if len(shapes) > 1:
        raise UnsupportedOption(
            f"{a.variant.name} and {b.variant.name} have KV heads of different number or size, so "
            "a chain of both cannot be served: leave out the name, the stitches are kept anyway"
        )
