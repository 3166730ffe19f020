"""Steps of a worker beside what its device can do at most: decoding, prefill, and variants beside
their base.

The worker's real loop runs in this process, so a step is all that it takes from one token to the
next: deciding, kernels, sampling.
"""

import contextlib
import gc
import random
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.device import Device
from bench.job import FIRST_PLAIN_TOKEN
from bench.loop import Loop
from bench.result import Result
from bench.roofline import Limits, Shape, Weights, decode_seconds, prefill_seconds
from bench.spread import median
from bench.stage import Stage
from bench.weigh import weigh
from workers import wire
from zoo.catalog import Catalog
from zoo.dummy.recipe import BASE, Recipe

_WARM_STEPS = 4
# Pages are whole, and every request may have one that is not full.
_SLACK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. A decoding batch stands at `context` on the average; `rows` are those
    of a prefill step; `streams` decode while a variant arrives."""

    batches: tuple[int, ...] = (1, 32, 128)
    mix: int = 32
    context: int = 1024
    rows: int = 8192
    steps: int = 32
    rounds: int = 3
    loras: int = 32
    lasts: int = 8
    deltas: int = 8
    last_layers: int = 4
    delta_rank: int = 128
    streams: int = 64
    is_checked: bool = True

    @property
    def decoded(self) -> int:
        """Tokens that a request decodes while one cell is measured."""
        return _WARM_STEPS + (self.rounds + 1) * self.steps

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return self.context + self.decoded


SMALL = Size(
    batches=(1, 4),
    mix=4,
    context=64,
    rows=128,
    steps=4,
    rounds=2,
    loras=4,
    lasts=2,
    deltas=2,
    last_layers=1,
    delta_rank=8,
    streams=8,
    is_checked=False,
)


def asked(stage: Stage, device: Device) -> tuple[Size, Recipe]:
    """How much is measured, of what: small numbers on a CPU and where a quick run was asked for."""
    size = SMALL if device.name == "cpu" or stage.quick else Size()
    recipe = Recipe(
        config=stage.gpu.shapes or ("tiny" if device.name == "cpu" else "llama-3.1-8b"),
        loras=size.loras,
        lasts=size.lasts,
        deltas=size.deltas,
        last_layers=size.last_layers,
        delta_rank=size.delta_rank,
    )
    return size, recipe


@dataclass(frozen=True, slots=True)
class Mix:
    """Variants of one kind that share a batch. `most` is the target: how many times as long as a
    step of the base one over them may take (0: none), or as the least that their own weights let
    it take (`of_least`)."""

    kind: str
    count: int
    most: float = 0.0
    of_least: bool = False

    @property
    def names(self) -> list[str]:
        """The variants."""
        return [f"{self.kind}-{i}" for i in range(self.count)]


@dataclass(frozen=True, slots=True)
class Bench:
    """What the cells share: a worker that holds all variants of `zoo`, and what is possible at
    most."""

    zoo: Path
    loop: Loop
    device: Device
    size: Size
    limits: Limits
    weights: Weights
    vocabulary: int

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random token ids."""
        draw = random.Random(count)
        plain = range(min(FIRST_PLAIN_TOKEN, self.vocabulary // 2), self.vocabulary)
        return [draw.choices(plain, k=length) for _ in range(count)]


@contextlib.contextmanager
def opened(zoo: Path, device: Device, size: Size, limits: Limits) -> Generator[Bench]:
    """A worker over a dummy zoo, with room for the largest batch; nothing is loaded yet."""
    weights = weigh(zoo, BASE)
    with contextlib.closing(Catalog(zoo)) as catalog:
        vocabulary = catalog.variant(BASE).vocabulary
    streams = max(size.mix, *size.batches)
    config = wire.WorkerConfig(
        "bench",
        "",
        str(zoo),
        device=device.name,
        load_format="dummy",
        # As much as pages of float32 take, which the CPU's kernels have.
        kv_bytes=streams * (size.longest + _SLACK_TOKENS) * weights.kv_bytes,
        max_rows=size.rows,
        prefix_cache=False,
    )
    kv_bytes = weights.kv_bytes * weights.element_bytes // 4
    weights = msgspec.structs.replace(weights, kv_bytes=kv_bytes)
    with Loop(config, device.ops) as loop:
        yield Bench(zoo, loop, device, size, limits, weights, vocabulary)
    del loop
    gc.collect()
    device.free()


def decode(bench: Bench, batch: int) -> Result:
    """Steps of the base alone, and how much of one no kernel runs in."""
    size = bench.size
    steps, busy_s = steps_of(bench, (BASE,), batch, profiled=True)
    step_s = median(steps)
    shape = Shape(batch, size.context, 0)
    share = decode_seconds(shape, bench.weights, bench.limits) / step_s
    between = max(0.0, 1 - busy_s / step_s)
    checks = {"at least 0.8 of the roofline": share >= 0.8}
    if batch == size.mix:
        checks["no kernel for less than 5 % of a step"] = between < 0.05
    return Result(
        scenario="gpu: decode",
        cell=f"batch {batch}",
        figures={
            "step ms": 1000 * step_s,
            "of roofline": share,
            "tokens/s": batch / step_s,
            "no kernel": between,
        },
        checks=checks if size.is_checked else {},
        detail={"steps_s": steps, "busy_s": busy_s},
    )


def prefill(bench: Bench) -> Result:
    """Full steps of prompts; the floating-point operations of their linear layers alone count."""
    size, loop = bench.size, bench.loop
    each = max(1, size.rows // size.context)
    times: list[float] = []
    waves = 0
    for _ in range(size.rounds + 1):
        prompts = bench.prompts(each, size.context)
        numbers = [loop.open(BASE, prompt, 1) for prompt in prompts]
        bench.device.finish()
        began, before = time.perf_counter(), loop.worker.steps
        loop.start(numbers)
        bench.device.finish()
        times.append(time.perf_counter() - began)
        waves = loop.worker.steps - before
    step_s = median(times[1:])
    shape = Shape(each, size.context, 1)
    share = prefill_seconds(shape, bench.weights, bench.limits) / step_s
    return Result(
        scenario="gpu: prefill",
        cell=f"{each} x {size.context} tokens in {waves} steps",
        figures={
            "step ms": 1000 * step_s / waves,
            "of matrix rate": share,
            "tokens/s": each * size.context / step_s,
        },
        checks={"at least 0.6 of the matrix rate": share >= 0.6} if size.is_checked else {},
        detail={"times_s": times},
    )


def mix(bench: Bench, over: Mix) -> Result:
    """A batch over variants, and one of the base alone before each. What their own tensors take
    to be read is `least over base`; no kernel can do better."""
    size = bench.size
    alone: list[float] = []
    mixed: list[float] = []
    for _ in range(2):
        alone += steps_of(bench, (BASE,), size.mix)[0]
        mixed += steps_of(bench, over.names, size.mix)[0]
    ratio, least = median(mixed) / median(alone), _least_ratio(bench, over)
    checks: dict[str, bool] = {}
    if over.most and over.of_least:
        checks[f"at most {over.most} of the least that is possible"] = ratio <= over.most * least
    elif over.most:
        checks[f"at most {over.most} of the base"] = ratio <= over.most
    return Result(
        scenario="gpu: variants",
        cell=f"batch {size.mix} over {over.count} {over.kind}",
        figures={
            "step ms": 1000 * median(mixed),
            "base ms": 1000 * median(alone),
            "over base": ratio,
            "least over base": least,
            "tokens/s": size.mix / median(mixed),
        },
        checks=checks if size.is_checked else {},
        detail={"steps_s": mixed, "base_s": alone},
    )


def _least_ratio(bench: Bench, over: Mix) -> float:
    """The roofline's step over the variants in that of the base."""
    own = weigh(bench.zoo, BASE, over.names).own_bytes
    # No row needs those layers of the base that its variant has of its own.
    replaced = own // over.count if over.kind == "last" else 0
    weights = msgspec.structs.replace(bench.weights, own_bytes=own - replaced)
    shape = Shape(bench.size.mix, bench.size.context, 0)
    alone = decode_seconds(shape, bench.weights, bench.limits)
    return decode_seconds(shape, weights, bench.limits) / alone


def steps_of(
    bench: Bench, models: Sequence[str], batch: int, *, profiled: bool = False
) -> tuple[list[float], float]:
    """Seconds of a decoding step, once per round, and those in which the device worked (0 unless
    `profiled`)."""
    size, loop, device = bench.size, bench.loop, bench.device
    prompts = bench.prompts(batch, size.context - size.decoded // 2)
    numbers = [
        loop.open(models[i % len(models)], prompt, size.decoded + 1)
        for i, prompt in enumerate(prompts)
    ]
    loop.start(numbers)

    def work(steps: int = size.steps) -> None:
        for _ in range(steps):
            loop.step()

    work(_WARM_STEPS)
    times: list[float] = []
    for _ in range(size.rounds):
        device.finish()
        began = time.perf_counter()
        work()
        device.finish()
        times.append((time.perf_counter() - began) / size.steps)
    busy_s = device.busy_s(work) / size.steps if profiled else 0.0
    loop.close(numbers)
    return times, busy_s
