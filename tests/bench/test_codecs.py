"""What differences decode to: within a step of what they were, in the bytes that are claimed."""

import pytest
import torch

from bench.codecs import CODECS, even_rank, few_bit, one_bit


def change() -> torch.Tensor:
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(1)) * 1e-3


@pytest.mark.parametrize("name", CODECS)
def test_a_decoded_difference_is_nearer_than_none(name: str):
    exact = change()
    decoded, size = CODECS[name](exact)
    assert decoded.shape == exact.shape
    assert (exact - decoded).norm() < exact.norm()
    assert 0 < size < 2 * exact.numel()


def test_signs_and_scales_take_a_bit_each_and_two_bytes_a_row():
    exact = change()
    decoded, size = one_bit(exact)
    assert size == 96 * 128 // 8 + 2 * 96
    assert torch.equal(decoded.sign(), exact.sign())
    assert torch.allclose(decoded.abs().mean(1), exact.abs().mean(1), rtol=0.01)


@pytest.mark.parametrize("bits", [2, 4])
def test_levels_lie_half_a_step_from_the_truth_at_most(bits: int):
    exact = change()
    decoded, size = few_bit(exact, bits)
    step = 2 * exact.reshape(-1, 64).abs().amax(1, keepdim=True) / (2**bits - 1)
    assert ((exact - decoded).reshape(-1, 64).abs() <= 0.53 * step).all()
    assert size == 96 * 128 * bits // 8 + 2 * 2 * 96


def test_a_matrix_that_did_not_move_decodes_to_nothing():
    still = torch.zeros(8, 64)
    for code in CODECS.values():
        assert torch.equal(code(still)[0], still)


def test_ranks_keep_to_their_share():
    exact = change()
    decoded, size = even_rank(exact, 1 / 4)
    assert size <= exact.numel() // 2
    assert torch.linalg.matrix_rank(decoded) == size // (2 * (96 + 128))
