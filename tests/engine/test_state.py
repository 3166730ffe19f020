"""The cluster's state: every change by an event, and what can be read of it."""

import msgspec
import pytest

from engine.events import (
    Advanced,
    AnyEvent,
    Began,
    ChainEvicting,
    ChainFailed,
    ChainLoading,
    Closed,
    Returned,
    VariantRetired,
    WorkerLost,
    WorkerReported,
)
from tests.engine.clusters import (
    CHAIN,
    SERVING,
    appeared,
    arrived,
    cluster,
    hello,
    loaded,
    opened,
    wave,
)
from workers import wire
from workers.wire import ChainId, RequestId
from zoo.manifest import ChainDigest


def test_a_variant_has_a_chain_with_a_number() -> None:
    made = cluster(appeared("base"), appeared("alias"))
    assert made.variants["base"].chain == made.variants["alias"].chain == CHAIN
    assert made.chains[CHAIN].names == {"base", "alias"}
    assert made.numbers == {ChainDigest("digest1"): CHAIN}


def test_a_replaced_variant_leaves_its_old_chain() -> None:
    made = cluster(appeared("base"), appeared("base", 2))
    assert made.chains[CHAIN].names == set()
    assert made.variants["base"].chain == ChainId(2)


def test_a_retired_variant_leaves_the_chain_to_its_requests() -> None:
    made = cluster(*SERVING, arrived(1), VariantRetired("base"))
    assert not made.variants
    assert made.chains[CHAIN].requests == {RequestId(1)}


def test_an_evicted_chain_is_gone_everywhere() -> None:
    made = cluster(*SERVING, VariantRetired("base"), ChainEvicting(CHAIN))
    assert not made.chains
    assert not made.numbers
    assert not made.workers["w"].holdings


@pytest.mark.parametrize(
    ("events", "residency"),
    [
        ((appeared("base"),), "stored"),
        ((hello("w"), appeared("base"), ChainLoading("w", CHAIN)), "loading"),
        (SERVING, "loaded"),
        ((*SERVING[:3], ChainFailed("w", CHAIN, "no room")), "failed"),
        ((*SERVING, hello("v"), ChainFailed("v", CHAIN, "no room")), "loaded"),
        ((*SERVING, WorkerLost("w")), "stored"),
    ],
)
def test_residency_is_the_best_of_all_workers(events: tuple[AnyEvent, ...], residency: str) -> None:
    assert cluster(*events).residency(CHAIN) == residency


def test_capacity_is_what_every_holder_has() -> None:
    assert cluster(appeared("base")).capacity(CHAIN) is None
    made = cluster(*SERVING, hello("v"), loaded("v", max_tokens=50))
    assert made.capacity(CHAIN) == 50


def test_a_request_from_arrival_to_close_leaves_nothing() -> None:
    made = cluster(*SERVING, arrived(1), opened(1, 10), Began(RequestId(1), 2))
    live = made.requests[RequestId(1)]
    assert (live.cached_tokens, live.attempts) == (2, 1)
    made.apply(Closed(RequestId(1)))
    assert not made.requests
    assert not made.attempts
    assert not made.chains[CHAIN].requests
    worker = made.workers["w"]
    assert (worker.opened, worker.unstarted) == (set(), 0)


def test_a_returned_request_keeps_its_tokens_and_gets_another_number() -> None:
    made = cluster(*SERVING, arrived(1), opened(1, 10), Began(RequestId(1), 2))
    made.apply(Advanced(wave((10, 5, 0)), [0]))
    made.apply(Returned(RequestId(1)))
    made.apply(WorkerLost("w"))
    made.apply(hello("v"))
    made.apply(opened(1, 11, "v"))
    made.apply(Began(RequestId(1), 3))
    live = made.requests[RequestId(1)]
    assert (live.emitted, live.attempts, live.attempt) == ([5], 2, 11)
    # What the client is told of the cache is what its own first attempt found.
    assert live.cached_tokens == 2
    assert set(made.attempts) == {RequestId(11)}


def test_only_the_next_token_is_news() -> None:
    made = cluster(*SERVING, arrived(1), arrived(2), opened(1, 10), opened(2, 20))
    made.apply(Advanced(wave((10, 5, 0)), [0]))
    cases = [
        (wave((10, 6, 1), (20, 7, 0)), [0, 1], set[int]()),
        (wave((10, 5, 0)), [], set[int]()),
        (wave((99, 5, 0)), [], set[int]()),
        (wave((10, 6, 1), (10, 7, 2)), [0, 1], set[int]()),
        (wave((10, 7, 2), (20, 7, 0)), [1], {1}),
    ]
    for tokens, rows, gaps in cases:
        assert made.news(tokens) == (rows, gaps)


def test_sums_do_not_fall_when_a_worker_is_lost() -> None:
    status = wire.Status(1, 0, 0, 1, 0, 1, 0, 0, 0, 1, {"opens": 3}, {})
    made = cluster(hello("w"), WorkerReported("w", status), WorkerLost("w"), hello("v"))
    made.apply(WorkerReported("v", msgspec.structs.replace(status, counters={"opens": 2})))
    assert made.counters()["opens"] == 5
