"""What rounding costs and brings: linear layers in codes of 8 and 4 bits, KV pages in bfloat16,
and layers that multiply bfloat16.

Each way of serving the base runs the built-in held-out text beside the exact one, in the same
kernels. `weight error` is the norm of what the weights lost over theirs, `logits` how far a logit
lies from the exact one at worst, `KL` and `agreement` those of the next token's distribution.
`x 1`, `x 8` and `x 32` are milliseconds of a decode step of so many sequences at 160 positions, the
least of all rounds, measured in turns; `faster` is against the exact way. A model that came here
from 4 bits already (the demo's base is such a GGUF) loses less than another in `int4`: its weights
lie near the codes, and `weight error` says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.result import Figure, Result
from bench.stage import Stage
from bench.zoos import BASE
from workers.offline import Model, Offline
from zoo.catalog import Catalog
from zoo.equivalence.agreement import Agreement, Reading, log_probabilities, read, sum_up
from zoo.equivalence.chains import manifests_of
from zoo.equivalence.corpus import Corpus, Passage, read_corpus, tokenizer_of
from zoo.store import Store

EXACT = "exact"
WAYS: Mapping[str, Mapping[str, Any]] = {
    EXACT: {},
    "KV bfloat16": {"kv_dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
}
_STREAMS = (1, 8, 32)
_CONTEXT = 160
_SEED = 0
# The least agreement that a way must reach to be worth its name.
_AGREEMENT = {"KV bfloat16": 0.99, "bfloat16": 0.95, "int8": 0.95, "int4": 0.5}


@dataclass(slots=True)
class Way:
    """A way of serving, and what was found of it."""

    name: str
    model: Model
    readings: list[Reading] = field(default_factory=list)
    furthest: float = 0.0
    step_s: dict[int, float] = field(default_factory=dict)


def run(stage: Stage) -> Iterator[Result]:
    """One cell per way."""
    rows, rounds = (48, 3) if stage.quick else (256, 9)
    with ExitStack() as stack:
        ways = _ways(stage, stack)
        for place, passage in enumerate(_corpus(stage.zoos.plain, rows).passages):
            if place % 32 == 0:
                stage.say(f"quantized: text {place} of {rows}")
            _compare(ways, passage)
        for number in range(rounds):
            stage.say(f"quantized: speed, round {number + 1} of {rounds}")
            for streams in _STREAMS:
                for way in ways:
                    _clock(way, streams)
        exact = ways[0]
        for way in ways:
            yield _result(way, exact)


def _ways(stage: Stage, stack: ExitStack) -> list[Way]:
    zoo = stage.zoos.plain
    with closing(Catalog(zoo)) as catalog:
        chain = manifests_of(catalog, catalog.variant(BASE))
    found: list[Way] = []
    for name, settings in WAYS.items():
        stage.say(f"quantized: loading, {name}")
        runner = stack.enter_context(Offline(zoo, **settings))
        found.append(Way(name, runner.load(chain)))
    return found


def _corpus(zoo: Path, rows: int) -> Corpus:
    store = Store(zoo)
    with closing(Catalog(zoo)) as catalog:
        variant = catalog.variant(BASE)
    return read_corpus(tokenizer_of(store, variant), None, rows, variant.context)


def _compare(ways: Sequence[Way], passage: Passage) -> None:
    """The exact way is the first."""
    exact = _logits(ways[0], passage)
    known, targets = log_probabilities(exact), torch.tensor(passage.ids[passage.first :])
    for way in ways:
        logits = exact if way is ways[0] else _logits(way, passage)
        way.readings.append(read(known, logits, targets))
        way.furthest = max(way.furthest, float((logits - exact).abs().max()))


def _logits(way: Way, passage: Passage) -> Tensor:
    return way.model.logits([passage.ids])[0][passage.first - 1 : -1]


def _clock(way: Way, streams: int) -> None:
    units = len(way.model.loaded.units)
    (spent,) = way.model.clock([(0, units)], (streams, _CONTEXT, 1), 3)
    way.step_s[streams] = min(spent, way.step_s.get(streams, spent))


def _result(way: Way, exact: Way) -> Result:
    found = sum_up(way.readings, _SEED)
    figures: dict[str, Figure] = {
        "MB": way.model.nbytes / 1e6,
        "weight error": way.model.loaded.weight_error,
        "logits": way.furthest,
        "KL": found.kl.value,
        "KL to": found.kl.high,
        "agreement": found.agreement.value,
        "agreement from": found.agreement.low,
        "perplexity": found.perplexity.value,
        "exact perplexity": found.exact_perplexity.value,
    }
    for streams in _STREAMS:
        figures[f"x {streams} ms"] = 1e3 * way.step_s[streams]
        figures[f"x {streams} faster"] = exact.step_s[streams] / way.step_s[streams]
    return Result(
        scenario="quantized",
        cell=way.name,
        figures=figures,
        checks=_checks(way, exact, found),
        detail={"tokens": found.tokens, "sequences": found.sequences},
    )


def _checks(way: Way, exact: Way, found: Agreement) -> dict[str, bool]:
    if way is exact:
        return {"agrees with itself": found.agreement.value == 1 and way.furthest == 0}
    least = _AGREEMENT[way.name]
    checks = {f"at least {least} of the best tokens": found.agreement.value >= least}
    if "weights" in WAYS[way.name]:
        checks["less memory"] = way.model.nbytes < exact.model.nbytes
        checks["one stream is faster"] = way.step_s[1] < exact.step_s[1]
    return checks
