"""An error of the engine room as the reply that a client gets."""

from typing import cast

from engine import api
from engine.errors import EngineError


def rejected(number: int, error: EngineError) -> api.Rejected:
    """The Rejected for request `number`; `engine.errors.rejection` is its inverse."""
    reason = cast("api.Reason", error.reason)
    return api.Rejected(number, reason, error.message, error.param, error.retry_after_s)
