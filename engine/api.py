"""Messages between clients and the engine over ZeroMQ, and their codec. Needs msgspec alone.

A client connects a DEALER to the engine's ROUTER. Each message is two frames: PROTOCOL, then a body
of MessagePack: an array whose first item names the message ("submit", "cancel", ...), followed by
its fields in the order below; trailing fields that have their default may be left out. Every
request carries an `id` chosen by the client, unique on its connection; every reply repeats it.

A Submit is answered by Accepted, then Tokens (index 0, 1, ...), then one Finished; or by Rejected,
which may also come in place of Finished. Every other request is answered by one reply.
"""

from typing import Any, Literal

import msgspec

PROTOCOL = b"BLK1"
MAX_REQUEST_BYTES = 8 * 1024 * 1024

Reason = Literal[
    "invalid",  # the request's fields are wrong: mend it
    "not_found",  # no such model
    "too_long",  # prompt (or prompt + max_tokens) over the model's context or the memory
    "unauthorized",  # no valid key
    "overloaded",  # queue full or draining: try again later
    "failed",  # the engine's own fault
    "timeout",  # the deadline passed
]
FinishReason = Literal["stop", "length", "cancelled"]


class Sampling(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How an answer is generated; names, ranges and defaults are OpenAI's and vLLM's.

    `max_tokens` None: up to the model's context. `logprobs` None: none; k: each token's and the k
    best. `seed` None: the engine draws one. `deadline_s`: give up after so long; None: never.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    skip_special_tokens: bool = True
    deadline_s: float | None = None


class Logprob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One token's natural-log probability, its text, its rank (from 1) and the best alternatives
    (token id, text, logprob)."""

    token: int
    text: str
    logprob: float
    rank: int
    top: tuple[tuple[int, str, float], ...] = ()


# ---- client -> engine ---------------------------------------------------------------------------


class Submit(
    msgspec.Struct, frozen=True, array_like=True, tag="submit", forbid_unknown_fields=True
):
    """Ask a variant for an answer. Give `prompt` (text or token ids) or `messages` (chat), not
    both.

    `template` are extra variables for the chat template. `priority`: a lower number goes first.
    """

    id: int
    model: str
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    sampling: Sampling = Sampling()
    api_key: str = ""
    priority: int = 0
    template: dict[str, Any] = {}
    add_special_tokens: bool = True


class Cancel(
    msgspec.Struct, frozen=True, array_like=True, tag="cancel", forbid_unknown_fields=True
):
    """End an answer now: Finished with reason "cancelled" follows. Unknown ids are ignored."""

    id: int


class ListModels(
    msgspec.Struct, frozen=True, array_like=True, tag="models", forbid_unknown_fields=True
):
    """Which variants are served."""

    id: int
    api_key: str = ""


class GetStatus(
    msgspec.Struct, frozen=True, array_like=True, tag="status", forbid_unknown_fields=True
):
    """State of the engine, its workers and blocks."""

    id: int
    api_key: str = ""


class GetMetrics(
    msgspec.Struct, frozen=True, array_like=True, tag="metrics", forbid_unknown_fields=True
):
    """Metrics as Prometheus text."""

    id: int


class Tokenize(
    msgspec.Struct, frozen=True, array_like=True, tag="tokenize", forbid_unknown_fields=True
):
    """Token ids of a text or of chat messages, as Submit would make them."""

    id: int
    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    api_key: str = ""


class Detokenize(
    msgspec.Struct, frozen=True, array_like=True, tag="detokenize", forbid_unknown_fields=True
):
    """Text of token ids."""

    id: int
    model: str
    tokens: list[int]
    api_key: str = ""


Request = Submit | Cancel | ListModels | GetStatus | GetMetrics | Tokenize | Detokenize

# ---- engine -> client ---------------------------------------------------------------------------


class Approximation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Why answers are not exact: because of their chain, or because of how the server keeps it.

    A chain whose `store` is "delta" or "equivalent" was measured against the exact one when it was
    added: `agreement` is the share of positions with the same best token (from `agreement_low`,
    95 %), `kl` the mean divergence in nats, over `tokens` held-out tokens. `dtype`
    is what the server rounds to before it multiplies ("bfloat16"), `weights` what it keeps linear
    layers in ("int8" or "int4"), `kv_cache` what it rounds keys and values to ("bfloat16")."""

    store: str
    agreement: float | None = None
    agreement_low: float | None = None
    kl: float | None = None
    tokens: int = 0
    dtype: str | None = None
    weights: str | None = None
    kv_cache: str | None = None


class Accepted(
    msgspec.Struct, frozen=True, array_like=True, tag="accepted", forbid_unknown_fields=True
):
    """The request runs or waits its turn. `fingerprint` is the digest of the chain that answers,
    `approximation` is there where that chain is not exact."""

    id: int
    model: str
    fingerprint: str
    prompt_token_ids: list[int]
    approximation: Approximation | None = None


class Tokens(
    msgspec.Struct, frozen=True, array_like=True, tag="tokens", forbid_unknown_fields=True
):
    """A piece of the answer: `text` is whole characters only and may lag behind `token_ids`.
    `prompt_logprobs` comes once, in the first message, where it was asked for (position 0:
    None)."""

    id: int
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob | None] | None = None


class Finished(
    msgspec.Struct, frozen=True, array_like=True, tag="finished", forbid_unknown_fields=True
):
    """End of an answer. `text` is what was still held back. `stop` names the stop string or token
    that ended it, if one did."""

    id: int
    index: int
    reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    fingerprint: str
    stop: str | int | None = None


class Rejected(
    msgspec.Struct, frozen=True, array_like=True, tag="rejected", forbid_unknown_fields=True
):
    """The request is not served; `message` is one sentence that says what to do."""

    id: int
    reason: Reason
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A served variant. `residency`: "loaded", "loading", "stored" or "failed"."""

    id: str
    created: int
    parent: str | None
    root: str
    kind: str
    family: str
    context: int
    fingerprint: str
    residency: str
    has_chat_template: bool
    approximation: Approximation | None = None


class Models(
    msgspec.Struct, frozen=True, array_like=True, tag="models", forbid_unknown_fields=True
):
    """Answer to ListModels."""

    id: int
    models: list[Model]


class StatusReply(
    msgspec.Struct, frozen=True, array_like=True, tag="status", forbid_unknown_fields=True
):
    """Answer to GetStatus: a plain mapping, fit for JSON."""

    id: int
    status: dict[str, Any]


class MetricsReply(
    msgspec.Struct, frozen=True, array_like=True, tag="metrics", forbid_unknown_fields=True
):
    """Answer to GetMetrics."""

    id: int
    text: str


class Tokenized(
    msgspec.Struct, frozen=True, array_like=True, tag="tokenized", forbid_unknown_fields=True
):
    """Answer to Tokenize."""

    id: int
    tokens: list[int]
    context: int


class Detokenized(
    msgspec.Struct, frozen=True, array_like=True, tag="detokenized", forbid_unknown_fields=True
):
    """Answer to Detokenize."""

    id: int
    text: str


Reply = (
    Accepted
    | Tokens
    | Finished
    | Rejected
    | Models
    | StatusReply
    | MetricsReply
    | Tokenized
    | Detokenized
)

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
