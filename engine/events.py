"""What can happen to a cluster: made by who decides, read by `state.Cluster.apply` alone."""

import msgspec

from workers import wire
from workers.wire import ChainId, RequestId
from zoo.manifest import ChainDigest, Variant

# ---- workers ------------------------------------------------------------------------------------


class WorkerGreeted(msgspec.Struct, frozen=True, gc=False):
    """A worker process said Hello and takes commands."""

    hello: wire.Hello


class WorkerReported(msgspec.Struct, frozen=True, gc=False):
    """A heartbeat."""

    worker: str
    status: wire.Status


class WorkerLost(msgspec.Struct, frozen=True, gc=False):
    """A worker process is no more, and with it all that it held."""

    worker: str


# ---- variants and chains ------------------------------------------------------------------------


class VariantAppeared(msgspec.Struct, frozen=True, gc=False):
    """The catalog has a new name, or other content under a known one. `chain` numbers its chain."""

    variant: Variant
    chain: ChainId
    digest: ChainDigest
    units: int


class VariantRetired(msgspec.Struct, frozen=True, gc=False):
    """A name left the catalog; requests that run on its chain go on."""

    name: str


class ChainLoading(msgspec.Struct, frozen=True, gc=False):
    """A worker was told to load a chain."""

    worker: str
    chain: ChainId


class ChainLoaded(msgspec.Struct, frozen=True, gc=False):
    """A worker can serve a chain."""

    worker: str
    loaded: wire.Loaded


class ChainFailed(msgspec.Struct, frozen=True, gc=False):
    """A worker cannot serve a chain, and says why."""

    worker: str
    chain: ChainId
    reason: str


class ChainEvicting(msgspec.Struct, frozen=True, gc=False):
    """Nothing uses a chain any more: its number is void from now on."""

    chain: ChainId


# ---- requests -----------------------------------------------------------------------------------


class Arrived(msgspec.Struct, frozen=True, gc=False):
    """A request passed every check and waits its turn."""

    request: RequestId
    chain: ChainId
    prompt: list[int]
    sampling: wire.Sampling
    salt: int
    priority: int


class Opened(msgspec.Struct, frozen=True, gc=False):
    """A request was handed to the workers of its chain under a number of its own."""

    request: RequestId
    attempt: RequestId
    hops: tuple[wire.Hop, ...]
    sampling: wire.Sampling


class Began(msgspec.Struct, frozen=True, gc=False):
    """The worker has pages for a request and computes."""

    request: RequestId
    cached_tokens: int


class Advanced(msgspec.Struct, frozen=True, gc=False):
    """A wave's tokens; only these `rows` of it are news."""

    tokens: wire.Tokens
    rows: list[int]


class Returned(msgspec.Struct, frozen=True, gc=False):
    """An opened request lost its worker and waits for another one."""

    request: RequestId


class Closed(msgspec.Struct, frozen=True, gc=False):
    """A request ended, one way or the other."""

    request: RequestId


WorkerEvent = WorkerGreeted | WorkerReported | WorkerLost
ChainEvent = (
    VariantAppeared | VariantRetired | ChainLoading | ChainLoaded | ChainFailed | ChainEvicting
)
RequestEvent = Arrived | Opened | Began | Advanced | Returned | Closed
AnyEvent = WorkerEvent | ChainEvent | RequestEvent
