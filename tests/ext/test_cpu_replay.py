"""Steps as lists of native calls: a replay gives the very bits of the step unit by unit."""

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ext import native
from ext.build import supported
from ext.cpu import CpuOps
from ext.ops import Geometry, Patch
from ext.recordings import Recordings
from ext.replays import Entry
from ext.tape import Workspace
from tests.ext.layered import (
    HIDDEN,
    INNER,
    POSITIONS,
    Layer,
    adapters,
    geometry,
    nothing,
    random,
    stack,
    worded,
)

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")


@pytest.fixture(scope="module", params=[False, True], ids=["exact", "rounding"])
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(threads=2, rounding=request.param)


def assert_replays(
    recordings: Recordings,
    layer: Layer,
    contexts: list[int],
    patches: list[Patch | None],
    new: list[int] | None = None,
) -> None:
    place = geometry(contexts, new)
    plan = layer.ops.plan(place)
    x = random(place.num_rows, HIDDEN)
    before, expected = layer.cache.data.clone(), x.clone()
    results = layer.step(expected, plan, patches)
    pages = layer.cache.data.clone()
    layer.cache.data.copy_(before)
    given = recordings.run((id(layer),), x, (plan, 0), patches, layer.step)
    assert torch.equal(given, results)
    assert (given is x) == (results is expected)
    assert torch.equal(layer.cache.data, pages)


def counts(recordings: Recordings) -> tuple[int, int]:
    return recordings.counts.captured, recordings.counts.replayed


@pytest.mark.parametrize("fused", [False, True])
def test_a_recording_serves_every_batch_of_its_rows(ops: CpuOps, fused: bool) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=fused)
    for contexts in ([3, 40, 100], [200, 1, 16], [1, 2, 3], [7], [300], [8, 9, 7]):
        assert_replays(recordings, layer, contexts, nothing(layer))
    assert counts(recordings) == (2, 4)


@pytest.mark.parametrize("fused", [False, True])
def test_so_do_rows_enough_to_fetch_pages_meanwhile(ops: CpuOps, fused: bool) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=fused)
    worn = adapters(layer, [(0, 9, 8), (9, 30, 16)])
    for patches in (nothing(layer), nothing(layer), worn):
        for step in (1, 17):
            assert_replays(recordings, layer, [1 + step * i for i in range(30)], patches)
    assert counts(recordings) == (1, 5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_recording_serves_fewer_rows_and_more(ops: CpuOps, fused: bool) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=fused)
    for rows in (20, 17, 32, 25):
        assert_replays(recordings, layer, [1 + 3 * i for i in range(rows)], nothing(layer))
        assert_replays(recordings, layer, [5] * rows, adapters(layer, [(0, rows, 3)]))
    assert counts(recordings) == (1, 7)


@pytest.mark.parametrize("bare", [True, False])
def test_a_step_may_end_in_the_best_of_each_row(ops: CpuOps, bare: bool) -> None:
    recordings, layers = Recordings(ops), stack(ops, "headed")
    for rows in (1, 2, 9, 30, 17, 1, 2):
        worn = nothing(layers) if bare else adapters(layers, [(0, rows, 3)])
        assert_replays(recordings, layers, [1 + 3 * i for i in range(rows)], worn)
    assert counts(recordings) == (4, 3)


def entry(tokens: np.ndarray) -> Entry:
    return Entry(tokens, torch.full((len(tokens), HIDDEN), torch.nan))


@pytest.mark.parametrize("positions", [True, False])
def test_a_step_may_begin_with_tokens(ops: CpuOps, positions: bool) -> None:
    recordings, layers = Recordings(ops), worded(ops, positions=positions)
    for rows in (1, 2, 9, 30, 17, 1, 2):
        plan = ops.plan(geometry([1 + 3 * i for i in range(rows)]))
        tokens = np.random.default_rng(rows).integers(0, 100, rows)
        expected = layers.read(tokens, plan, nothing(layers))
        given = recordings.run((1,), entry(tokens), (plan, 0), nothing(layers), layers.read)
        assert torch.equal(given, expected)
    assert counts(recordings) == (4, 3)


def test_a_token_that_the_table_lacks_is_read_as_its_first(ops: CpuOps) -> None:
    recordings, layers = Recordings(ops), worded(ops, positions=False)
    plan = ops.plan(geometry([4, 5, 6]))
    expected = layers.read(np.array([0, 7, 0]), plan, nothing(layers))
    for _ in range(2):
        tokens = np.array([-1, 7, 100])
        given = recordings.run((1,), entry(tokens), (plan, 0), nothing(layers), layers.read)
        assert torch.equal(given, expected)


def test_positions_that_nobody_learned_are_refused(ops: CpuOps) -> None:
    recordings, layers = Recordings(ops), worded(ops, positions=True)
    for context in (POSITIONS - 1, POSITIONS):
        batch = (ops.plan(geometry([context])), 0)
        run = (entry(np.array([3])), batch, nothing(layers), layers.read)
        if context < POSITIONS:
            recordings.run((1,), *run)
            continue
        for name in (1, 2):  # recorded, and not
            with pytest.raises(ValueError, match="beyond"):
                recordings.run((name,), *run)


def test_a_plan_that_is_moved_on_is_as_one_made_anew(ops: CpuOps) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=False)
    place = geometry([30, 70, 100])
    plan = ops.plan(place)
    for moved in range(1, 4):
        place = Geometry(place.starts, np.array([30, 70, 100], "i4") + moved, place.tables)
        plan = ops.plan(place, plan)
        x = random(3, HIDDEN)
        expected = layer.step(x.clone(), ops.plan(place), nothing(layer))
        pages = layer.cache.data.clone()
        assert torch.equal(layer.step(x.clone(), plan, nothing(layer)), expected)
        assert torch.equal(layer.cache.data, pages)
        recordings.run((1,), x, (plan, 0), nothing(layer), layer.step)
        assert torch.equal(x, expected)


# Together two threads have two chunks of rows, and more; pages do not suffice for other sequences.
PROMPTS = [([150], [150]), ([140, 3, 9], [140, 3, 1]), ([300], [257]), ([290], [290])]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bare", [True, False])
def test_prompts_are_replayed_too(ops: CpuOps, fused: bool, bare: bool) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=fused)
    for contexts, new in PROMPTS * 2:
        rows = sum(new)
        runs = [(3, 90, 5), (90, 91, 40), (100, rows, 8)]
        worn = nothing(layer) if bare else adapters(layer, runs)
        assert_replays(recordings, layer, contexts, worn, new)
    assert counts(recordings) == (2, 6)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("kind", ["gated", "plain", "headed"])
def test_rows_pass_several_layers(kind: str, bare: bool, threads: int) -> None:
    ops = CpuOps(threads=threads, rounding=True)
    recordings, layers = Recordings(ops), stack(ops, kind)
    for contexts, new in PROMPTS * 2:
        runs = [(0, sum(new) - 1, 7)]
        worn = nothing(layers) if bare else adapters(layers, runs)
        assert_replays(recordings, layers, contexts, worn, new)


@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_no_result_between_two_attentions_lies_where_another_is_read(kind: str) -> None:
    ops = CpuOps(threads=2, rounding=True)
    layers, x = stack(ops, kind), random(300, HIDDEN)
    with ops.taped(Workspace(), 512) as tape:
        layers.step(x, ops.plan(geometry([300], [300])), nothing(layers))
    assert [name for name, _ in tape.calls].count("attend") == 3
    used: set[int] = set()
    for name, record in tape.calls:
        if name == "attend":
            used.clear()
        for source, targets in places(name, record):
            used.add(source)
            for target in targets - {x.data_ptr()}:
                assert target not in used
                used.add(target)


def places(name: str, record: bytes) -> Iterator[tuple[int, set[int]]]:
    """What a call reads, and what it writes."""
    words = np.frombuffer(record, np.uint64).tolist()
    if name == "project":
        head = native.PROJECT[0].size // 8
        yield words[0], {out for out in words[head + 2 :: 4] if out}
    if name == "activate":
        yield words[1], {words[2]}
    if name == "split":
        yield words[0], set(words[native.SPLIT.size // 8 :: 2])


@pytest.mark.parametrize("fused", [False, True])
def test_whatever_rows_wear_is_exchanged(ops: CpuOps, fused: bool) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=fused)
    worn = adapters(layer, [(0, 1, 1), (1, 2, 16), (2, 4, 9)])
    for patches in (nothing(layer), adapters(layer, [(1, 2, 4)]), worn, nothing(layer), worn, worn):
        assert_replays(recordings, layer, [3, 40, 100, 9], patches)
    assert counts(recordings) == (1, 5)


def test_a_patch_for_more_rows_than_there_are_is_refused_each_time(ops: CpuOps) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=False)
    assert_replays(recordings, layer, [5, 6], nothing(layer))
    plan, wide = ops.plan(geometry([5, 6])), adapters(layer, [(0, 3, 2)])
    for _ in range(2):
        with pytest.raises(ValueError, match="up to row 3 for 2 rows"):
            recordings.run((id(layer),), random(2, HIDDEN), (plan, 0), wide, layer.step)
    assert_replays(recordings, layer, [5, 6], adapters(layer, [(0, 2, 2)]))


def test_positions_beyond_what_was_prepared_are_refused(ops: CpuOps) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=False)
    assert_replays(recordings, layer, [POSITIONS], nothing(layer))
    batch = (ops.plan(geometry([POSITIONS + 1])), 0)
    with pytest.raises(ValueError, match="lies beyond"):
        recordings.run((id(layer),), random(1, HIDDEN), batch, nothing(layer), layer.step)


def test_recordings_share_memory_and_disturb_nobody(ops: CpuOps) -> None:
    recordings = Recordings(ops)
    layers = [Layer(ops, fused=fused) for fused in (False, True)]
    for contexts in ([3, 4, 5], [30, 40], [50], [6, 7, 8], [9, 10]):
        kept = [random(len(contexts), INNER) for _ in range(50)]
        copies = [tensor.clone() for tensor in kept]
        for layer in layers:
            assert_replays(recordings, layer, contexts, nothing(layer))
        assert all(map(torch.equal, kept, copies))
    assert counts(recordings) == (6, 4)


def test_the_least_used_recording_leaves_and_so_do_those_of_units_that_are_gone(
    ops: CpuOps,
) -> None:
    recordings, layer = Recordings(ops, capacity=2), Layer(ops, fused=False)
    for count in (1, 2, 3, 2):
        assert_replays(recordings, layer, [4] * count, nothing(layer))
    assert (len(recordings), counts(recordings)) == (2, (3, 1))
    recordings.retain(lambda units: units != (id(layer),))
    gc.collect()
    assert len(recordings) == 0
    assert_replays(recordings, layer, [4, 5], nothing(layer))


def test_a_step_that_fails_leaves_no_recording(ops: CpuOps) -> None:
    recordings, layer = Recordings(ops), Layer(ops, fused=False)
    batch = (ops.plan(geometry([POSITIONS + 1])), 0)
    with pytest.raises(ValueError, match="lies beyond"):
        recordings.run((id(layer),), random(1, HIDDEN), batch, nothing(layer), layer.step)
    assert len(recordings) == 0
    assert_replays(recordings, layer, [4], nothing(layer))
