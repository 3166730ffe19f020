"""Pages of bfloat16: half the memory, answers near the exact ones, and everything that lives in
pages goes on working.

Bound: log-probabilities of the tiny models move by less than 0.02 against float32 pages.
"""

import random

import pytest

from tests.workers.family_zoo import Family
from tests.workers.hand_made import Base, Tuned
from tests.workers.local import LocalWorker
from tests.workers.rounded import gap, said, scores, tokens

OPS = ["torch", "native"]
BOUND = 0.02


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = Family(tmp_path_factory.mktemp("rounded"), "llama")
    made.tune("last", ["layers.3."])
    made.tune("last2", ["layers.2.", "layers.3."], seed=4)
    return made


def worker_of(family, ops: str, dtype: str, *names: str, **config: object) -> LocalWorker:
    made = LocalWorker(family.zoo, ops, kv_dtype=dtype, **config)
    made.load(*(names or family.names))
    return made


@pytest.mark.parametrize("ops", OPS)
def test_answers_are_near_the_exact_ones(family, ops):
    exact, rounded = (worker_of(family, ops, dtype) for dtype in ("auto", "bfloat16"))
    for name in family.names:
        prompt = tokens(120, seed=1)
        distance = gap(scores(exact, name, prompt), scores(rounded, name, prompt))
        assert 0 < distance < BOUND, distance


def test_a_page_takes_half_the_bytes(family):
    exact, rounded = (worker_of(family, "native", dtype) for dtype in ("float32", "bfloat16"))
    for worker in (exact, rounded):
        worker.open("base", tokens(40), max_tokens=4)
        worker.run()
    assert rounded.status.total_pages == 2 * exact.status.total_pages
    hellos = [worker.worker.hello() for worker in (exact, rounded)]
    assert [hello.kv_dtype for hello in hellos] == ["float32", "bfloat16"]
    assert hellos[0].kv_bytes == hellos[1].kv_bytes


def test_a_prompt_sent_twice_is_computed_once(family):
    worker = worker_of(family, "native", "bfloat16")
    prompt = tokens(100, seed=2)
    answers = []
    for _ in range(2):
        answers.append(worker.open("base", prompt, max_tokens=8, logprobs=0))
        worker.run()
    assert [a.cached for a in answers] == [0, 96]
    assert said(answers[0]) == said(answers[1])


@pytest.mark.parametrize("rows", [23, 256])
@pytest.mark.parametrize("name", ["last", "last2"])
def test_kept_activations_lose_nothing_in_pages_of_bfloat16(family, name, rows):
    prompt = tokens(70, seed=3)
    alone = worker_of(family, "native", "bfloat16", name, max_rows=rows)
    whole = alone.open(name, prompt, max_tokens=12, logprobs=0)
    alone.run()
    shared = worker_of(family, "native", "bfloat16", max_rows=rows)
    shared.open("base", prompt, max_tokens=2)
    shared.run()
    found = shared.open(name, prompt, max_tokens=12, logprobs=0)
    shared.run()
    assert (whole.cached, found.cached) == (0, 64)
    assert said(found) == said(whole)


def test_memory_is_given_back_and_evicted(family):
    worker = worker_of(family, "native", "bfloat16", kv_bytes=8 << 20, max_rows=64)
    rng = random.Random(0)
    asked = []
    for i in range(150):
        name, prompt = rng.choice(family.names), tokens(rng.choice([20, 100, 180]), seed=i % 60)
        asked.append((name, prompt, worker.open(name, prompt, max_tokens=4, logprobs=0)))
        if i % 5 == 0:
            worker.run()
    worker.run()
    status = worker.status
    assert status.counters["evicted_pages"] > 0
    assert status.free_pages + status.cached_pages == status.total_pages
    fresh = {name: worker_of(family, "native", "bfloat16", name) for name in family.names}
    for name, prompt, answer in asked[::15]:
        again = fresh[name].open(name, prompt, max_tokens=4, logprobs=0)
        fresh[name].run()
        assert said(again) == said(answer)


@pytest.mark.parametrize("ops", OPS)
def test_given_keys_and_soft_prompts_are_near_the_exact_ones(tmp_path, ops):
    base = Base(tmp_path, "llama")
    names = [
        Tuned(base, "prefix", 1).with_prefix(20).low_rank(1, "o").publish(),
        Tuned(base, "prompt", 3).with_prompt(9).publish(),
    ]
    exact, rounded = (
        LocalWorker(base.zoo, ops, kv_dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    for worker in (exact, rounded):
        worker.load(*names)
    for name in names:
        prompt = tokens(50, seed=5)
        distance = gap(scores(exact, name, prompt), scores(rounded, name, prompt))
        assert 0 < distance < BOUND, distance
        first = rounded.open(name, prompt, max_tokens=6)
        rounded.run()
        second = rounded.open(name, prompt, max_tokens=6)
        rounded.run()
        assert second.cached > 0
        assert second.tokens == first.tokens
