"""Bytes on disk and in memory against the bytes of distinct tensors.

`disk` are all object files of the zoo, `distinct` the tensors that serving needs, each counted
once, `alone` what the variants would take as whole models. `resident` is the worker's own count of
its weights, `growth` its resident set (RSS) beyond that of a worker of an empty zoo, once
everything is loaded; `served` the same after a request to each variant, `KV` the part of that
growth that is pages. `tree PSS` is what all processes of the server take together.
"""

from collections.abc import Iterator
from pathlib import Path

from bench.job import Job
from bench.memory import Footprint
from bench.result import Result
from bench.server import Server
from bench.stage import Stage
from bench.zoos import variants
from zoo.keeping.listing import Listing, Stats

_KV_BYTES = 256 << 20
_FLAGS = ("--kv-cache-memory-bytes", str(_KV_BYTES))
_MEGABYTE = 1e6


def run(stage: Stage) -> Iterator[Result]:
    """Zoos of the base, of the base and eight adapters, and of every kind."""
    with stage.server(stage.zoos.empty, *_FLAGS) as server:
        server.status()
        nothing = _worker(server.memory()).rss_bytes
    zoos = {"base": stage.zoos.plain, "base + 8 LoRA": stage.zoos.loras}
    if not stage.quick:
        zoos["base + 8 LoRA + 7 last + full"] = stage.zoos.whole
    for name, zoo in zoos.items():
        stage.say(f"memory: {name}")
        yield _measure(stage, name, zoo, nothing)


def _measure(stage: Stage, name: str, zoo: Path, nothing: int) -> Result:
    stats = Listing(zoo).stats()
    with stage.server(zoo, *_FLAGS) as server:
        resident = server.status()["workers"][0]["resident_bytes"]
        loaded = server.memory()
        touched = _serve_each(stage, server, zoo)
        served = server.memory()
    growth = _worker(loaded).rss_bytes - nothing
    return Result(
        scenario="memory",
        cell=name,
        figures={
            "disk MB": stats.disk_bytes / _MEGABYTE,
            "distinct MB": stats.serving_bytes / _MEGABYTE,
            "alone MB": stats.model_bytes / _MEGABYTE,
            "resident MB": resident / _MEGABYTE,
            "growth MB": growth / _MEGABYTE,
            "growth/distinct": growth / stats.serving_bytes,
            "served MB": (_worker(served).rss_bytes - nothing) / _MEGABYTE,
            "KV MB": touched / _MEGABYTE,
            "tree PSS MB": sum(one.pss_bytes for one in loaded) / _MEGABYTE,
        },
        checks=_checks(stats, resident, growth),
        detail={"empty_worker_rss": nothing, "loaded": loaded, "served": served},
    )


def _checks(stats: Stats, resident: int, growth: int) -> dict[str, bool]:
    return {
        "disk within 2 % of the distinct tensors": _near(
            stats.disk_bytes, stats.tensor_bytes, 0.02
        ),
        "resident at most 1.02 of the distinct tensors": resident <= 1.02 * stats.serving_bytes,
        "RSS growth at most 1.1 of the distinct tensors": growth <= 1.1 * stats.serving_bytes,
    }


def _serve_each(stage: Stage, server: Server, zoo: Path) -> int:
    """One short request to each variant; bytes of the KV pages that are in use afterwards."""
    served = variants(zoo)
    job = Job(
        endpoint=server.endpoint,
        models=tuple(variant.name for variant in served),
        requests=len(served),
        streams=1,
        prompt_tokens=(32, 32),
        output_tokens=(4, 4),
        vocabulary=served[0].vocabulary,
    )
    stage.load(server, job)
    worker = server.status()["workers"][0]
    used = worker["total_pages"] - worker["free_pages"]
    return round(worker["kv_bytes"] * used / worker["total_pages"])


def _near(value: float, wanted: float, tolerance: float) -> bool:
    return abs(value - wanted) <= tolerance * wanted


def _worker(memory: list[Footprint]) -> Footprint:
    return next(one for one in memory if one.role == "worker")
