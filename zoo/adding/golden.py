"""The golden check: before a variant is published, its chain runs a few short sequences, and its
logits must be those of transformers and peft on the source.

Both sides compute in float32, so the tolerance does not depend on what the source is stored as. A
departure is the largest difference of two logits of a sequence, over the largest logit of that
sequence. The bound is 1e-4 from the reference. Two float32 runs of a network that amplifies
rounding may lie further apart though both are right, so where they do, each is compared with the
reference run in float64: the chain must lie within 1e-4 of that. Beyond it may lie only as far as
the reference's own float32 shows the network to be unsure: at most sixteen times that one's
distance, since each order of summation is one draw of the rounding (and the kernels' own, one input
after the other, a coarser one than sums of sums: eight times has been seen), never beyond 1e-3.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from zoo.adding.reference import Expected, in_float64
from zoo.catalog import Publication
from zoo.door import Manifests, offline
from zoo.errors import NotEqual
from zoo.families.registry import family_named

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.door import Model

TOLERANCE = 1e-4
# So many times the reference's own distance to float64 passes, up to a bound.
_DRAWS, _MOST = 16.0, 1e-3
_LENGTHS = (1, 5, 19)
_SEED = 20
# The reference in float32, the chain as it is stored, and activations.
_ROOM = 1.3


def golden_sequences(vocabulary: int, context: int, special: Sequence[int] = ()) -> list[list[int]]:
    """A few short sequences, the same for the same model; they hold `special` tokens too."""
    draw = random.Random(_SEED)
    lengths = sorted({min(length, context) for length in _LENGTHS})
    sequences = [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]
    chosen = special[: lengths[-1]]
    for place, token in zip(draw.sample(range(lengths[-1]), len(chosen)), chosen, strict=True):
        sequences[-1][place] = token
    return sequences


def lacking_bytes(reference_bytes: int, chain_bytes: int) -> int:
    """How many bytes of memory are wanting to run both; 0 or less where there is room."""
    wanted = int(_ROOM * (reference_bytes + chain_bytes))
    return wanted - psutil.virtual_memory().available


@dataclass(frozen=True, slots=True)
class Departure:
    """How far logits are from what was expected, and how far they may be. `exact` is the reference
    in float64, which both are relative to; None where the two agree in float32."""

    error: float
    bound: float = TOLERANCE
    exact: Expected | None = None

    @property
    def passes(self) -> bool:
        """Whether it is rounding."""
        return self.error <= self.bound


def departure(given: "Sequence[Tensor]", expected: Expected) -> Departure:
    """Compare logits of the expected sequences. The expected model may be float64 afterwards."""
    error = _farthest(given, expected.logits)
    exact = None if error <= TOLERANCE else _exact(expected)
    if exact is None:
        return Departure(error)
    unsure = _farthest(expected.logits, exact.logits)
    bound = max(TOLERANCE, min(_DRAWS * unsure, _MOST))
    return Departure(_farthest(given, exact.logits), bound, exact)


def check_golden(root: Path, publication: Publication, expected: Expected) -> float:
    """Run the chain and return how far it departs; raises NotEqual beyond the bound, with the first
    place where the two part."""
    with offline(root) as runner:
        model = runner.load(manifests_of(publication))
        found = departure(model.logits(expected.sequences), expected)
        if found.passes:
            return found.error
        place = _first_departure(publication, model, found.exact or expected)
    variant = publication.variant
    raise NotEqual(
        f"{variant.source} was not added: the chain's logits differ from the source's own by "
        f"{found.error:.1e} of their size, which is no rounding, first at {place}; --no-golden "
        "adds it all the same"
    )


def manifests_of(publication: Publication) -> Manifests:
    """A chain that the catalog need not know, as the door wants it."""
    chain = publication.chain
    return Manifests(
        units=[(digest, publication.units[digest]) for digest in chain.units],
        attachments=[
            None if digest is None else (digest, publication.attachments[digest])
            for digest in chain.attachments
        ],
        context=publication.variant.context,
    )


def _exact(expected: Expected) -> Expected | None:
    """The reference in float64, if there is memory for it."""
    wide = sum(4 * parameter.numel() for parameter in expected.model.parameters())
    return in_float64(expected) if lacking_bytes(wide, 0) <= 0 else None


def _first_departure(publication: Publication, model: "Model", expected: Expected) -> str:
    family = family_named(publication.variant.family)
    step = len(family.layer_units)
    for depth, _ in enumerate(expected.hidden[0]):
        given = model.hidden(expected.sequences, 1 + depth * step)
        wanted = [states[depth] for states in expected.hidden]
        # Also for what is not a number.
        if not _farthest(given, wanted) <= TOLERANCE:
            return f"layer {depth - 1}" if depth else "the embedding"
    return f"layer {len(expected.hidden[0]) - 1} or the head"


def _farthest(given: "Sequence[Tensor]", wanted: "Sequence[Tensor]") -> float:
    return max(map(_distance, given, wanted))


def _distance(given: "Tensor", wanted: "Tensor") -> float:
    if given.shape != wanted.shape:
        return float("inf")
    error = float((given - wanted).abs().max() / wanted.abs().max())
    # Not a number compares as neither small nor large.
    return error if error == error else float("inf")
