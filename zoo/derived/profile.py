"""Profiles: what each block costs on a device, measured with the workers' own kernels.

A block's step is timed over a grid of batches and contexts and at points between, so that the error
of interpolating is known; loading it from the disk and from memory that the system keeps of files;
and its bytes. Findings are keyed by block, device and kernels: what is measured is not measured
again, so a run that was killed goes on.
"""

import contextlib
import hashlib
import os
import platform
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from zoo.catalog import Catalog
from zoo.derived.latency import Grid, Point, grid_of
from zoo.derived.publishing import opened
from zoo.derived.subject import manifests_of
from zoo.door import offline
from zoo.errors import UnsupportedOption
from zoo.findings import Findings
from zoo.manifest import ObjectDigest, Unit, UnitDigest, Variant, attention_of
from zoo.partition import cut, partition
from zoo.progress import Progress
from zoo.store import Store

if TYPE_CHECKING:
    from zoo.door import Offline

KIND = "profile"
# Keys and values lie in float32.
_KV_ELEMENT_BYTES = 4
Digests = tuple[UnitDigest, ...]


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """`batches` and `contexts` are the grid of decoding, `prompts` the rows of prompts; between lie
    the points that check them. Points whose keys and values would take more than `kv_bytes`, and
    contexts that the chain does not have, are left out. Each time is the least of `repeats`."""

    device: str = "auto"
    again: bool = False
    batches: tuple[int, ...] = (1, 4, 16, 64)
    contexts: tuple[int, ...] = (32, 256, 1024)
    prompts: tuple[int, ...] = (16, 64, 256)
    repeats: int = 5
    seed: int = 0
    threads: int = 0
    kv_bytes: int = 960 << 20
    wait_s: float = 600.0


class BlockProfile(msgspec.Struct, frozen=True):
    """One block on one device: seconds of decoding by batch and context, and of a prompt by its
    rows. `stored_bytes` lie on disk, `resident_bytes` are its distinct tensors; seconds of loading
    are until it is ready to run."""

    block: str
    of: str
    units: int
    depth: int
    device: str
    kernels: str
    threads: int
    seed: int
    stored_bytes: int
    resident_bytes: int
    kv_bytes_per_token: int
    load_disk_s: float
    load_host_s: float
    decode: Grid
    prefill: Grid


def profile(
    root: Path, name: str | None, options: ProfileOptions, progress: Progress
) -> list[BlockProfile]:
    """Profiles of all blocks of a variant, or of the whole zoo: those that were measured before,
    and those that are measured now."""
    if options.device not in {"auto", "cpu"}:
        raise UnsupportedOption(
            f"--device {options.device!r} cannot be profiled by this process: use cpu"
        )
    with contextlib.closing(Catalog(root)) as catalog:
        chains = {one.name: (one, catalog.chain(one.chain).units) for one in catalog.variants()}
        if name is not None:
            catalog.variant(name)
        units = {digest: catalog.unit(digest) for _, chain in chains.values() for digest in chain}
    blocks = partition([chain for _, chain in chains.values()])
    wanted = [chains[name]] if name is not None else list(chains.values())
    with offline(root, threads=options.threads) as door:
        profiling = _Profiling(root, door, options, progress)
        found: dict[str, BlockProfile] = {}
        for variant, chain in wanted:
            found |= profiling.measure(variant, chain, cut(chain, blocks), units)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class _Step:
    """A step to be timed: for the grid, or to check it. A prompt has a context of 0."""

    batch: int
    context: int
    rows: int
    checks: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequences, the positions that each has in the end, and its rows."""
        return self.batch, self.context or self.rows, self.rows


class _Profiling:
    """Blocks under measurement, one chain after the other."""

    def __init__(
        self, root: Path, door: "Offline", options: ProfileOptions, progress: Progress
    ) -> None:
        self._root, self._door, self._options, self._progress = root, door, options, progress
        self._device = _device_name()
        self._threads = options.threads or torch.get_num_threads()

    def measure(
        self,
        variant: Variant,
        chain: Digests,
        spans: Sequence[tuple[int, int]],
        units: dict[UnitDigest, Unit],
    ) -> dict[str, BlockProfile]:
        """The profiles of a chain's blocks, by key; those that are missing are measured."""
        keys = {self._key(chain[first:last]): (first, last) for first, last in spans}
        with contextlib.closing(Catalog(self._root)) as catalog:
            kept = Findings(catalog)
            known = {key: kept.get(KIND, key, BlockProfile) for key in keys}
        found = {k: v for k, v in known.items() if v is not None and not self._options.again}
        missing = {key: span for key, span in keys.items() if key not in found}
        if not missing:
            return found
        members = tuple(units[digest] for digest in chain)
        model = self._door.load(manifests_of(chain, members, variant.context))
        options = self._options
        steps = _plan(options, variant.context, members)
        random.Random(options.seed).shuffle(steps)
        times: dict[_Step, list[float]] = {}
        for step in self._progress.track(steps, f"timing the blocks of {variant.name}"):
            times[step] = model.clock(list(missing.values()), step.shape, options.repeats)
        self._door.drop(model)
        for place, (key, (first, last)) in enumerate(missing.items()):
            named = list(zip(chain[first:last], members[first:last], strict=True))
            spent = {step: seconds[place] for step, seconds in times.items()}
            found[key] = self._profile(variant, first, named, spent)
            with opened(self._root, options.wait_s, self._progress) as zoo:
                Findings(zoo.catalog).put(KIND, key, found[key])
        return found

    def _profile(
        self,
        variant: Variant,
        depth: int,
        named: Sequence[tuple[UnitDigest, Unit]],
        spent: Mapping["_Step", float],
    ) -> BlockProfile:
        store = Store(self._root)
        objects = {digest for _, unit in named for digest in unit.tensors.values()}
        stored_bytes = _forget(store, objects)
        disk_s = self._door.time_load(named, variant.context)
        host_s = self._door.time_load(named, variant.context)
        return BlockProfile(
            block=_block_digest(tuple(digest for digest, _ in named)),
            of=variant.name,
            units=len(named),
            depth=depth,
            device=self._device,
            kernels=self._door.kernels,
            threads=self._threads,
            seed=self._options.seed,
            stored_bytes=stored_bytes,
            resident_bytes=sum(store.info(digest).nbytes for digest in objects),
            kv_bytes_per_token=_kv_bytes_per_token([unit for _, unit in named]),
            load_disk_s=disk_s,
            load_host_s=host_s,
            decode=_grid({s: t for s, t in spent.items() if s.rows == 1 and s.context > 0}),
            prefill=_grid({s: t for s, t in spent.items() if s.context == 0}),
        )

    def _key(self, block: Digests) -> str:
        return f"{_block_digest(block)}:{self._device}:{self._door.kernels}:{self._threads}"


def _block_digest(units: Digests) -> str:
    """A block's name, as workers report it."""
    return hashlib.sha256("".join(units).encode()).hexdigest()


def _plan(options: ProfileOptions, context: int, members: Sequence[Unit]) -> list[_Step]:
    """Full grids within what fits, and the points between."""
    fitting = options.kv_bytes // max(1, _kv_bytes_per_token(members))
    room = min(context, fitting)
    contexts = [c for c in options.contexts if c <= room] or [room]
    batches = [b for b in options.batches if b * max(contexts) <= fitting] or [1]
    prompts = [r for r in options.prompts if r <= room] or [room]
    steps = [_Step(b, c, 1, False) for b in batches for c in contexts]
    steps += [_Step(b, c, 1, True) for b in _between(batches) for c in _between(contexts)]
    steps += [_Step(1, 0, r, False) for r in prompts]
    return steps + [_Step(1, 0, r, True) for r in _between(prompts)]


def _between(places: Sequence[int]) -> list[int]:
    """Whole numbers near the geometric middle of neighbours."""
    return [
        middle
        for left, right in pairwise(places)
        if (middle := round((left * right) ** 0.5)) not in places
    ]


def _grid(spent: Mapping[_Step, float]) -> Grid:
    made: dict[bool, list[Point]] = {False: [], True: []}
    for step, seconds in spent.items():
        batch = step.rows if step.context == 0 else step.batch
        made[step.checks].append(Point(batch, step.context, seconds))
    for points in made.values():
        points.sort(key=lambda point: (point.batch, point.context))
    return grid_of(made[False], made[True])


def _kv_bytes_per_token(units: Sequence[Unit]) -> int:
    """K and V of one position in all attention layers of these units."""
    specs = [spec for unit in units if (spec := attention_of(unit.spec)) is not None]
    return sum(2 * spec.kv_heads * spec.head_dim * _KV_ELEMENT_BYTES for spec in specs)


def _forget(store: Store, objects: Iterable[ObjectDigest]) -> int:
    """Ask the system to forget what it keeps of these objects' files in memory; their bytes."""
    total = 0
    for digest in objects:
        path = store.path(digest)
        total += path.stat().st_size
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return total


def _device_name() -> str:
    """The processor, as the system names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"cpu {line.partition(':')[2].strip()}"
    return f"cpu {platform.machine()}"
