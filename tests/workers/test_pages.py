"""Pages: nothing is handed out twice, nothing is lost, shapes share one budget."""

import numpy as np
import pytest

from workers.pages import Arena, Pool

MB = 1 << 20


def test_pages_of_two_shapes_never_overlap():
    arena = Arena(8 * MB, slab_bytes=MB)
    pools = [Pool(arena, 24 * 1024), Pool(arena, 40 * 1000)]
    taken = []
    for count in (50, 3, 20, 40, 7):
        for pool in pools:
            assert pool.missing(count) == 0
            taken.append((pool.page_bytes, pool.take(count)))
    used = np.zeros(8 * MB, bool)
    for size, ids in taken:
        for i in ids.tolist():
            assert not used[i * size : (i + 1) * size].any()
            used[i * size : (i + 1) * size] = True


def test_missing_says_how_many_are_lacking():
    pool = Pool(Arena(4 * MB, slab_bytes=MB), 64 * 1024)
    assert pool.missing(64) == 0
    pool.take(60)
    assert pool.missing(4) == 0
    assert pool.missing(6) == 2


def test_a_slab_moves_to_the_shape_that_needs_it():
    arena = Arena(4 * MB, slab_bytes=MB)
    first, second = Pool(arena, 64 * 1024), Pool(arena, 128 * 1024)
    assert first.missing(64) == 0
    ids = first.take(64)
    assert second.missing(8) == 8
    first.free(ids)
    assert second.missing(32) == 0
    second.free(second.take(32))
    assert first.missing(64) == 0
    assert sorted(first.take(64).tolist()) == list(range(64))


def test_a_slab_in_use_stays():
    arena = Arena(2 * MB, slab_bytes=MB)
    first, second = Pool(arena, 64 * 1024), Pool(arena, 128 * 1024)
    assert first.missing(32) == 0
    ids = first.take(32)
    first.free(ids[1:])
    assert second.missing(16) == 8


def test_refuses_pages_larger_than_a_slab():
    with pytest.raises(ValueError, match="larger than a slab"):
        Pool(Arena(4 * MB, slab_bytes=MB), 2 * MB)


def test_random_use_neither_loses_nor_repeats_pages():
    rng = np.random.default_rng(0)
    arena = Arena(4 * MB, slab_bytes=MB // 4)
    pools = [Pool(arena, 4096), Pool(arena, 12000)]
    held: list[tuple[Pool, np.ndarray]] = []
    for _ in range(2000):
        pool = pools[rng.integers(2)]
        wanted = int(rng.integers(1, 40))
        if rng.random() < 0.55 and pool.missing(wanted) == 0:
            held.append((pool, pool.take(wanted)))
        elif held:
            owner, ids = held.pop(int(rng.integers(len(held))))
            owner.free(ids)
    for pool in pools:
        ids = np.concatenate([i for p, i in held if p is pool] or [np.empty(0, np.int32)])
        assert len(ids) == len(set(ids.tolist()))
        assert pool.num_free + len(ids) == pool.total
