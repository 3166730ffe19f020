"""Results on disk and as tables; the arithmetic of the roofline and of merging."""

from pathlib import Path

import msgspec
import pytest

from bench.blocks import difference, merging
from bench.report import append, markdown, shown, tables
from bench.result import Context, Line, Result
from bench.roofline import Limits, Shape, Weights, decode_seconds, least_seconds, prefill_seconds

CONTEXT = Context(
    date="2026-01-02T03:04:05+00:00",
    commit="0123456789abcdef+dirty",
    command="python -m bench",
    machine={"cpu": "Some CPU", "cores": 2, "memory_bytes": 24 << 30, "isa": ["avx2"]},
    versions={"python": "3.11"},
)
RESULTS = [
    Result(scenario="speed", cell="one", figures={"tokens/s": 12.345, "runs": 3}),
    Result(
        scenario="speed",
        cell="many",
        figures={"tokens/s": 1234.5, "ratio": 0.5},
        checks={"fast enough": False, "whole": True},
    ),
]


def test_lines_come_back_as_they_were_written(tmp_path: Path):
    path = tmp_path / "results" / "day.jsonl"
    for result in RESULTS:
        append(path, result, CONTEXT)
    lines = [msgspec.json.decode(line, type=Line) for line in path.read_bytes().splitlines()]
    assert lines == [Line(result=result, context=CONTEXT) for result in RESULTS]


def test_markdown_has_a_row_per_cell_and_names_what_fails():
    text = markdown(RESULTS, CONTEXT)
    assert "Some CPU, 2 cores, 24 GiB, kernels avx2; commit 0123456789ab+dirty" in text
    assert "|  | tokens/s | runs | ratio |\n| --- | ---: | ---: | ---: |" in text
    assert "| one | 12.3 | 3 |  |" in text
    assert "| many | 1,234 |  | 0.5 |" in text
    assert "- **FAILS**: many: fast enough\n- holds: many: whole" in text


def test_tables_say_which_check_fails():
    (table,) = tables(RESULTS)
    assert list(table.columns[-1].cells) == ["", "fast enough"]


@pytest.mark.parametrize(
    ("figure", "text"),
    [("a / b", "a / b"), (12345, "12,345"), (0.01234, "0.0123"), (432.16, "432.2"), (0.0, "0")],
)
def test_figures_have_the_digits_that_matter(figure: float | str, text: str):
    assert shown(figure) == text


LIMITS = Limits(read_bytes_per_s=1000.0, flops_per_s=10_000.0)
WEIGHTS = Weights(body_bytes=800, head_bytes=200, element_bytes=2, kv_bytes=1)


def test_a_single_row_is_bound_by_reading_and_many_by_arithmetic():
    alone = Shape(streams=1, prompt=10, new=20)
    assert decode_seconds(alone, WEIGHTS, LIMITS) == pytest.approx((1000 + 20) / 1000)
    many = Shape(streams=100, prompt=0, new=2)
    assert decode_seconds(many, WEIGHTS, LIMITS) == pytest.approx(2 * 100 * 500 / 10_000)
    assert prefill_seconds(alone, WEIGHTS, LIMITS) == pytest.approx(1.0)
    assert least_seconds(alone, WEIGHTS, LIMITS) == pytest.approx(1.0 + 19 * 1.02)


def test_adapters_add_to_reading_and_to_every_row():
    tuned = msgspec.structs.replace(WEIGHTS, own_bytes=500, own_weights=50.0)
    assert decode_seconds(Shape(1, 0, 0), tuned, LIMITS) == pytest.approx(1.5)
    assert decode_seconds(Shape(100, 0, 0), tuned, LIMITS) == pytest.approx(2 * 100 * 550 / 10_000)


def block(digest: str, units: int, chains: int, **counts: int) -> dict[str, object]:
    names = ("runs", "rows", "sequences", "merged_runs")
    place = {"worker": "w", "digest": digest, "first": 0, "units": units, "chains": chains}
    return place | {name: counts.get(name, 0) for name in names}


def test_blocks_count_by_their_units_and_only_shared_ones_can_merge():
    before = [block("a", 3, 2, runs=10, rows=10, sequences=10)]
    after = [
        block("a", 3, 2, runs=12, rows=70, sequences=42, merged_runs=1),
        block("b", 1, 1, runs=2, rows=4, sequences=4),
        block("idle", 1, 1),
    ]
    changes = difference(before, after)
    assert [change["runs"] for change in changes] == [2, 2]
    met = merging(changes)
    assert met.shared_sequences == pytest.approx(16.0)
    assert met.sequences == pytest.approx((3 * 32 + 4) / (3 * 2 + 2))
    assert met.merged == pytest.approx(0.5)
