"""Logprobs in the three shapes that clients expect: completions, chats, prompts. Pure."""

from collections.abc import Iterable, Sequence

from engine import api
from engine.http.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    TokenLogprob,
    TopLogprob,
)

# JSON has no infinity: what cannot be is given this logprob, as vLLM does.
_LEAST = -9999.0


def leading_text(entries: Sequence[api.Logprob | None], echo: str) -> str:
    """The text of a prompt's first token, which has no logprob: what the others leave of `echo`."""
    rest = sum(len(entry.text) for entry in entries if entry is not None)
    return echo[: max(0, len(echo) - rest)]


def completion_logprobs(
    entries: Sequence[api.Logprob | None], leading: str = "", offset: int = 0
) -> CompletionLogprobs:
    """Columns of a text that begins at `offset`; `leading` is the text of an entry that is None."""
    texts = [leading if entry is None else entry.text for entry in entries]
    offsets: list[int] = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in entries],
        top_logprobs=[None if entry is None else _best(entry) for entry in entries],
        text_offset=offsets,
    )


def chat_logprobs(entries: Iterable[api.Logprob]) -> ChatLogprobs:
    """A list over the tokens of a message."""
    return ChatLogprobs(
        [
            TokenLogprob(
                entry.text,
                _finite(entry.logprob),
                list(entry.text.encode()),
                [
                    TopLogprob(text, _finite(logprob), list(text.encode()))
                    for _, text, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )


def prompt_logprobs(
    entries: Iterable[api.Logprob | None],
) -> list[dict[str, PromptLogprob] | None]:
    """vLLM's shape: at each position the candidates by token id, the prompt's own token first."""
    return [None if entry is None else _candidates(entry) for entry in entries]


def _candidates(entry: api.Logprob) -> dict[str, PromptLogprob]:
    best = {
        str(token): PromptLogprob(_finite(logprob), rank, text)
        for rank, (token, text, logprob) in enumerate(entry.top, 1)
    }
    return {str(entry.token): PromptLogprob(_finite(entry.logprob), entry.rank, entry.text)} | best


def _best(entry: api.Logprob) -> dict[str, float]:
    """The token's own and the best; of several tokens with one text the likeliest counts."""
    best = {entry.text: _finite(entry.logprob)}
    for _, text, logprob in entry.top:
        best[text] = max(_finite(logprob), best.get(text, _LEAST))
    return best


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
