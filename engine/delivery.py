"""One answer on its way: tokens of a worker become messages to a client.

Knows text, stop strings and probabilities; knows no worker, no socket and no clock.
"""

from dataclasses import dataclass

from engine import api
from engine.text import Stream, VariantText
from workers import wire
from workers.wire import ChainId
from zoo.manifest import Variant


@dataclass(frozen=True, slots=True)
class Ask:
    """A Submit that passed every check, in the terms of this engine."""

    model: str
    variant: Variant
    chain: ChainId
    tenant: str
    salt: int
    priority: int
    context: int
    prompt: list[int]
    sampling: api.Sampling
    wire_sampling: wire.Sampling
    text: VariantText
    approximation: api.Approximation | None


class Delivery:
    """The way of one answer to its client."""

    def __init__(self, client: bytes, number: int, ask: Ask, arrived_s: float) -> None:
        self.client = client
        self.id = number
        self.ask = ask
        self.arrived_s = arrived_s
        self.opened_s: float | None = None
        self.first_s: float | None = None
        self.last_s = arrived_s
        self.completion_tokens = 0
        self.has_begun = False
        self._scores: dict[int, wire.Logprobs] = {}
        sampling = ask.sampling
        self._wants_tokens = sampling.max_tokens != 0
        self._shows_stop = sampling.include_stop_str_in_output
        self._stream = Stream(
            ask.text,
            ask.prompt,
            sampling.stop,
            sampling.include_stop_str_in_output,
            sampling.skip_special_tokens,
            min_tokens=sampling.min_tokens,
        )

    def accepted(self) -> api.Accepted:
        """The word that the request runs or waits."""
        ask = self.ask
        return api.Accepted(self.id, ask.model, ask.variant.chain, ask.prompt, ask.approximation)

    def score(self, first: int, logprobs: tuple[wire.Logprobs, ...]) -> None:
        """Take in probabilities of the prompt's tokens from position `first` on."""
        self._scores.update(enumerate(logprobs, start=first))

    def push(
        self, token: int, ended: int, logprobs: wire.Logprobs | None
    ) -> tuple[api.Tokens, api.FinishReason | None, str | int | None]:
        """The piece that a token makes and, if it ends the answer, why and by which stop."""
        if not self._wants_tokens:
            return self._piece([], "", None), "length", None
        text, stop = "", None
        if ended != wire.STOPPED or self._shows_stop:
            piece = self._stream.push((token,))
            text, stop = piece.text, piece.stopped
        message = self._piece([token], text, logprobs)
        if stop is not None:
            return message, "stop", stop
        if ended == wire.STOPPED:
            return message, "stop", None if token in self.ask.variant.eos else token
        return message, "length" if ended == wire.LENGTH else None, None

    def finished(
        self, reason: api.FinishReason, stop: str | int | None, cached_tokens: int
    ) -> api.Finished:
        """The last message. A stop string leaves nothing held back that may be shown."""
        return api.Finished(
            id=self.id,
            index=self.completion_tokens,
            reason=reason,
            text="" if isinstance(stop, str) else self._stream.flush(),
            prompt_tokens=len(self.ask.prompt),
            completion_tokens=self.completion_tokens,
            cached_tokens=cached_tokens,
            fingerprint=self.ask.variant.chain,
            stop=stop,
        )

    def _piece(self, tokens: list[int], text: str, logprobs: wire.Logprobs | None) -> api.Tokens:
        index = self.completion_tokens
        self.completion_tokens += len(tokens)
        is_first, self.has_begun = not self.has_begun, True
        shown = None if logprobs is None else [self._shown(logprobs)]
        if not is_first or self.ask.sampling.prompt_logprobs is None:
            return api.Tokens(self.id, index, tokens, text, shown)
        return api.Tokens(self.id, index, tokens, text, shown, self._prompt_logprobs())

    def _prompt_logprobs(self) -> list[api.Logprob | None]:
        scores = [self._scores.get(position) for position in range(len(self.ask.prompt))]
        self._scores.clear()
        return [None if score is None else self._shown(score) for score in scores]

    def _shown(self, score: wire.Logprobs) -> api.Logprob:
        best = zip(score.top_ids, score.top_logprobs, strict=True)
        top = tuple((token, self._text(token), logprob) for token, logprob in best)
        return api.Logprob(score.token, self._text(score.token), score.logprob, score.rank, top)

    def _text(self, token: int) -> str:
        text = self.ask.text
        return text.token_text(token) if text.has_tokenizer else ""
