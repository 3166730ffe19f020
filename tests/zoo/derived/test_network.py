"""Chains in plain torch say what transformers says, and pruning takes what it claims to take."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.zoo.conftest import FAMILIES, Adder
from zoo.derived.cut import Cut, Shape, layers_of, shapes
from zoo.derived.importance import Importance
from zoo.derived.network import Network, buckets
from zoo.derived.pruning import narrow, prune
from zoo.derived.subject import read_subject
from zoo.errors import UnsupportedFamily, UnsupportedOption
from zoo.progress import Quiet

QUIET = Quiet()
IDS = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(3))


def network_of(root: Path, name: str) -> Network:
    return read_subject(root, name).network(torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_says_what_transformers_says(
    family: str, checkpoints: Path, put: Adder, root: Path
) -> None:
    put(family, checkpoints / family)
    model = AutoModelForCausalLM.from_pretrained(checkpoints / family, dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(IDS).logits
        given = network_of(root, family).logits(IDS)
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_what_adds_nothing_can_be_pruned_without_a_trace(
    family: str, checkpoints: Path, put: Adder, root: Path
) -> None:
    """A KV group and neurons whose outputs are nulled, and a layer whose outputs are nulled."""
    put(family, checkpoints / family)
    network = network_of(root, family)
    specs = [part.spec for part in network.parts]
    layers = layers_of(specs)
    attention, mlp = layers[0].attention, layers[0].mlp
    per_group = attention.heads // attention.kv_heads * attention.head_dim
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for part in network.parts[layer.first : layer.last]:
                for role in {"o.weight", "down.weight"} & part.weights.keys():
                    matrix = part.weights[role]
                    matrix = matrix.T if attention.transposed else matrix
                    dead = slice(per_group, 2 * per_group) if role == "o.weight" else slice(0, 32)
                    matrix[:, dead] = 0
                    if number == 2:
                        matrix.zero_()
                for role in {"o.bias", "down.bias"} & part.weights.keys():
                    if number == 2:
                        part.weights[role].zero_()
    groups = tuple(g for g in range(attention.kv_heads) if g != 1)
    neurons = tuple(range(32, mlp.intermediate))
    kept = tuple(n for n in range(len(layers)) if n != 2)
    pruned = prune(network, Cut(kept, (groups,) * len(kept), (neurons,) * len(kept)))
    with torch.inference_mode():
        torch.testing.assert_close(pruned.logits(IDS), network.logits(IDS), atol=1e-5, rtol=1e-5)
    assert sum(w.numel() for p in pruned.parts for w in p.weights.values()) < sum(
        w.numel() for p in network.parts for w in p.weights.values()
    )


def test_what_adds_nothing_is_found(checkpoints: Path, put: Adder, root: Path) -> None:
    put("llama", checkpoints / "llama")
    network = network_of(root, "llama")
    layers = layers_of([part.spec for part in network.parts])
    with torch.no_grad():
        for layer in layers:
            attention, mlp = network.parts[layer.first], network.parts[layer.first + 1]
            attention.weights["o.weight"][:, :32] = 0
            mlp.weights["down.weight"][:, 5] = 0
        network.parts[layers[1].first].weights["o.weight"].zero_()
        network.parts[layers[1].first + 1].weights["down.weight"].zero_()
    importance = Importance(network, IDS)
    cut = importance.cut(Shape(3, 1, 111), importance.spare(2, QUIET))
    assert cut.layers == (0, 2, 3)
    assert cut.groups == ((1,),) * 3
    assert all(5 not in neurons for neurons in cut.neurons)
    assert importance.loss(prune(network, cut)) < 1e-6


def test_narrowing_is_exact_where_the_stream_leaves_room(
    checkpoints: Path, put: Adder, root: Path
) -> None:
    put("qwen2", checkpoints / "qwen2")
    network = network_of(root, "qwen2")
    turned = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    with torch.inference_mode():
        torch.testing.assert_close(
            narrow(network, turned).logits(IDS), network.logits(IDS), atol=1e-4, rtol=1e-4
        )
        importance = Importance(network, IDS)
        half = narrow(network, importance.directions(32))
        best, other = importance.loss(half), importance.loss(narrow(network, turned[:, :32]))
    assert half.logits(IDS).shape == (2, 40, 320)
    assert best < other


def test_chains_of_other_norms_are_not_narrowed(checkpoints: Path, put: Adder, root: Path) -> None:
    put("gpt2", checkpoints / "gpt2")
    with pytest.raises(UnsupportedFamily, match="RMS norm"):
        narrow(network_of(root, "gpt2"), torch.eye(64)[:, :32])


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.9])
def test_shapes_keep_within_their_share(
    ratio: float, checkpoints: Path, put: Adder, root: Path
) -> None:
    put("llama", checkpoints / "llama")
    layers = layers_of([unit.spec for unit in read_subject(root, "llama").units])
    whole = sum(layer.weights for layer in layers)
    for shape in shapes(layers, ratio):
        one = layers[0]
        kept = shape.groups * one.group_weights + shape.neurons * one.neuron_weights
        assert 0 < shape.layers * kept <= ratio * whole


@pytest.mark.parametrize("ratio", [-1.0, 0.0, 1.0, 1.5, 0.001])
def test_a_ratio_that_cannot_be_is_refused(
    ratio: float, checkpoints: Path, put: Adder, root: Path
) -> None:
    put("llama", checkpoints / "llama")
    layers = layers_of([unit.spec for unit in read_subject(root, "llama").units])
    with pytest.raises(UnsupportedOption, match="--ratio"):
        shapes(layers, ratio)


def test_positions_share_a_bucket_by_their_power_of_two() -> None:
    assert buckets(9, 12).tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]
    assert buckets(9, 3).tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2]
