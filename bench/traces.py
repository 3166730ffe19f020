"""When requests arrive, for whom and how long they are: recorded traces, or a seeded synthetic one.

A trace is a CSV file, gzipped or not, with the columns `t_s, prompt_tokens, output_tokens` and
perhaps `tenant`: the form of the published Azure LLM and ServeGen traces. Pure but for reading.
"""

import csv
import gzip
import io
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec


class TraceError(Exception):
    """A trace cannot be used; the message is one sentence that says why."""


class Arrival(msgspec.Struct, frozen=True):
    """One request of a trace, `at_s` seconds after its start."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""


def read_trace(path: Path, *, speed: float, seconds: float) -> list[Arrival]:
    """The arrivals of the first `seconds` of a trace that runs at `speed` times its own."""
    arrivals: list[Arrival] = []
    for arrival in _rows(path):
        at_s = arrival.at_s / speed
        if at_s > seconds:
            break
        arrivals.append(msgspec.structs.replace(arrival, at_s=at_s))
    if not arrivals:
        raise TraceError(f"{path} has no request in its first {seconds * speed:g} s")
    return arrivals


def synthetic(*, rate: float, seconds: float, tenants: int, seed: int) -> list[Arrival]:
    """Bursty arrivals at `rate` per second (gamma gaps, coefficient of variation 2), log-normal
    lengths (median prompt 100, answer 30), tenants by Zipf's law with exponent 1.2."""
    draw = random.Random(seed)
    names = [str(tenant) for tenant in range(tenants)]
    weights = [1 / (rank + 1) ** 1.2 for rank in range(tenants)]
    shape = 0.25
    arrivals: list[Arrival] = []
    at_s = 0.0
    while True:
        arrivals.append(
            Arrival(
                at_s,
                prompt_tokens=max(1, round(draw.lognormvariate(4.6, 0.6))),
                output_tokens=max(1, round(draw.lognormvariate(3.4, 0.6))),
                tenant=draw.choices(names, weights)[0],
            )
        )
        at_s += draw.gammavariate(shape, 1 / (rate * shape))
        if at_s > seconds:
            return arrivals


def assign(arrivals: Sequence[Arrival], models: Sequence[str]) -> list[str]:
    """The model of each arrival: tenants, busiest first, get the models in turn; requests without a
    tenant take turns themselves."""
    counts = Counter(arrival.tenant for arrival in arrivals)
    ranks = {tenant: rank for rank, (tenant, _) in enumerate(counts.most_common())}
    return [
        models[(ranks[arrival.tenant] if arrival.tenant else i) % len(models)]
        for i, arrival in enumerate(arrivals)
    ]


def _rows(path: Path) -> Iterator[Arrival]:
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as data:
            reader = csv.DictReader(io.TextIOWrapper(data, encoding="utf-8", newline=""))
            for row in reader:
                yield Arrival(
                    float(row["t_s"]),
                    max(1, int(row["prompt_tokens"])),
                    max(1, int(row["output_tokens"])),
                    row.get("tenant") or "",
                )
    except OSError as error:
        raise TraceError(f"the trace {path} cannot be read: {error.strerror or error}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise TraceError(
            f"{path} is not a trace: it needs the columns t_s, prompt_tokens, output_tokens"
        ) from error
