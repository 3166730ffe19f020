"""Every kind of attachment gives what the whole model gives with its weights changed: alone, and in
one batch that mixes all of them."""

import random
from collections.abc import Callable

import pytest
import torch

from tests.workers.hand_made import Base, Tuned
from zoo.door import offline

FAMILIES = ["llama", "gpt2", "qwen3", "gemma3", "gpt_neox"]
CASES = [(family, "native") for family in FAMILIES] + [("llama", "torch"), ("gpt2", "torch")]
FUSED = {"gpt2", "gpt_neox"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def base(family: str) -> Base:
        if family not in made:
            made[family] = Base(tmp_path_factory.mktemp(family), family)
        return made[family]

    return base


def kinds(base: Base) -> list[Tuned]:
    """A variant of each kind that the base's family can have, and one of many kinds."""
    fused = base.family in FUSED
    inputs = ["qkv", "up"] if fused else ["q", "v", "gate", "up"]
    half = torch.bfloat16
    mlp_norm = "mlp_norm" if base.family == "gpt_neox" else "norm"
    low_rank = Tuned(base, "low_rank", 1)
    for role in [*inputs, "o", "down"]:
        low_rank.low_rank(1, role, rank=3).low_rank(2, role, rank=5, dtype=half)
    low_rank.low_rank(1, "down", rank=2)
    ends = Tuned(base, "ends", 2).low_rank(0, "head").low_rank(0, "head", 2, half)
    ends.tokens_low_rank().tokens_low_rank(2, half)
    dora = Tuned(base, "dora", 3).low_rank(0, inputs[0]).gain(0, inputs[0])
    dora.low_rank(1, "down").gain(1, "down").gain(0, "head")
    ia3 = Tuned(base, "ia3", 4).gain(1, inputs[0]).input_gain(1, "down").input_gain(3, "o")
    bias = Tuned(base, "bias", 5).bias(0, inputs[0]).bias(2, "up").bias(3, "down").bias(0, "o")
    norms = Tuned(base, "norms", 6).norm(0, "a", "norm").norm(2, "m", mlp_norm)
    if base.family in {"qwen3", "gemma3"}:
        norms.norm(1, "a", "q_norm").norm(2, "a", "k_norm")
    if base.family == "gemma3":
        norms.norm(0, "a", "post_norm").norm(1, "m", "post_norm")
    sides = [
        Tuned(base, f"side_{reads}", 7 + i)
        .bottleneck(0, "o", reads, activation)
        .bottleneck(1, "down", reads, "gelu")
        for i, (reads, activation) in enumerate(
            [("output", "relu"), ("stream", "silu"), ("input", "tanh"), ("norm", "gelu_tanh")]
        )
    ]
    many = Tuned(base, "many", 20).low_rank(1, inputs[0]).gain(1, inputs[0]).bias(1, "down")
    many.norm(1, "a", "norm").bottleneck(1, "down", "stream").input_gain(1, "down")
    rows = Tuned(base, "rows", 21).token_rows([7, 30, 320, 321, 322]).low_rank(2, "o")
    chosen = Tuned(base, "chosen", 22).token_rows([9, 11], tokens=False).low_rank(0, "head")
    return [low_rank, ends, dora, ia3, bias, norms, *sides, many, rows, chosen, *virtual(base)]


def virtual(base: Base) -> list[Tuned]:
    if base.family not in {"llama", "gpt2"}:
        return []
    return [
        Tuned(base, "prefix", 30).with_prefix(20),
        Tuned(base, "prompt", 31).with_prompt(9),
        Tuned(base, "prompted", 32).with_prompt(33).low_rank(1, "o").token_rows([320]),
    ]


def sequences(count: int, vocabulary: int = 320, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(rng.randrange(3, 60))] for _ in range(count)]


def check(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    assert found.shape == wanted.shape, name
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error <= 1e-4, f"{name}: logits are off by {error}"
    assert torch.equal(found.argmax(1), wanted.argmax(1)), name


@pytest.mark.parametrize(("family", "ops"), CASES)
def test_each_kind_alone_and_all_kinds_in_one_batch(bases, family, ops):
    variants = [*kinds(bases(family)), Tuned(bases(family), "base")]
    asked = [sequences(2, 320 + v.added, i) for i, v in enumerate(variants)]
    references = [v.reference() for v in variants]
    wanted = [[r.logits(s) for s in a] for r, a in zip(references, asked, strict=True)]
    with offline(bases(family).zoo, ops=ops, threads=2) as chains:
        models = [chains.load(v.manifests()) for v in variants]
        for variant, model, tokens, logits in zip(variants, models, asked, wanted, strict=True):
            for found, expected in zip(model.logits(tokens), logits, strict=True):
                check(found, expected, f"{variant.name} alone")
        firsts, seconds = zip(*asked, strict=True)
        mixed = list(zip(models * 2, [*firsts, *seconds], strict=True))
        together = chains.logits(mixed)
        for i, found in enumerate(together):
            name = f"{variants[i % len(variants)].name} in the mix"
            check(found, wanted[i % len(variants)][i // len(variants)], name)
