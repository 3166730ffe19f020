"""Time from the start of the process to its ready line, and from there to a first token.

`cold`: the zoo's files were dropped from the page cache, so weights come from the disk (Python's
own files stay cached). `warm`: started again right after. The server holds the base and eight
adapters.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from bench.job import Job
from bench.result import Result
from bench.stage import Stage
from bench.zoos import BASE, variants

_LIMITS_S = {"cold": 30.0, "warm": 3.0}


def run(stage: Stage) -> Iterator[Result]:
    """One cold start and some warm ones."""
    zoo = stage.zoos.loras
    for number in range(2 if stage.quick else 4):
        if number == 0:
            _forget(zoo)
        stage.say(f"start: {'cold' if number == 0 else f'warm {number}'}")
        yield _start(stage, zoo, "cold" if number == 0 else f"warm {number}")


def _start(stage: Stage, zoo: Path, name: str) -> Result:
    limit = _LIMITS_S[name.split()[0]]
    with stage.server(zoo) as server:
        job = Job(
            endpoint=server.endpoint,
            models=(BASE,),
            prompt_tokens=(16, 16),
            output_tokens=(1, 1),
            vocabulary=variants(zoo)[0].vocabulary,
        )
        first = stage.load(server, job)
        loads = [variant["load_seconds"] for variant in server.status()["variants"]]
    return Result(
        scenario="start",
        cell=name,
        figures={
            "ready s": server.ready_s,
            "loading s": sum(loads),
            "first token ms": first.outcome.ttft_ms.p50,
            "stop s": server.stop_s,
            "others": first.others,
        },
        checks={f"ready within {limit:g} s": server.ready_s <= limit},
        detail={"load_seconds": loads},
    )


def _forget(folder: Path) -> None:
    """Drop the clean pages of every file from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
