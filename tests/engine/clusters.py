"""Clusters made of events, for the tests of who reads them."""

from engine.events import (
    AnyEvent,
    Arrived,
    ChainLoaded,
    ChainLoading,
    Opened,
    VariantAppeared,
    WorkerGreeted,
)
from engine.state import Cluster
from workers import wire
from workers.wire import ChainId, Hop, RequestId
from zoo.manifest import ChainDigest, Variant

CHAIN = ChainId(1)


def hello(name: str, max_sequences: int = 4) -> WorkerGreeted:
    return WorkerGreeted(wire.Hello(1, name, 1, "cpu", "fake", 1, 1, 16, max_sequences))


def appeared(name: str, number: int = 1) -> VariantAppeared:
    variant = Variant(
        name=name,
        chain=ChainDigest(f"digest{number}"),
        family="llama",
        kind="base",
        store="exact",
        base=None,
        source="",
        created=0.0,
        hidden=8,
        vocabulary=10,
        context=64,
        dtype="float32",
        eos=(),
        files={},
        tensors={},
        report={},
    )
    return VariantAppeared(variant, ChainId(number), variant.chain, 7)


def loaded(worker: str, number: int = 1, max_tokens: int = 100) -> ChainLoaded:
    return ChainLoaded(worker, wire.Loaded(ChainId(number), 1, 2, 0.1, max_tokens))


def arrived(number: int) -> Arrived:
    return Arrived(RequestId(number), CHAIN, [1, 2], wire.Sampling(), 0, 0)


def opened(number: int, attempt: int, worker: str = "w") -> Opened:
    hops = (Hop(worker, 0, 7),)
    return Opened(RequestId(number), RequestId(attempt), hops, wire.Sampling())


def wave(*rows: tuple[int, int, int]) -> wire.Tokens:
    """Rows of attempt, token, index."""
    attempts, tokens, indices = zip(*rows, strict=True)
    return wire.Tokens(
        tuple(RequestId(a) for a in attempts), tokens, indices, (wire.CONTINUES,) * len(rows)
    )


def cluster(*events: AnyEvent) -> Cluster:
    made = Cluster()
    for event in events:
        made.apply(event)
    return made


SERVING = (hello("w"), appeared("base"), ChainLoading("w", CHAIN), loaded("w"))
