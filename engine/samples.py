"""One sampled answer of each variant, asked as any client asks; `launch --samples` shows them."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from engine.client import AsyncClient
from engine.config import ConfigError
from engine.errors import EngineError

MAX_TOKENS = 48

Samples = dict[str, list[dict[str, Any]]]


def read_samples(path: str) -> Samples:
    """Chat messages by variant, from a JSON file. Raises ConfigError."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Samples)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"the samples {path} cannot be read: {error}") from error


async def show(endpoint: str, samples: Samples) -> None:
    """Ask all at once and print the answers, a line each, to stderr in the file's order."""
    async with AsyncClient(endpoint) as client, asyncio.TaskGroup() as group:
        asked = {
            name: group.create_task(_ask(client, name, messages))
            for name, messages in samples.items()
        }
    for name, task in asked.items():
        question = " ".join(str(samples[name][-1].get("content", "")).split())
        sys.stderr.write(f"{name}\n  asked:   {question}\n  answers: {task.result()}\n")


async def _ask(client: AsyncClient, name: str, messages: list[dict[str, Any]]) -> str:
    try:
        answer = await client.chat(name, messages, max_tokens=MAX_TOKENS, temperature=0)
    except EngineError as error:
        return f"(none: {error})"
    return " ".join(answer.text.split())
