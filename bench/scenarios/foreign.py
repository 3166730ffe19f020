"""The base through transformers' own layer classes, beside the base through our own: what an
architecture costs that nobody wrote a file for.

A Granite whose multipliers are all 1 computes what a Llama computes, so the base's weights under
that name are the same model of another architecture. Both run in this process, over the kernels
that serve, in turns. A time is the least of all rounds, `speed` of the twin's the share of ours
that it is; `from` and `to` are the least and the largest of the rounds' own shares. `equal` are
greedy tokens of the one that are those of the other.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from bench.result import Result
from bench.scenarios.parity import TOKENS, prompts_for
from bench.stage import Stage
from bench.zoos import BASE, TWIN
from workers.offline import Model
from zoo.catalog import Catalog
from zoo.door import offline
from zoo.equivalence.chains import manifests_of
from zoo.equivalence.corpus import tokenizer_of
from zoo.store import Store

# Sequences, positions that each has after the step, rows of the step that are its own.
_SHAPES: Mapping[str, tuple[int, int, int]] = {
    "decode 1": (1, 256, 1),
    "decode 8": (8, 256, 1),
    "decode 32": (32, 256, 1),
    "prefill 256": (1, 256, 256),
}
_REPEATS = 5


def run(stage: Stage) -> Iterator[Result]:
    """One cell per shape of a step, and one for the tokens."""
    zoo = stage.zoos.foreign
    rounds, asked = (3, 2) if stage.quick else (20, 8)
    with closing(Catalog(zoo)) as catalog, offline(zoo) as door:
        base = catalog.variant(BASE)
        models = {
            name: door.load(manifests_of(catalog, catalog.variant(name))) for name in (BASE, TWIN)
        }
        for shape in _SHAPES:
            stage.say(f"foreign: {shape}")
            yield _timed(models, shape, rounds)
        stage.say("foreign: tokens")
        yield _tokens(models, _prompts(zoo, asked), base.family)


def _timed(models: Mapping[str, Model], shape: str, rounds: int) -> Result:
    times: dict[str, list[float]] = {name: [] for name in models}
    # The first round is thrown away: it makes what is made once.
    for number in range(-1, rounds):
        for name, model in models.items():
            whole = (0, len(model.loaded.units))
            (seconds,) = model.clock([whole], _SHAPES[shape], _REPEATS)
            if number >= 0:
                times[name].append(seconds)
    ratios = [own / other for own, other in zip(times[BASE], times[TWIN], strict=True)]
    return Result(
        scenario="foreign",
        cell=shape,
        figures={
            "own ms": 1000 * min(times[BASE]),
            "transformers' ms": 1000 * min(times[TWIN]),
            "speed": min(times[BASE]) / min(times[TWIN]),
            "from": min(ratios),
            "to": max(ratios),
        },
        detail={"times": times},
    )


def _tokens(models: Mapping[str, Model], prompts: list[list[int]], family: str) -> Result:
    ours, theirs = (model.generate(prompts, TOKENS) for model in models.values())
    pairs = zip(ours, theirs, strict=True)
    equal = sum(a == b for one, two in pairs for a, b in zip(one, two, strict=True))
    total = TOKENS * len(prompts)
    return Result(
        scenario="foreign",
        cell=f"tokens beside {family}",
        figures={"tokens": total, "equal": equal},
        checks={"both give the same tokens": equal == total},
    )


def _prompts(zoo: Path, count: int) -> list[list[int]]:
    with closing(Catalog(zoo)) as catalog:
        tokenizer = tokenizer_of(Store(zoo), catalog.variant(BASE))
    return [tokenizer.encode(text) for text in prompts_for(BASE, count)]
