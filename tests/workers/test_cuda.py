"""Chains on the CUDA kernels: on a device where there is one, else in Triton's interpreter, where a
captured step is run again instead of replayed."""

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from tests import builders
from tests.workers.family_zoo import MLP, Family, wrong_tokens
from tests.workers.hand_made import Base, Tuned
from tests.workers.local import Answer, LocalWorker
from zoo.add import AddOptions, add
from zoo.progress import Quiet

if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = Family(tmp_path_factory.mktemp("cuda"), "llama")
    made.lora("qv", rank=4, targets=["q_proj", "v_proj"])
    made.lora("mlp", rank=20, targets=MLP, seed=3)
    made.tune("last", ["layers.3."])
    return made


def prompt(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 300) for _ in range(count)]


def assert_own_tokens(family: Family, asked: list[tuple[str, list[int], Answer]]) -> None:
    for name, given, answer in asked:
        assert not answer.failed, answer.failed
        wrong, _ = wrong_tokens(family.reference(name), given, answer.tokens)
        assert wrong == 0, f"{name}: {wrong} tokens differ from the model's"


def test_mixed_batches_give_each_variants_own_tokens_and_are_replayed(family: Family) -> None:
    worker = LocalWorker(family.zoo, "cuda", max_rows=64)
    worker.load(*family.names)
    asked = []
    for name, length in zip(family.names, (2, 17, 3, 1), strict=True):
        given = prompt(length, length)
        asked.append((name, given, worker.open(name, given, max_tokens=3)))
    worker.run()
    assert_own_tokens(family, asked)
    counters = worker.status.counters
    assert counters["replayed_steps"] > counters["captured_steps"] > 0


def test_a_variant_that_leaves_takes_its_captures_along(family: Family) -> None:
    worker = LocalWorker(family.zoo, "cuda", max_rows=64)
    worker.load("last", "base")
    asked = []

    def ask(name: str) -> int:
        given = prompt(3, len(asked))
        asked.append((name, given, worker.open(name, given, max_tokens=3)))
        worker.run()
        return worker.status.counters["captured_steps"]

    before = ask("last")
    worker.evict("last")
    between = ask("base")
    worker.load("last")
    assert before < between < ask("last")
    assert_own_tokens(family, asked)


def test_pages_have_the_precision_of_the_weights(tmp_path: Path) -> None:
    dtype = "bfloat16" if torch.cuda.is_available() else "float16"
    checkpoint = builders.tiny_llama(tmp_path / "half", dtype=getattr(torch, dtype))
    add(tmp_path / "zoo", "base", str(checkpoint), AddOptions(), Quiet())
    pages, scores = [], []
    for ops in ("torch", "cuda"):
        worker = LocalWorker(tmp_path / "zoo", ops)
        worker.load("base")
        answer = worker.open("base", prompt(20, 1), max_tokens=1, prompt_logprobs=0)
        worker.run()
        assert not answer.failed, answer.failed
        scores.append(torch.tensor([given.logprob for given in answer.scored]))
        pages.append(worker.status.total_pages)
    assert pages[1] == 2 * pages[0]
    assert 0 < (scores[1] - scores[0]).abs().max() < 0.05


def test_what_no_capture_can_exchange_runs_unit_by_unit(tmp_path: Path) -> None:
    base = Base(tmp_path, "llama")
    names = [
        Tuned(base, "norms", 1).norm(1, "a", "norm").input_gain(2, "down").publish(),
        Tuned(base, "prefix", 2).with_prefix(5).gain(1, "q").bias(2, "o").publish(),
        Tuned(base, "adapter", 3).bottleneck(1, "o", "stream").publish(),
    ]
    answers = []
    for ops in ("torch", "cuda"):
        worker = LocalWorker(base.zoo, ops)
        worker.load(*names)
        together = [worker.open(name, prompt(4, 2), max_tokens=3) for name in names]
        worker.run()
        answers.append([answer.tokens for answer in together])
    assert answers[0] == answers[1]
