"""What a load sees of an answer as it comes: tokens, and at the end the reason and the counts."""

from collections.abc import Sequence

import msgspec

from engine.answers import Usage


class Piece(msgspec.Struct, frozen=True):
    """Tokens as they came; the last piece of an answer has its reason and the engine's counts."""

    tokens: Sequence[int]
    index: int
    reason: str | None = None
    usage: Usage | None = None
