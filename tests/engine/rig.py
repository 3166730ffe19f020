"""A whole engine in the test's own event loop; its zoo has no weights, its workers no models.

Everything between them is real: sockets, processes, catalog, tokenizer.
"""

import asyncio
import contextlib
import hashlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.client import AsyncClient
from engine.config import Config
from engine.launch import Commands, Engine, build
from tests.engine.fakeworker import Script, token_at
from zoo.catalog import Catalog, Publication
from zoo.manifest import Chain, ChainDigest, HeadSpec, Norm, Unit, UnitDigest, Variant, digest
from zoo.store import Store

PATIENCE_S = 60.0
COMMANDS = Commands(worker=(sys.executable, "-m", "tests.engine.fakeworker"))
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
EOS = 256


def tokenizer_file() -> bytes:
    """A tokenizer whose tokens are the 256 bytes, in GPT-2's alphabet, and one end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer.to_str().encode()


def text_of(tokens: list[int]) -> str:
    """What the tokenizer makes of tokens."""
    return Tokenizer.from_str(tokenizer_file().decode()).decode(tokens)


def variant_of(zoo: Path, name: str, content: str | None = None, **changes: Any) -> Variant:
    """A variant that is described by `content`: equal content, equal chain."""
    store = Store(zoo)
    files = {
        "tokenizer.json": store.put_blob(tokenizer_file()),
        "chat_template.jinja": store.put_blob(CHAT_TEMPLATE.encode()),
    }
    chain = hashlib.sha256((content or name).encode()).hexdigest()
    fields: dict[str, Any] = {
        "name": name,
        "chain": ChainDigest(chain),
        "family": "llama",
        "kind": "base",
        "store": "exact",
        "base": None,
        "source": "test",
        "created": 1.0,
        "hidden": 8,
        "vocabulary": 257,
        "context": 256,
        "dtype": "float32",
        "eos": (EOS,),
        "files": files,
        "tensors": {},
        "report": {},
    }
    return Variant(**(fields | changes))


def publish(zoo: Path, variant: Variant) -> None:
    """Put a variant in the catalog, as another process would."""
    unit = Unit(HeadSpec(8, 257, Norm("rms", 1e-5)), {})
    name = UnitDigest(digest(unit))
    chain = Chain((name,), (None,))
    catalog = Catalog(zoo, writable=True)
    try:
        catalog.publish(Publication(variant, chain, {name: unit}, {}, {}), replace=True)
    finally:
        catalog.close()


def remove(zoo: Path, name: str) -> None:
    """Take a variant out of the catalog."""
    catalog = Catalog(zoo, writable=True)
    try:
        catalog.remove(name)
    finally:
        catalog.close()


def expected(first: int, count: int) -> list[int]:
    """The tokens that the fake worker makes."""
    return [token_at(first, index) for index in range(count)]


@contextlib.asynccontextmanager
async def engine(zoo: Path, *, ready: bool = True, **settings: Any) -> AsyncIterator[Engine]:
    """A running engine; it has been drained at the end."""
    config = Config(**({"zmq": "tcp://127.0.0.1:0", "http": "none", "zoo": str(zoo)} | settings))
    # Addresses of local sockets must be short, and a test's own folder is not.
    with tempfile.TemporaryDirectory(prefix="blk-") as folder:
        built = build(config, Path(folder), COMMANDS)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(built.run(stop))
            try:
                if ready:
                    async with asyncio.timeout(PATIENCE_S):
                        await built.controller.ready.wait()
                yield built
            finally:
                stop.set()
                async with asyncio.timeout(PATIENCE_S):
                    await running


def client(built: Engine, api_key: str | None = None) -> AsyncClient:
    """A client of a running engine."""
    return AsyncClient(built.controller.addresses["zmq"], api_key)


async def until(is_so: Callable[[], bool] | Callable[[], Coroutine[None, None, bool]]) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + PATIENCE_S
    while True:
        answer = is_so()
        if await answer if isinstance(answer, Coroutine) else answer:
            return
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.02)


async def counters(built: Engine) -> dict[str, int]:
    """What the fake workers have counted, as of their last heartbeat."""
    async with client(built) as asker:
        return (await asker.status())["counters"]


async def has_counted(built: Engine, name: str, count: int) -> bool:
    """Whether they have counted so many of something."""
    return (await counters(built)).get(name) == count


def run(test: Coroutine[None, None, None]) -> None:
    """Run a test on uvloop, for a bounded time."""

    async def bounded() -> None:
        async with asyncio.timeout(3 * PATIENCE_S):
            await test

    uvloop.run(bounded())


def script(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Tell the fake workers started from now on what to do."""
    monkeypatch.setenv("FAKEWORKER", msgspec.json.encode(Script(**fields)).decode())
