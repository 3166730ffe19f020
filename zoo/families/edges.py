"""What stands before and after the layers of a tried architecture, as our own specs say it.

Embedding and head are ours to compute, so each is measured against the only forms they know: a
scaled table and learned positions before the layers, one norm and one scaled matrix after them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.family import Config
from zoo.families.outline import Model, put
from zoo.families.trial import ROWS, TOKENS, Trial
from zoo.manifest import Norm

_IDS = torch.tensor([3, 31, 8, 17, 4, 9, 25])
_POSITIONS = torch.tensor([9, 2, 5, 11, 0, 7, 3])
_FAR_OFFSET = 5


@dataclass(frozen=True, slots=True)
class Edges:
    """`scale` and `offset` (added to learned positions) of the embedding; norm and scale of the
    head."""

    scale: float
    offset: int
    norm: Norm
    head_scale: float


@torch.no_grad()
def edges_of(trial: Trial, config: Config) -> Edges:
    """Measure them; raises UnsupportedFamily where they have no form that is known."""
    scale, offset = _before(trial, config.dtype)
    norm, head_scale = _after(trial, config)
    return Edges(scale, offset, norm, head_scale)


def _before(trial: Trial, dtype: torch.dtype | None) -> tuple[float, int]:
    """Scale and offset of the positions."""
    parts = trial.outline.parts
    table = trial.module(parts.tokens)
    offset = 0 if parts.positions is None else _offset(trial, trial.module(parts.positions))
    scale = _scale(trial, table)
    given = table.weight[_IDS]
    if not torch.allclose(_embedded(trial), scale * given, rtol=1e-6, atol=1e-6):
        trial.refuse("do more before their first layer than look up tokens and positions")
    if scale != 1.0 and dtype in (torch.bfloat16, torch.float16):
        kept = table.weight
        put(table, "weight", kept.to(dtype))
        rounded = float(torch.tensor(scale, dtype=dtype))
        exactly = [(table.weight[_IDS].float() * s).to(dtype) for s in (scale, rounded)]
        if not torch.equal(_embedded(trial), exactly[0]):
            scale = rounded
        put(table, "weight", kept)
    return scale, offset


def _offset(trial: Trial, places: Model) -> int:
    """What is added to a row's position before its learned one is looked up; the table of learned
    positions is zero from then on."""
    weight = places.weight
    put(places, "weight", torch.zeros_like(weight))
    without = _embedded(trial)
    put(places, "weight", weight)
    added = _embedded(trial) - without
    put(places, "weight", torch.zeros_like(weight))
    for offset in range(_FAR_OFFSET):
        if torch.allclose(added, weight[_POSITIONS + offset], atol=1e-5):
            return offset
    return trial.refuse("use their learned positions in a way that is not known")


def _scale(trial: Trial, table: Model) -> float:
    """What embeddings are multiplied by, to the last bit: that of ones."""
    kept = table.weight
    put(table, "weight", torch.ones_like(kept))
    scale = float(_embedded(trial)[0, 0])
    put(table, "weight", kept)
    return scale


def _embedded(trial: Trial) -> Tensor:
    found = trial.embedded(_IDS, _POSITIONS)
    width = trial.outline.model.get_input_embeddings().weight.shape[1]
    if found.shape != (ROWS, width):
        trial.refuse("change the width of embeddings before their first layer")
    return found


def _after(trial: Trial, config: Config) -> tuple[Norm, float]:
    """The norm after the layers, and the factor on the logits."""
    parts = trial.outline.parts
    if parts.norm is None:
        trial.refuse("have no norm before their head")
    norm = _norm(trial, trial.module(parts.norm))
    head = trial.module(parts.head)
    run = trial.shown
    expected = F.linear(normed(run.last, norm, trial.module(parts.norm)), head.weight, head.bias)
    if run.logits.shape == expected.shape == (1, ROWS, TOKENS):
        scale = float((run.logits * expected).sum() / expected.square().sum())
        if torch.allclose(run.logits, scale * expected, rtol=1e-4, atol=1e-4):
            return norm, _said(config, scale)
    return trial.refuse(
        "do more after their last layer than a norm, a matrix and a scale (soft-capped logits, "
        "for one)"
    )


def _norm(trial: Trial, module: nn.Module) -> Norm:
    """The norm that a module computes, of those known."""
    weight = next(module.parameters(), None)
    width = trial.module(trial.outline.parts.tokens).weight.shape[1]
    x = 0.01 * trial.tensor(5, width if weight is None else len(weight))
    found = module(x)
    # some norms have theirs written into the code
    epsilons = [v for v in vars(module).values() if isinstance(v, float)] + [1e-5, 1e-6]
    for eps in epsilons:
        for kind in ("rms", "layer"):
            for offset in (0.0, 1.0):
                norm = Norm(kind, eps, offset)
                if torch.allclose(normed(x, norm, module), found, rtol=1e-5, atol=1e-6):
                    return norm
    return trial.refuse(f"have a last norm ({type(module).__name__}) of a kind that is not known")


def normed(x: Tensor, norm: Norm, module: Model) -> Tensor:
    """x as our own kernels would norm it with the module's weights."""
    weight = getattr(module, "weight", None)
    weight = torch.ones(x.shape[-1]) if weight is None else weight + norm.offset
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, getattr(module, "bias", None), norm.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight


def _said(config: Config, scale: float) -> float:
    """The number that the config gives for a measured scale, or for its inverse."""
    said = [v for v in config.to_dict().values() if isinstance(v, float | int) and v]
    for value in (1.0, *said, *(1 / v for v in said)):
        if abs(value - scale) < 1e-5 * abs(scale):
            return float(value)
    return scale
