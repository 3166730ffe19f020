"""POST /v1/completions."""

import time

from msgspec import UNSET, UnsetType

from engine import api
from engine.answers import Chunk, Completion
from engine.client import AsyncClient
from engine.errors import InvalidRequest
from engine.http import bodies
from engine.http.asgi import Write, event, together
from engine.http.bodies import CompletionRequest
from engine.http.choices import Choices
from engine.http.logprobs import completion_logprobs, leading_text, prompt_logprobs
from engine.http.replies import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    PromptLogprob,
    UsageReply,
    extras,
)

# OpenAI's default for this endpoint.
_MAX_TOKENS = 16
DONE = b"data: [DONE]\n\n"


class Completions:
    """One request's answers in OpenAI's shape: `whole`, or piece by piece with `stream`."""

    def __init__(self, client: AsyncClient, request: CompletionRequest, api_key: str) -> None:
        bodies.check(request)
        self._client = client
        self._request = request
        self._key = api_key
        self._prompts = _prompts(request.prompt)
        self._each = request.n or 1
        self._choices = Choices(
            client, [self._submit(prompt) for prompt in self._prompts], self._each
        )
        self._id = bodies.new_id("cmpl")
        self._created = int(time.time())
        # The text of each prompt, where it is echoed.
        self._echoes = [""] * len(self._prompts)
        self._offsets = [0] * len(self._prompts) * self._each

    async def whole(self) -> CompletionReply:
        """All answers."""
        answers = await self._choices.collect()
        await self._read_prompts()
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self._reply(choices, answers[0], self._choices.usage())

    async def stream(self, write: Write) -> None:
        """Write the answers as events."""
        await self._read_prompts()
        options = self._request.stream_options or bodies.StreamOptions()
        usage = None if options.include_usage else UNSET
        last: Chunk | None = None

        async def take(index: int, chunk: Chunk) -> None:
            nonlocal last
            last = chunk
            choice = self._choice(index, chunk)
            counts = self._choices.usage_so_far(index) if options.continuous_usage_stats else usage
            if choice.text or choice.finish_reason or choice.logprobs or self._shows_tokens:
                await write(event(self._reply([choice], chunk, counts)))

        await self._choices.follow(take)
        if options.include_usage:
            await write(event(self._reply([], last, self._choices.usage())))
        await write(DONE)

    @property
    def _shows_tokens(self) -> bool:
        return bool(self._request.return_token_ids)

    def _submit(self, prompt: str | list[int]) -> api.Submit:
        request = self._request
        scored = request.prompt_logprobs
        if request.echo:
            # A prompt that is only looked at (max_tokens 0) needs some logprobs to be read at all.
            looked_at = 0 if request.max_tokens == 0 else None
            scored = next((k for k in (scored, request.logprobs, looked_at) if k is not None), None)
        limit = _MAX_TOKENS if request.max_tokens is None else request.max_tokens
        return api.Submit(
            id=0,
            model=request.model,
            prompt=prompt,
            sampling=bodies.sampling(request, max_tokens=limit, prompt_logprobs=scored),
            api_key=self._key,
            priority=request.priority or 0,
            add_special_tokens=request.add_special_tokens is not False,
        )

    async def _read_prompts(self) -> None:
        if self._request.echo:
            self._echoes = await together(self._text(prompt) for prompt in self._prompts)

    async def _text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        question = api.Detokenize(0, self._request.model, prompt, self._key)
        return (await self._client.ask(question, api.Detokenized)).text

    def _choice(self, index: int, answer: Chunk | Completion) -> CompletionChoice:
        """A whole answer, or a piece of one; what belongs to the prompt goes with the first."""
        request = self._request
        is_first = answer.prompt_token_ids is not None
        echo = self._echoes[index // self._each] if is_first else ""
        scored: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
        if request.prompt_logprobs is not None and answer.prompt_logprobs is not None:
            scored = prompt_logprobs(answer.prompt_logprobs)
        return CompletionChoice(
            index=index,
            text=echo + answer.text,
            logprobs=self._logprobs(index, answer, echo),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop,
            prompt_logprobs=scored,
            token_ids=answer.token_ids if self._shows_tokens else UNSET,
            prompt_token_ids=(
                answer.prompt_token_ids
                if self._shows_tokens and answer.prompt_token_ids is not None
                else UNSET
            ),
        )

    def _logprobs(
        self, index: int, answer: Chunk | Completion, echo: str
    ) -> CompletionLogprobs | None:
        if self._request.logprobs is None:
            return None
        entries: list[api.Logprob | None] = list(answer.logprobs or [])
        leading = ""
        if self._request.echo and answer.prompt_logprobs is not None:
            leading = leading_text(answer.prompt_logprobs, echo)
            entries = answer.prompt_logprobs + entries
        if not entries:
            return None
        columns = completion_logprobs(entries, leading, self._offsets[index])
        self._offsets[index] = columns.text_offset[-1] + len(columns.tokens[-1])
        return columns

    def _reply(
        self,
        choices: list[CompletionChoice],
        answer: Chunk | Completion | None,
        usage: UsageReply | UnsetType | None,
    ) -> CompletionReply:
        return CompletionReply(
            id=self._id,
            created=self._created,
            model=self._request.model,
            system_fingerprint=(answer and answer.fingerprint) or None,
            choices=choices,
            usage=usage,
            blockllm=extras(answer),
        )


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts of a request: a text, texts, token ids, or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    tokens = [item for item in prompt if isinstance(item, int)]
    if tokens and len(tokens) == len(prompt):
        return [tokens]
    if tokens or not prompt:
        raise InvalidRequest(
            "prompt must be a text, a list of texts, token ids, or lists of token ids.", "prompt"
        )
    return [item for item in prompt if not isinstance(item, int)]
