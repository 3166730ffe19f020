"""How a device's memory is divided between weights and KV pages: one budget in bytes. Pure."""

from dataclasses import dataclass

# Weights take at most this share of a budget: without pages nothing runs.
_MOST_WEIGHTS = 3 / 4
# Of the host memory that a worker finds free, this share may hold weights that left its device.
_PARKED = 1 / 4
# Of what the weights that are known leave, this share waits for variants that are added later.
_FOR_LATER = 1 / 8


class NoBudget(Exception):
    """The device has too little memory; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Bytes for KV pages and for weights."""

    kv_bytes: int
    weight_bytes: int


def share(budget: int, known: int, kv_bytes: int = 0, weight_bytes: int = 0) -> Shares:
    """Divide `budget`; `known` are the bytes of all weights to be served. Sizes that are given
    stand, and the other part gets the rest; else weights get what they need and some for later, and
    where they need more than their most, chains that nobody uses will give way to others."""
    if weight_bytes == 0:
        if kv_bytes:
            weight_bytes = budget - kv_bytes
        else:
            later = int(max(0, budget - known) * _FOR_LATER)
            weight_bytes = min(known + later, int(budget * _MOST_WEIGHTS))
    if kv_bytes == 0:
        kv_bytes = budget - weight_bytes
    if kv_bytes <= 0 or weight_bytes <= 0:
        raise NoBudget(
            f"{budget} bytes of the device are this worker's and leave nothing beside what was "
            "asked for: raise --gpu-memory-utilization or lower the sizes given"
        )
    return Shares(kv_bytes, weight_bytes)


def parked(known: int, weight_bytes: int, available: int, workers: int = 1) -> int:
    """Host bytes for weights that give way to others on the device: none where all that are known
    fit into `weight_bytes`; else as many as they are, within one of `workers`' part of the memory
    that is `available`."""
    if known <= weight_bytes:
        return 0
    return min(known, int(available * _PARKED) // max(1, workers))
