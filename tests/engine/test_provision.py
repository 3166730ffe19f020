"""The catalog changes while the engine serves."""

from pathlib import Path

import pytest

from engine.errors import (
    EngineFailed,
    ModelNotFound,
)
from engine.launch import Engine
from tests.engine import rig
from zoo.catalog import Catalog


def test_variants_come_and_go_without_a_restart(zoo: Path) -> None:
    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            rig.publish(zoo, rig.variant_of(zoo, "late"))
            # No wait: a name that is not known yet is looked up at once, and its request waits.
            whole = await client.complete("late", [65], max_tokens=3)
            assert whole.token_ids == rig.expected(65, 3)
            assert {model.id for model in await client.models()} == {"base", "late"}
            rig.remove(zoo, "late")
            await rig.until(lambda: _models(built, {"base"}))
            with pytest.raises(ModelNotFound):
                await client.complete("late", [65])
            await rig.until(lambda: rig.has_counted(built, "evicts", 1))

    rig.run(test())


async def _models(built: Engine, names: set[str]) -> bool:
    async with rig.client(built) as client:
        return {model.id for model in await client.models()} == names


def test_a_replaced_variant_ends_what_runs_under_its_old_chain(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.script(monkeypatch, interval_s=0.01)

    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            old = rig.variant_of(zoo, "base").chain
            new = rig.variant_of(zoo, "base", content="other")
            running = client.stream("base", [65], max_tokens=150)
            first = await anext(running)
            rig.publish(zoo, new)
            await rig.until(lambda: _serves(built, new.chain))
            fresh = await client.complete("base", [66], max_tokens=2)
            assert (await rig.counters(built)).get("evicts") == 0
            rest = [chunk async for chunk in running]
            assert (first.fingerprint, rest[-1].fingerprint) == (old, old)
            assert fresh.fingerprint == new.chain
            await rig.until(lambda: rig.has_counted(built, "evicts", 1))

    rig.run(test())


async def _serves(built: Engine, chain: str) -> bool:
    async with rig.client(built) as client:
        return (await client.models())[0].fingerprint == chain


def test_an_alias_is_a_model_that_stays_with_its_version(zoo: Path) -> None:
    async def test() -> None:
        old = rig.variant_of(zoo, "base").chain
        new = rig.variant_of(zoo, "base", content="other")
        writer = Catalog(zoo, writable=True)
        writer.set_alias("stable", "base")
        async with rig.engine(zoo) as built, rig.client(built) as client:

            async def serves(**chains: str) -> bool:
                return {m.id: m.fingerprint for m in await client.models()} == chains

            assert await serves(base=old, stable=old)
            rig.publish(zoo, new)
            await rig.until(lambda: serves(base=new.chain, stable=old))
            fresh = await client.complete("base", [66], max_tokens=2)
            stable = await client.complete("stable", [66], max_tokens=2)
            assert (fresh.fingerprint, stable.fingerprint) == (new.chain, old)
            writer.set_alias("stable", "base")
            await rig.until(lambda: serves(base=new.chain, stable=new.chain))
            await rig.until(lambda: rig.has_counted(built, "evicts", 1))
            writer.remove_alias("stable")
            await rig.until(lambda: serves(base=new.chain))

    rig.run(test())


def test_a_variant_that_cannot_be_loaded_is_named_with_the_reason(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = rig.variant_of(zoo, "broken")
    rig.publish(zoo, broken)
    rig.script(monkeypatch, refuses=(broken.chain,))

    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            with pytest.raises(EngineFailed, match="its weights are refused"):
                await client.complete("broken", [65])
            residency = {model.id: model.residency for model in await client.models()}
            assert residency == {"base": "loaded", "broken": "failed"}

    rig.run(test())
