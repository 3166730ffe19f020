"""What a client gets for its requests: pieces of an answer as they come, and whole answers."""

from collections.abc import Iterable

import msgspec

from engine import api
from engine.errors import EngineFailed


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer; `cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer.

    `text` is whole characters only, so it may lag behind `token_ids`; `index` is the first token's
    place in the answer. `prompt_token_ids` and `prompt_logprobs` come with the first chunk,
    `finish_reason`, `stop` (the stop string or token that ended the answer) and `usage` with the
    last.
    """

    text: str
    token_ids: list[int]
    index: int
    fingerprint: str
    approximation: api.Approximation | None = None
    logprobs: list[api.Logprob] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[api.Logprob | None] | None = None
    finish_reason: api.FinishReason | None = None
    stop: str | int | None = None
    usage: Usage | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer. `fingerprint` is the digest of the chain of blocks that gave it;
    `approximation` says how that chain was measured where it is not exact."""

    text: str
    token_ids: list[int]
    finish_reason: api.FinishReason
    usage: Usage
    fingerprint: str
    prompt_token_ids: list[int]
    approximation: api.Approximation | None = None
    logprobs: list[api.Logprob] | None = None
    prompt_logprobs: list[api.Logprob | None] | None = None
    stop: str | int | None = None


class Answer:
    """Turns the replies to one Submit into chunks: feed it every reply until `ended`."""

    def __init__(self) -> None:
        self._accepted: api.Accepted | None = None
        self._first = True
        self.ended = False

    def take(self, reply: api.Reply) -> Chunk | None:
        """The chunk that a reply makes; Accepted makes none, it goes with the first one."""
        match reply:
            case api.Accepted():
                self._accepted = reply
                return None
            case api.Tokens():
                return self._tokens(reply)
            case api.Finished():
                self.ended = True
                return self._finished(reply)
            case _:
                raise EngineFailed(
                    f"The engine answered a Submit with {type(reply).__name__}: "
                    "use a client and an engine of one version."
                )

    def _tokens(self, reply: api.Tokens) -> Chunk:
        return Chunk(
            text=reply.text,
            token_ids=reply.token_ids,
            index=reply.index,
            fingerprint="" if self._accepted is None else self._accepted.fingerprint,
            approximation=self._approximation,
            logprobs=reply.logprobs,
            prompt_token_ids=self._prompt_once(),
            prompt_logprobs=reply.prompt_logprobs,
        )

    def _finished(self, reply: api.Finished) -> Chunk:
        return Chunk(
            text=reply.text,
            token_ids=[],
            index=reply.index,
            fingerprint=reply.fingerprint,
            approximation=self._approximation,
            prompt_token_ids=self._prompt_once(),
            finish_reason=reply.reason,
            stop=reply.stop,
            usage=Usage(reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens),
        )

    @property
    def _approximation(self) -> api.Approximation | None:
        return None if self._accepted is None else self._accepted.approximation

    def _prompt_once(self) -> list[int] | None:
        if not self._first or self._accepted is None:
            return None
        self._first = False
        return self._accepted.prompt_token_ids


def whole(chunks: Iterable[Chunk]) -> Completion:
    """All chunks of an answer, put together."""
    chunks = list(chunks)
    last = chunks[-1]
    if last.finish_reason is None or last.usage is None:
        raise ValueError("the last chunk of an answer is missing")
    scored = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        finish_reason=last.finish_reason,
        usage=last.usage,
        fingerprint=last.fingerprint,
        approximation=last.approximation,
        prompt_token_ids=chunks[0].prompt_token_ids or [],
        logprobs=[entry for entries in scored for entry in entries] if scored else None,
        prompt_logprobs=next((c.prompt_logprobs for c in chunks if c.prompt_logprobs), None),
        stop=last.stop,
    )
