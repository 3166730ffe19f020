"""Every exception of the engine room. Each message is one sentence that says what to do.

Clients see the `EngineError` family: one class per `api.Reason`, and `EngineUnreachable`.
"""

from engine import api


class TextError(Exception):
    """A variant's text cannot be had: no tokenizer, no chat template, messages of no use to it."""


class EngineError(Exception):
    """A request was not served.

    `reason` is the engine's word for it, `param` the field at fault if one is, `retry_after_s` how
    long to wait before trying again if that may help.
    """

    reason: str = "failed"

    def __init__(
        self, message: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(EngineError):
    """A field is wrong; sending the same again fails again."""

    reason = "invalid"


class ModelNotFound(EngineError):
    """No variant of that name is served."""

    reason = "not_found"


class PromptTooLong(EngineError):
    """The prompt, or prompt + max_tokens, exceeds the model's context or the memory."""

    reason = "too_long"


class Unauthorized(EngineError):
    """The key is missing or unknown."""

    reason = "unauthorized"


class Overloaded(EngineError):
    """The queue is full or the engine drains; try again after `retry_after_s`."""

    reason = "overloaded"


class EngineFailed(EngineError):
    """The engine's own fault."""

    reason = "failed"


class DeadlineExceeded(EngineError):
    """The answer was not ready within `deadline_s`."""

    reason = "timeout"


class EngineUnreachable(EngineError):
    """No engine listens at the endpoint, or it went away."""

    reason = "unreachable"


_BY_REASON: dict[str, type[EngineError]] = {
    family.reason: family
    for family in (
        InvalidRequest,
        ModelNotFound,
        PromptTooLong,
        Unauthorized,
        Overloaded,
        EngineFailed,
        DeadlineExceeded,
    )
}


def rejection(reply: api.Rejected) -> EngineError:
    """The exception for a Rejected reply."""
    return _BY_REASON[reply.reason](reply.message, reply.param, reply.retry_after_s)
