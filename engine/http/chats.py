"""POST /v1/chat/completions."""

import time

from msgspec import UNSET, UnsetType

from engine import api
from engine.answers import Chunk, Completion
from engine.client import AsyncClient
from engine.http import bodies
from engine.http.asgi import Write, event
from engine.http.bodies import ChatRequest
from engine.http.choices import Choices
from engine.http.completions import DONE
from engine.http.logprobs import chat_logprobs, prompt_logprobs
from engine.http.replies import (
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    Delta,
    DeltaChoice,
    UsageReply,
    extras,
)


class Chats:
    """One request's answers in OpenAI's shape: `whole`, or piece by piece with `stream`."""

    def __init__(self, client: AsyncClient, request: ChatRequest, api_key: str) -> None:
        bodies.check(request)
        self._request = request
        self._choices = Choices(client, [_submit(request, api_key)], request.n or 1)
        self._id = bodies.new_id("chatcmpl")
        self._created = int(time.time())

    async def whole(self) -> ChatReply:
        """All answers."""
        answers = await self._choices.collect()
        first, shows = answers[0], bool(self._request.return_token_ids)
        return ChatReply(
            id=self._id,
            created=self._created,
            model=self._request.model,
            system_fingerprint=first.fingerprint,
            choices=[self._choice(index, answer) for index, answer in enumerate(answers)],
            usage=self._choices.usage(),
            prompt_logprobs=(
                UNSET if first.prompt_logprobs is None else prompt_logprobs(first.prompt_logprobs)
            ),
            prompt_token_ids=first.prompt_token_ids if shows else UNSET,
            blockllm=extras(first),
        )

    async def stream(self, write: Write) -> None:
        """Write the answers as events."""
        options = self._request.stream_options or bodies.StreamOptions()
        usage = None if options.include_usage else UNSET
        shows = bool(self._request.return_token_ids)
        last: Chunk | None = None

        async def take(index: int, chunk: Chunk) -> None:
            nonlocal last
            last = chunk
            counts = self._choices.usage_so_far(index) if options.continuous_usage_stats else usage
            events = b""
            if chunk.prompt_token_ids is not None:
                opening = DeltaChoice(index=index, delta=Delta("", "assistant"))
                prompt = chunk.prompt_token_ids if shows else UNSET
                events = event(self._chunk([opening], chunk, counts, prompt))
            choice = self._piece(index, chunk)
            if chunk.text or choice.finish_reason or choice.logprobs or shows:
                events += event(self._chunk([choice], chunk, counts))
            if events:
                await write(events)

        await self._choices.follow(take)
        if options.include_usage:
            await write(event(self._chunk([], last, self._choices.usage())))
        await write(DONE)

    def _choice(self, index: int, answer: Completion) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(answer.text),
            logprobs=self._logprobs(answer),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop,
            token_ids=answer.token_ids if self._request.return_token_ids else UNSET,
        )

    def _piece(self, index: int, chunk: Chunk) -> DeltaChoice:
        return DeltaChoice(
            index=index,
            delta=Delta(chunk.text or None),
            logprobs=self._logprobs(chunk) if chunk.logprobs else None,
            finish_reason=chunk.finish_reason,
            stop_reason=UNSET if chunk.finish_reason is None else chunk.stop,
            token_ids=chunk.token_ids if self._request.return_token_ids else UNSET,
        )

    def _logprobs(self, answer: Chunk | Completion) -> ChatLogprobs | None:
        return chat_logprobs(answer.logprobs or []) if self._request.logprobs else None

    def _chunk(
        self,
        choices: list[DeltaChoice],
        piece: Chunk | None,
        usage: UsageReply | UnsetType | None,
        prompt: list[int] | UnsetType = UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._request.model,
            system_fingerprint=(piece and piece.fingerprint) or None,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt,
            blockllm=extras(piece),
        )


def _submit(request: ChatRequest, api_key: str) -> api.Submit:
    limit = request.max_completion_tokens
    template = dict(request.chat_template_kwargs or {})
    if request.add_generation_prompt is not None:
        template["add_generation_prompt"] = request.add_generation_prompt
    return api.Submit(
        id=0,
        model=request.model,
        messages=request.messages,
        sampling=bodies.sampling(
            request,
            max_tokens=request.max_tokens if limit is None else limit,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        ),
        api_key=api_key,
        priority=request.priority or 0,
        template=template,
    )
