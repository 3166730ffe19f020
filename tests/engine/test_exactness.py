"""Who gets approximate answers is told so, whatever makes them approximate."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine.api import Approximation
from engine.config import Config
from engine.exactness import approximation_of, warning
from engine.status import render
from tests.engine import rig
from zoo.measured import Interval, Measured

MEASURED = Measured(
    corpus="c",
    name="built-in",
    sequences=4,
    tokens=100,
    created=1.0,
    kl=Interval(0.02, 0.01, 0.03),
    agreement=Interval(0.97, 0.95, 0.99),
    perplexity=Interval(3.0, 2.0, 4.0),
    exact_perplexity=Interval(3.0, 2.0, 4.0),
)
DELTA = Approximation("delta", 0.97, 0.95, 0.02, 100)


@pytest.mark.parametrize(
    ("settings", "changes", "told"),
    [
        ({}, {}, None),
        ({"kv_cache_dtype": "float32"}, {}, None),
        ({}, {"store": "delta", "measured": MEASURED}, DELTA),
        ({"kv_cache_dtype": "bfloat16"}, {}, Approximation("exact", kv_cache="bfloat16")),
        (
            {"kv_cache_dtype": "bfloat16"},
            {"store": "delta", "measured": MEASURED},
            Approximation("delta", 0.97, 0.95, 0.02, 100, kv_cache="bfloat16"),
        ),
    ],
)
def test_what_is_told_of_a_variant(
    zoo: Path, settings: dict[str, Any], changes: dict[str, Any], told: Approximation | None
) -> None:
    config = Config(**settings)
    assert approximation_of(rig.variant_of(zoo, "v", **changes), config) == told
    assert bool(warning(config)) == (told is not None and told.kv_cache is not None)


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "bfloat16"}])
def test_answers_models_and_status_say_how_the_server_rounds(
    zoo: Path, settings: dict[str, Any]
) -> None:
    async def test() -> None:
        async with rig.engine(zoo, **settings) as built, rig.client(built) as client:
            answer = await client.complete("base", [65], max_tokens=2)
            (model,) = await client.models()
            status = await client.status()
        rounds = Approximation("exact", kv_cache="bfloat16") if settings else None
        assert answer.approximation == model.approximation == rounds
        dtype = settings.get("kv_cache_dtype", "float32")
        assert status["workers"][0]["kv_dtype"] == dtype
        kept = {"store": "exact", "kv_cache": dtype} if settings else None
        assert status["variants"][0].get("approximation") == kept
        shown = Console(width=200, record=True, file=io.StringIO())
        shown.print(render(status))
        assert f"pages of {dtype}" in shown.export_text()

    rig.run(test())
