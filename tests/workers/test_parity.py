"""A chain's tokens are the whole model's: against transformers and peft, alone and in mixed
batches."""

import random
from pathlib import Path

import pytest
import torch

from ext.build import supported
from tests.workers.family_zoo import everything, wrong_tokens
from tests.workers.local import LocalWorker

OPS = ["torch", "native"]
needs_kernels = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gpt2", "gpt_neox"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return everything(tmp_path_factory.mktemp(request.param), request.param)


def prompts(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 300) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("ops", OPS)
def test_mixed_batch_gives_each_variants_own_greedy_tokens(family, ops):
    worker = LocalWorker(family.zoo, ops, max_rows=96)
    worker.load(*family.names)
    asked = []
    for i, prompt in enumerate(prompts(4 * len(family.names), seed=1)):
        name = family.names[i % len(family.names)]
        asked.append((name, prompt, worker.open(name, prompt, max_tokens=64)))
    worker.run()
    models = {name: family.reference(name) for name in family.names}
    ties = 0
    for name, prompt, answer in asked:
        assert not answer.failed, answer.failed
        assert len(answer.tokens) == 64
        wrong, near = wrong_tokens(models[name], prompt, answer.tokens)
        assert wrong == 0, f"{name}: {wrong} tokens differ from the model's"
        ties += near
    print(f"{ops}: {ties} near ties")
    merged = [b for b in worker.status.blocks if b.merged_runs]
    assert merged, "no block ran rows of several variants together"


@pytest.mark.parametrize("ops", OPS)
def test_a_request_alone_gives_the_same_tokens_as_in_the_mix(family, ops):
    name = family.names[2]
    prompt = prompts(1, seed=5)[0]
    together = LocalWorker(family.zoo, ops)
    together.load(*family.names)
    mixed = together.open(name, prompt, max_tokens=32)
    for i, other in enumerate(prompts(12, seed=6)):
        together.open(family.names[i % len(family.names)], other, max_tokens=32)
    together.run()
    alone = LocalWorker(family.zoo, ops)
    alone.load(name)
    single = alone.open(name, prompt, max_tokens=32)
    alone.run()
    assert single.tokens == mixed.tokens
    assert wrong_tokens(family.reference(name), prompt, single.tokens)[0] == 0


def test_prompt_logprobs_equal_the_models(family):
    worker = LocalWorker(family.zoo, "torch")
    worker.load("base")
    prompt = prompts(1, seed=3)[0] * 3
    answer = worker.open("base", prompt, max_tokens=4, prompt_logprobs=3, logprobs=2)
    worker.run()
    with torch.no_grad():
        model = family.reference("base")
        logs = torch.log_softmax(model(torch.tensor([prompt + answer.tokens])).logits[0], -1)
    assert len(answer.scored) == len(prompt) - 1
    for i, scored in enumerate(answer.scored, 1):
        assert scored.token == prompt[i]
        assert scored.logprob == pytest.approx(float(logs[i - 1, prompt[i]]), abs=1e-3)
        best = logs[i - 1].topk(3).values.tolist()
        assert list(scored.top_logprobs) == pytest.approx(best, abs=1e-3)
    for i, given in enumerate(answer.logprobs, len(prompt) - 1):
        assert given.rank == 1
        assert given.logprob == pytest.approx(float(logs[i].max()), abs=1e-3)


@needs_kernels
def test_an_answer_is_the_same_whether_all_rows_pass_the_last_layer_or_those_wanted(family):
    prompt = prompts(1, seed=4)[0] * 3
    worker = LocalWorker(family.zoo, "native", max_rows=64, prefix_cache=False)
    worker.load(*family.names)
    for name in family.names:
        answers = []
        for options in ({"prompt_logprobs": 0}, {}):
            beside = worker.open("base", prompt[:3], max_tokens=24)
            worker.step()
            answers.append(worker.open(name, prompt, max_tokens=8, logprobs=3, **options))
            worker.run()
            assert not beside.failed
        assert not answers[0].failed, answers[0].failed
        assert answers[0].tokens == answers[1].tokens
        assert answers[0].logprobs == answers[1].logprobs


def test_chunked_prefill_equals_one_step(family):
    prompt = [x for p in prompts(5, seed=9) for x in p][:180]
    answers = []
    for rows in (16, 23, 256):
        worker = LocalWorker(family.zoo, "torch", max_rows=rows)
        worker.load("base")
        answers.append(worker.open("base", prompt, max_tokens=8))
        worker.run()
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens


def test_shared_tensors_are_resident_once(family: object, tmp_path: Path):
    worker = LocalWorker(family.zoo, "torch")
    worker.load("base")
    alone = worker.status.resident_bytes
    worker.load(*family.names[1:])
    everything_loaded = worker.status.resident_bytes
    assert everything_loaded < alone * 3.3
    for name in family.names[1:]:
        worker.evict(name)
    assert worker.status.resident_bytes == alone
    worker.evict("base")
    assert worker.status.resident_bytes == 0
