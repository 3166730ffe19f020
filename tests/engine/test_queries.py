"""Models, status, metrics and tokens of a text, as clients see them."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from engine import api
from engine.errors import (
    ModelNotFound,
    PromptTooLong,
)
from engine.launch import Engine
from engine.status import render
from tests.engine import rig


def test_texts_become_tokens_and_back(zoo: Path) -> None:
    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            tokens = await client.tokenize("base", "grün")
            assert len(tokens) == 5
            assert await client.detokenize("base", tokens) == "grün"
            reply = await client.ask(
                api.Tokenize(0, "base", messages=[{"role": "user", "content": "x"}]), api.Tokenized
            )
            assert await client.detokenize("base", reply.tokens) == "<user>x"

    rig.run(test())


def test_metrics_count_what_happened(zoo: Path) -> None:
    async def test() -> None:
        async with rig.engine(zoo, vllm_metrics=True) as built, rig.client(built) as client:
            await client.complete("base", [65, 66], max_tokens=5)
            with pytest.raises(ModelNotFound):
                await client.complete("nobody", [65])
            text = await client.metrics()
            for line in (
                'blockllm_requests_total{finish_reason="length",variant="base"} 1.0',
                'blockllm_generation_tokens_total{variant="base"} 5.0',
                'blockllm_prompt_tokens_total{variant="base"} 2.0',
                'blockllm_requests_rejected_total{reason="not_found"} 1.0',
                'blockllm_requests_running{variant="base"} 0.0',
                'blockllm_time_to_first_token_seconds_count{variant="base"} 1.0',
                'blockllm_inter_token_latency_seconds_count{variant="base"} 4.0',
                'vllm:generation_tokens_total{model_name="base"} 5.0',
                'vllm:request_success_total{finished_reason="length",model_name="base"} 1.0',
            ):
                assert line in text

    rig.run(test())


def test_status_and_metrics_tell_of_workers_blocks_and_variants(zoo: Path) -> None:
    async def test() -> None:
        async with rig.engine(zoo) as built, rig.client(built) as client:
            await rig.until(lambda: _has_blocks(built))
            status = await client.status()
            assert status["state"] == "ready"
            assert status["workers"][0]["device"] == "cpu"
            assert status["workers"][0]["total_pages"] == 64
            assert status["variants"][0]["chain_bytes"] == 100
            assert status["blocks"][0]["mean_batch"] == 0.0
            text = await client.metrics()
            assert 'blockllm_kv_pages{state="total",worker="cpu-0.1"} 64.0' in text
            assert "blockllm_shared_weight_ratio 1.0" in text
            assert 'blockllm_device_utilization{worker="cpu-0.1"} 0.5' in text
            assert 'blockllm_device_power_watts{worker="cpu-0.1"} 321.0' in text
            assert "blockllm_device_temperature_celsius{" not in text
            shown = Console(width=150, record=True, file=io.StringIO())
            shown.print(render(status))
            devices = ("50%", "3.0 of 8.0 GB", "321 W", "4 NVLinks")
            for word in ("ready", "cpu-0.1", "bbbbbbbbbbbb", "base", "loaded", *devices):
                assert word in shown.export_text(clear=False)

    rig.run(test())


async def _has_blocks(built: Engine) -> bool:
    async with rig.client(built) as client:
        return bool((await client.status())["blocks"])


def test_the_configured_length_limits_every_variant(zoo: Path) -> None:
    async def test() -> None:
        async with rig.engine(zoo, max_model_len=20) as built, rig.client(built) as client:
            assert (await client.models())[0].context == 20
            assert (await client.complete("base", [65] * 4)).usage.completion_tokens == 16
            with pytest.raises(PromptTooLong, match="maximum context length is 20 tokens"):
                await client.complete("base", [65] * 20)

    rig.run(test())
