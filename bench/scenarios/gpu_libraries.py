"""transformers and peft on the same device, beside ours: shapes, prompts and batches are the same,
weights are made up on both sides.

Each library runs in a process of its own, after our worker has given the device back. `step ms` is
the median time between two tokens of a request while the whole batch decodes; `times ours` compares
it with ours, measured in this run. A library that fails is a row that says where its log lies.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.ceiling import cores
from bench.device import Device, find_device
from bench.job import Job
from bench.peers.hosted import SCRIPT, Hosted
from bench.peers.peer import PeerMissing
from bench.result import Result
from bench.roofline import Limits
from bench.spread import median
from bench.stage import Stage
from bench.stepping import Bench, Mix, Size, asked, opened, steps_of
from zoo.dummy.recipe import BASE, Recipe

_SCENARIO = "gpu: beside libraries"
# Nothing here is compared with what the device can do.
_NO_LIMITS = Limits(1.0, 1.0)
# What runs, in which mode of `bench.peers.hosts.batches`, over adapters or not.
_LIBRARIES = (
    ("transformers, static batch", "static", False),
    ("transformers, continuous batching", "continuous", False),
    ("peft, mixed batch", "mixed", True),
)


def run(stage: Stage) -> Iterator[Result]:
    """Ours, then each library. Raises NoDevice."""
    device = find_device(stage.gpu.device)
    size, recipe = asked(stage, device)
    recipe = Recipe(config=recipe.config, loras=recipe.loras, rank=recipe.rank)
    over = Mix("lora", recipe.loras)
    with opened(stage.zoos.dummy(recipe), device, size, _NO_LIMITS) as bench:
        stage.say("gpu-libraries: ours")
        bench.loop.load([BASE, *over.names], size.longest)
        vocabulary = bench.vocabulary
        ours = {False: _ours(bench, (BASE,)), True: _ours(bench, over.names)}
        del bench
    yield _result("ours, base", size, ours[False], ours[False])
    yield _result(f"ours, {over.count} LoRA", size, ours[True], ours[True])
    folder = stage.zoos.room / "shapes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(recipe.config_json())
    for name, mode, is_mixed in _LIBRARIES:
        stage.say(f"gpu-libraries: {name}")
        adapters = over.names if is_mixed else []
        command = _command(device, folder, mode, [f"{one}={recipe.rank}" for one in adapters])
        log = stage.zoos.room / "libraries.log"
        try:
            step_s = _played(command, log, _job(size, adapters, vocabulary))
        except PeerMissing as error:
            yield Result(scenario=_SCENARIO, cell=name, figures={"failed": str(error)})
        else:
            yield _result(name, size, step_s, ours[is_mixed])


def _ours(bench: Bench, models: Sequence[str]) -> float:
    return median(steps_of(bench, models, bench.size.mix)[0])


def _command(device: Device, folder: Path, mode: str, adapters: Sequence[str]) -> list[str | Path]:
    words: list[str | Path] = [
        *(sys.executable, SCRIPT, "--dummy", "--mode", mode, "--model", folder),
        *("--dtype", "bfloat16", "--device", device.name, "--threads", str(cores())),
    ]
    for adapter in adapters:
        words += ["--variant", adapter]
    return words


def _job(size: Size, adapters: Sequence[str], vocabulary: int) -> Job:
    """One batch that decodes around the context that ours decode at."""
    prompt, new = size.context - size.steps // 2, size.steps
    return Job(
        models=tuple(adapters) or (BASE,),
        requests=size.mix,
        prompt_tokens=(prompt, prompt),
        output_tokens=(new, new),
        vocabulary=vocabulary,
    )


def _played(command: Sequence[str | Path], log: Path, job: Job) -> float:
    """Seconds between two tokens, from the second of two batches. Raises PeerMissing."""
    with Hosted(command, log) as hosted:
        hosted.play(job)
        return hosted.play(job).itl_ms.p50 / 1000


def _result(name: str, size: Size, step_s: float, ours_s: float) -> Result:
    return Result(
        scenario=_SCENARIO,
        cell=f"{name}, batch {size.mix}",
        figures={
            "step ms": 1000 * step_s,
            "tokens/s": size.mix / step_s,
            "times ours": step_s / ours_s,
        },
    )
