"""Matrices as sums of few outer products, and how many each of them gets under one byte budget.

Pure but for the arithmetic; equal matrices give equal factors.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# No matrix gets more: beyond it, factors cost more to serve than they bring.
MOST_RANKS = 128
# Up to this width the products of all columns are decomposed, beyond it a random sketch of them.
_WIDEST_EXACT = 2048
_OVERSAMPLED = 16
_ROUNDS = 4
# What is added to the second moment of inputs in every direction, as a share of their mean.
_RIDGE = 0.1


@dataclass(frozen=True, slots=True)
class Factors:
    """The best approximation left @ right of a matrix [m, n] for every rank up to some k:
    left [m, k], right [k, n], the strongest first. `energies` [k] are what each rank takes off the
    squared error."""

    left: Tensor
    right: Tensor
    energies: Tensor

    def relative_to(self, energy: float) -> "Factors":
        """The same, with energies as shares of another one, which makes matrices comparable; of
        nothing they are nothing."""
        shares = self.energies / energy if energy > 0 else torch.zeros_like(self.energies)
        return Factors(self.left, self.right, shares)

    @property
    def bytes_per_rank(self) -> int:
        """Bytes that one more rank takes in 16 bits."""
        return 2 * (self.left.shape[0] + self.right.shape[1])

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """The factors of that rank in bfloat16, of equal norm so that neither loses more."""
        return self.left[:, :rank].bfloat16(), self.right[:rank].bfloat16()


def factorize_for(matrix: Tensor, moment: Tensor) -> Factors:
    """Decompose a float32 matrix M [m, n] so that its outputs M x come out best, rather than its
    elements, for inputs whose mean of x x^T is `moment` [n, n].

    With moment = L L^T the squared error of the outputs is ||(M - left right) L||_F^2, so M L is
    cut off, and L undone: right = (V^T of M L) L^-1 (SVD-LLM, Wang et al. 2024, arXiv:2403.07378,
    3.1, where L is called S)."""
    root = _root(moment)
    found = factorize(matrix @ root)
    undone = torch.linalg.solve_triangular(root, found.right, upper=False, left=False)
    return Factors(found.left, undone.contiguous(), found.energies)


def _root(moment: Tensor) -> Tensor:
    """The Cholesky factor of a second moment, after a ridge: no direction counts for nothing,
    because other text will have it."""
    wide = moment.double()
    mean = float(wide.diagonal().mean())
    ridge = _RIDGE * mean if mean > 0 else 1.0
    while True:
        wide.diagonal().add_(ridge)
        root, trouble = torch.linalg.cholesky_ex(wide)
        if not int(trouble):
            return root.float()
        ridge *= 10


def factorize(matrix: Tensor) -> Factors:
    """Decompose a float32 matrix [m, n]."""
    if matrix.shape[0] < matrix.shape[1]:
        flipped = factorize(matrix.T)
        return Factors(flipped.right.T, flipped.left.T, flipped.energies)
    # More ranks would take more bytes than the matrix itself.
    most = min(MOST_RANKS, matrix.numel() // sum(matrix.shape))
    if matrix.shape[1] <= _WIDEST_EXACT:
        wide = matrix.double()
        energies, basis = torch.linalg.eigh(wide.T @ wide)
        right = basis.flip(1)[:, :most].float()
        energies = energies.flip(0)[:most].clamp(min=0).float()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, values, right = torch.svd_lowrank(matrix, most + _OVERSAMPLED, _ROUNDS)
        right, energies = right[:, :most], values[:most].square()
    left = matrix @ right
    root = energies.sqrt().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return Factors(left / root, (right * root).T, energies)


def allot(factors: Sequence[tuple[Factors, int]], budget_bytes: int) -> list[int]:
    """Ranks for each matrix, which is kept in so many places: one at a time to where a byte takes
    most off the squared error, as long as the budget lasts."""
    ranks = [0] * len(factors)
    gains = [(-_gain(one, 0), place) for place, (one, _) in enumerate(factors)]
    heapq.heapify(gains)
    left = budget_bytes
    while gains:
        gain, place = heapq.heappop(gains)
        one, uses = factors[place]
        cost = uses * one.bytes_per_rank
        if gain == 0 or cost > left:
            continue
        left -= cost
        ranks[place] += 1
        if ranks[place] < len(one.energies):
            heapq.heappush(gains, (-_gain(one, ranks[place]), place))
    return ranks


def _gain(factors: Factors, rank: int) -> float:
    return float(factors.energies[rank]) / factors.bytes_per_rank
