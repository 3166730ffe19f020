"""Layers of transformers' own classes in our batches: their tokens are the whole model's, alone and
mixed with variants, and what they share is kept once."""

import random
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from tests import builders
from tests.workers.family_zoo import Family, wrong_tokens
from tests.workers.local import LocalWorker
from workers.chains import UnservableChain
from workers.offline import Offline
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.manifest import Manifests
from zoo.progress import Quiet

OPS = ["torch", "native"]
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"]
FAMILIES = ["olmo2", "falcon", "falcon_new", "stablelm_parallel"]
# Architectures that need more of our embeddings, heads and windows, or other kinds of layers.
OTHERS = {
    "stablelm": {"num_key_value_heads": 2},
    "falcon": {"multi_query": False, "parallel_attn": False, "bias": True, "ffn_hidden_size": 128},
    "opt": {"ffn_dim": 112, "word_embed_proj_dim": 64},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.3},
    "cohere2": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "olmo": {},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    made = Family(tmp_path_factory.mktemp(request.param), request.param)
    falcon = request.param.startswith("falcon")
    made.lora("lora", rank=4, targets=FUSED if falcon else SEPARATE)
    made.lora("rslora", rank=8, targets=FUSED[:1] if falcon else SEPARATE[:3], use_rslora=True)
    made.tune("last", ["h.3." if falcon else "layers.3."])
    return made


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 300) for _ in range(rng.randrange(1, 60))] for _ in range(count)]


@pytest.mark.parametrize("ops", OPS)
def test_mixed_batch_gives_each_variants_own_greedy_tokens(family, ops):
    worker = LocalWorker(family.zoo, ops, max_rows=48)
    worker.load(*family.names)
    asked = []
    for i, prompt in enumerate(prompts(2 * len(family.names), seed=1)):
        name = family.names[i % len(family.names)]
        asked.append((name, prompt, worker.open(name, prompt, max_tokens=24)))
    worker.run()
    models = {name: family.reference(name) for name in family.names}
    for name, prompt, answer in asked:
        assert not answer.failed, answer.failed
        assert len(answer.tokens) == 24
        assert wrong_tokens(models[name], prompt, answer.tokens)[0] == 0, name
    merged = [b for b in worker.status.blocks if b.merged_runs]
    assert merged, "no block ran rows of several variants together"


def test_alone_and_from_the_prefix_cache_it_gives_the_same_tokens(family):
    worker = LocalWorker(family.zoo, "native")
    worker.load("lora")
    prompt = [token for some in prompts(4, seed=5) for token in some][:70]
    first = worker.open("lora", prompt, max_tokens=16)
    worker.run()
    again = worker.open("lora", prompt, max_tokens=16)
    worker.run()
    assert again.cached >= 64
    assert again.tokens == first.tokens
    assert wrong_tokens(family.reference("lora"), prompt, first.tokens)[0] == 0


def test_tensors_that_variants_share_are_resident_once(family):
    worker = LocalWorker(family.zoo, "native")
    worker.load("base")
    alone = worker.status.resident_bytes
    worker.load("lora", "rslora", "last")
    assert worker.status.resident_bytes < 1.8 * alone
    for name in ("lora", "rslora", "last"):
        worker.evict(name)
    assert worker.status.resident_bytes == alone
    worker.evict("base")
    assert worker.status.resident_bytes == 0


@pytest.mark.parametrize(
    ("said", "instead", "reason"),
    [
        ('"attention_bias":false', '"attention_bias":true', "other tensors .* add the model anew"),
        ('"model_type":"olmo2"', '"model_type":"olmo9"', "cannot build its layers: 'olmo9'"),
    ],
)
def test_layers_that_transformers_builds_otherwise_are_refused(
    tmp_path: Path, said: str, instead: str, reason: str
):
    catalog = Catalog(Family(tmp_path, "olmo2").zoo)
    units = [(d, catalog.unit(d)) for d in catalog.chain(catalog.variant("base").chain).units]
    digest, unit = units[1]
    assert said in unit.spec.config
    spec = replace(unit.spec, config=unit.spec.config.replace(said, instead))
    units[1] = (digest, replace(unit, spec=spec))
    with Offline(tmp_path / "zoo") as offline, pytest.raises(UnservableChain, match=reason):
        offline.load(Manifests(units, [None] * len(units), 64))


@pytest.mark.parametrize("kind", OTHERS)
def test_probabilities_of_other_architectures_are_the_models(tmp_path: Path, kind: str):
    base = builders.tiny_model(tmp_path / "base", kind, **OTHERS[kind])
    add(tmp_path / "zoo", "base", str(base), AddOptions(), Quiet())
    worker = LocalWorker(tmp_path / "zoo", "native", max_rows=40)
    worker.load("base")
    prompt = [token for some in prompts(4, seed=3) for token in some][:90]
    answer = worker.open("base", prompt, max_tokens=8, prompt_logprobs=3, logprobs=2)
    worker.run()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        logs = torch.log_softmax(model(torch.tensor([prompt + answer.tokens])).logits[0], -1)
    assert wrong_tokens(model, prompt, answer.tokens)[0] == 0
    for i, scored in enumerate(answer.scored, 1):
        assert scored.logprob == pytest.approx(float(logs[i - 1, prompt[i]]), abs=1e-3)
        best = logs[i - 1].topk(3).values.tolist()
        assert list(scored.top_logprobs) == pytest.approx(best, abs=1e-3)
