"""The answers that one HTTP request asks for: a number of choices for each of its prompts."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from engine import api
from engine.answers import Chunk, Completion, Usage, whole
from engine.client import AsyncClient
from engine.errors import InvalidRequest, Overloaded
from engine.http.asgi import together
from engine.http.bodies import variations
from engine.http.replies import UsageReply, usage

_MOST = 1024
_RETRY_AFTER_S = 5.0


class Choices:
    """Runs `each` choices of every Submit at once and counts their tokens.

    The choices of the first Submit have the indices 0 to each - 1, and so on.
    """

    def __init__(self, client: AsyncClient, submits: Sequence[api.Submit], each: int) -> None:
        if len(submits) * each > _MOST:
            raise InvalidRequest(f"One request gets at most {_MOST} answers: send several.", "n")
        self._client = client
        self._each = each
        self._submits = [one for submit in submits for one in variations(submit, each)]
        self._prompt_tokens = [0] * len(self._submits)
        self._completion_tokens = [0] * len(self._submits)
        self._usages: dict[int, Usage] = {}

    async def collect(self) -> list[Completion]:
        """All answers, whole."""
        chunks: list[list[Chunk]] = [[] for _ in self._submits]

        async def take(index: int, chunk: Chunk) -> None:
            chunks[index].append(chunk)

        await self.follow(take)
        return [whole(pieces) for pieces in chunks]

    async def follow(self, take: Callable[[int, Chunk], Awaitable[None]]) -> None:
        """Give every chunk to `take(index of its choice, chunk)` as it comes."""

        async def follow_one(index: int, submit: api.Submit) -> None:
            async with aclosing(self._client.submit(submit)) as chunks:
                async for chunk in chunks:
                    self._count(index, chunk)
                    await take(index, chunk)

        await together(follow_one(*numbered) for numbered in enumerate(self._submits))

    def usage(self) -> UsageReply:
        """Tokens of all answers; a prompt counts once, however many choices it got."""
        usages = [self._usages[index] for index in range(len(self._submits))]
        firsts = usages[:: self._each]
        return usage(
            sum(one.prompt_tokens for one in firsts),
            sum(one.completion_tokens for one in usages),
            sum(one.cached_tokens for one in firsts),
        )

    def usage_so_far(self, index: int) -> UsageReply:
        """Tokens of one choice up to now."""
        return usage(self._prompt_tokens[index], self._completion_tokens[index], 0)

    def _count(self, index: int, chunk: Chunk) -> None:
        if chunk.prompt_token_ids is not None:
            self._prompt_tokens[index] = len(chunk.prompt_token_ids)
        self._completion_tokens[index] += len(chunk.token_ids)
        if chunk.usage is not None:
            self._usages[index] = chunk.usage
        if chunk.finish_reason == "cancelled":
            # Nobody here cancels an answer and stays to hear of it.
            raise Overloaded(
                "The engine ended the answer early, it may be leaving: try again.",
                retry_after_s=_RETRY_AFTER_S,
            )
