"""Token ids to text, a few at a time: two ways, one for each kind of vocabulary.

Neither knows a tokenizer library: `engine.text` gives them what they need as functions. The cost of
a token does not grow with the answer's length.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# Prompt tokens that give the first output token its context, as the rules for leading spaces want.
_CONTEXT = 6
# A character spans at most four tokens; a longer run that does not decode will not mend itself.
_PATIENCE = 16


class Detokenizer(Protocol):
    """Turns an answer's tokens into text as they come."""

    def push(self, token: int) -> str:
        """The text that this token completes: whole characters only."""
        ...

    def flush(self) -> str:
        """What is left of a character that was never completed."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies, where each token stands for bytes: exact for every split."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that the token's bytes complete."""
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        """U+FFFD if a character was left incomplete."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other vocabulary: decodes a short window of tokens again and shows what is new.

    The window reaches back to the last place where text was shown, because decoders treat the first
    token of a text differently (leading spaces) and join byte tokens into characters.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._shown = list(prompt[-_CONTEXT:])
        self._shown_text = decode(self._shown)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text of the pending tokens, unless it ends within a character."""
        self._pending.append(token)
        text = self._new_text()
        incomplete = text.endswith(_REPLACEMENT) and len(self._pending) < _PATIENCE
        if incomplete or not text:
            return ""
        self._show()
        return text

    def flush(self) -> str:
        """The text of what is pending, complete or not."""
        text = self._new_text() if self._pending else ""
        self._show()
        return text

    def _new_text(self) -> str:
        return self._decode(self._shown + self._pending)[len(self._shown_text) :]

    def _show(self) -> None:
        """Make the pending tokens the context of the next ones."""
        self._shown, self._pending = self._pending, []
        self._shown_text = self._decode(self._shown)
