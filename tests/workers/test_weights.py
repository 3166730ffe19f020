"""Weights that are made up: equal for equal digests, finite through a deep model."""

from pathlib import Path

import pytest
import torch

from tests import builders
from tests.workers.local import LocalWorker
from workers.weights import DummyWeights, StoredWeights, open_weights
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.dummy.make import make
from zoo.dummy.recipe import Recipe
from zoo.dummy.store import DummyStore
from zoo.progress import Quiet

MIX = Recipe("tiny", loras=2, lasts=1, last_layers=2, fulls=1, deltas=1, delta_rank=16)
NAMES = ("base", "lora-0", "lora-1", "last-0", "full-0", "delta-0")
PROMPTS = ([5, 9, 200, 31, 7], [11, 12])


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights") / "zoo"
    make(root, MIX, Quiet())
    return root


def answers(zoo: Path, ops: str, *, together: bool) -> dict[tuple[str, int], list[int]]:
    worker = LocalWorker(zoo, ops, load_format="dummy")
    worker.load(*NAMES)
    found = {}
    for name in NAMES:
        for i, prompt in enumerate(PROMPTS):
            found[name, i] = worker.open(name, prompt, max_tokens=12, prompt_logprobs=0)
            if not together:
                worker.run()
    worker.run()
    for answer in found.values():
        assert not answer.failed
        assert torch.isfinite(torch.tensor([scored.logprob for scored in answer.scored])).all()
    return {key: answer.tokens for key, answer in found.items()}


@pytest.mark.parametrize("ops", ["torch", "native"])
def test_variants_in_one_batch_answer_as_they_do_alone(zoo: Path, ops: str):
    mixed = answers(zoo, ops, together=True)
    assert mixed == answers(zoo, ops, together=False)
    assert len({tuple(mixed[name, 0]) for name in NAMES}) == len(NAMES)


def test_memory_is_that_of_distinct_tensors(zoo: Path):
    worker = LocalWorker(zoo, "torch", load_format="dummy")
    worker.load(*NAMES)
    infos = Catalog(zoo).objects().values()
    # The torch kernels keep matrices in float32.
    stored = sum(info.nbytes for info in infos if info.dtype == "BF16")
    assert stored < worker.status.resident_bytes <= 2 * stored


def test_tensors_depend_on_their_digest_alone(zoo: Path):
    weights = open_weights(zoo, "dummy", torch.device("cpu"))
    again = DummyWeights(DummyStore(zoo), torch.device("cpu"))
    assert isinstance(open_weights(zoo, "auto", torch.device("cpu")), StoredWeights)
    tensors = Catalog(zoo).variant("base").tensors
    table, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    made = weights.tensor(table)
    assert made.dtype is torch.bfloat16
    assert made.shape == weights.info(table).shape
    assert torch.equal(made, again.tensor(table))
    assert not torch.equal(made, weights.tensor(tensors["lm_head.weight"]))
    assert torch.equal(weights.tensor(norm), torch.ones(64, dtype=torch.bfloat16))
    assert float(made.float().std()) == pytest.approx(512**-0.5, rel=0.02)


def test_of_real_variants_nothing_but_the_shapes_is_read(tmp_path: Path):
    base = builders.tiny_llama(tmp_path / "base")
    add(tmp_path / "zoo", "base", str(base), AddOptions(golden=False), Quiet())
    for path in (tmp_path / "zoo" / "objects").rglob("*.safetensors"):
        path.unlink()
    worker = LocalWorker(tmp_path / "zoo", load_format="dummy")
    worker.load("base")
    answer = worker.open("base", [5, 6], max_tokens=4)
    worker.run()
    assert len(answer.tokens) == 4


@pytest.mark.gpu
def test_weights_are_made_where_they_stay(zoo: Path):
    weights = open_weights(zoo, "dummy", torch.device("cuda"))
    table = Catalog(zoo).variant("base").tensors["model.embed_tokens.weight"]
    made = weights.tensor(table)
    assert made.is_cuda
    assert torch.equal(made, weights.tensor(table))
    assert float(made.float().std()) == pytest.approx(512**-0.5, rel=0.02)
