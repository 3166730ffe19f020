"""A zoo of variants of every kind upon the base: what each brings, keeps, and takes to load.

`source` are the weight files as they came, `kept` what the zoo's disk grew by (the base's own
tensors are there already), `ratio` the one over the other; `add` is the time of the import with its
golden check, `load` the worker's for what it did not hold yet. `how`: exact (by the golden check,
with the largest difference of logits relative to theirs), or measured (mean KL and agreement).
Adapters are random and small, made by peft itself. Then all of them answer in mixed batches, and
alone, and tokens and logits are compared with transformers and peft (`bench.scenarios.parity`).
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import adapters
from bench.result import Result
from bench.scenarios import parity
from bench.stage import Stage
from bench.variants import Checkpoint, full, last_layers
from zoo.adding.add import AddOptions, add
from zoo.keeping.listing import Listing
from zoo.manifest import Variant
from zoo.progress import Quiet
from zoo.store import Store

BASE = "base"
# Kinds that show each way of import; the rest of `bench.adapters` differs in settings only.
_QUICK = ("lora", "dora", "ia3", "prefix", "prompt", "tokens", "norm", "bottleneck")
_UPON_BASE = AddOptions(base=BASE)
_WEIGHTS = {".safetensors"}
_MEGABYTE = 1e6

Make = Callable[[Path], Path | str]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A variant to be made: its source, and how it is added."""

    name: str
    make: Make
    options: AddOptions = _UPON_BASE


@dataclass(frozen=True, slots=True)
class _Added:
    """A variant that is in the zoo."""

    variant: Variant
    source_bytes: int
    kept_bytes: int
    add_s: float


def run(stage: Stage) -> Iterator[Result]:
    """One row per variant, one for them all, and then what they answer."""
    with stage.zoos.checkpoint() as base, tempfile.TemporaryDirectory() as folder:
        zoo = Path(folder, "zoo")
        added = list(_fill(stage, zoo, base, Path(folder, "scratch")))
        with stage.server(zoo) as server:
            loads = {v["name"]: float(v["load_seconds"]) for v in server.status()["variants"]}
        yield from (_row(one, loads[one.variant.name]) for one in added)
        yield _total(zoo, added, loads)
        yield from parity.check(stage, zoo, *((2, 1) if stage.quick else (8, 2)))


def _fill(stage: Stage, zoo: Path, base: Checkpoint, scratch: Path) -> Iterator[_Added]:
    wanted = [_Wanted(BASE, lambda _: base.folder, AddOptions()), *_variants(stage, base)]
    for one in wanted:
        stage.say(f"kinds: {one.name}")
        source = one.make(scratch)
        before, began = Store(zoo).disk_bytes(), time.perf_counter()
        variant = add(zoo, one.name, str(source), one.options, Quiet())
        seconds = time.perf_counter() - began
        # A sum has no source but the adapters that are there.
        size = _weight_bytes(source) if isinstance(source, Path) else 0
        yield _Added(variant, size, Store(zoo).disk_bytes() - before, seconds)
        shutil.rmtree(scratch, ignore_errors=True)


def _variants(stage: Stage, base: Checkpoint) -> Iterator[_Wanted]:
    kinds = _QUICK if stage.quick else (*adapters.KINDS, *adapters.BOTTLENECKS, *adapters.MERGED)
    for seed, kind in enumerate(kinds):
        name = kind.replace(":", "-").replace(" ", "-")
        yield _Wanted(
            name, lambda to, kind=kind, seed=seed: adapters.make(kind, to, base.folder, seed)
        )
    yield _Wanted("sum", lambda _: "lora+0.5*lora" if stage.quick else "lora+0.5*lora-patterns")
    yield _Wanted("last-2", lambda to: last_layers(base, to, layers=2, seed=1))
    yield _Wanted("full-exact", lambda to: full(base, to, seed=2))
    if not stage.quick:
        delta = AddOptions(base=BASE, store="delta", rows=16)
        yield _Wanted("full-delta", lambda to: full(base, to, seed=3), delta)


def _row(one: _Added, load_s: float) -> Result:
    variant = one.variant
    return Result(
        scenario="kinds",
        cell=variant.name,
        figures={
            "kind": variant.kind,
            "source MB": one.source_bytes / _MEGABYTE,
            "kept MB": one.kept_bytes / _MEGABYTE,
            "ratio": _ratio(one.source_bytes, one.kept_bytes),
            "units": "{shared} shared, {changed} changed, {attached} attached".format(
                **variant.report
            ),
            "add s": one.add_s,
            "load s": load_s,
            "how": _how(variant),
        },
        checks={
            f"{variant.name} is exact or measured": variant.golden is not None
            or variant.measured is not None
        },
    )


def _total(zoo: Path, added: list[_Added], loads: dict[str, float]) -> Result:
    stats = Listing(zoo).stats()
    source = sum(one.source_bytes for one in added)
    return Result(
        scenario="kinds",
        cell=f"all {len(added)}",
        figures={
            "kind": "-",
            "source MB": source / _MEGABYTE,
            "kept MB": stats.disk_bytes / _MEGABYTE,
            "ratio": _ratio(source, stats.disk_bytes),
            "units": f"{stats.units} in {stats.blocks} blocks",
            "add s": sum(one.add_s for one in added),
            "load s": sum(loads.values()),
            "how": f"{stats.model_bytes / _MEGABYTE:.0f} MB as whole models",
        },
    )


def _how(variant: Variant) -> str:
    if variant.measured is not None:
        kl, agreement = variant.measured.kl.value, variant.measured.agreement.value
        return f"measured: KL {kl:.2g}, agreement {agreement:.3f}"
    return "unchecked" if variant.golden is None else f"exact: {variant.golden:.1e}"


def _ratio(source: int, kept: int) -> float:
    return source / kept if kept else 0.0


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS)
