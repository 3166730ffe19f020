"""Every message that crosses a worker's boundary: engine -> worker, worker -> engine, worker ->
worker.

One union per direction, encoded as MessagePack arrays (msgspec). Frames are `[identity] body`; a
body larger than MAX_MESSAGE_BYTES is refused before it is decoded. Cold messages (Load, Open) carry
digests; hot ones (Tokens, Activation, Next) carry small integers only. Numbers that name a request
are the engine's own and never reused within an engine's life."""

from typing import Literal, NewType

import msgspec

WIRE_VERSION = 1
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

# What the elements of KV pages are. bfloat16 rounds keys and values: half the memory, approximate.
KvDtype = Literal["float32", "bfloat16"]

# What linear layers are kept in. Codes of 8 and 4 bits take less memory and are approximate.
Precision = Literal["exact", "int8", "int4"]

RequestId = NewType("RequestId", int)
ChainId = NewType("ChainId", int)


class Sampling(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How the next token of a request is chosen. Temperature 0 is greedy.

    `seed` fixes every draw: draw number n depends on (seed, n) alone, not on what shares the batch.
    `logprobs` < 0: none; k >= 0: the chosen token's and the k best. `prompt_logprobs` likewise for
    the prompt's positions. `min_tokens` holds back the tokens of `stop_token_ids` that long.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int = -1
    prompt_logprobs: int = -1
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()


class Hop(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Units [first, last) of a chain on the worker of that name."""

    worker: str
    first: int
    last: int


class WorkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker process is started with (JSON on its command line).

    `kv_bytes` and `weight_bytes` are ceilings; 0 lets the worker choose from what the device has:
    on a GPU `memory_utilization` is the share of its memory for both together.
    `max_rows` is the token budget of one wave (decode rows first, the rest prefill); 0: what suits
    the device. `dtype` "auto" is exact, `kv_dtype` "auto" is what layers multiply. `load_format`
    "dummy" makes weights up. `parked_bytes` of host memory hold weights that left a GPU. So many
    `speculative_tokens` are guessed ahead, at most, where the kernels verify them at little cost.
    """

    name: str
    endpoint: str
    zoo: str
    device: str = "cpu"
    ops: str = "auto"
    attention: Literal["auto", "flashinfer", "triton"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    threads: int = 0
    page: int = 16
    kv_bytes: int = 0
    dtype: KvDtype | Literal["auto"] = "auto"
    kv_dtype: KvDtype | Literal["auto"] = "auto"
    weights: Precision = "exact"
    weight_bytes: int = 0
    parked_bytes: int = 0
    memory_utilization: float = 0.9
    max_sequences: int = 256
    max_rows: int = 0
    prefix_cache: bool = True
    speculative_tokens: int = 0
    heartbeat_s: float = 1.0
    log_level: str = "info"


# ---- engine -> worker ---------------------------------------------------------------------------


class Load(msgspec.Struct, frozen=True, array_like=True, tag="load", forbid_unknown_fields=True):
    """Make units [first, last) of a chain resident; `chain` is the number used from now on and
    `context` the longest sequence in tokens that will be asked of it."""

    chain: ChainId
    digest: str
    first: int
    last: int
    context: int = 8192


class Evict(msgspec.Struct, frozen=True, array_like=True, tag="evict", forbid_unknown_fields=True):
    """Forget a chain once its running requests have ended; what no other chain uses is freed."""

    chain: ChainId


class Open(msgspec.Struct, frozen=True, array_like=True, tag="open", forbid_unknown_fields=True):
    """Announce a request to each worker of its chain; the head then gets its Prompt.

    `salt` separates tenants in the prefix cache (0: the shared one).
    """

    request: RequestId
    chain: ChainId
    hops: tuple[Hop, ...]
    sampling: Sampling
    prompt_tokens: int
    salt: int = 0
    priority: int = 0


class Prompt(
    msgspec.Struct, frozen=True, array_like=True, tag="prompt", forbid_unknown_fields=True
):
    """Token ids of an opened request: int32 little endian. `emitted` of them, at the end, are
    tokens that an earlier worker had already delivered (a replay)."""

    request: RequestId
    tokens: bytes
    emitted: int = 0


class Close(msgspec.Struct, frozen=True, array_like=True, tag="close", forbid_unknown_fields=True):
    """End a request now; its pages return at once. Unknown requests are ignored."""

    request: RequestId


class Drain(msgspec.Struct, frozen=True, array_like=True, tag="drain", forbid_unknown_fields=True):
    """Finish what runs, then exit 0."""


Command = Load | Evict | Open | Prompt | Close | Drain

# ---- worker -> engine ---------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello", forbid_unknown_fields=True):
    """First message of a worker. Capacities: `pages` per layer of 16 tokens by default, bytes."""

    version: int
    name: str
    pid: int
    device: str
    ops: str
    kv_bytes: int
    weight_bytes: int
    page: int
    max_sequences: int
    dtype: KvDtype | Literal["auto"] = "float32"
    kv_dtype: KvDtype | Literal["auto"] = "float32"
    weights: Precision = "exact"


class Loaded(
    msgspec.Struct, frozen=True, array_like=True, tag="loaded", forbid_unknown_fields=True
):
    """A chain can be served: bytes moved for it now, bytes it uses in all, seconds it took,
    the longest request in tokens that the pages can hold for it, and how far its linear layers'
    weights are off: the norm of the difference over theirs."""

    chain: ChainId
    moved_bytes: int
    chain_bytes: int
    seconds: float
    max_tokens: int
    weight_error: float = 0.0


class Evicted(
    msgspec.Struct, frozen=True, array_like=True, tag="evicted", forbid_unknown_fields=True
):
    """A chain is forgotten."""

    chain: ChainId
    freed_bytes: int


class Logprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Natural-log probabilities at one position: the token's own (and its rank, from 1), the best
    ids and theirs."""

    token: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Tokens(
    msgspec.Struct, frozen=True, array_like=True, tag="tokens", forbid_unknown_fields=True
):
    """All tokens of one wave: columns of equal length.

    `indices` number a request's output tokens from 0. `finished` holds 0 (goes on), 1 (stop token;
    the token itself is included in the row), 2 (length). `logprobs` maps row -> Logprobs.
    """

    requests: tuple[RequestId, ...]
    tokens: tuple[int, ...]
    indices: tuple[int, ...]
    finished: tuple[int, ...]
    logprobs: dict[int, Logprobs] = {}


class Started(
    msgspec.Struct, frozen=True, array_like=True, tag="started", forbid_unknown_fields=True
):
    """A request left the worker's waiting list: prompt tokens found in the cache, seconds
    waited."""

    request: RequestId
    cached_tokens: int
    waited_s: float


class Scored(
    msgspec.Struct, frozen=True, array_like=True, tag="scored", forbid_unknown_fields=True
):
    """Logprobs of a prompt's tokens at positions first, first+1, .. (position 0 has none)."""

    request: RequestId
    first: int
    logprobs: tuple[Logprobs, ...]


class Failed(
    msgspec.Struct, frozen=True, array_like=True, tag="failed", forbid_unknown_fields=True
):
    """A chain (request < 0) or a request could not be served; `reason` is one clear sentence."""

    chain: ChainId
    request: RequestId
    reason: str


class BlockReport(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One resident block: digest of its units, its kind of units, bytes, chains that use it, runs
    and rows since start (rows / runs is its mean batch), runs that merged rows of several
    chains."""

    digest: str
    first: int
    units: int
    bytes: int
    chains: int
    runs: int
    rows: int
    sequences: int
    merged_runs: int


class Status(
    msgspec.Struct, frozen=True, array_like=True, tag="status", forbid_unknown_fields=True
):
    """Heartbeat with progress: `steps` grows with every wave. Pages count (page x layer) pieces.

    `counters` are monotone sums by name (prefix_hit_tokens, prefix_query_tokens, shared_pages,
    evicted_pages, prompt_tokens, output_tokens, draft_tokens that were guessed, accepted_tokens of
    these, dropped_messages ...);
    `seconds` are sums of time by name (ops, wait, prepare, sample, send, total); on a GPU `ops` is
    the time to queue the work, and `sample` has the wait for it. `device` is the
    device's own last reading by name (utilization 0 to 1, memory_used_bytes, memory_total_bytes,
    power_w, temperature_c, pcie_sent_bytes_per_s, nvlinks ...), as far as it tells; the host's
    where the device is a CPU.
    """

    steps: int
    running: int
    waiting: int
    free_pages: int
    cached_pages: int
    total_pages: int
    weight_bytes: int
    resident_bytes: int
    rss_bytes: int
    chains: int
    counters: dict[str, int]
    seconds: dict[str, float]
    blocks: tuple[BlockReport, ...] = ()
    device: dict[str, float] = {}


class Drained(
    msgspec.Struct, frozen=True, array_like=True, tag="drained", forbid_unknown_fields=True
):
    """Last word of a worker that leaves in order."""


Report = Hello | Loaded | Evicted | Started | Tokens | Scored | Failed | Status | Drained

# ---- worker -> worker ---------------------------------------------------------------------------


class Activation(msgspec.Struct, frozen=True, array_like=True, tag="a", forbid_unknown_fields=True):
    """Rows of one wave that leave a hop: `rows[i]` positions of `requests[i]`, in that order, lie
    in `slot` of the link as float rows. The slot returns with a Credit."""

    step: int
    slot: int
    requests: tuple[RequestId, ...]
    rows: tuple[int, ...]


class Next(msgspec.Struct, frozen=True, array_like=True, tag="n", forbid_unknown_fields=True):
    """Tail -> head: the tokens of a wave, so that the next step begins without the engine."""

    requests: tuple[RequestId, ...]
    tokens: tuple[int, ...]


class Credit(msgspec.Struct, frozen=True, array_like=True, tag="c", forbid_unknown_fields=True):
    """A slot of the link is free again."""

    slot: int


Peer = Activation | Next | Credit

CONTINUES, STOPPED, LENGTH = 0, 1, 2

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
decode_peer = msgspec.msgpack.Decoder(Peer).decode
