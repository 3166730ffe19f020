"""Who gets how much of a device's memory."""

import pytest

from workers.budget import NoBudget, Shares, parked, share

GIB = 1 << 30


@pytest.mark.parametrize(
    ("known", "kv", "weights", "expected"),
    [
        pytest.param(16, 0, 0, Shares(56, 24), id="weights get theirs and some for later"),
        pytest.param(0, 0, 0, Shares(70, 10), id="an empty zoo expects variants"),
        pytest.param(70, 0, 0, Shares(20, 60), id="pages keep a quarter"),
        pytest.param(400, 0, 0, Shares(20, 60), id="also where the zoo is larger than the device"),
        pytest.param(16, 50, 0, Shares(50, 30), id="what pages leave goes to weights"),
        pytest.param(16, 0, 70, Shares(10, 70), id="and the other way round"),
        pytest.param(16, 90, 90, Shares(90, 90), id="what is given stands"),
    ],
)
def test_divides_eighty_gibibytes(known: int, kv: int, weights: int, expected: Shares) -> None:
    assert share(80 * GIB, known * GIB, kv * GIB, weights * GIB) == Shares(
        expected.kv_bytes * GIB, expected.weight_bytes * GIB
    )


@pytest.mark.parametrize(("budget", "kv"), [(0, 0), (-GIB, 0), (8 * GIB, 8 * GIB), (GIB, 2 * GIB)])
def test_too_little_is_refused_with_what_to_do(budget: int, kv: int) -> None:
    with pytest.raises(NoBudget, match="raise --gpu-memory-utilization"):
        share(budget, GIB, kv)


@pytest.mark.parametrize(
    ("known", "weights", "workers", "expected"),
    [
        pytest.param(60, 60, 1, 0, id="what fits never leaves"),
        pytest.param(61, 60, 1, 61, id="all that is known, where there is memory"),
        pytest.param(900, 60, 1, 100, id="a quarter of the machine's at most"),
        pytest.param(900, 60, 8, 12, id="which all its workers share"),
    ],
)
def test_weights_that_do_not_fit_get_host_memory(
    known: int, weights: int, workers: int, expected: int
) -> None:
    assert parked(known, weights, 400, workers) == expected
