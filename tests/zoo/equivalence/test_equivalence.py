"""Variants compared: known pairs are ranked rightly, results stay in the catalog, and what must not
be compared is refused."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import builders
from tests.zoo.conftest import Adder
from zoo.__main__ import main
from zoo.catalog import Catalog
from zoo.door import offline
from zoo.equivalence import compare as comparing
from zoo.equivalence.agreement import log_probabilities, read
from zoo.equivalence.chains import can_swap, differing, digest_of, manifests_of, swapped
from zoo.equivalence.compare import CompareOptions, Comparison, compare
from zoo.equivalence.corpus import corpus_of, read_corpus, tokenizer_of
from zoo.equivalence.distance import together, unit_sums
from zoo.equivalence.edges import KIND, Edge
from zoo.equivalence.probe import Probe
from zoo.errors import BadSource, Incomparable
from zoo.findings import Findings
from zoo.progress import Quiet
from zoo.store import Store

PAIRS = ("same", "noise", "light", "strong", "unrelated")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, what is ever further from it, and models that it cannot be put into."""
    folder = tmp_path_factory.mktemp("pairs")
    base = builders.tiny_llama(folder / "base")
    builders.fine_tune(folder / "noise", base, ["weight"], scale=1e-5)
    builders.fine_tune(folder / "light", base, ["layers."], scale=2e-3)
    builders.fine_tune(folder / "strong", base, ["layers."], scale=3e-2)
    builders.tiny_llama(folder / "unrelated", seed=9)
    builders.tiny_llama(folder / "wide", seed=2, hidden_size=96, num_hidden_layers=2)
    return folder


def beside(root: Path, other: str, **options: object) -> Comparison:
    return compare(root, "base", other, CompareOptions(rows=6, **options), Quiet())


def test_known_pairs_are_ranked_rightly(root: Path, put: Adder, folders: Path):
    put("base", folders / "base")
    put("same", folders / "base", base="base")
    for name in PAIRS[1:]:
        put(name, folders / name, base="base")
    edges = {name: beside(root, name).edges[0] for name in PAIRS}
    kl = [edges[name].kl.value for name in PAIRS]
    assert kl == sorted(kl)
    assert kl[0] == 0
    assert all(below < above for below, above in itertools.pairwise(kl))
    assert [edges[name].agreement.value for name in PAIRS[:2]] == [1, 1]
    assert edges["unrelated"].agreement.high < 0.5
    moved = [edges[name].weights.relative for name in PAIRS]
    assert moved == sorted(moved)
    assert edges["same"].weights.cosine == 1
    assert abs(edges["unrelated"].weights.cosine) < 0.5 < edges["strong"].weights.cosine
    assert all(edge.kl.low <= edge.kl.value <= edge.kl.high for edge in edges.values())


def test_blocks_and_units_are_measured_by_swapping(
    root: Path, put: Adder, folders: Path, tmp_path: Path
):
    put("base", folders / "base")
    put("light", folders / "light", base="base")
    # A variant that parts from the base at unit 7 cuts the base's chain there.
    put("last", builders.fine_tune(tmp_path / "last", folders / "base", ["layers.3."]))
    found = beside(root, "light", units=True)
    chain, lower, upper, *units = found.edges
    assert [edge.level for edge in found.edges] == ["chain", "block", "block", *["unit"] * 8]
    assert [(edge.first, edge.last) for edge in (lower, upper)] == [(1, 7), (7, 9)]
    assert [edge.first for edge in units] == list(range(1, 9))
    assert all(0 < edge.kl.value < chain.kl.value for edge in units)
    assert len(found.tensors) == 4 * 9


def test_what_was_measured_is_not_measured_again(
    root: Path, put: Adder, folders: Path, monkeypatch: pytest.MonkeyPatch
):
    put("base", folders / "base")
    put("light", folders / "light", base="base")
    first = beside(root, "light")
    kept = Findings(Catalog(root)).all(KIND, Edge)
    assert list(kept.values()) == first.edges

    def fail(*_: object) -> None:
        raise AssertionError("a chain was loaded")

    monkeypatch.setattr(comparing, "offline", fail)
    assert beside(root, "light") == first
    with pytest.raises(AssertionError, match="loaded"):
        compare(root, "base", "light", CompareOptions(rows=7), Quiet())


def test_what_was_interrupted_goes_on_where_it_stopped(
    root: Path, put: Adder, folders: Path, monkeypatch: pytest.MonkeyPatch
):
    put("base", folders / "base")
    put("light", folders / "light", base="base")
    measured: list[str] = []
    agreement = Probe.agreement

    def count(self: Probe, chain: object, label: str) -> object:
        measured.append(label)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return agreement(self, chain, label)

    monkeypatch.setattr(Probe, "agreement", count)
    with pytest.raises(KeyboardInterrupt):
        beside(root, "light", units=True)
    assert len(Findings(Catalog(root)).all(KIND, Edge)) == 2
    assert len(beside(root, "light", units=True).edges) == 9
    assert len(measured) == 3 + 7


def test_weights_that_point_elsewhere_are_not_run(root: Path, put: Adder, folders: Path):
    put("base", folders / "base")
    put("unrelated", folders / "unrelated", base="base")
    put("light", folders / "light", base="base")
    edges = beside(root, "unrelated", units=True).edges
    assert edges[0].kl is not None
    units = [edge for edge in edges if edge.level == "unit"]
    assert units
    assert all((edge.kl is None) == (edge.weights.cosine < 0.5) for edge in units)
    assert any(edge.kl is None for edge in units)


def test_other_widths_are_compared_through_the_head(root: Path, put: Adder, folders: Path):
    put("base", folders / "base")
    put("wide", folders / "wide")
    found = beside(root, "wide", units=True)
    assert [edge.level for edge in found.edges] == ["chain"]
    assert found.edges[0].weights is None
    assert found.edges[0].kl.value > 0


def test_other_tokenizers_are_refused(root: Path, put: Adder, folders: Path, tmp_path: Path):
    other = builders.fine_tune(tmp_path / "other", folders / "base", ["layers."])
    told = json.loads((folders / "base" / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    one, two = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(told))
    put("base", folders / "base")
    put("other", other, base="base")
    with pytest.raises(Incomparable, match="different tokenizers"):
        beside(root, "other")


@pytest.mark.parametrize(
    ("one", "two", "may"),
    [
        ({"private": True, "tenant": "a"}, {"tenant": "a"}, True),
        ({"private": True, "tenant": "a"}, {"tenant": "b"}, False),
        ({"tenant": "a"}, {"private": True, "tenant": "b"}, False),
        ({"tenant": "a"}, {"tenant": "b"}, True),
        ({"private": True}, {}, True),
    ],
)
def test_a_private_variant_enters_no_edge_with_another_tenants(
    root: Path, put: Adder, folders: Path, one: dict[str, object], two: dict[str, object], may: bool
):
    put("base", folders / "base", **one)
    put("light", folders / "light", base="base", **two)
    if may:
        assert [edge.level for edge in beside(root, "light").edges] == ["chain"]
        return
    with pytest.raises(Incomparable, match="different tenants"):
        beside(root, "light")
    assert Findings(Catalog(root)).all(KIND, Edge) == {}


def test_a_swapped_chain_runs_as_transformers_would(
    root: Path, put: Adder, folders: Path, tmp_path: Path
):
    put("base", folders / "base")
    put("strong", folders / "strong", base="base")
    catalog, store = Catalog(root), Store(root)
    here, there = (manifests_of(catalog, catalog.variant(name)) for name in ("base", "strong"))
    assert can_swap(here, there)
    assert differing(here, there) == list(range(1, 9))
    assert digest_of(swapped(here, there, range(10))) == catalog.variant("strong").chain
    corpus = read_corpus(tokenizer_of(store, catalog.variant("base")), None, 3, 128)
    with offline(root) as runner:
        probe = Probe(runner, corpus, here, Quiet())
        found = probe.agreement(swapped(here, there, {3, 4}), "")
        probe.close()
    base, mixed = (AutoModelForCausalLM.from_pretrained(folders / "base").eval() for _ in range(2))
    strong = AutoModelForCausalLM.from_pretrained(folders / "strong").eval()
    # Unit 3 is the attention of layer 1, unit 4 its MLP.
    mixed.model.layers[1] = strong.model.layers[1]
    readings = []
    with torch.inference_mode():
        for passage in corpus.passages:
            ids = torch.tensor([passage.ids])
            one, two = (model(ids).logits[0, passage.first - 1 : -1] for model in (base, mixed))
            readings.append(read(log_probabilities(one), two, ids[0, passage.first :]))
    assert found.tokens == sum(reading.tokens for reading in readings)
    expected = sum(reading.kl for reading in readings) / found.tokens
    assert found.kl.value == pytest.approx(expected, rel=1e-3)


def test_distance_is_that_of_the_numbers(root: Path, put: Adder, folders: Path):
    names = ("base", "strong")
    for name in names:
        put(name, folders / name, **({"base": "base"} if name != "base" else {}))
    catalog, store = Catalog(root), Store(root)
    units = [catalog.unit(catalog.chain(catalog.variant(name).chain).units[2]) for name in names]
    sums = unit_sums(store, units[0], units[1])
    weights = [
        AutoModelForCausalLM.from_pretrained(folders / name).model.layers[0].mlp.up_proj.weight
        for name in names
    ]
    one, two = (weight.detach().double().flatten() for weight in weights)
    distance = sums["up.weight"].distance()
    assert distance.cosine == pytest.approx(float(one @ two / one.norm() / two.norm()), rel=1e-6)
    assert distance.relative == pytest.approx(float((two - one).norm() / one.norm()), rel=1e-6)
    assert 0 < together(sums).relative < 1


def test_rows_of_a_file_are_held_out_text(root: Path, put: Adder, folders: Path, tmp_path: Path):
    variant = put("base", folders / "base")
    rows = [{"prompt": f"Row {i}", "response": "yes" * i, "split": "dev"} for i in range(1, 9)]
    rows.append({"prompt": "seen", "response": "seen", "split": "train"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = tokenizer_of(Store(root), variant)
    corpus = read_corpus(tokenizer, path, 4, 128)
    assert corpus.name == "rows.jsonl"
    assert len(corpus.passages) == 4
    texts = [tokenizer.decode(p.ids[p.first :]) for p in corpus.passages]
    assert texts == ["yes" * i + "<|im_end|>" for i in (1, 3, 5, 7)]
    assert corpus.digest == corpus_of("another name", corpus.passages).digest
    assert corpus.digest != read_corpus(tokenizer, path, 5, 128).digest
    path.write_text(json.dumps(rows[-1]))
    with pytest.raises(BadSource, match="no rows of the split 'dev'"):
        read_corpus(tokenizer, path, 4, 128)


def test_the_command_prints_and_answers_in_json(
    root: Path, put: Adder, folders: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    put("base", folders / "base")
    put("light", folders / "light", base="base")
    for flags in ([], ["--json"]):
        argv = ["zoo", "--zoo", str(root), "compare", "base", "light", "--rows", "3", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        assert main() == 0
        out = capsys.readouterr().out
        if flags:
            assert json.loads(out)["edges"][0]["level"] == "chain"
        else:
            assert "whole chain" in out
    monkeypatch.setattr(sys, "argv", ["zoo", "--zoo", str(root), "compare", "base", "gone"])
    assert main() == 2
