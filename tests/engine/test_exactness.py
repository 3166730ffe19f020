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
        ({"weights": "int8"}, {}, Approximation("exact", weights="int8")),
        ({"dtype": "float32"}, {}, None),
        ({"dtype": "bfloat16"}, {}, Approximation("exact", dtype="bfloat16")),
        (
            {"weights": "int4", "kv_cache_dtype": "bfloat16"},
            {},
            Approximation("exact", weights="int4", kv_cache="bfloat16"),
        ),
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
    rounds = (
        [] if told is None else [word for word in (told.dtype, told.weights, told.kv_cache) if word]
    )
    assert bool(warning(config)) == bool(rounds)
    assert all(word in warning(config) for word in rounds)


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "bfloat16"}, {"weights": "int4"}])
def test_answers_models_and_status_say_how_the_server_rounds(
    zoo: Path, settings: dict[str, Any]
) -> None:
    async def test() -> None:
        async with rig.engine(zoo, **settings) as built, rig.client(built) as client:
            answer = await client.complete("base", [65], max_tokens=2)
            (model,) = await client.models()
            status = await client.status()
        dtype = settings.get("kv_cache_dtype")
        weights = settings.get("weights")
        rounds = Approximation("exact", weights=weights, kv_cache=dtype) if settings else None
        assert answer.approximation == model.approximation == rounds
        worker, variant = status["workers"][0], status["variants"][0]
        assert worker["kv_dtype"] == (dtype or "float32")
        assert worker["weights"] == (weights or "exact")
        kept = {"weights": weights, "kv_cache": dtype}
        kept = {name: value for name, value in kept.items() if value}
        assert variant.get("approximation") == ({"store": "exact"} | kept if settings else None)
        shown = Console(width=200, record=True, file=io.StringIO())
        shown.print(render(status))
        text = shown.export_text()
        assert f"pages of {dtype or 'float32'}" in text
        assert f"{weights or 'exact'}" in text

    rig.run(test())
