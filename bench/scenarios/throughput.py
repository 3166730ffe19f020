"""Output tokens per second, prefill inside the time.

Cells: one, 8 and 32 streams on the base, 32 over eight LoRA adapters, 32 over the base and seven
fine-tunes of its last four layers.

One server holds all variants. Each round runs every cell once, so what is compared ran side by side
(A B A B); figures are medians of the rounds, `swing` is (largest - smallest) / median, `ratio` the
median over the rounds of a cell's rate to the base's in the same round. Prompts are random token
ids, new in every round, so no prefix is shared. `of limit` is the roofline's bound over the time
taken (`bench/roofline.py`). `batch` is the mean number of sequences in a run of a block that
several variants share, `merged` the share of those runs that carried more than one variant,
`others` the cores that other processes kept busy. `CPU ratio` is the ratio of CPU time per token,
which holds on a busy machine too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.blocks import difference, merging
from bench.ceiling import best, measure
from bench.job import Job, Outcome
from bench.result import Result
from bench.roofline import Shape, Weights, least_seconds
from bench.server import Server
from bench.spread import median, swing
from bench.stage import Played, Stage
from bench.weigh import weigh
from bench.zoos import BASE, LAST, LORAS, variants

_KV_BYTES = 1 << 30
_REFERENCE = "base x 32"
_TARGETS = {"8 LoRA x 32": 0.8, "base + 7 last x 32": 0.6}


@dataclass(slots=True)
class Cell:
    """One row of the table, and what its rounds gave."""

    name: str
    models: tuple[str, ...]
    streams: int
    played: list[Played] = field(default_factory=list)
    blocks: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def outcomes(self) -> list[Outcome]:
        """What the clients saw, by round."""
        return [played.outcome for played in self.played]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        return [outcome.tokens_per_s for outcome in self.outcomes]

    @property
    def costs(self) -> list[float]:
        """CPU seconds of the server per token of each round."""
        return [one.server_cpu_s / one.outcome.output_tokens for one in self.played]


def cells() -> list[Cell]:
    """The table's rows, the reference next to what is compared with it."""
    return [
        Cell("base x 1", (BASE,), 1),
        Cell("base x 8", (BASE,), 8),
        Cell(_REFERENCE, (BASE,), 32),
        Cell("8 LoRA x 32", LORAS, 32),
        Cell("base + 7 last x 32", (BASE, *LAST), 32),
    ]


def run(stage: Stage) -> Iterator[Result]:
    """Every cell, in rounds."""
    zoo = stage.zoos.whole
    prompt, new, rounds = (128, 24, 2) if stage.quick else (128, 64, 3)
    vocabulary = variants(zoo)[0].vocabulary
    table = cells()
    limits = [measure()]
    with stage.server(zoo, "--kv-cache-memory-bytes", str(_KV_BYTES)) as server:
        _warm_up(stage, server, vocabulary)
        for number in range(rounds):
            for index, cell in enumerate(table):
                stage.say(f"throughput: round {number + 1} of {rounds}, {cell.name}")
                job = Job(
                    endpoint=server.endpoint,
                    models=cell.models,
                    requests=cell.streams,
                    streams=cell.streams,
                    prompt_tokens=(prompt, prompt),
                    output_tokens=(new, new),
                    vocabulary=vocabulary,
                    seed=1000 * number + index,
                )
                _measure(stage, server, cell, job)
        memory = server.memory()
    limits.append(measure())
    ceiling = best(limits)
    for cell in table:
        shape = Shape(cell.streams, prompt, new)
        others = cell.models if cell.models != (BASE,) else ()
        weights = weigh(zoo, BASE, [name for name in others if name != BASE])
        yield _result(cell, table, least_seconds(shape, weights, ceiling), weights)
    yield Result(
        scenario="limits",
        cell="machine",
        figures={
            "read GB/s": ceiling.read_bytes_per_s / 1e9,
            "GFLOP/s": ceiling.flops_per_s / 1e9,
            "PSS MB": sum(one.pss_bytes for one in memory) / 1e6,
        },
        detail={"measured": limits, "memory": memory},
    )


def _warm_up(stage: Stage, server: Server, vocabulary: int) -> None:
    models = (BASE, LORAS[0], LORAS[-1], LAST[0])
    job = Job(
        endpoint=server.endpoint,
        models=models,
        requests=4,
        streams=4,
        prompt_tokens=(32, 32),
        output_tokens=(4, 4),
        vocabulary=vocabulary,
        seed=-1,
    )
    stage.load(server, job)


def _measure(stage: Stage, server: Server, cell: Cell, job: Job) -> None:
    before = server.status()["blocks"]
    cell.played.append(stage.load(server, job))
    cell.blocks.append(difference(before, server.status()["blocks"]))


def _result(cell: Cell, table: list[Cell], least_s: float, weights: Weights) -> Result:
    reference = next(one for one in table if one.name == _REFERENCE)
    met = merging(cell.blocks[-1])
    figures: dict[str, float | int | str] = {
        "tokens/s": median(cell.rates),
        "swing": swing(cell.rates),
        "first token ms": median([one.ttft_ms.p50 for one in cell.outcomes]),
        "between ms": median([one.itl_ms.p50 for one in cell.outcomes]),
        "of limit": median([least_s / one.seconds for one in cell.outcomes]),
        "batch": met.shared_sequences,
        "merged": met.merged,
        "CPU ms/token": 1000 * median(cell.costs),
        "others": median([one.others for one in cell.played]),
    }
    checks = {
        "every answer is whole": all(
            one.finished == {"length": cell.streams} and not one.mismatched for one in cell.outcomes
        )
    }
    if cell.name in _TARGETS:
        ratios = [a / b for a, b in zip(cell.rates, reference.rates, strict=True)]
        figures["ratio"] = median(ratios)
        costs = [b / a for a, b in zip(cell.costs, reference.costs, strict=True)]
        figures["CPU ratio"] = median(costs)
        figures["ratios"] = " ".join(f"{ratio:.2f}" for ratio in ratios)
        target = _TARGETS[cell.name]
        checks[f"at least {target} of the base alone"] = figures["ratio"] >= target
        checks["rows of several variants ran together"] = met.merged > 0
    return Result(
        scenario="throughput",
        cell=cell.name,
        figures=figures,
        checks=checks,
        detail={
            "rounds": cell.outcomes,
            "blocks": cell.blocks[-1],
            "merging": met,
            "least_s": least_s,
            "weights": weights,
        },
    )
