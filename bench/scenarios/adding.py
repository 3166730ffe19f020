"""What streams that are being served notice of a variant that is added: the gaps between tokens.

8 and 32 streams decode the base. A few seconds on, a name is given to a variant whose objects lie
in the zoo already, so the server loads it (nothing is packed before) while no other process works
for it: a LoRA adapter, a fine-tune of the last four layers, and a full one that is kept as lossless
differences. `calm` is the same load without any; a gap may be as long as two of its usual ones, or
as its own longest. Gaps before that are left out: there the prompts of the others are computed.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from bench.job import Job, Outcome
from bench.result import Figure, Result
from bench.stage import Stage
from bench.zoos import BASE, LAST, LORAS, variants
from zoo.keeping.aliases import pin
from zoo.keeping.remove import remove
from zoo.progress import Quiet

_ADDED = {"LoRA": LORAS[-1], "last 4 layers": LAST[0], "full": "tickets-0"}
_AFTER_S = 3.0
_WAIT_S = 60.0


def run(stage: Stage) -> Iterator[Result]:
    """A calm load and one per kind of variant, at each number of streams."""
    source = stage.zoos.adding
    for streams, tokens in ((8, 512), (32, 256)) if stage.quick else ((8, 2048), (32, 1024)):
        calm = None
        for kind, name in {"calm": "", **_ADDED}.items():
            stage.say(f"adding: {streams} streams, {kind}")
            with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
                zoo = _without(source, Path(scratch, "zoo"))
                outcome, seconds = _play(stage, zoo, name, (streams, tokens))
            calm = calm or outcome
            yield _result(f"{streams} streams, {kind}", outcome, calm, seconds)


def _without(source: Path, target: Path) -> Path:
    """A zoo of the same files that serves the base alone; the others are versions that it knows."""
    shutil.copytree(
        source, target, copy_function=os.link, ignore=shutil.ignore_patterns("packed", "catalog*")
    )
    for file in source.glob("catalog*"):
        shutil.copy(file, target)
    for variant in variants(target):
        if variant.name != BASE:
            remove(target, variant.name, wait_s=_WAIT_S, progress=Quiet())
    return target


def _play(
    stage: Stage, zoo: Path, name: str, shape: tuple[int, int]
) -> tuple[Outcome, float | None]:
    """Load the server and let it add `name@1` meanwhile; the seconds that its loading took."""
    streams, tokens = shape
    with stage.server(zoo) as server:
        job = Job(
            endpoint=server.endpoint,
            models=(BASE,),
            requests=streams,
            streams=streams,
            prompt_tokens=(16, 16),
            output_tokens=(tokens, tokens),
            vocabulary=variants(zoo)[0].vocabulary,
            settling_s=_AFTER_S,
        )
        timer = threading.Timer(_AFTER_S, _name, (zoo, name))
        if name:
            timer.start()
        try:
            played = stage.load(server, job)
        finally:
            timer.cancel()
        known = {
            variant["name"]: variant["load_seconds"] for variant in server.status()["variants"]
        }
    return played.outcome, known.get(f"new-{name}")


def _name(zoo: Path, name: str) -> None:
    pin(zoo, f"new-{name}", f"{name}@1", wait_s=_WAIT_S, progress=Quiet())


def _result(cell: str, outcome: Outcome, calm: Outcome, seconds: float | None) -> Result:
    gaps = outcome.itl_ms
    limit = max(2 * calm.itl_ms.p50, calm.itl_ms.max)
    figures: dict[str, Figure] = {
        "median gap ms": gaps.p50,
        "p99 ms": gaps.p99,
        "longest ms": gaps.max,
        "longest / median": gaps.max / gaps.p50,
        "tokens/s": outcome.tokens_per_s,
    }
    if seconds is not None:
        figures["loading s"] = seconds
    checks = {"no gap over two steps": gaps.max <= limit} if outcome is not calm else {}
    return Result(scenario="adding", cell=cell, figures=figures, checks=checks)
