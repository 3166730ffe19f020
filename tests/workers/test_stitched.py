"""A chain of two widths: a stitch between the lower units of one model and the upper of another."""

import random

import pytest
import torch

from tests import builders
from tests.workers.hand_made import Base
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.compose import unit_digest
from zoo.door import Manifests, offline
from zoo.manifest import StitchSpec, Unit
from zoo.progress import Quiet

BUCKETS = 5


class Stitched:
    """Two layers of a narrow model, the stitch, three layers of a wide one."""

    def __init__(self, root) -> None:
        self.narrow = Base(root, "llama")
        wide = builders.tiny_llama(root / "wide", seed=5, hidden_size=96, head_dim=16)
        add(self.narrow.zoo, "wide", str(wide), AddOptions(), Quiet())
        catalog = Catalog(self.narrow.zoo)
        upper = [(d, catalog.unit(d)) for d in catalog.chain(catalog.variant("wide").chain).units]
        self.wide = Manifests(upper, [None] * len(upper), 256)
        generator = torch.Generator().manual_seed(1)
        self.map, self.bias, self.places = (
            torch.randn(shape, generator=generator) * 0.2 for shape in [(96, 64), (96,), (5, 96)]
        )
        roles = {"map.weight": self.map, "map.bias": self.bias, "positions.weight": self.places}
        tensors = {role: self.narrow.put(tensor) for role, tensor in roles.items()}
        stitch = Unit(StitchSpec(64, 96, BUCKETS), tensors)
        units = [*self.narrow.units[:5], (unit_digest(stitch), stitch), *upper[3:]]
        self.manifests = Manifests(units, [None] * len(units), 256)
        self.model = type(self.narrow.untouched).from_pretrained(wide, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        lower = self.narrow.untouched.model(torch.tensor([tokens]), output_hidden_states=True)
        positions = range(len(tokens))
        buckets = [min(p.bit_length(), BUCKETS - 1) for p in positions]
        x = lower.hidden_states[2] @ self.map.t() + self.bias + self.places[buckets]
        model = self.model.model
        places = model.rotary_emb(x, torch.tensor([list(positions)]))
        mask = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)[None, None]
        for layer in model.layers[1:]:
            x = layer(x, attention_mask=mask, position_embeddings=places)
        return self.model.lm_head(model.norm(x))[0]


@pytest.fixture(scope="module")
def stitched(tmp_path_factory) -> Stitched:
    return Stitched(tmp_path_factory.mktemp("stitched"))


@pytest.mark.parametrize("ops", ["torch", "native"])
def test_a_stitched_chain_runs_beside_the_chains_it_is_made_of(stitched, ops):
    rng = random.Random(0)
    asked = [[rng.randrange(320) for _ in range(n)] for n in (40, 3, 200)]
    with offline(stitched.narrow.zoo, ops=ops) as chains:
        lower = Manifests(stitched.narrow.units, [None] * 10, 256)
        models = [chains.load(m) for m in (stitched.manifests, lower, stitched.wide)]
        mixed = chains.logits([(m, tokens) for tokens in asked for m in models])
        hidden = models[0].hidden(asked, 6)
        answers = models[0].generate(asked, 8)
    assert [x.shape for x in hidden] == [(len(tokens), 96) for tokens in asked]
    for i, tokens in enumerate(asked):
        wanted = stitched.logits(tokens)
        error = (mixed[3 * i] - wanted).abs().max() / wanted.abs().max()
        assert float(error) < 1e-4
        greedy = stitched.logits(tokens + answers[i]).argmax(1)[len(tokens) - 1 : -1]
        assert greedy.tolist() == answers[i]
