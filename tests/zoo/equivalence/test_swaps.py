"""One budget for all swaps together, and what pairwise bounds would have let through."""

import pytest

from zoo.equivalence.agreement import Agreement, Reading, mean_interval, sum_up
from zoo.equivalence.swaps import Budget, choose
from zoo.measured import Interval

PLAIN = Interval(1.0, 1.0, 1.0)


def measured(agreement: float, kl: float = 0.0, width: float = 0.0) -> Agreement:
    return Agreement(
        sequences=1,
        tokens=100,
        kl=Interval(kl, kl - width, kl + width),
        agreement=Interval(agreement, agreement - width, agreement + width),
        perplexity=PLAIN,
        exact_perplexity=PLAIN,
        perplexity_change=PLAIN,
    )


class Chain:
    """Swaps that cost so much each, and in pairs more than the sum; counts what it is asked."""

    def __init__(self, costs: dict[int, float], extra: dict[frozenset[int], float] | None = None):
        self.costs, self.extra = costs, extra or {}
        self.asked: list[frozenset[int]] = []

    def __call__(self, places: frozenset[int]) -> Agreement:
        self.asked.append(places)
        cost = sum(self.costs[place] for place in places)
        cost += sum(more for pair, more in self.extra.items() if pair <= places)
        return measured(1 - cost)


def test_the_composed_chain_is_refused_where_every_pair_would_have_passed():
    chain = Chain(dict.fromkeys(range(4), 0.004))
    budget = Budget(agreement=0.99)
    assert all(budget.allows(chain(frozenset({place}))) for place in range(4))
    assert not budget.allows(chain(frozenset(range(4))))
    choice = choose(range(4), chain, budget, most=50)
    assert choice.places == {0, 1}
    assert choice.measured is not None
    assert choice.measured.agreement.value == pytest.approx(0.992)


def test_swaps_that_only_hurt_together_are_not_both_taken():
    chain = Chain({0: 0.0, 1: 0.0, 2: 0.0}, {frozenset({0, 2}): 0.5})
    choice = choose([0, 1, 2], chain, Budget(agreement=0.9), most=50)
    assert choice.places == {0, 1}


def test_one_measurement_is_enough_where_all_fit():
    chain = Chain(dict.fromkeys(range(64), 0.0))
    choice = choose(range(64), chain, Budget(agreement=1.0), most=50)
    assert choice.places == frozenset(range(64))
    assert choice.attempts == len(chain.asked) == 1


def test_what_was_not_asked_about_is_not_swapped():
    chain = Chain(dict.fromkeys(range(64), 0.01))
    choice = choose(range(64), chain, Budget(agreement=0.98), most=5)
    assert len(chain.asked) == 5
    assert choice.places == frozenset()
    assert choice.measured is None


def test_what_is_measured_last_is_the_chain_that_is_served():
    chain = Chain({0: 0.0, 1: 0.5, 2: 0.0, 3: 0.5})
    choice = choose([0, 1, 2, 3], chain, Budget(agreement=0.9), most=50)
    assert choice.places == {0, 2}
    assert chain(choice.places) == choice.measured


def test_the_interval_counts_and_not_its_middle():
    assert Budget(0.99).allows(measured(0.995, width=0.004))
    assert not Budget(0.99).allows(measured(0.995, width=0.01))
    assert Budget(0.9, kl=0.02).allows(measured(1.0, kl=0.01, width=0.005))
    assert not Budget(0.9, kl=0.02).allows(measured(1.0, kl=0.01, width=0.015))


def test_no_swap_leaves_the_exact_chain():
    assert choose([], Chain({}), Budget(1.0), most=9).places == frozenset()


def test_sums_are_means_over_tokens_with_seeded_intervals():
    readings = [Reading(10, 1.0, 9, 20.0, 21.0), Reading(30, 0.2, 30, 30.0, 30.0)]
    found = sum_up(readings, seed=1)
    assert found.kl.value == pytest.approx(1.2 / 40)
    assert found.agreement.value == pytest.approx(39 / 40)
    assert found.exact_perplexity.value == pytest.approx(2.718281828 ** (50 / 40))
    assert found.perplexity_change.value == pytest.approx(2.718281828 ** (1 / 40) - 1)
    assert found.kl.low == pytest.approx(0.2 / 30)
    assert found.kl.high == pytest.approx(0.1)
    assert found == sum_up(readings, seed=1)


def test_more_text_narrows_the_interval():
    few = mean_interval([0.0, 1.0] * 10, seed=0)
    many = mean_interval([0.0, 1.0] * 1000, seed=0)
    assert few.value == many.value == 0.5
    assert many.high - many.low < 0.2 * (few.high - few.low)
    assert few.low < 0.5 < few.high
