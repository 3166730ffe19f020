"""Equal prefixes are computed once, also by different variants below the point where they part."""

import random

import pytest

from tests.workers.family_zoo import Family, wrong_tokens
from tests.workers.local import LocalWorker

OPS = ["torch", "native"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = Family(tmp_path_factory.mktemp("prefix"), "llama")
    made.tune("last", ["layers.3."])
    made.tune("last2", ["layers.2.", "layers.3."], seed=4)
    made.lora("upper", rank=4, targets=["q_proj", "down_proj"], layers_to_transform=[1, 2, 3])
    made.tune("head", ["lm_head"], seed=9)
    return made


@pytest.fixture(params=OPS)
def worker(request, family):
    made = LocalWorker(family.zoo, request.param, max_rows=64)
    made.load(*family.names)
    return made


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 300) for _ in range(count)]


def check(family, name, prompt, answer):
    assert not answer.failed, answer.failed
    assert wrong_tokens(family.reference(name), prompt, answer.tokens)[0] == 0


def test_a_prompt_sent_twice_is_computed_once(worker, family):
    prompt = tokens(100)
    first = worker.open("base", prompt, max_tokens=8)
    worker.run()
    second = worker.open("base", prompt, max_tokens=8)
    worker.run()
    assert (first.cached, second.cached) == (0, 96)
    assert first.tokens == second.tokens
    check(family, "base", prompt, second)


@pytest.mark.parametrize("name", ["base", "last", "upper"])
def test_of_a_prompt_of_whole_pages_only_the_last_token_is_computed_again(worker, family, name):
    prompt = tokens(96)
    first = worker.open(name, prompt, max_tokens=20)
    worker.run()
    twice = [worker.open(name, prompt, max_tokens=20) for _ in range(2)]
    worker.run()
    for again in twice:
        assert again.cached == 95
        assert again.tokens == first.tokens
    check(family, name, prompt, first)


def test_a_page_that_is_copied_stays_as_it_was(worker, family):
    prompt = tokens(32)
    first = worker.open("base", prompt, max_tokens=4)
    worker.run()
    other = worker.open("base", prompt + tokens(30, seed=5), max_tokens=8)
    again = worker.open("base", prompt, max_tokens=8)
    worker.run()
    assert (other.cached, again.cached) == (32, 31)
    assert again.tokens[:4] == first.tokens
    check(family, "base", prompt, again)
    check(family, "base", prompt + tokens(30, seed=5), other)


def test_a_generated_answer_is_found_by_the_next_turn(worker, family):
    prompt = tokens(30, seed=1)
    first = worker.open("base", prompt, max_tokens=40)
    worker.run()
    longer = prompt + first.tokens + tokens(10, seed=2)
    second = worker.open("base", longer, max_tokens=8)
    worker.run()
    assert second.cached == 64
    check(family, "base", longer, second)


def test_eight_users_of_one_system_prompt_compute_it_once(worker, family):
    system = tokens(80, seed=3)
    asked = [(system + tokens(12, seed=10 + i)) for i in range(8)]
    answers = [worker.open("base", prompt, max_tokens=6) for prompt in asked]
    worker.run()
    assert sorted(a.cached for a in answers) == [0] + [80] * 7
    for prompt, answer in zip(asked, answers, strict=True):
        check(family, "base", prompt, answer)


def test_tenants_do_not_share(worker):
    prompt = tokens(64, seed=4)
    worker.open("base", prompt, max_tokens=2, salt=1)
    worker.run()
    other = worker.open("base", prompt, max_tokens=2, salt=2)
    worker.run()
    assert other.cached == 0


@pytest.mark.parametrize(("name", "layers"), [("last", 3), ("last2", 2), ("upper", 1), ("head", 4)])
def test_variants_share_the_pages_below_the_point_where_they_part(worker, family, name, layers):
    prompt = tokens(70, seed=5)
    worker.open("base", prompt, max_tokens=4)
    worker.run()
    before = worker.status.counters["shared_pages"]
    answer = worker.open(name, prompt, max_tokens=24)
    worker.run()
    assert answer.cached == 64
    assert worker.status.counters["shared_pages"] - before == 4 * layers
    check(family, name, prompt, answer)


def test_sharing_works_in_any_order_and_all_at_once(worker, family):
    prompt = tokens(50, seed=6)
    order = ["upper", "last", "base", "head", "last2", "last", "base"]
    answers = [(n, worker.open(n, prompt, max_tokens=12)) for n in order]
    worker.run()
    again = [(n, worker.open(n, prompt, max_tokens=12)) for n in reversed(order)]
    worker.run()
    for name, answer in answers + again:
        check(family, name, prompt, answer)
    assert all(a.cached == 48 for _, a in again)
    assert [a.tokens for _, a in again] == [a.tokens for _, a in reversed(answers)]


def test_eviction_makes_room_and_keeps_answers_right(family):
    worker = LocalWorker(family.zoo, "torch", kv_bytes=8 << 20, max_rows=64)
    worker.load(*family.names)
    rng = random.Random(0)
    asked = []
    for i in range(150):
        name = rng.choice(family.names)
        prompt = tokens(rng.choice([20, 60, 100]), seed=i % 40)
        asked.append((name, prompt, worker.open(name, prompt, max_tokens=rng.randrange(1, 60))))
        if i % 5 == 0:
            worker.run()
    worker.run()
    status = worker.status
    assert status.counters["evicted_pages"] > 0
    assert status.free_pages + status.cached_pages == status.total_pages
    models = {name: family.reference(name) for name in family.names}
    for name, prompt, answer in asked[::7]:
        assert wrong_tokens(models[name], prompt, answer.tokens)[0] == 0


def test_a_closed_request_returns_its_pages_at_once(worker):
    free = worker.status.free_pages + worker.status.cached_pages
    prompt = tokens(90, seed=8)
    answer = worker.open("last", prompt, max_tokens=100)
    for _ in range(5):
        worker.step()
    worker.close(answer)
    status = worker.status
    assert (status.running, status.waiting) == (0, 0)
    assert status.free_pages + status.cached_pages == free


def test_a_leader_that_is_closed_does_not_block_its_followers(worker, family):
    prompt = tokens(120, seed=12)
    leader = worker.open("base", prompt, max_tokens=4)
    worker.step()
    follower = worker.open("base", prompt, max_tokens=4)
    worker.step()
    worker.close(leader)
    worker.run()
    check(family, "base", prompt, follower)
