"""Every kind of tuning, imported and served: in one batch that mixes them all, and alone, tokens
and logits are those of the library that made it."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench import adapters, reference
from tests import builders
from tests.workers.local import LocalWorker
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.door import Manifests, offline
from zoo.progress import Quiet

OPS = ["torch", "native"]
NEW_TOKENS = 6
TOLERANCE = 1e-4
# A full fine-tune, a merged one and the base run in the same batch.
MERGED = "vera"
FULL = "full fine-tune"


@dataclass
class Fleet:
    """A zoo with a base and a variant of every kind. `prompts` and `wanted`, by variant: what is
    asked, and the logits of its library for the prompt and for every token that follows."""

    zoo: Path
    names: list[str]
    prompts: dict[str, list[int]]
    answers: dict[str, list[int]]
    wanted: dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The references are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    folder = tmp_path_factory.mktemp(request.param)
    base = getattr(builders, f"tiny_{request.param}")(folder / "base")
    made = Fleet(folder / "zoo", ["base"], {}, {}, {})
    add(made.zoo, "base", str(base), AddOptions(), Quiet())
    _expect(made, "base", AutoModelForCausalLM.from_pretrained(base).eval(), 0)
    layers = "h." if request.param == "gpt2" else "layers."
    full = builders.fine_tune(folder / "full", base, [layers])
    _put(made, FULL, full, AutoModelForCausalLM.from_pretrained(full).eval())
    for kind in [*adapters.KINDS, *adapters.BOTTLENECKS, MERGED]:
        source = adapters.make(kind, folder / kind, base, seed=len(made.names))
        _put(made, kind, source, reference.load(base, source))
    return made


def _put(made: Fleet, kind: str, source: Path, model: torch.nn.Module) -> None:
    name = kind.replace(" ", "-")
    add(made.zoo, name, str(source), AddOptions(base="base", golden=False), Quiet())
    made.names.append(name)
    _expect(made, name, model, len(made.names))


def _expect(made: Fleet, name: str, model: torch.nn.Module, seed: int) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(builders.VOCABULARY) for _ in range(rng.randrange(3, 40))]
    tokens = [*prompt, 7, 300, 250][-40:]
    made.prompts[name] = list(tokens)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            # Virtual tokens stand before these.
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -len(tokens) :]
            tokens.append(int(logits[-1].argmax()))
    made.answers[name] = tokens[len(made.prompts[name]) :]
    made.wanted[name] = logits


def _check(made: Fleet, name: str, given: list[int]) -> None:
    """Equal tokens; after a near tie of the reference's two best nothing is compared."""
    first = len(made.prompts[name]) - 1
    for i, (ours, theirs) in enumerate(zip(given, made.answers[name], strict=True)):
        if ours != theirs:
            row = made.wanted[name][first + i]
            assert float(row[theirs] - row[ours]) < 1e-3, f"{name}: token {i} differs"
            return


@pytest.mark.parametrize("ops", OPS)
def test_a_batch_of_every_kind_gives_each_its_own_tokens(fleet: Fleet, ops: str):
    worker = LocalWorker(fleet.zoo, ops, max_rows=128)
    worker.load(*fleet.names)
    asked = {
        name: worker.open(name, fleet.prompts[name], max_tokens=NEW_TOKENS) for name in fleet.names
    }
    worker.run()
    for name, answer in asked.items():
        assert not answer.failed, answer.failed
        _check(fleet, name, answer.tokens)
    assert any(block.merged_runs for block in worker.status.blocks), "no block ran them together"


@pytest.mark.parametrize("ops", OPS)
def test_logits_are_the_librarys_alone_and_in_one_batch(fleet: Fleet, ops: str):
    catalog = Catalog(fleet.zoo)
    with offline(fleet.zoo, ops=ops) as runner:
        models = {name: runner.load(_manifests(catalog, name)) for name in fleet.names}
        tokens = {n: [*fleet.prompts[n], *fleet.answers[n][:-1]] for n in fleet.names}
        together = runner.logits([(models[name], tokens[name]) for name in fleet.names])
        for name, mixed in zip(fleet.names, together, strict=True):
            (alone,) = models[name].logits([tokens[name]])
            wanted = fleet.wanted[name]
            for way, given in (("mixed", mixed), ("alone", alone)):
                error = float((given - wanted).abs().max() / wanted.abs().max())
                assert error < TOLERANCE, f"{name}, {way}: {error}"


def _manifests(catalog: Catalog, name: str) -> Manifests:
    variant = catalog.variant(name)
    chain = catalog.chain(variant.chain)
    return Manifests(
        [(unit, catalog.unit(unit)) for unit in chain.units],
        [None if a is None else (a, catalog.attachment(a)) for a in chain.attachments],
        variant.context,
    )
