"""Which worker serves a request, or why none does."""

from engine.events import Began, ChainFailed, Closed
from engine.planner import AHEAD, NoPlan, plan
from tests.engine.clusters import CHAIN, SERVING, appeared, arrived, cluster, hello, loaded, opened
from workers.wire import Hop, RequestId


def test_planner_waits_for_a_chain_that_loads() -> None:
    assert plan(cluster(appeared("base")), CHAIN) == NoPlan("wait")
    assert plan(cluster(*SERVING[:3]), CHAIN) == NoPlan("wait")


def test_planner_says_why_a_chain_failed() -> None:
    made = cluster(*SERVING[:3], ChainFailed("w", CHAIN, "no room"))
    assert plan(made, CHAIN) == NoPlan("failed", "no room")


def test_planner_gives_one_hop_over_the_whole_chain() -> None:
    assert plan(cluster(*SERVING), CHAIN) == (Hop("w", 0, 7),)


def test_planner_prefers_the_worker_with_fewest_requests() -> None:
    made = cluster(*SERVING, hello("v"), loaded("v"), arrived(1), opened(1, 10, "v"))
    assert plan(made, CHAIN) == (Hop("w", 0, 7),)


def test_planner_prefers_among_equals_the_worker_that_served_the_chain_last() -> None:
    made = cluster(*SERVING, hello("v"), loaded("v"), arrived(1), opened(1, 10, "w"))
    made.apply(Closed(RequestId(1)))
    assert plan(made, CHAIN) == (Hop("w", 0, 7),)


def test_planner_waits_while_workers_are_full() -> None:
    made = cluster(*SERVING)
    for number in range(4):
        made.apply(arrived(number))
        made.apply(opened(number, 10 + number))
    assert plan(made, CHAIN) == NoPlan("wait")
    made.apply(Closed(RequestId(0)))
    assert plan(made, CHAIN) == (Hop("w", 0, 7),)


def test_planner_leaves_order_to_the_queue_while_a_worker_has_enough_to_begin() -> None:
    made = cluster(hello("w", max_sequences=1000), *SERVING[1:])
    for number in range(AHEAD):
        made.apply(arrived(number))
        made.apply(opened(number, 1000 + number))
    assert plan(made, CHAIN) == NoPlan("wait")
    made.apply(Began(RequestId(0), 0))
    assert plan(made, CHAIN) == (Hop("w", 0, 7),)
