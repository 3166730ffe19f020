"""The OpenAI-compatible HTTP bodies: what goes out. Shapes are OpenAI's, extra fields vLLM's."""

import msgspec
from msgspec import UNSET, UnsetType

from engine import api
from engine.answers import Chunk, Completion

Id = str | int


class CachedTokens(msgspec.Struct, frozen=True):
    """Prompt tokens that were found in the prefix cache."""

    cached_tokens: int


class UsageReply(msgspec.Struct, frozen=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


def usage(prompt: int, completion: int, cached: int) -> UsageReply:
    """Token counts with their sum."""
    return UsageReply(prompt, completion, prompt + completion, CachedTokens(cached))


# ---- logprobs -----------------------------------------------------------------------------------


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Columns over the tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(msgspec.Struct, frozen=True):
    """An alternative at one position of a chat answer."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """One position of a chat answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """All positions of a chat answer."""

    content: list[TokenLogprob]


class PromptLogprob(msgspec.Struct, frozen=True):
    """A candidate at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


# ---- /v1/completions ----------------------------------------------------------------------------


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, or one piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: api.FinishReason | None = None
    stop_reason: Id | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ReplyExtras(msgspec.Struct, frozen=True):
    """What only this engine says of an answer: that the chain which gave it is not exact."""

    approximation: api.Approximation


def extras(answer: Chunk | Completion | None) -> ReplyExtras | UnsetType:
    """Of an answer or a piece of one; nothing where the chain is exact."""
    if answer is None or answer.approximation is None:
        return UNSET
    return ReplyExtras(answer.approximation)


class CompletionReply(msgspec.Struct, frozen=True, kw_only=True):
    """Body of an answer to POST /v1/completions; streams send many."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: UsageReply | UnsetType | None = UNSET
    blockllm: ReplyExtras | UnsetType = UNSET


# ---- /v1/chat/completions -----------------------------------------------------------------------


class ChatMessage(msgspec.Struct, frozen=True):
    """The assistant's words."""

    content: str
    role: str = "assistant"
    refusal: str | None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: api.FinishReason | None
    stop_reason: Id | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    """Body of an answer to POST /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: UsageReply
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    blockllm: ReplyExtras | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a piece adds to the message."""

    content: str | None = None
    role: str | None = None


class DeltaChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: api.FinishReason | None = None
    stop_reason: Id | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a streamed chat answer."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[DeltaChoice]
    usage: UsageReply | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    blockllm: ReplyExtras | UnsetType = UNSET


# ---- the rest -----------------------------------------------------------------------------------


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct, frozen=True):
    """Body of every answer that is not 2xx."""

    error: ErrorDetail


class ModelExtras(msgspec.Struct, frozen=True):
    """What only this engine says of a model: `fingerprint` is the digest of its chain,
    `approximation` how that was measured where it is not exact."""

    fingerprint: str
    residency: str
    kind: str
    family: str
    has_chat_template: bool
    approximation: api.Approximation | None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One served model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "blockllm"
    root: str
    parent: str | None
    max_model_len: int
    permission: list[str] = []
    blockllm: ModelExtras


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Body of GET /v1/models."""

    object: str = "list"
    data: list[ModelCard]


class TokenizeReply(msgspec.Struct, frozen=True):
    """Body of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeReply(msgspec.Struct, frozen=True):
    """Body of POST /detokenize."""

    prompt: str


def card(model: api.Model) -> ModelCard:
    """A model as OpenAI's clients know it."""
    return ModelCard(
        id=model.id,
        created=model.created,
        root=model.root,
        parent=model.parent,
        max_model_len=model.context,
        blockllm=ModelExtras(
            model.fingerprint,
            model.residency,
            model.kind,
            model.family,
            model.has_chat_template,
            model.approximation,
        ),
    )
