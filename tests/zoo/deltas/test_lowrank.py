"""Few outer products: as good as can be, and spread over matrices by what a byte brings."""

import pytest
import torch

from zoo.deltas.lowrank import Factors, allot, factorize, factorize_for


def noisy(m: int, n: int, rank: int, seed: int = 0) -> torch.Tensor:
    """A matrix that is mostly of a rank."""
    draw = torch.Generator().manual_seed(seed)
    strong = torch.randn(m, rank, generator=draw) @ torch.randn(rank, n, generator=draw)
    return strong + 0.01 * torch.randn(m, n, generator=draw)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (300, 8)])
def test_every_rank_is_the_best_there_is(shape: tuple[int, int]):
    matrix = noisy(*shape, rank=3)
    factors = factorize(matrix)
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 5):
        error = (matrix - factors.left[:, :rank] @ factors.right[:rank]).square().sum()
        assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-3, abs=1e-4)
    assert factors.energies[:3].tolist() == pytest.approx(values[:3].square().tolist(), rel=1e-3)


def test_what_is_kept_is_best_for_the_inputs_it_will_meet():
    draw = torch.Generator().manual_seed(3)
    matrix = torch.randn(40, 24, generator=draw)
    # Inputs lie mostly in few directions.
    inputs = torch.randn(500, 24, generator=draw) @ torch.randn(24, 24, generator=draw).matrix_exp()
    moment = inputs.T @ inputs / len(inputs)
    plain, fitted = factorize(matrix), factorize_for(matrix, moment)
    ridge = 0.1 * float(moment.diagonal().mean())
    values = torch.linalg.svdvals(matrix @ torch.linalg.cholesky(moment + ridge * torch.eye(24)))
    for rank in (1, 4, 8):
        errors = []
        for factors in (plain, fitted):
            left = matrix - factors.left[:, :rank] @ factors.right[:rank]
            errors.append(float((inputs @ left.T).square().sum(1).mean()))
        assert errors[1] < 0.8 * errors[0]
        least = float(values[rank:].square().sum())
        assert errors[1] + ridge * float(left.square().sum()) == pytest.approx(least, rel=1e-3)
    assert fitted.energies[:8].tolist() == pytest.approx(values[:8].square().tolist(), rel=1e-3)


@pytest.mark.parametrize("moment", [torch.zeros(16, 16), torch.ones(16, 16)])
def test_directions_that_no_input_has_count_a_little(moment: torch.Tensor):
    matrix = noisy(24, 16, rank=16)
    factors = factorize_for(matrix, moment)
    rank = len(factors.energies)
    error = (matrix - factors.left @ factors.right).square().sum() / matrix.square().sum()
    assert torch.isfinite(factors.right).all()
    assert error < 1 - rank / 32


def test_a_wide_matrix_is_sketched_alike_each_time(monkeypatch: pytest.MonkeyPatch):
    matrix = noisy(300, 260, rank=4)
    exact = factorize(matrix)
    monkeypatch.setattr("zoo.deltas.lowrank._WIDEST_EXACT", 64)
    first, again = factorize(matrix), factorize(matrix)
    assert torch.equal(first.left, again.left)
    for one in (exact, first):
        error = (matrix - one.left[:, :4] @ one.right[:4]).norm() / matrix.norm()
        assert error < 0.01


def test_factors_share_the_size_between_them():
    factors = factorize(noisy(64, 48, rank=2))
    left, right = factors.cut(2)
    assert left.dtype == right.dtype == torch.bfloat16
    assert left.float().norm() == pytest.approx(float(right.float().norm()), rel=0.01)


def test_a_matrix_that_did_not_move_gets_nothing():
    still, moved = factorize(torch.zeros(16, 16)), factorize(noisy(16, 16, rank=2))
    assert allot([(still, 1), (moved, 1)], 10_000)[0] == 0
    assert torch.isfinite(still.left).all()


def test_shares_of_nothing_are_nothing():
    factors = factorize(noisy(16, 16, rank=2))
    assert factors.relative_to(0.0).energies.tolist() == [0.0] * len(factors.energies)
    half = factors.relative_to(2 * float(factors.energies[0]))
    assert float(half.energies[0]) == pytest.approx(0.5)


def test_ranks_go_where_a_byte_brings_most():
    def factors(width: int, *energies: float) -> tuple[Factors, int]:
        k = len(energies)
        return Factors(torch.zeros(width, k), torch.zeros(k, width), torch.tensor(energies)), 1

    small, large, weak = factors(8, 4, 3, 1), factors(16, 5, 4, 1), factors(8, 0.1, 0.05)
    # Per byte: small 4/32, 3/32, 1/32; large 5/64, 4/64, 1/64; weak 0.1/32.
    assert allot([small, large, weak], 32) == [1, 0, 0]
    assert allot([small, large, weak], 32 + 32) == [2, 0, 0]
    assert allot([small, large, weak], 32 + 32 + 64) == [2, 1, 0]
    assert allot([small, large, weak], 32 + 32 + 64 + 63) == [3, 1, 0]
    assert allot([small, large, weak], 10_000) == [3, 3, 2]
    assert allot([], 100) == []


def test_a_matrix_in_two_places_takes_twice_the_bytes():
    factors = factorize(noisy(16, 16, rank=4))
    assert allot([(factors, 1)], 2 * 64) == [2]
    assert allot([(factors, 2)], 2 * 64) == [1]
