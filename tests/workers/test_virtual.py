"""Virtual tokens (prefixes, soft prompts) and added ones in the worker's loop: pages, chunks, the
prefix cache, capacity, sampling and logprobs."""

import random
from collections.abc import Sequence

import pytest
import torch

from tests.workers.hand_made import Base, Reference, Tuned
from tests.workers.local import Answer, LocalWorker
from workers import wire

FAMILIES = ["llama", "gpt2"]
ADDED = [320, 321, 322]


class Variants:
    def __init__(self, base: Base) -> None:
        self.zoo = base.zoo
        made = [
            Tuned(base, "prefix", 1).with_prefix(20).low_rank(1, "o"),
            Tuned(base, "prefix32", 2).with_prefix(32),
            Tuned(base, "prompt", 3).with_prompt(9),
            Tuned(base, "prompt40", 4).with_prompt(40).token_rows([5, *ADDED]),
            Tuned(base, "added", 5).token_rows(ADDED),
        ]
        self.names = [tuned.publish() for tuned in made] + ["base"]
        self.references = {tuned.name: tuned.reference() for tuned in made}
        self.references["base"] = Reference(base.untouched, [], None)

    def check(self, name: str, prompt: Sequence[int], answer: Answer, tie: float = 1e-3) -> None:
        """Every token is the whole model's own choice after what was emitted before it."""
        assert not answer.failed, answer.failed
        logits = self.references[name].logits([*prompt, *answer.tokens])
        for position, token in enumerate(answer.tokens, len(prompt) - 1):
            assert float(logits[position].max() - logits[position, token]) < tie, name


@pytest.fixture(scope="module", params=FAMILIES)
def variants(request, tmp_path_factory) -> Variants:
    return Variants(Base(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Variants:
    return Variants(Base(tmp_path_factory.mktemp("alone"), "llama"))


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 300) for _ in range(count)]


@pytest.mark.parametrize(("ops", "rows"), [("native", 16), ("native", 23), ("torch", 256)])
def test_answers_are_the_whole_models_however_the_prompt_is_cut(variants, ops, rows):
    worker = LocalWorker(variants.zoo, ops, max_rows=rows)
    worker.load(*variants.names)
    asked = [(n, p) for n in variants.names for p in (tokens(70), tokens(3, 1), [7])]
    answers = [worker.open(n, p, max_tokens=12) for n, p in asked]
    worker.run()
    again = [worker.open(n, p, max_tokens=12) for n, p in asked]
    worker.run()
    for (name, prompt), first, second in zip(asked, answers, again, strict=True):
        variants.check(name, prompt, first)
        assert second.tokens == first.tokens


@pytest.mark.parametrize("name", ["prefix", "prefix32", "prompt", "prompt40"])
def test_what_is_found_in_the_cache_is_counted_in_the_clients_tokens(llama, name):
    worker = LocalWorker(llama.zoo, "native")
    worker.load(name)
    virtual = {"prefix": 20, "prefix32": 32, "prompt": 9, "prompt40": 40}[name]
    prompt = tokens(70)
    first = worker.open(name, prompt, max_tokens=6)
    worker.run()
    second = worker.open(name, prompt, max_tokens=6)
    other = worker.open(name, tokens(50, seed=9), max_tokens=6)
    worker.run()
    pages = (virtual + 69) // 16 * 16
    assert (first.cached, second.cached, other.cached) == (0, pages - virtual, 0)
    status = worker.status
    assert status.counters["shared_pages"] == 4 * (pages + virtual // 16 * 16) // 16
    assert status.counters["prompt_tokens"] == 190
    llama.check(name, prompt, second)
    llama.check(name, tokens(50, seed=9), other)


def test_requests_that_start_together_share_the_pages_of_their_prefix(llama):
    worker = LocalWorker(llama.zoo, "native")
    worker.load("prefix32")
    asked = [tokens(20, seed=i) for i in range(4)]
    answers = [worker.open("prefix32", prompt, max_tokens=4) for prompt in asked]
    worker.run()
    assert worker.status.counters["shared_pages"] == 3 * 4 * 2
    for prompt, answer in zip(asked, answers, strict=True):
        llama.check("prefix32", prompt, answer)


def test_a_variant_and_its_base_never_share_what_differs(llama):
    worker = LocalWorker(llama.zoo, "native")
    worker.load(*llama.names)
    prompt = tokens(64, seed=3)
    answers = [(n, worker.open(n, prompt, max_tokens=8)) for n in [*llama.names, *llama.names]]
    worker.run()
    for name, answer in answers:
        llama.check(name, prompt, answer)


def test_pages_are_returned_and_evicted_like_any_others(llama):
    worker = LocalWorker(llama.zoo, "native", kv_bytes=4 << 20, max_rows=64)
    worker.load(*llama.names)
    rng = random.Random(0)
    asked = []
    for i in range(80):
        name, prompt = rng.choice(llama.names), tokens(rng.choice([20, 60, 100]), seed=i % 20)
        asked.append((name, prompt, worker.open(name, prompt, max_tokens=rng.randrange(1, 30))))
        if i % 5 == 0:
            worker.run()
    worker.run()
    status = worker.status
    assert status.counters["evicted_pages"] > 0
    assert status.free_pages + status.cached_pages == status.total_pages
    for name, prompt, answer in asked[::4]:
        llama.check(name, prompt, answer)


def test_the_longest_request_is_told_in_the_clients_tokens(llama):
    worker = LocalWorker(llama.zoo, "native", kv_bytes=4 << 20)
    worker.load("base", "prefix", "prompt40")
    loaded = {r.chain: r.max_tokens for r in worker.reports if isinstance(r, wire.Loaded)}
    assert loaded == {
        worker.chains["base"]: 256,
        worker.chains["prefix"]: 236,
        worker.chains["prompt40"]: 216,
    }
    answer = worker.open("prefix", tokens(200), max_tokens=36)
    worker.run()
    assert len(answer.tokens) == 36
    llama.check("prefix", tokens(200), answer)


@pytest.mark.parametrize("name", ["prefix", "prompt", "prompt40"])
def test_prompt_logprobs_are_of_the_clients_tokens_alone(llama, name):
    worker = LocalWorker(llama.zoo, "native", max_rows=23)
    worker.load(name)
    prompt = tokens(40, seed=5)
    answer = worker.open(name, prompt, max_tokens=2, prompt_logprobs=2)
    worker.run()
    logs = torch.log_softmax(llama.references[name].logits(prompt), -1)
    assert [s.token for s in answer.scored] == prompt[1:]
    for i, scored in enumerate(answer.scored):
        assert scored.logprob == pytest.approx(float(logs[i, prompt[i + 1]]), abs=1e-3)


def test_added_tokens_are_chosen_read_and_scored_beside_narrower_variants(llama):
    worker = LocalWorker(llama.zoo, "native")
    worker.load("added", "base")
    prompt = [9, 321, 30, 322]
    options = {"max_tokens": 8, "logprobs": 3}
    only = worker.open("added", prompt, allowed_token_ids=tuple(ADDED), **options)
    narrow = worker.open("base", [9, 30], repetition_penalty=1.3, **options)
    pushed = worker.open("added", prompt, logit_bias=((320, 50.0),), presence_penalty=1, **options)
    drawn = worker.open("added", prompt, temperature=3.0, seed=4, **options)
    worker.run()
    assert set(only.tokens) <= set(ADDED)
    assert pushed.tokens == [320] * 8
    assert max(narrow.tokens) < 320
    assert len(drawn.tokens) == 8
    logs = torch.log_softmax(llama.references["added"].logits(prompt + only.tokens), -1)
    for i, given in enumerate(only.logprobs):
        row = logs[len(prompt) - 1 + i]
        assert given.logprob == pytest.approx(float(row[only.tokens[i]]), abs=1e-3)
        assert list(given.top_ids) == row.topk(3).indices.tolist()


def test_a_request_beyond_the_context_is_refused(llama):
    worker = LocalWorker(llama.zoo, "native")
    worker.load("base", "prefix")
    for name, context in (("base", 256), ("prefix", 236)):
        answer = worker.open(name, [5] * 200, max_tokens=context - 199)
        worker.absorb()
        assert f"more than its context of {context}" in answer.failed


@pytest.mark.parametrize("wrong", [[320], [5, -1], [2**31 - 1], []])
def test_a_prompt_outside_the_vocabulary_is_refused(llama, wrong):
    worker = LocalWorker(llama.zoo, "native")
    worker.load("base", "prompt")
    for name in ("base", "prompt"):
        answer = worker.open(name, wrong, max_tokens=4)
        worker.absorb()
        assert "outside the vocabulary" in answer.failed or "0 tokens" in answer.failed
