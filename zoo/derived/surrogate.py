"""Surrogates: cheaper stand-ins of a chain, pruned by measured importance and taught by the chain.

A surrogate is stored as a chain of ordinary units, so it is served like any variant; embedding and
head are the true chain's own and lie in the zoo once. What it is worth is measured beside trivial
choices and kept as a finding.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from zoo.derived.cut import Cut, Shape, layers_of, shapes
from zoo.derived.distillation import distillation
from zoo.derived.importance import Importance, at_random, directions_at_random
from zoo.derived.network import Network
from zoo.derived.pruning import narrow, prune
from zoo.derived.publishing import Draft, opened, publish, stored
from zoo.derived.subject import check_free, fast_dtype, read_subject
from zoo.derived.training import Course, Training
from zoo.derived.verdict import Verdict, weigh
from zoo.equivalence.text import Corpus, Measure, read_corpus
from zoo.errors import UnsupportedOption
from zoo.findings import Findings
from zoo.manifest import Unit, Variant
from zoo.names import checked_name
from zoo.progress import Progress
from zoo.store import Store
from zoo.work import work_folder

KIND = "surrogate"
# Chunks of text that importance is measured on.
_MEASURED = 4
_WIDTH_STEP = 16
_PLAN = "plan.json"


@dataclass(frozen=True, slots=True)
class SurrogateOptions:
    """`ratio` is the share of the layers' weights that stays at full width, `width` the share of
    the stream's channels; `name` None: the variant's with "-surrogate"."""

    ratio: float = 0.5
    width: float = 1.0
    data: tuple[Path, ...] = ()
    measure: Measure = field(default_factory=Measure)
    course: Course = field(default_factory=lambda: Course(steps=200, batch=8, rate=3e-4))
    name: str | None = None
    wait_s: float = 600.0


class SurrogateFinding(msgspec.Struct, frozen=True):
    """A surrogate, how it was made, and its verdict; `layers` are those of the true chain that it
    has, `weights` the share of the layers' weights, `losses` the first and the last step's."""

    name: str
    chain: str
    of: str
    true_chain: str
    ratio: float
    width: float
    weights: float
    layers: tuple[int, ...]
    shape: Shape
    steps: int
    seed: int
    losses: tuple[float, float]
    verdict: Verdict


def make_surrogate(
    root: Path, name: str, options: SurrogateOptions, progress: Progress
) -> SurrogateFinding:
    """Make, publish and measure a surrogate of the variant `name`. One that was killed goes on."""
    making = _Making(root, name, options, progress)
    student, training = making.train()
    return making.conclude(student, training)


class _Making:
    """One surrogate on its way."""

    def __init__(
        self, root: Path, name: str, options: SurrogateOptions, progress: Progress
    ) -> None:
        self._root, self._options, self._progress = root, options, progress
        self._subject = read_subject(root, name)
        layers = layers_of([unit.spec for unit in self._subject.units])
        self._shapes = shapes(layers, options.ratio)
        if not 0 < options.width <= 1:
            raise UnsupportedOption(
                f"--width {options.width:g} is out of range: give a share above 0 and up to 1"
            )
        self._name = checked_name(options.name or f"{name}-surrogate")
        self._corpus = self._read_corpus()
        self._folder = self._find_folder()
        if not self._folder.exists():
            check_free(root, self._name)
        self._teacher = self._subject.network(fast_dtype())
        self._importance = Importance(self._teacher, self._corpus.train[:_MEASURED])
        self._cut, self._shape = self._plan()

    def train(self) -> tuple[Network, Training]:
        """The student, taught."""
        student = self._shaped(self._subject.network(torch.float32), self._cut)
        whole = student.parts if self._options.width < 1 else student.parts[1:-1]
        for part in whole:
            for tensor in part.weights.values():
                tensor.requires_grad_()
        training = Training(student.trained(), self._options.course, self._folder)
        loss = distillation(self._teacher, student, fast_dtype())
        training.run(self._corpus.train, loss, f"training {self._name}", self._progress)
        return student, training

    def conclude(self, student: Network, training: Training) -> SurrogateFinding:
        """Publish, measure, and keep what was found."""
        variant = self._publish(student)
        made = read_subject(self._root, self._name)
        seed = self._options.course.seed
        verdict = weigh(self._subject, made, self._trivial(), (self._corpus, seed), self._progress)
        finding = SurrogateFinding(
            name=self._name,
            chain=variant.chain,
            of=self._subject.variant.name,
            true_chain=self._subject.variant.chain,
            ratio=self._options.ratio,
            width=self._options.width,
            weights=_layer_weights(student) / _layer_weights(self._teacher),
            layers=self._cut.layers,
            shape=self._shape,
            steps=self._options.course.steps,
            seed=seed,
            losses=(training.losses[0], training.losses[-1]),
            verdict=verdict,
        )
        with opened(self._root, self._options.wait_s, self._progress) as zoo:
            Findings(zoo.catalog).put(KIND, f"{finding.true_chain}:{finding.chain}", finding)
        training.finish()
        return finding

    def _publish(self, student: Network) -> Variant:
        dtype = self._subject.variant.dtype

        def make(store: Store) -> list[Unit]:
            return stored(store, student, dtype, self._progress)

        draft = Draft(self._name, KIND, self._subject, make, self._cut.layers)
        return publish(self._root, draft, self._options.wait_s, self._progress)

    def _read_corpus(self) -> Corpus:
        options = self._options
        seed = options.course.seed
        store, variant = self._subject.store, self._subject.variant
        return read_corpus(store, variant, options.data, options.measure, seed)

    def _find_folder(self) -> Path:
        course = self._options.course
        facts = (course.steps, course.batch, course.rate, course.seed)
        made_from = (self._subject.variant.chain, self._corpus.digest)
        shape = (self._options.ratio, self._options.width)
        return work_folder(self._root, KIND, self._name, made_from, shape, facts)

    def _plan(self) -> tuple[Cut, Shape]:
        """The cut that is nearest to the true chain before any training; measured once."""
        path = self._folder / _PLAN
        if path.is_file():
            return msgspec.json.decode(path.read_bytes(), type=tuple[Cut, Shape])
        fewest = min(shape.layers for shape in self._shapes)
        removed = self._importance.spare(len(self._importance.layers) - fewest, self._progress)
        cuts = [(self._importance.cut(shape, removed), shape) for shape in self._shapes]
        tracked = self._progress.track(cuts, "comparing shapes")
        losses = [self._importance.loss(prune(self._teacher, cut)) for cut, _ in tracked]
        best = cuts[losses.index(min(losses))]
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(best))
        return best

    def _trivial(self) -> dict[str, Network]:
        """What can be had without training: the same cut, and a blind one."""
        seed = self._options.course.seed
        blind = at_random(self._importance.layers, self._shape, seed)
        return {
            "untrained": self._shaped(self._teacher, self._cut),
            "random": self._shaped(self._teacher, blind, blind=True),
        }

    def _shaped(self, network: Network, cut: Cut, *, blind: bool = False) -> Network:
        pruned = prune(network, cut)
        if self._options.width == 1:
            return pruned
        return narrow(pruned, self._directions(blind=blind))

    def _directions(self, *, blind: bool) -> Tensor:
        hidden = self._subject.variant.hidden
        width = max(1, round(hidden * self._options.width / _WIDTH_STEP)) * _WIDTH_STEP
        if blind:
            return directions_at_random(hidden, min(width, hidden), self._options.course.seed)
        return self._importance.directions(min(width, hidden))


def _layer_weights(network: Network) -> int:
    return sum(w.numel() for part in network.parts[1:-1] for w in part.weights.values())
