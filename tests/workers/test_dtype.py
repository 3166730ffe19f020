"""Layers that multiply bfloat16: near the exact answers, in pages of half the size, and the same
answer whatever shares its batch and however its prompt is cut."""

import pytest
import torch

from tests.workers.family_zoo import Family
from tests.workers.local import LocalWorker
from tests.workers.rounded import gap, said, scores, tokens

# Of log-probabilities over tiny random models, whose logits are a few tenths wide.
BOUND = 0.05


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = Family(tmp_path_factory.mktemp("dtype"), "llama", dtype=torch.bfloat16)
    made.tune("last", ["layers.3."])
    made.lora("lora")
    return made


def worker_of(family, dtype: str, **config: object) -> LocalWorker:
    made = LocalWorker(family.zoo, "native", dtype=dtype, **config)
    made.load(*family.names)
    return made


def test_answers_are_near_the_exact_ones(family):
    exact, rounded = (worker_of(family, dtype) for dtype in ("auto", "bfloat16"))
    for name in family.names:
        prompt = tokens(120, seed=1)
        distance = gap(scores(exact, name, prompt), scores(rounded, name, prompt))
        assert 0 < distance < BOUND, distance


def test_float32_is_the_exact_way(family):
    found = [scores(worker_of(family, d), "lora", tokens(50)) for d in ("auto", "float32")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "pages"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "kv_dtype": "float32"}, "float32"),
        ({"dtype": "auto", "kv_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
    ],
)
def test_pages_hold_what_layers_multiply_unless_told(family, settings, pages):
    hello = LocalWorker(family.zoo, "native", **settings).worker.hello()
    assert hello.kv_dtype == pages
    assert hello.dtype == settings["dtype"].replace("auto", "float32")


@pytest.mark.parametrize("length", [90, 230])
@pytest.mark.parametrize("name", ["base", "last", "lora"])
def test_an_answer_does_not_depend_on_batch_or_chunks(family, name, length):
    prompt = tokens(length, seed=2)
    alone = worker_of(family, "bfloat16")
    whole = alone.open(name, prompt, max_tokens=12, logprobs=0)
    alone.run()
    crowd = worker_of(family, "bfloat16", max_rows=23, prefix_cache=False)
    for number, other in enumerate(family.names):
        crowd.open(other, tokens(40 + 9 * number, seed=number), max_tokens=12)
    among = crowd.open(name, prompt, max_tokens=12, logprobs=0)
    crowd.run()
    assert said(among) == said(whole)
