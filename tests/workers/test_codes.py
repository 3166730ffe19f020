"""Workers whose linear layers are codes of 8 or 4 bits: near the exact ones, in less memory, the
same whatever shares the batch.

Bounds: log-probabilities of the tiny models move by less than 0.1 (int8) and 1.0 (int4).
"""

import pytest

from tests.workers.family_zoo import Family
from tests.workers.local import LocalWorker
from tests.workers.rounded import gap, said, scores, tokens
from workers import wire

OPS = ["torch", "native"]
BOUNDS = {"int8": 0.1, "int4": 1.0}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request, tmp_path_factory):
    made = Family(tmp_path_factory.mktemp(request.param), request.param)
    last = {"llama": "layers.3.", "gpt2": "h.3."}[request.param]
    made.tune("last", [last])
    if request.param == "llama":
        made.lora("lora", rank=4, targets=["q_proj", "down_proj"])
    return made


def worker_of(family, ops: str, weights: str, **config: object) -> LocalWorker:
    made = LocalWorker(family.zoo, ops, weights=weights, **config)
    made.load(*family.names)
    return made


def loaded(worker: LocalWorker) -> list[wire.Loaded]:
    return [report for report in worker.reports if isinstance(report, wire.Loaded)]


@pytest.mark.parametrize("weights", BOUNDS)
def test_answers_are_near_the_exact_ones_and_equal_the_references(family, weights):
    exact = worker_of(family, "native", "exact")
    plain, native = (worker_of(family, ops, weights) for ops in OPS)
    for name in family.names:
        prompt = tokens(120, seed=1)
        wanted, coded, ours = (scores(w, name, prompt) for w in (exact, plain, native))
        assert 0 < gap(coded, wanted) < BOUNDS[weights]
        assert gap(ours, coded) < 1e-3


@pytest.mark.parametrize("weights", BOUNDS)
def test_the_error_and_the_memory_are_told(family, weights):
    exact, coded = (worker_of(family, "native", kind) for kind in ("exact", weights))
    assert [report.weight_error for report in loaded(exact)] == [0.0] * len(family.names)
    errors = [report.weight_error for report in loaded(coded)]
    low, high = {"int8": (0.001, 0.01), "int4": (0.03, 0.1)}[weights]
    assert all(low < error < high for error in errors), errors
    assert coded.worker.hello().weights == weights
    for before, after in zip(loaded(exact), loaded(coded), strict=True):
        assert after.chain_bytes < before.chain_bytes
    # What a variant shares with its base is held once.
    assert coded.status.resident_bytes < sum(report.chain_bytes for report in loaded(coded))


@pytest.mark.parametrize("weights", BOUNDS)
def test_a_request_has_the_same_answer_whatever_shares_its_batch(family, weights):
    prompt, name = tokens(40, seed=2), family.names[-1]
    alone = worker_of(family, "native", weights)
    only = alone.open(name, prompt, max_tokens=16, logprobs=0)
    alone.run()
    together = worker_of(family, "native", weights, max_rows=100)
    mixed = together.open(name, prompt, max_tokens=16, logprobs=0)
    for i in range(20):
        other = family.names[i % len(family.names)]
        together.open(other, tokens(5 + 3 * i, seed=10 + i), max_tokens=12)
    together.run()
    assert said(mixed) == said(only)


def test_a_budget_counts_codes_not_what_is_stored(family):
    coded = worker_of(family, "native", "int8")
    needed = coded.status.resident_bytes
    tight = LocalWorker(family.zoo, "native", weights="int8", weight_bytes=needed + 4096)
    tight.load("base")
    exact = LocalWorker(family.zoo, "native", weight_bytes=needed + 4096)
    with pytest.raises(AssertionError, match="raise --weight-memory-bytes"):
        exact.load("base")
