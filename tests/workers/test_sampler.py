"""The sampler: limits hold, distributions are right, draws depend on the seed and their number
alone."""

from collections import Counter

import numpy as np
import pytest
import torch

from ext.reference import TorchOps
from tests.workers.test_batcher import ONE
from workers.requests import Request
from workers.sampler import Sampler, logprobs_of, uniform
from workers.wire import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.2])


def asking(number: int = 0, known: tuple[int, ...] = (0,), outputs: int = 0, **options: object):
    tokens = np.array([*known, *[0] * 4], np.int32)
    return Request(number, ONE, Sampling(**options), 0, 0, 0.0, tokens, len(known), outputs)


def sampler() -> Sampler:
    return Sampler(TorchOps().argmax)


def choose(request: Request, logits: torch.Tensor = LOGITS) -> int:
    return sampler().choose(logits[None], [request])[0][0]


def draw_many(count: int = 4000, **options: object) -> Counter[int]:
    requests = [asking(i, seed=i, **options) for i in range(count)]
    return Counter(sampler().choose(LOGITS.expand(count, -1), requests)[0])


def expect(seen: Counter[int], weights: torch.Tensor) -> None:
    """Chi-square against the expected shares, far out in the tail."""
    shares = (weights / weights.sum()).tolist()
    total = seen.total()
    assert all(shares[t] > 0 for t in seen), "a token outside the limits was drawn"
    pairs = [(seen[i], total * s) for i, s in enumerate(shares) if s > 0]
    assert sum((a - e) ** 2 / e for a, e in pairs) < 40


def test_greedy_takes_the_best():
    assert choose(asking()) == 0


def test_temperature_shapes_the_distribution():
    expect(draw_many(temperature=0.7), torch.softmax(LOGITS / 0.7, 0))


def test_top_k_keeps_the_best_k():
    kept = torch.softmax(LOGITS, 0) * (LOGITS.sort().values[-3] <= LOGITS)
    expect(draw_many(temperature=1.0, top_k=3), kept)


def test_top_p_keeps_the_fewest_that_hold_p():
    probabilities, ids = torch.softmax(LOGITS, 0).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    kept = torch.zeros(8)
    kept[ids[before < 0.6]] = probabilities[before < 0.6]
    expect(draw_many(temperature=1.0, top_p=0.6), kept)


def test_min_p_drops_what_is_far_below_the_best():
    probabilities = torch.softmax(LOGITS, 0)
    expect(
        draw_many(temperature=1.0, min_p=0.3),
        probabilities * (probabilities >= 0.3 * probabilities.max()),
    )


def test_top_p_over_a_flat_large_vocabulary():
    flat = torch.zeros(5000)
    requests = [asking(i, seed=i, temperature=1.0, top_p=0.5) for i in range(300)]
    tokens = sampler().choose(flat.expand(300, -1), requests)[0]
    assert len(set(tokens)) > 250


def by_sorting(logits: torch.Tensor, s: Sampling) -> int:
    """The first draw, from all of the row sorted, in float64."""
    weights, ids = torch.softmax(logits.double() / s.temperature, 0).sort(descending=True)
    if s.top_k > 0:
        weights[s.top_k :] = 0.0
    before = weights.cumsum(0) - weights
    weights[1:][before[1:] >= s.top_p * weights.sum()] = 0.0
    through = weights.cumsum(0)
    return int(ids[torch.searchsorted(through, uniform(s.seed, 0) * through[-1], right=True)])


# From a few of the best to all of them, the nucleus of rows as flat as these.
FLATNESS = (8.0, 4.0, 3.0, 2.0, 1.0, 0.1)
LIMITS = ({"top_p": 0.95}, {"top_k": 3000, "top_p": 0.9}, {"top_k": 50}, {"top_p": 0.999})


def test_rows_are_drawn_from_as_if_sorted_whatever_shares_their_batch():
    torch.manual_seed(0)
    rows = [torch.randn(20_000) * spread for spread in FLATNESS for _ in LIMITS for _ in range(5)]
    requests = [
        asking(i, seed=i, temperature=0.8, **LIMITS[i // 5 % len(LIMITS)]) for i in range(len(rows))
    ]
    together = sampler().choose(torch.stack(rows), requests)[0]
    alone = [choose(request, row) for request, row in zip(requests, rows, strict=True)]
    sorted_ = [by_sorting(row, r.sampling) for row, r in zip(rows, requests, strict=True)]
    assert together == alone
    # A draw may fall between the sums in float32 and in float64.
    assert sum(a != b for a, b in zip(together, sorted_, strict=True)) <= 2


def test_a_draw_depends_on_seed_and_number_alone():
    options = {"temperature": 1.0, "seed": 7}
    alone = choose(asking(1, outputs=3, **options))
    crowd = [asking(i, temperature=0.9, top_k=i % 5, seed=i) for i in range(9)]
    mixed = sampler().choose(LOGITS.expand(10, -1), [*crowd, asking(1, outputs=3, **options)])[0]
    assert mixed[-1] == alone
    assert len({uniform(7, n) for n in range(100)}) == 100


def test_penalties_follow_their_formulas():
    request = asking(5, known=(0, 6, 6, 1), outputs=2, presence_penalty=0.4, frequency_penalty=0.3)
    made, row = sampler(), LOGITS.clone()
    made._shape(row, request)
    expected = LOGITS.clone()
    expected[6] -= 0.3 + 0.4
    expected[1] -= 0.3 + 0.4
    assert torch.allclose(row, expected)
    repeated = asking(6, known=(0, 4, 1), outputs=1, repetition_penalty=2.0)
    row = LOGITS.clone()
    made._shape(row, repeated)
    expected = LOGITS.clone()
    expected[0], expected[1], expected[4] = 1.0, 0.5, -2.0
    assert torch.allclose(row, expected)


def test_counts_follow_the_answer_as_it_grows():
    request = asking(7, known=(0,), frequency_penalty=1.1)
    made, tokens = sampler(), []
    for _ in range(4):
        tokens.append(made.choose(LOGITS[None], [request])[0][0])
        request.tokens[request.length] = tokens[-1]
        request.length += 1
        request.outputs += 1
    assert tokens == [0, 6, 1, 0]


@pytest.mark.parametrize(
    ("options", "token"),
    [
        ({"logit_bias": ((5, 9.0),)}, 5),
        ({"logit_bias": ((0, -100.0),)}, 6),
        ({"allowed_token_ids": (4, 5)}, 4),
        ({"min_tokens": 2, "stop_token_ids": (0,)}, 6),
    ],
)
def test_bias_limits_and_minimum_length(options, token):
    assert choose(asking(**options)) == token


def test_logprobs_are_of_the_raw_logits():
    given = sampler().choose(LOGITS[None], [asking(logprobs=2, logit_bias=((5, 9.0),))])[1][0]
    logs = torch.log_softmax(LOGITS, 0)
    assert (given.token, given.rank) == (5, 8)
    assert given.logprob == pytest.approx(float(logs[5]))
    assert given.top_ids == (0, 6)
    assert logprobs_of(LOGITS[None], [3], 0)[0].top_ids == ()
