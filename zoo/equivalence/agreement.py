"""What two chains say of the same text, position by position, summed up with intervals. Pure.

Positions of one sequence depend on each other, so the bootstrap draws whole sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoo.measured import Interval

_DRAWS = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Reading:
    """Sums over the `tokens` predicted positions of one sequence: divergence from the reference
    (nats), equal best tokens, and the loss (nats) of the reference and of the other chain."""

    tokens: int
    kl: float
    equal: int
    exact_loss: float
    loss: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """A corpus summed up; see `zoo.manifest.Measured`."""

    sequences: int
    tokens: int
    kl: Interval
    agreement: Interval
    perplexity: Interval
    exact_perplexity: Interval
    perplexity_change: Interval


def read(reference: Tensor, logits: Tensor, targets: Tensor) -> Reading:
    """Compare log-probabilities of the reference [n, vocabulary] with another chain's logits; the
    tokens that really follow are `targets`, int64 [n]."""
    other = logits.float().log_softmax(-1)
    kl = (reference.exp() * (reference - other)).sum(-1).clamp(min=0)
    picked = targets[:, None]
    return Reading(
        tokens=len(targets),
        kl=float(kl.sum()),
        equal=int((reference.argmax(-1) == other.argmax(-1)).sum()),
        exact_loss=-float(reference.gather(1, picked).sum()),
        loss=-float(other.gather(1, picked).sum()),
    )


def sum_up(readings: Sequence[Reading], seed: int) -> Agreement:
    """Means over all positions; at least one reading, each of at least one token."""
    table = np.array(
        [(r.tokens, r.kl, r.equal, r.exact_loss, r.loss) for r in readings], np.float64
    )
    draws = np.random.default_rng(seed).integers(0, len(table), (_DRAWS, len(table)))
    samples = np.stack([table.sum(0), *(table[draw].sum(0) for draw in draws)])
    mean = samples[:, 1:] / samples[:, :1]
    perplexity, exact = np.exp(mean[:, 3]), np.exp(mean[:, 2])
    return Agreement(
        sequences=len(readings),
        tokens=int(table[:, 0].sum()),
        kl=_interval(mean[:, 0]),
        agreement=_interval(mean[:, 1]),
        perplexity=_interval(perplexity),
        exact_perplexity=_interval(exact),
        perplexity_change=_interval(perplexity / exact - 1),
    )


def mean_interval(values: Sequence[float], seed: int) -> Interval:
    """The mean of independent values, of which there is at least one."""
    table = np.array(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(table), (_DRAWS, len(table)))
    return _interval(np.concatenate([[table.mean()], table[draws].mean(1)]))


def _interval(samples: np.ndarray) -> Interval:
    """The first sample is the value itself, the others were drawn."""
    edge = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(samples[1:], (edge, 1 - edge))
    return Interval(float(samples[0]), float(low), float(high))


def log_probabilities(logits: Tensor) -> Tensor:
    """What `read` takes as the reference."""
    return torch.log_softmax(logits.float(), dim=-1)
