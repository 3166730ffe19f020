"""One GPU under the shapes of a large model, whose weights are made up on it: steps beside what the
device can do at most, many variants beside their base, the time between kernels, and a variant that
arrives while streams decode.

The worker's real loop runs in this process, so a step is all that it takes from one token to the
next: deciding, kernels, sampling. Everything is measured against the copy bandwidth and the matrix
rate that this run found (`of roofline`: the least time of `bench/roofline.py`, keys and values in
the weights' data type, over the time taken). Variants and base take turns (A B A B), all at equal
batch. `no kernel` is the share of a step in which the device runs nothing: kernel time from a
profiled run, step time from the others. The last row is a real server and its clients.

On a CPU (`--device cpu`) the same code runs with small numbers: a smoke test, no measurement.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from bench.adder import Adding
from bench.arrival import Arrival, Streams, watch
from bench.device import Device, find_device
from bench.result import Figure, Result
from bench.server import Server
from bench.stage import Stage
from bench.stepping import Bench, Mix, Size, asked, decode, mix, opened, prefill
from bench.weigh import weigh
from zoo.catalog import Catalog
from zoo.dummy.make import make
from zoo.dummy.recipe import BASE, Recipe

_BUDGET_BYTES = 80e9


def run(stage: Stage) -> Iterator[Result]:
    """Every cell. Raises NoDevice."""
    device = find_device(stage.gpu.device)
    size, recipe = asked(stage, device)
    zoo = stage.zoos.dummy(recipe)
    stage.say(f"gpu: limits of {device.title}")
    limits = device.limits()
    device.free()
    yield Result(
        scenario="gpu: limits",
        cell=device.title,
        figures={
            "GB/s": limits.read_bytes_per_s / 1e9,
            "TFLOP/s": limits.flops_per_s / 1e12,
            "kernels": device.ops.name,
        },
    )
    with opened(zoo, device, size, limits) as bench:
        yield from _cells(stage, bench)
        del bench
    yield _arrival(stage, device, recipe, size)


def _cells(stage: Stage, bench: Bench) -> Iterator[Result]:
    """What one worker in this process can tell."""
    size = bench.size
    stage.say("gpu: making up the weights")
    yield _memory(bench)
    for batch in size.batches:
        stage.say(f"gpu: decode, batch {batch}")
        yield decode(bench, batch)
    stage.say("gpu: prefill")
    yield prefill(bench)
    for over in (
        Mix("lora", size.loras, 1.25),
        Mix("last", size.lasts, 1.15, of_least=True),
        Mix("delta", size.deltas),
    ):
        stage.say(f"gpu: {over.count} {over.kind} beside the base")
        yield mix(bench, over)


def _memory(bench: Bench) -> Result:
    """Load everything; what the deltas take beside whole copies of the model."""
    loop, size = bench.loop, bench.size
    began = time.perf_counter()
    loop.load([BASE, *(f"delta-{i}" for i in range(size.deltas))], size.longest)
    kept = loop.worker.status().resident_bytes
    with closing(Catalog(bench.zoo)) as catalog:
        infos = catalog.objects()
        model = sum(infos[d].nbytes for d in set(catalog.variant(BASE).tensors.values()))
    copies = (1 + size.deltas) * model
    loop.load([f"last-{i}" for i in range(size.lasts)], size.longest)
    loop.load([f"lora-{i}" for i in range(size.loras)], size.longest)
    seconds = time.perf_counter() - began
    everything = loop.worker.status().resident_bytes
    figures: dict[str, Figure] = {
        "GB": kept / 1e9,
        "as whole copies GB": copies / 1e9,
        "with all variants GB": everything / 1e9,
        "loaded s": seconds,
    }
    fits = {"fits into 80 GB, which whole copies do not": kept <= _BUDGET_BYTES < copies}
    return Result(
        scenario="gpu: memory",
        cell=f"base and {size.deltas} fine-tunes as deltas",
        figures=figures,
        checks=fits if size.is_checked else {},
    )


def _arrival(stage: Stage, device: Device, recipe: Recipe, size: Size) -> Result:
    """A LoRA is added to a server under load."""
    stage.say(f"gpu: a variant arrives while {size.streams} streams decode")
    there = replace(recipe, loras=4, lasts=0, deltas=0)
    with tempfile.TemporaryDirectory(prefix="blockllm-bench-") as scratch:
        zoo = Path(scratch, "zoo")
        make(zoo, there, stage.zoos.progress)
        with Adding(zoo, replace(there, loras=there.loras + 1)) as adding:
            seen = _watched(stage, device, size, adding)
    return Result(
        scenario="gpu: arrival",
        cell=f"a LoRA arrives under {size.streams} streams",
        figures={
            "first token ms": 1000 * seen.first_token_s,
            "longest gap ms": 1000 * seen.gap_s,
            "gap before ms": 1000 * seen.gap_before_s,
        },
        checks={"no answer ended meanwhile": seen.renewed == 0} if size.is_checked else {},
        detail={"arrival": seen},
    )


def _watched(stage: Stage, device: Device, size: Size, adding: Adding) -> Arrival:
    """A server over the zoo, streams over what it holds, and what `adding` adds."""
    with closing(Catalog(adding.zoo)) as catalog:
        there = catalog.variants()
    longest = 4 * size.context
    streams = Streams(
        tuple(variant.name for variant in there),
        count=size.streams,
        prompt=size.context,
        tokens=longest - size.context,
        vocabulary=there[0].vocabulary,
        settle_s=1.0 if size.is_checked else 0.2,
    )
    kv_bytes = (size.streams + 1) * longest * weigh(adding.zoo, BASE).kv_bytes
    flags = (
        *("--device", device.name.partition(":")[0], "--workers", "1", "--load-format", "dummy"),
        *("--kv-cache-memory-bytes", str(kv_bytes), "--max-model-len", str(longest)),
        "--no-enable-prefix-caching",
    )
    with Server(adding.zoo, stage.zoos.room / "gpu.log", *flags, *stage.flags) as server:
        adding.wait()
        return watch(server.endpoint, streams, adding)
