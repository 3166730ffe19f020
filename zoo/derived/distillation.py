"""Teaches a pruned network what the true one says: the distribution of the next token, and the
stream below the head.

Logits are compared at every fourth position, another fourth at each step: the head costs as much as
many layers, and its gradient is much the same at neighbouring positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.derived.network import Network
from zoo.derived.training import Loss

POSITION_STEP = 4
# How much the distance between normed streams counts beside the divergence in nats.
_STREAM_WEIGHT = 1.0


def distillation(teacher: Network, student: Network, dtype: torch.dtype) -> Loss:
    """The loss of a batch of ids; the teacher's weights are of `dtype`, the student computes in
    it."""

    def loss(ids: Tensor, step: int) -> Tensor:
        first = step % POSITION_STEP
        with torch.no_grad():
            wanted = teacher.hidden(ids, len(teacher) - 1).float()
            truth = teacher.head(wanted[:, first::POSITION_STEP])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            given = student.hidden(ids, len(student) - 1)
            logits = student.head(given[:, first::POSITION_STEP])
        total = divergence(truth, logits)
        if given.shape == wanted.shape:
            total = total + _STREAM_WEIGHT * stream_distance(wanted, given)
        return total

    return loss


def divergence(truth: Tensor, logits: Tensor) -> Tensor:
    """KL(truth || other) per position, in nats."""
    wanted, given = F.log_softmax(truth.float(), dim=-1), F.log_softmax(logits.float(), dim=-1)
    return F.kl_div(given, wanted, log_target=True, reduction="sum") / truth[..., 0].numel()


def stream_distance(wanted: Tensor, given: Tensor) -> Tensor:
    """Mean square distance of streams that are normed as the head norms them."""
    width = (wanted.shape[-1],)
    return F.mse_loss(F.rms_norm(given.float(), width), F.rms_norm(wanted.float(), width))
