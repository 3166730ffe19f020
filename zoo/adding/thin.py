"""A fine-tune that changed norms and biases alone, as attachments upon its base's units: it shares
every matrix, and the batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.adapters.whole import NORMS
from zoo.manifest import Attachment, Bias, NormWeights, Unit


@dataclass(frozen=True, slots=True)
class Thin:
    """The attachments, unit by unit, and what such a variant is called: "norm", or "bias" where no
    norm's weight changed."""

    kind: str
    attachments: list[Attachment | None]


def thin(units: Sequence[Unit], theirs: Sequence[Unit]) -> Thin | None:
    """What makes `units` of the base's; None where a unit differs in more than norms and biases, or
    none differs at all."""
    if len(units) != len(theirs):
        return None
    changed: set[str] = set()
    found: list[Attachment | None] = []
    for unit, base in zip(units, theirs, strict=True):
        if unit.spec != base.spec or not base.tensors.keys() <= unit.tensors.keys():
            return None
        roles = [role for role, own in unit.tensors.items() if base.tensors.get(role) != own]
        if any(_piece(unit, role) is None for role in roles):
            return None
        changed.update(roles)
        pieces = {role.rpartition(".")[0]: _piece(unit, role) for role in sorted(roles)}
        found.append(Attachment(tuple(p for p in pieces.values() if p)) if pieces else None)
    if not changed:
        return None
    return Thin("bias" if all(role.endswith(".bias") for role in changed) else "norm", found)


def _piece(unit: Unit, tensor_role: str) -> NormWeights | Bias | None:
    """A changed tensor as a piece, if one can say it."""
    role, _, kind = tensor_role.rpartition(".")
    if role in NORMS:
        return NormWeights(role, unit.tensors[f"{role}.weight"], unit.tensors.get(f"{role}.bias"))
    return Bias(role, unit.tensors[tensor_role]) if kind == "bias" else None
