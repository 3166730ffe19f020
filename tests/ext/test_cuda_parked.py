"""Weights that leave a device and come back: the same bytes, within the bound, the oldest leave
first. Ordinary memory where there is no device."""

import pytest
import torch

from ext.cuda.parked import Parked
from ext.plain import DenseMatrix

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PIECE = 1 << 12


def matrix(seed: int, nbytes: int, dtype: torch.dtype = torch.float32) -> DenseMatrix:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(nbytes // dtype.itemsize, generator=draw).to(dtype)
    return DenseMatrix(values.view(1, -1).to(DEVICE))


def assert_comes_back(parked: Parked, key: str, expected: DenseMatrix) -> None:
    found = parked.recall(key)
    assert found is not None
    assert found.data.device.type == DEVICE.type
    assert found.data.data_ptr() != expected.data.data_ptr()
    assert found.data.dtype is expected.data.dtype
    assert torch.equal(found.data, expected.data)


@pytest.mark.parametrize("nbytes", [4, PIECE - 4, PIECE, PIECE + 4, 7 * PIECE + 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_comes_back(nbytes: int, dtype: torch.dtype) -> None:
    parked = Parked(8 * PIECE, DEVICE, PIECE)
    one = matrix(1, nbytes, dtype)
    assert parked.park("one", one)
    assert parked.kept_bytes == -(-nbytes // PIECE) * PIECE
    for _ in range(2):
        assert_comes_back(parked, "one", one)
    assert parked.recalled == 2
    assert parked.recall("other") is None


def test_the_least_recently_wanted_leave_for_others() -> None:
    parked = Parked(4 * PIECE, DEVICE, PIECE)
    made = {name: matrix(i, 2 * PIECE) for i, name in enumerate("abc")}
    assert parked.park("a", made["a"])
    assert parked.park("b", made["b"])
    assert_comes_back(parked, "a", made["a"])
    assert parked.park("c", made["c"])
    assert parked.recall("b") is None
    assert_comes_back(parked, "a", made["a"])
    assert_comes_back(parked, "c", made["c"])
    # It is there already: nothing moves, and it counts as wanted.
    assert parked.park("a", made["a"])
    assert parked.park("b", made["b"])
    assert parked.recall("c") is None
    assert parked.kept_bytes == 4 * PIECE


def test_what_can_never_fit_is_not_kept_and_drives_nothing_out() -> None:
    parked = Parked(4 * PIECE, DEVICE, PIECE)
    one = matrix(1, 3 * PIECE)
    assert parked.park("one", one)
    assert not parked.park("large", matrix(2, 5 * PIECE))
    assert not parked.park("vector", torch.ones(3))
    assert_comes_back(parked, "one", one)
    assert not Parked(PIECE - 1, DEVICE, PIECE).park("one", one)
