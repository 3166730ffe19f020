"""Full fine-tunes stored exactly, as deltas and as equivalents, side by side.

Two really trained full fine-tunes and five between them and the base (`bench.tunes`), in one zoo
per way. `disk` and `resident` are what one variant takes beside the base: its files, and the bytes
that a worker with everything loaded holds for it; `share` is the latter over the bytes of a whole
model. `dates` and `tickets` are the scores of the two trained ones on held-out questions, `lost`
beside them what the exact one scores more on the same questions (with an interval), `KL` and
`agreement` the worse of the two beside the exact ones, as measured when they were added. `tokens/s`
are of 32 streams over base and all seven, `ratio` is to the base alone on the same server, side by
side in rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from bench.job import Job
from bench.result import Figure, Result
from bench.server import Server
from bench.spread import median
from bench.stage import Stage
from bench.tunes import REAL, TUNED, TUNES
from bench.zoos import BASE, variants
from zoo.catalog import Catalog
from zoo.door import offline
from zoo.equivalence.agreement import mean_interval
from zoo.equivalence.chains import manifests_of
from zoo.equivalence.corpus import tokenizer_of
from zoo.equivalence.probe import SEED
from zoo.equivalence.score import scores
from zoo.keeping.reach import Reach
from zoo.manifest import ObjectDigest
from zoo.measured import Interval, Measured
from zoo.store import Store

_WAYS = ("exact", "delta", "equivalent")
_FLAGS = ("--kv-cache-memory-bytes", str(512 << 20))
_MEGABYTE = 1e6
# By task the score of each answer.
Scores = Mapping[str, Sequence[float]]
_MOST_SHARE, _SCORE_LOSS, _LEAST_RATIO = 1 / 8, 0.01, 0.7


def run(stage: Stage) -> Iterator[Result]:
    """One cell per way; what depends on what else the machine does comes last."""
    rows, questions = (16, 200) if stage.quick else (64, 600)
    zoos: dict[str, Path] = {}
    found: dict[str, Scores] = {}
    for way in _WAYS:
        stage.say(f"stores: {way}: scores")
        zoos[way] = stage.zoos.tuned(way, rows)
        found[way] = _scores(stage, zoos[way], questions)
    for way, zoo in zoos.items():
        stage.say(f"stores: {way}: speeds")
        yield _cell(stage, way, zoo, found[way], found["exact"])


def _scores(stage: Stage, zoo: Path, count: int) -> dict[str, list[float]]:
    """By task the score of each answer of the variant that was trained on it."""
    store = Store(zoo)
    found: dict[str, list[float]] = {}
    with closing(Catalog(zoo)) as catalog, offline(zoo) as runner:
        for name, task in zip(REAL, TUNED.values(), strict=True):
            asked = (task, task.questions(None, count))
            variant = catalog.variant(name)
            chain, tokenizer = manifests_of(catalog, variant), tokenizer_of(store, variant)
            found[task.name] = scores(runner, chain, tokenizer, asked, stage.zoos.progress)
    return found


def _cell(
    stage: Stage,
    way: str,
    zoo: Path,
    found: Scores,
    exact: Scores,
) -> Result:
    measured = [one.measured for one in variants(zoo) if one.name in REAL and one.measured]
    with stage.server(zoo, *_FLAGS) as server:
        total = server.status()["workers"][0]["resident_bytes"]
        base, mix = _rates(stage, server, zoo)
    whole = _base_bytes(zoo)
    resident = (total - whole) / len(TUNES)
    share = resident / whole
    ratios = [a / b for a, b in zip(mix, base, strict=True)]
    lost = {task: _lost(found[task], exact[task]) for task in exact}
    checks = {
        f"at least {_LEAST_RATIO} of the base alone": median(ratios) >= _LEAST_RATIO,
        f"resident at most {_MOST_SHARE} of a model": share <= _MOST_SHARE,
        "scores within a point of exact": all(one.value <= _SCORE_LOSS for one in lost.values()),
    }
    return Result(
        scenario="stores",
        cell=way,
        figures={
            "disk MB": _disk(zoo) / _MEGABYTE,
            "resident MB": resident / _MEGABYTE,
            "share": share,
            **_scored(found, lost),
            **_agreement(measured),
            "tokens/s": median(mix),
            "ratio": median(ratios),
        },
        # What is exact is not small, and its mix shares no block with the base.
        checks=checks if way == "delta" else {},
        detail={"measured": measured, "lost": lost, "base": base, "mix": mix, "ratios": ratios},
    )


def _lost(found: Sequence[float], exact: Sequence[float]) -> Interval:
    """How much more the exact one scores, question by question."""
    return mean_interval([a - b for a, b in zip(exact, found, strict=True)], SEED)


def _scored(found: Scores, lost: Mapping[str, Interval]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for task, got in found.items():
        one = lost[task]
        figures[task] = sum(got) / len(got)
        figures[f"{task} lost"] = f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f}) of {len(got)}"
    return figures


def _agreement(measured: list[Measured]) -> dict[str, float]:
    if not measured:
        return {"KL": 0.0, "agreement": 1.0}
    return {
        "KL": max(one.kl.value for one in measured),
        "agreement": min(one.agreement.value for one in measured),
    }


def _tensors(zoo: Path) -> dict[str, frozenset[ObjectDigest]]:
    """By variant what serving it needs."""
    with closing(Catalog(zoo)) as catalog:
        reach = Reach(catalog)
        return {one.name: reach.footprint(one).tensors for one in catalog.variants()}


def _disk(zoo: Path) -> float:
    """Bytes of the files that one fine-tune has beside the base's."""
    store, tensors = Store(zoo), _tensors(zoo)
    own = frozenset().union(*tensors.values()) - tensors[BASE]
    return sum(store.path(digest).stat().st_size for digest in own) / len(TUNES)


def _base_bytes(zoo: Path) -> int:
    """Bytes of the base's tensors."""
    return sum(Store(zoo).info(digest).nbytes for digest in _tensors(zoo)[BASE])


def _rates(stage: Stage, server: Server, zoo: Path) -> tuple[list[float], list[float]]:
    """Tokens per second of the base alone and of the mix, by round."""
    found: dict[str, list[float]] = {"base": [], "mix": []}
    mixes = {"base": (BASE,), "mix": (BASE, *TUNES)}
    prompt, new, rounds = (128, 24, 2) if stage.quick else (128, 64, 3)
    for number in range(-1, rounds):
        for index, (name, models) in enumerate(mixes.items()):
            length = new if number >= 0 else 4
            job = Job(
                endpoint=server.endpoint,
                models=models,
                requests=32,
                streams=32,
                prompt_tokens=(prompt, prompt),
                output_tokens=(length, length),
                vocabulary=variants(zoo)[0].vocabulary,
                seed=1000 * number + index,
            )
            played = stage.load(server, job)
            if number >= 0:
                found[name].append(played.outcome.tokens_per_s)
    return found["base"], found["mix"]
