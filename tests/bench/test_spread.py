"""Summaries of measured values."""

import pytest

from bench.spread import Spread, median, percentile, spread, swing


def test_percentiles_lie_between_neighbours():
    assert percentile([1.0], 0.99) == 1.0
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile([0.0, 10.0, 20.0, 30.0, 40.0], 0.95) == pytest.approx(38.0)


def test_a_spread_does_not_depend_on_the_order():
    values = [float(value) for value in range(100, -1, -1)]
    assert spread(values) == Spread(count=101, mean=50.0, p50=50.0, p95=95.0, p99=99.0, max=100.0)


def test_nothing_measured_is_all_zero():
    assert spread([]) == Spread()


def test_swing_is_relative_to_the_median():
    assert median([9.0, 10.0, 14.0]) == 10.0
    assert swing([9.0, 10.0, 14.0]) == pytest.approx(0.5)
