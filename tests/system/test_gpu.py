"""The whole server on a GPU: real processes, tokens as the CPU's, readings of the device."""

import asyncio

import pytest
import uvloop

from engine.client import AsyncClient
from tests.system.running import running
from tests.workers.family_zoo import Family, wrong_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
NAMES = ("base", "lora", "last")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = Family(tmp_path_factory.mktemp("gpu"), "llama")
    made.lora("lora", rank=4, targets=["q_proj", "v_proj"])
    made.tune("last", ["layers.3."])
    return made


async def ask(endpoint: str) -> dict[tuple[str, int], list[int]]:
    prompts = [[7 + i, 20, 33 + i, 41] * (i + 1) for i in range(6)]
    async with AsyncClient(endpoint) as client, asyncio.TaskGroup() as group:
        tasks = {
            (name, i): group.create_task(
                client.complete(name, prompt, max_tokens=24, temperature=0, ignore_eos=True)
            )
            for i, prompt in enumerate(prompts)
            for name in NAMES
        }
    return {key: task.result().token_ids for key, task in tasks.items()}


def test_a_gpu_serves_the_cpus_tokens_and_tells_of_itself(family: Family) -> None:
    answers = {}
    for device in ("cpu", "cuda:0"):
        with running(family.zoo, "--device", device, "--gpu-memory-utilization", "0.2") as engine:
            answers[device] = uvloop.run(ask(engine.zmq))
            worker = engine.settled()
            assert engine.stop() == 0
    assert (worker["ops"], worker["device"]) == ("cuda", "cuda:0")
    assert worker["counters"]["replayed_steps"] > worker["counters"]["captured_steps"] > 0
    assert worker["gauges"]["memory_total_bytes"] > worker["kv_bytes"] + worker["weight_bytes"]
    models = {name: family.reference(name) for name in NAMES}
    for (name, i), tokens in answers["cuda:0"].items():
        prompt = [7 + i, 20, 33 + i, 41] * (i + 1)
        assert len(tokens) == 24
        assert wrong_tokens(models[name], prompt, tokens)[0] == 0
    same = sum(answers["cpu"][key] == tokens for key, tokens in answers["cuda:0"].items())
    assert same >= len(answers["cpu"]) - 1, "more answers than one near tie differ from the CPU's"
