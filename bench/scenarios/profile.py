"""Where the time of the worker's loop goes, at batches of 1 and 32 decoding rows.

The worker runs in this process, driven by hand, its kernels with a clock around each call; every
row is a share of the wall time of the steps. `kernels` is time inside the operations of a step (of
which `project` and so on), `runner` the rest of running a wave (arranging rows, Python between
calls), `sample` choosing tokens, `decide` and `absorb` the rest of the loop. `rest` is what no
clock covers. `detail` has the functions that cost most besides the kernels, from a second run under
cProfile, whose own cost falls on small functions. A last row is a real server under 32 streams, by
its own clocks.
"""

import cProfile
import pstats
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.ceiling import cores
from bench.job import FIRST_PLAIN_TOKEN, Job
from bench.loop import Loop
from bench.opsclock import OpsClock
from bench.result import Result
from bench.stage import Stage
from bench.zoos import BASE, LORAS, variants
from ext.select import select_ops
from workers import wire

_KV_BYTES = 512 << 20
_MAX_ROWS = 256
_PROMPT = 64
_TOP = 12


def run(stage: Stage) -> Iterator[Result]:
    """Base and adapters at both batches, then a server."""
    steps = 24 if stage.quick else 96
    bench = Profile(stage.zoos.loras, 2 * steps)
    for batch, models in ((1, (BASE,)), (32, (BASE,)), (32, LORAS)):
        stage.say(f"profile: batch {batch} of {models[0]}")
        yield bench.measure(batch, models, steps)
    yield _served(stage, steps)


class Profile:
    """A worker without sockets, and clocks around its kernels."""

    def __init__(self, zoo: Path, new_tokens: int) -> None:
        torch.set_num_threads(cores())
        ops = select_ops("cpu", "auto", cores())
        self._clock = OpsClock(ops)
        config = wire.WorkerConfig(
            "bench",
            "",
            str(zoo),
            threads=cores(),
            kv_bytes=_KV_BYTES,
            max_rows=_MAX_ROWS,
            prefix_cache=False,
        )
        self._loop = Loop(config, ops)
        self._new_tokens = new_tokens + 2
        there = variants(zoo)
        self._loop.load(variant.name for variant in there)
        self._vocabulary = there[0].vocabulary

    def measure(self, batch: int, models: tuple[str, ...], steps: int) -> Result:
        """Decode `steps` steps twice: by the clocks, then under the profiler."""
        numbers = self._open(batch, models)
        before = self._loop.worker.status().seconds
        self._clock.reset()
        began = time.perf_counter()
        for _ in range(steps):
            self._loop.step()
        wall = time.perf_counter() - began
        operations, calls = dict(self._clock.seconds), dict(self._clock.calls)
        after = self._loop.worker.status().seconds
        spent = {name: after[name] - before[name] for name in after}
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(steps):
            self._loop.step()
        profiler.disable()
        self._loop.close(numbers)
        kernels = sum(operations.values())
        figures = _shares(spent, kernels, wall) | {"step ms": 1000 * wall / steps}
        return Result(
            scenario="profile",
            cell=f"batch {batch}, {'base' if models == (BASE,) else '8 LoRA'}",
            figures=figures,
            detail={
                "operations": {name: spent_s / wall for name, spent_s in operations.items()},
                "calls_per_step": {name: count / steps for name, count in calls.items()},
                "functions": _functions(profiler),
            },
        )

    def _open(self, batch: int, models: tuple[str, ...]) -> list[wire.RequestId]:
        """Start `batch` requests and compute their prompts."""
        draw = random.Random(batch)
        numbers: list[wire.RequestId] = []
        for index in range(batch):
            tokens = [draw.randrange(FIRST_PLAIN_TOKEN, self._vocabulary) for _ in range(_PROMPT)]
            model = models[index % len(models)]
            numbers.append(self._loop.open(model, tokens, self._new_tokens + _PROMPT))
        self._loop.start(numbers)
        return numbers


def _shares(spent: dict[str, float], kernels: float, wall: float) -> dict[str, float | int | str]:
    """Seconds by the worker's clocks as shares; "ops" holds the kernels, "absorb" the sampling."""
    absorb = spent["absorb"] - spent["sample"]
    rest = wall - spent["ops"] - spent["decide"] - spent["absorb"]
    return {
        "kernels": kernels / wall,
        "runner": (spent["ops"] - kernels) / wall,
        "sample": spent["sample"] / wall,
        "decide": spent["decide"] / wall,
        "absorb": absorb / wall,
        "rest": rest / wall,
    }


def _functions(profiler: cProfile.Profile) -> list[dict[str, Any]]:
    """The functions with the most time of their own, as shares of the profiled time."""
    stats = pstats.Stats(profiler).get_stats_profile()
    rows = sorted(stats.func_profiles.items(), key=lambda item: -item[1].tottime)
    return [
        {
            "function": f"{Path(row.file_name).parent.name}/{Path(row.file_name).name}:{name}",
            "calls": row.ncalls,
            "share": row.tottime / stats.total_tt,
        }
        for name, row in rows[:_TOP]
    ]


def _served(stage: Stage, steps: int) -> Result:
    """A real server: its loop's clocks between two reports, idle time left out."""
    zoo = stage.zoos.loras
    with stage.server(zoo) as server:
        before = server.status()["workers"][0]["seconds"]
        job = Job(
            endpoint=server.endpoint,
            models=(BASE, *LORAS),
            requests=32,
            streams=32,
            prompt_tokens=(_PROMPT, _PROMPT),
            output_tokens=(steps, steps),
            vocabulary=variants(zoo)[0].vocabulary,
        )
        stage.say("profile: a server under 32 streams")
        played = stage.load(server, job)
        after = server.status()["workers"][0]["seconds"]
    spent = {name: after[name] - before[name] for name in after}
    busy = spent["total"] - spent["idle"]
    figures = _shares(spent, spent["ops"], busy)
    del figures["runner"]
    figures["kernels"] = "in run"
    return Result(
        scenario="profile",
        cell="server, 32 streams, base + 8 LoRA",
        figures=figures | {"run": spent["ops"] / busy, "busy": busy / played.outcome.seconds},
        detail={"seconds": spent, "outcome": played.outcome, "others": played.others},
    )
