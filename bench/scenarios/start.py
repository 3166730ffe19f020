"""Time from the start of the process to its ready line, and from there to a first token.

`first`: nothing is packed yet, and the zoo's files were dropped from the page cache. `cold`: packed
forms are there, the page cache again is empty, so weights come from the disk (Python's own files
stay cached). `warm`: started again right after. The server holds the base and eight adapters; then
seven full fine-tunes besides, which are kept as lossless differences and so are decoded by the
first start.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bench.job import Job
from bench.result import Result
from bench.stage import Stage
from bench.zoos import BASE, variants

_LIMITS_S = {"first": 30.0, "cold": 30.0, "warm": 3.0}
_PACKED = "packed"
_LOOK_S = 1.0


def run(stage: Stage) -> Iterator[Result]:
    """One first and one cold start of each zoo, and some warm ones."""
    zoos = {"base + 8 LoRA": stage.zoos.loras, "+ 7 full fine-tunes": stage.zoos.many}
    for what, zoo in zoos.items():
        for name in ("first", "cold", *["warm"] * (1 if stage.quick else 3)):
            stage.say(f"start: {what}, {name}")
            if name == "first":
                shutil.rmtree(zoo / _PACKED, ignore_errors=True)
            if name != "warm":
                _forget(zoo)
            yield _start(stage, zoo, what, name)


def _start(stage: Stage, zoo: Path, what: str, name: str) -> Result:
    limit = _LIMITS_S[name]
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
        packed = _settled(zoo / _PACKED)
    return Result(
        scenario="start",
        cell=f"{what}: {name}",
        figures={
            "ready s": server.ready_s,
            "loading s": sum(loads),
            "first token ms": first.outcome.ttft_ms.p50,
            "stop s": server.stop_s,
            "packed MB": packed / 1e6,
            "others": first.others,
        },
        checks={f"ready within {limit:g} s": server.ready_s <= limit},
        detail={"load_seconds": loads},
    )


def _settled(folder: Path) -> int:
    """Bytes under a folder, once they grow no more."""
    before, now = -1, _bytes(folder)
    while now != before:
        time.sleep(_LOOK_S)
        before, now = now, _bytes(folder)
    return now


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/??/[!.]*"))


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
