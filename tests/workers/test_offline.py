"""Chains run for measurements: what transformers computes, whatever shares the batch."""

import random

import pytest
import torch

from tests.workers.family_zoo import Family, wrong_tokens
from zoo.catalog import Catalog
from zoo.door import Manifests, offline

OPS = ["torch", "native"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = Family(tmp_path_factory.mktemp("offline"), "llama")
    made.tune("last", ["layers.3."])
    made.lora("qv", rank=4)
    return made


def manifests(zoo, name) -> Manifests:
    catalog = Catalog(zoo)
    variant = catalog.variant(name)
    chain = catalog.chain(variant.chain)
    return Manifests(
        [(d, catalog.unit(d)) for d in chain.units],
        [d and (d, catalog.attachment(d)) for d in chain.attachments],
        variant.context,
    )


def sequences(*lengths: int) -> list[list[int]]:
    rng = random.Random(len(lengths))
    return [[rng.randrange(5, 300) for _ in range(n)] for n in lengths]


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("ops", OPS)
def test_every_positions_logits_are_the_models_in_one_mixed_batch(family, ops):
    asked = sequences(1, 16, 17, 200, 33, 256)
    with offline(family.zoo, ops=ops, threads=2) as chains:
        models = {name: chains.load(manifests(family.zoo, name)) for name in family.names}
        mixed = [(models[name], tokens) for tokens in asked for name in family.names]
        found = chains.logits(mixed)
        alone = [model.logits([tokens])[0] for model, tokens in mixed]
    references = {name: family.reference(name) for name in family.names}
    for i, (_, tokens) in enumerate(mixed):
        with torch.no_grad():
            wanted = references[family.names[i % len(family.names)]](torch.tensor([tokens])).logits
        assert found[i].shape == wanted[0].shape
        assert close(found[i], wanted[0])
        assert close(alone[i], wanted[0])


def test_hidden_states_are_the_models(family):
    asked = sequences(40, 3, 70)
    model = family.reference("qv").base_model.model
    with offline(family.zoo) as chains, torch.no_grad():
        loaded = chains.load(manifests(family.zoo, "qv"))
        for layer in (0, 1, 3):
            found = loaded.hidden(asked, 1 + 2 * layer)
            for tokens, x in zip(asked, found, strict=True):
                output = model(torch.tensor([tokens]), output_hidden_states=True)
                assert close(x, output.hidden_states[layer][0])
        with pytest.raises(ValueError, match="depth 10 is not between"):
            loaded.hidden(asked, 10)


def inputs_of(model, asked: list[list[int]]) -> dict[str, torch.Tensor]:
    """What each linear layer of transformers reads, by its name: the mean of x x^T."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0][0])
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for tokens in asked:
            model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    rows = {name: torch.cat(found) for name, found in seen.items()}
    return {name: x.T @ x / len(x) for name, x in rows.items()}


@pytest.mark.parametrize("ops", OPS)
def test_the_moments_of_what_linear_layers_read_are_the_models(family, ops):
    asked = sequences(40, 3, 70, 200)
    names = {
        (1, "q"): "model.layers.0.self_attn.q_proj",
        (1, "v"): "model.layers.0.self_attn.v_proj",
        (5, "o"): "model.layers.2.self_attn.o_proj",
        (8, "gate"): "model.layers.3.mlp.gate_proj",
        (8, "down"): "model.layers.3.mlp.down_proj",
        (9, "head"): "lm_head",
    }
    wanted = inputs_of(family.reference("last"), asked)
    with offline(family.zoo, ops=ops) as chains:
        model = chains.load(manifests(family.zoo, "last"))
        whole = model.moments([asked[:2], asked[2:]], list(names))
        lower = model.moments([asked], [place for place in names if place[0] < 6])
        after = model.logits(asked[:1])
    for place, name in names.items():
        assert close(whole[place], wanted[name])
        if place[0] < 6:
            assert close(lower[place], wanted[name])
    assert whole[1, "q"] is whole[1, "v"]
    with torch.no_grad():
        assert close(after[0], family.reference("last")(torch.tensor(asked[:1])).logits[0])


def test_what_it_returns_can_be_trained_upon(family):
    with offline(family.zoo) as chains:
        (x,) = chains.load(manifests(family.zoo, "base")).hidden(sequences(9), 3)
    layer = torch.nn.Linear(64, 64)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_greedy_answers_are_the_models_and_end_where_they_should(family):
    asked = sequences(4, 60, 18)
    with offline(family.zoo) as chains:
        loaded = chains.load(manifests(family.zoo, "last"))
        answers = loaded.generate(asked, 24)
        reference = family.reference("last")
        for prompt, answer in zip(asked, answers, strict=True):
            assert len(answer) == 24
            assert wrong_tokens(reference, prompt, answer)[0] == 0
        end = answers[1][5]
        cut = loaded.generate(asked, 24, eos=[end])[1]
        assert cut == answers[1][: answers[1].index(end) + 1]


def test_tensors_are_shared_among_models_and_freed_with_them(family):
    with offline(family.zoo) as chains:
        base = chains.load(manifests(family.zoo, "base"))
        before = chains.resident_bytes
        assert before == base.nbytes
        other = chains.load(manifests(family.zoo, "last"))
        assert before < chains.resident_bytes < 1.5 * before
        chains.drop(other)
        assert chains.resident_bytes == before


def test_a_chain_in_no_catalog_runs(family):
    one, other = (manifests(family.zoo, name) for name in ("base", "last"))
    swapped = Manifests([*one.units[:7], other.units[7], *one.units[8:]], one.attachments, 64)
    asked = sequences(30)
    reference, donor = family.reference("base"), family.reference("last").model.layers[3]
    reference.model.layers[3].self_attn = donor.self_attn
    reference.model.layers[3].input_layernorm = donor.input_layernorm
    with offline(family.zoo) as chains, torch.no_grad():
        found, unswapped = (chains.load(m).logits(asked)[0] for m in (swapped, one))
        assert close(found, reference(torch.tensor(asked)).logits[0])
    assert not close(found, unswapped)


def test_a_longer_sequence_than_the_context_is_refused_and_nothing_stays_behind(family):
    with offline(family.zoo) as chains:
        loaded = chains.load(manifests(family.zoo, "base"))
        with pytest.raises(ValueError, match="257 tokens was asked for, 1 to 256 can run"):
            loaded.logits(sequences(5, 257))
        with pytest.raises(ValueError, match="0 tokens was asked for"):
            loaded.logits([[]])
        assert [len(x) for x in loaded.logits(sequences(5))] == [5]
