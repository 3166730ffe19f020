"""Profiles: every block once, the right bytes, and interpolation that says how far it is off."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.builders import fine_tune, tiny_llama
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.derived.latency import Point, fit, grid_of, predict
from zoo.derived.profile import KIND, BlockProfile, ProfileOptions, profile
from zoo.errors import UnknownVariant, UnsupportedOption
from zoo.findings import Findings
from zoo.keeping.listing import Listing
from zoo.progress import Quiet

OPTIONS = ProfileOptions(batches=(1, 8), contexts=(16, 64), prompts=(8, 32), repeats=2, threads=1)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A base and a fine-tune of its upper half: three blocks."""
    root = tmp_path / "zoo"
    base = tiny_llama(tmp_path / "base")
    tuned = fine_tune(tmp_path / "tuned", base, ["layers.2", "layers.3", "lm_head", "model.norm"])
    add(root, "base", str(base), AddOptions(), Quiet())
    add(root, "tuned", str(tuned), AddOptions(), Quiet())
    return root


def test_every_block_is_measured_once(zoo: Path) -> None:
    rows = profile(zoo, None, OPTIONS, Quiet())
    blocks = Listing(zoo).blocks()
    assert len(rows) == len(blocks) == 3
    assert sorted(row.resident_bytes for row in rows) == sorted(b.bytes for b in blocks)
    for row in rows:
        assert [(p.batch, p.context) for p in row.decode.points] == [
            (1, 16),
            (1, 64),
            (8, 16),
            (8, 64),
        ]
        assert [p.batch for p in row.prefill.points] == [8, 32]
        assert [(p.batch, p.context) for p in row.decode.held_out] == [(3, 32)]
        assert all(p.seconds > 0 for p in (*row.decode.points, *row.prefill.points))
        assert row.load_disk_s > 0
        assert row.load_host_s > 0
        # What is the base's lies there as it is, a fine-tune's as a difference to it.
        assert (row.stored_bytes >= row.resident_bytes) == (row.of == "base")
        # Two layers of two KV heads of 16 elements, K and V, float32.
        assert row.kv_bytes_per_token == 2 * (2 * 2 * 16 * 4)
    again = profile(zoo, None, OPTIONS, Quiet())
    assert again == rows
    assert len(Findings(Catalog(zoo)).all(KIND, BlockProfile)) == 3


def test_again_measures_again_and_one_variant_only_its_own(zoo: Path) -> None:
    first = profile(zoo, "base", OPTIONS, Quiet())
    assert [row.of for row in first] == ["base", "base"]
    second = profile(zoo, "base", replace(OPTIONS, again=True), Quiet())
    assert [row.block for row in second] == [row.block for row in first]
    assert second != first
    both = profile(zoo, "tuned", OPTIONS, Quiet())
    assert both[0] == second[0]
    assert both[1].of == "tuned"


def test_refusals(zoo: Path) -> None:
    with pytest.raises(UnknownVariant, match="no variant is called 'nobody'"):
        profile(zoo, "nobody", OPTIONS, Quiet())
    with pytest.raises(UnsupportedOption, match="--device"):
        profile(zoo, "base", replace(OPTIONS, device="abacus"), Quiet())


def test_interpolation_is_exact_for_what_is_linear_and_honest_for_what_is_not() -> None:
    def cost(batch: int, context: int) -> float:
        return 2.0 + 0.5 * batch + 0.25 * context + 0.125 * batch * context

    points = [Point(b, c, cost(b, c)) for b in (1, 4, 16) for c in (8, 64)]
    for batch, context in ((1, 8), (2, 16), (9, 40), (32, 100), (1, 0)):
        assert predict(points, batch, context) == pytest.approx(cost(batch, context))
    bent = Point(9, 40, 2 * cost(9, 40))
    grid = grid_of(points, [bent, Point(2, 16, cost(2, 16))])
    assert grid.error.largest == pytest.approx(0.5)
    assert grid.error.points == 2
    assert fit(points, []).points == 0
    falling = [Point(1, 8, 1.0), Point(2, 8, 0.1)]
    assert predict(falling, 9, 8) == 0.0
