"""Chains on the CUDA kernels: on a device where there is one, else in Triton's interpreter, where a
captured step is run again instead of replayed."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("triton", reason="needs triton")

from tests import builders
from tests.workers.family_zoo import Family, everything, mixed
from tests.workers.hand_made import Base, Tuned
from tests.workers.local import LocalWorker
from tests.workers.replayed import (
    assert_captures_leave_with_their_variant,
    assert_own_tokens,
    assert_runs_unit_by_unit,
)
from tests.workers.rounded import tokens
from workers.warmup import warm_up
from zoo.adding.add import AddOptions, add
from zoo.progress import Quiet

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gpt2", "gpt_neox"]
# Log-probabilities of the tiny models in bfloat16, ours and transformers', against float32.
BOUND = 0.1


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return mixed(tmp_path_factory.mktemp("cuda"))


def test_mixed_batches_give_each_variants_own_tokens_and_are_replayed(family: Family) -> None:
    worker = LocalWorker(family.zoo, "cuda", max_rows=64)
    worker.load(*family.names)
    asked = []
    for name, length in zip(family.names, (2, 9, 3, 1), strict=True):
        given = tokens(length, length)
        asked.append((name, given, worker.open(name, given, max_tokens=3)))
    worker.run()
    assert_own_tokens(family, asked)
    counters = worker.status.counters
    assert counters["replayed_steps"] >= counters["captured_steps"] > 0


def test_a_variant_that_leaves_takes_its_captures_along(family: Family) -> None:
    worker = LocalWorker(family.zoo, "cuda", max_rows=64)
    assert_captures_leave_with_their_variant(family, worker)


def test_pages_have_the_precision_of_the_weights(tmp_path: Path) -> None:
    dtype = "bfloat16" if torch.cuda.is_available() else "float16"
    checkpoint = builders.tiny_llama(tmp_path / "half", dtype=getattr(torch, dtype))
    add(tmp_path / "zoo", "base", str(checkpoint), AddOptions(), Quiet())
    pages, scores = [], []
    for ops in ("torch", "cuda"):
        worker = LocalWorker(tmp_path / "zoo", ops)
        worker.load("base")
        answer = worker.open("base", tokens(20, 1), max_tokens=1, prompt_logprobs=0)
        worker.run()
        assert not answer.failed, answer.failed
        scores.append(torch.tensor([given.logprob for given in answer.scored]))
        pages.append(worker.status.total_pages)
    assert pages[1] == 2 * pages[0]
    assert 0 < (scores[1] - scores[0]).abs().max() < 0.05


def test_what_no_capture_can_exchange_runs_unit_by_unit(tmp_path: Path) -> None:
    assert_runs_unit_by_unit(tmp_path, "cuda", max_tokens=3)


@pytest.mark.gpu
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_gives_transformers_tokens_in_float32(tmp_path: Path, kind: str) -> None:
    family = everything(tmp_path, kind)
    worker = LocalWorker(family.zoo, "cuda")
    worker.load(*family.names)
    asked = []
    for i, name in enumerate(family.names * 4):
        given = tokens(1 + 7 * i % 50, i)
        asked.append((name, given, worker.open(name, given, max_tokens=48)))
    worker.run()
    assert_own_tokens(family, asked)
    assert worker.status.counters["replayed_steps"] > 0


def test_parked_weights_come_back_without_their_files(tmp_path: Path) -> None:
    made = Family(tmp_path, "llama")
    for name in ("first", "second"):
        made.tune(name, ["layers.3."], seed=len(name))
    free = LocalWorker(made.zoo, "cuda", kv_bytes=8 << 20)
    free.load("first")
    worker = LocalWorker(
        made.zoo,
        "cuda",
        kv_bytes=8 << 20,
        weight_bytes=free.status.resident_bytes,
        parked_bytes=64 << 20,
    )
    worker.load("first", "second")
    asked = []
    for turn, name in enumerate(["first", "second", "first"]):
        given = tokens(3, turn)
        asked.append((name, given, worker.open(name, given, max_tokens=2)))
        while worker.worker.has_work or worker.worker.is_loading:
            worker.worker.collect()
            worker.step()
    assert_own_tokens(made, asked)
    counters = worker.status.counters
    assert counters["parked_chains"] >= 3
    # At least the seven matrices of its own layer, each time that one of them comes back.
    assert counters["recalled_weights"] >= 7 * (counters["parked_chains"] - 1)


def test_a_chain_that_is_warmed_up_lets_no_request_wait_for_a_capture(family: Family) -> None:
    worker = LocalWorker(family.zoo, "cuda", max_rows=64)
    worker.load("qv")
    inner = worker.worker
    (chain,) = inner._chains
    pages = inner._runner._caches._arena.clone()
    free = inner._memory.usage()
    warm_up(inner._runner, inner._memory, chain)
    captured = worker.status.counters["captured_steps"]
    assert captured > 0
    assert inner._memory.usage() == free
    spare = len(pages) - inner._memory.arena.slab_bytes
    assert torch.equal(inner._runner._caches._arena[:spare], pages[:spare])
    given = tokens(3, 1)
    answer = worker.open("qv", given, max_tokens=3)
    worker.run()
    assert_own_tokens(family, [("qv", given, answer)])
    assert worker.status.counters["captured_steps"] == captured


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path: Path, kind: str) -> None:
    checkpoint = builders.tiny_model(tmp_path / "half", kind, dtype=torch.bfloat16)
    add(tmp_path / "zoo", "base", str(checkpoint), AddOptions(), Quiet())
    given = tokens(120, 1)
    worker = LocalWorker(tmp_path / "zoo", "cuda")
    worker.load("base")
    answer = worker.open("base", given, max_tokens=1, prompt_logprobs=0)
    worker.run()
    assert not answer.failed, answer.failed
    ours = torch.tensor([scored.logprob for scored in answer.scored])
    exact, theirs = (scores(checkpoint, given, d) for d in (torch.float32, torch.bfloat16))
    assert (ours - exact).abs().max() < BOUND
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


@pytest.mark.gpu
def test_bfloat16_chooses_as_well_as_transformers_does(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    checkpoint = builders.tiny_llama(tmp_path / "half", hidden_size=256, dtype=torch.bfloat16)
    add(tmp_path / "zoo", "base", str(checkpoint), AddOptions(), Quiet())
    with caplog.at_level(logging.INFO):
        worker = LocalWorker(tmp_path / "zoo", "cuda")
        worker.load("base")
    if importlib.util.find_spec("flashinfer"):
        assert "4 heads on 2, 64 wide, bfloat16: FlashInfer" in caplog.text
    prompts = [tokens(3 + i % 40, i) for i in range(200)]
    answers = [worker.open("base", given, max_tokens=1) for given in prompts]
    worker.run()
    ours = [answer.tokens[0] for answer in answers]
    exact = nexts(checkpoint, prompts, torch.float32)
    theirs = nexts(checkpoint, prompts, torch.bfloat16).argmax(1)
    record_property("agrees with transformers", int((theirs == torch.tensor(ours)).sum()))
    best = exact.argmax(1)
    right = int((best == torch.tensor(ours)).sum())
    assert right >= int((best == theirs).sum()) - 10
    lost = exact.max(1).values - exact[torch.arange(len(ours)), torch.tensor(ours)]
    assert float(lost.max()) < 2 * BOUND


def nexts(checkpoint: Path, prompts: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """Logits that transformers gives after each prompt, on the device."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).cuda().eval()
    with torch.no_grad():
        rows = [model(torch.tensor([given], device="cuda")).logits[0, -1] for given in prompts]
    return torch.stack(rows).float().cpu()


@pytest.mark.gpu
def test_a_chain_is_captured_before_it_is_ready(family: Family) -> None:
    worker = LocalWorker(family.zoo, "cuda")
    worker.load("base")
    captured = worker.status.counters["captured_steps"]
    assert captured > 0
    given = tokens(9, 1)
    answer = worker.open("base", given, max_tokens=4)
    worker.run()
    assert_own_tokens(family, [("base", given, answer)])
    assert worker.status.counters["captured_steps"] == captured


def scores(checkpoint: Path, given: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities that transformers gives to a prompt's tokens on the device."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).cuda().eval()
    tokens = torch.tensor([given], device="cuda")
    with torch.no_grad():
        logs = model(tokens).logits[0].float().log_softmax(-1)
    return logs[:-1].gather(1, tokens[0, 1:, None])[:, 0].cpu()


@pytest.mark.gpu
def test_tuned_pieces_of_every_kind_match_the_reference_kernels(tmp_path: Path) -> None:
    base = Base(tmp_path, "llama")
    names = [
        Tuned(base, "low", 1).low_rank(0, "q").low_rank(1, "down").gain(2, "k").publish(),
        Tuned(base, "rows", 2).token_rows([5, 9, 40]).tokens_low_rank().publish(),
        Tuned(base, "prompt", 3).with_tokens(9).bias(1, "o").publish(),
        Tuned(base, "adapter", 4).bottleneck(1, "o", "output").norm(2, "m", "norm").publish(),
    ]
    answers = []
    for ops in ("torch", "cuda"):
        worker = LocalWorker(base.zoo, ops)
        worker.load(*names)
        asked = [worker.open(n, tokens(30, i), max_tokens=24) for i, n in enumerate(names * 3)]
        worker.run()
        assert not any(answer.failed for answer in asked)
        answers.append([answer.tokens for answer in asked])
    same = sum(ours == theirs for ours, theirs in zip(*answers, strict=True))
    assert same >= len(names) * 3 - 1, "more answers than one near tie differ"


@pytest.mark.gpu
def test_sampled_tokens_are_those_that_the_host_would_draw(family: Family) -> None:
    answers = []
    for ops in ("torch", "cuda"):
        worker = LocalWorker(family.zoo, ops)
        worker.load("base", "qv")
        shapes = [{"top_k": 20}, {"top_p": 0.9}, {}, {"min_p": 0.05, "repetition_penalty": 1.3}]
        asked = [
            worker.open(name, tokens(9, i), max_tokens=16, temperature=0.9, seed=i, **shape)
            for i, (name, shape) in enumerate((n, s) for n in ("base", "qv") for s in shapes)
        ]
        worker.run()
        answers.append([answer.tokens for answer in asked])
    same = sum(ours == theirs for ours, theirs in zip(*answers, strict=True))
    assert same >= 7, "more draws than one at the edge of two tokens differ"
