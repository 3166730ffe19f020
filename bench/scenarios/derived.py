"""Models made of the base: a surrogate, a narrower one, stitches between the two widths, profiles.

Everything is judged on text that nothing learned from, beside the trivial choices: for a surrogate
the same pruning without training, blind pruning, and guesses by tables of counts; for a stitch the
identity, a random map and least squares. `kept` is the share of greedy guesses that the true chain
keeps along its own answers, `kept of 4` how many tokens in a row of a draft of four. `equal` are
tokens of the real server that are those of the chain run here. Trainings take minutes; what the zoo
holds already is not made again.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import uvloop

from bench.result import Figure, Result
from bench.scenarios.parity import TOKENS, ask_all, prompts_for
from bench.stage import Stage
from bench.zoos import BASE
from zoo.catalog import Catalog
from zoo.derived.judgement import TRUE, Quality
from zoo.derived.pace import Pace
from zoo.derived.profile import BlockProfile, ProfileOptions, profile
from zoo.derived.stitch import TRAINED, StitchFinding, StitchOptions, make_stitch
from zoo.derived.surrogate import SurrogateFinding, SurrogateOptions, make_surrogate
from zoo.derived.training import Course
from zoo.derived.verdict import SURROGATE
from zoo.door import offline
from zoo.equivalence.chains import manifests_of
from zoo.equivalence.text import Measure
from zoo.findings import Findings
from zoo.progress import Progress

HALF, NARROW, JOINED = "half", "narrow", "joined"
_MEASURE = Measure(held_out=24)


def run(stage: Stage) -> Iterator[Result]:
    """The surrogate, the narrower model, the stitches, the blocks."""
    zoo, short = stage.zoos.derived, stage.quick
    half = SurrogateOptions(
        ratio=0.5, measure=_MEASURE, course=Course(20 if short else 150, 4, 4e-4), name=HALF
    )
    narrow = SurrogateOptions(
        0.9, 8 / 9, measure=_MEASURE, course=Course(10 if short else 40, 4, 4e-4), name=NARROW
    )
    for options in (half, narrow):
        stage.say(f"derived: the surrogate {options.name}")
        yield from _surrogate_cells(_surrogate(zoo, options, stage.zoos.progress))
    stage.say("derived: stitches")
    course = Course(10 if short else 40, 4, 3e-4)
    stitching = StitchOptions(measure=_MEASURE, course=course, name=JOINED)
    yield from _stitch_cells(_stitches(zoo, stitching, stage.zoos.progress))
    stage.say("derived: through the server")
    yield from _served(stage, zoo)
    yield from run_profiles(stage)


def run_profiles(stage: Stage) -> Iterator[Result]:
    """The blocks of the base alone, measured anew."""
    stage.say("derived: profiles")
    options = ProfileOptions(again=True)
    for row in profile(stage.zoos.derived, BASE, options, stage.zoos.progress):
        yield _profile_cell(row)


def _surrogate(zoo: Path, options: SurrogateOptions, progress: Progress) -> SurrogateFinding:
    with closing(Catalog(zoo)) as catalog:
        known = Findings(catalog).all("surrogate", SurrogateFinding).values()
    for finding in known:
        if (finding.name, finding.steps) == (options.name, options.course.steps):
            return finding
    return make_surrogate(zoo, BASE, options, progress)


def _stitches(zoo: Path, options: StitchOptions, progress: Progress) -> StitchFinding:
    with closing(Catalog(zoo)) as catalog:
        known = Findings(catalog).all("stitch", StitchFinding).values()
    for finding in known:
        if (finding.name, finding.steps) == (options.name, options.course.steps):
            return finding
    return make_stitch(zoo, (BASE, NARROW), options, progress)


def _surrogate_cells(finding: SurrogateFinding) -> Iterator[Result]:
    verdict = finding.verdict
    for name in dict.fromkeys((*verdict.quality, *verdict.acceptance)):
        figures: dict[str, Figure] = {}
        if name == SURROGATE:
            figures["weights"] = finding.weights
        if name in verdict.quality:
            figures |= _quality(verdict.quality[name])
        if name in verdict.acceptance:
            kept = verdict.acceptance[name]
            figures |= {"kept": kept.share, "kept of 4": kept.run}
        if name in verdict.pace:
            figures |= _pace(verdict.pace[name])
        checks = _surrogate_checks(finding) if name == SURROGATE else {}
        yield Result(
            scenario="derived",
            cell=f"{finding.name}: {name}",
            figures=figures,
            checks=checks,
            detail={"shape": finding.shape, "layers": finding.layers, "losses": finding.losses},
        )


def _surrogate_checks(finding: SurrogateFinding) -> dict[str, bool]:
    quality, kept = finding.verdict.quality, finding.verdict.acceptance
    nearer = {
        "nearer than without training": quality[SURROGATE].kl.high < quality["untrained"].kl.low,
        "nearer than blind pruning": quality[SURROGATE].kl.high < quality["random"].kl.low,
    }
    if finding.name == NARROW:
        # It is the other side of the stitches, and only taught until it makes sense.
        return nearer
    mine = kept[SURROGATE].share
    return nearer | {
        "keeps more guesses than tables": mine > max(kept["bigram"].share, kept["lookup"].share),
        "keeps more guesses than without training": mine > kept["untrained"].share,
        "faster than the true chain": finding.verdict.speedup > 1,
    }


def _stitch_cells(finding: StitchFinding) -> Iterator[Result]:
    yield Result(scenario="derived", cell=f"stitch: {TRUE}", figures=_quality(finding.true))
    for join in finding.joins:
        kl = {name: quality.kl for name, quality in join.quality.items()}
        others = ("identity", "untrained", "fitted")
        for name, quality in join.quality.items():
            figures = _quality(quality)
            if name == TRAINED and join == finding.best and finding.pace is not None:
                figures |= _pace(finding.pace["joined"])
            checks = {f"nearer than {o}": kl[TRAINED].value < kl[o].value for o in others}
            yield Result(
                scenario="derived",
                cell=f"stitch {join.below}:{join.above}: {name}",
                figures=figures,
                checks=checks if name == TRAINED else {},
            )


def _served(stage: Stage, zoo: Path) -> Iterator[Result]:
    """The tokens that the real server gives, all variants in one batch, beside those that the door
    finds in this process."""
    with closing(Catalog(zoo)) as catalog:
        chains = {one.name: manifests_of(catalog, one) for one in catalog.variants()}
    asked = [(name, prompt) for prompt in prompts_for(BASE, 4) for name in chains]
    with stage.server(zoo) as server:
        answers = uvloop.run(ask_all(server.endpoint, asked, len(asked)))
        merged = sum(block["merged_runs"] > 0 for block in server.status()["blocks"])
    with offline(zoo) as door:
        models = {name: door.load(chain) for name, chain in chains.items()}
        wanted = door.generate([(models[name], ids) for name, ids, _ in answers], TOKENS)
    for name in chains:
        pairs = [(a[2], w) for a, w in zip(answers, wanted, strict=True) if a[0] == name]
        equal = sum(a == b for one, two in pairs for a, b in zip(one, two, strict=True))
        total = TOKENS * len(pairs)
        yield Result(
            scenario="derived",
            cell=f"served: {name}",
            figures={"tokens": total, "equal": equal, "blocks shared": merged},
            checks={f"{name} is served as it was measured": equal == total},
        )


def _profile_cell(row: BlockProfile) -> Result:
    context = row.decode.points[0].context
    return Result(
        scenario="profiles",
        cell=f"{row.of} {row.depth}-{row.depth + row.units - 1}",
        figures={
            "MB": row.resident_bytes / 1e6,
            "KV bytes/token": row.kv_bytes_per_token,
            "disk ms": 1000 * row.load_disk_s,
            "host ms": 1000 * row.load_host_s,
            "1 row ms": 1000 * row.decode.predict(1, context),
            "16 rows ms": 1000 * row.decode.predict(16, context),
            "error": row.decode.error.median,
            "largest error": row.decode.error.largest,
        },
        detail={"decode": row.decode, "prefill": row.prefill},
    )


def _quality(quality: Quality) -> dict[str, Figure]:
    return {
        "perplexity": quality.perplexity.value,
        "KL": quality.kl.value,
        "same best": quality.agreement.value,
    }


def _pace(pace: Pace) -> dict[str, Figure]:
    return {
        "decode 1 ms": 1000 * pace.decode_1_s,
        "decode 8 ms": 1000 * pace.decode_8_s,
        "prefill ms": 1000 * pace.prefill_s,
        "processor ms": 1000 * pace.work_s,
    }
