"""Fine-tunes stored as deltas and as equivalents: what is kept, what was measured, what is
served."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import builders
from tests.zoo.conftest import Adder
from zoo.catalog import Catalog
from zoo.deltas.calibration import Calibration
from zoo.deltas.delta import Delta, compress
from zoo.door import offline
from zoo.equivalence.chains import manifests_of, written_out
from zoo.errors import BadCheckpoint, BadSource, UnsupportedOption
from zoo.export import export
from zoo.keeping.listing import Listing
from zoo.keeping.reach import Reach
from zoo.keeping.sweep import sweep
from zoo.keeping.verify import verify
from zoo.manifest import LowRank, NormWeights, Variant
from zoo.progress import Quiet
from zoo.store import Store

PROMPT = [5, 40, 7, 90, 23, 301, 12]


def low_rank_tune(path: Path, base: Path, scale: float = 0.05) -> Path:
    """A fine-tune whose matrices moved along two directions each, and whose norms moved too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            shape = parameter.shape
            if parameter.dim() == 2:
                change = torch.randn(shape[0], 2, generator=draw) @ torch.randn(
                    2, shape[1], generator=draw
                )
            else:
                change = torch.randn(shape, generator=draw)
            parameter.add_(scale * parameter.std() * change)
    model.save_pretrained(path)
    return path


def logits(root: Path, variant: Variant) -> torch.Tensor:
    with offline(root) as runner:
        model = runner.load(manifests_of(Catalog(root), variant))
        return model.logits([PROMPT])[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny bases with an untied and a tied head, and fine-tunes of them."""
    folder = tmp_path_factory.mktemp("tunes")
    for kind in ("llama", "gpt2"):
        base = getattr(builders, f"tiny_{kind}")(folder / kind)
        low_rank_tune(folder / f"{kind}-tuned", base)
    builders.tiny_llama(folder / "tied", tie_word_embeddings=True)
    low_rank_tune(folder / "tied-tuned", folder / "tied")
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tied"])
def test_a_delta_stands_on_its_base_and_behaves_like_the_exact_one(
    kind: str, root: Path, put: Adder, folders: Path
):
    base = put("base", folders / kind)
    exact = put("exact", folders / f"{kind}-tuned", base="base")
    delta = put("delta", folders / f"{kind}-tuned", base="base", store="delta", rows=4,
                delta_budget=0.5)  # fmt: skip
    assert delta.store == "delta"
    assert delta.measured is not None
    assert delta.measured.agreement.value >= 0.9
    assert delta.measured.kl.value < 1e-3
    assert delta.measured.sequences == 4
    assert 0 < delta.measured.kept_bytes <= delta.measured.saved_bytes
    theirs, ours, upon = (logits(root, variant) for variant in (base, exact, delta))
    assert (upon - ours).abs().max() < 0.05 * (theirs - ours).abs().max()
    # GPT-2's learned positions are the one tensor that no piece can express.
    assert delta.report["changed"] == (1 if kind == "gpt2" else 0)
    assert delta.report["attached"] > 8


def test_a_delta_keeps_only_its_pieces_on_disk(root: Path, put: Adder, folders: Path):
    put("base", folders / "llama")
    before = set(Store(root).digests())
    delta = put("delta", folders / "llama-tuned", base="base", store="delta", rows=2,
                delta_budget=0.3)  # fmt: skip
    reach = Reach(Catalog(root))
    new = set(Store(root).digests()) - before
    assert new <= reach.footprint(delta).objects
    assert delta.measured is not None
    infos = [Store(root).info(digest) for digest in new]
    assert sum(one.nbytes for one in infos if one.dtype != "BLOB") == delta.measured.kept_bytes
    assert verify(root, Quiet()).damages == []
    assert sweep(root, delete=True, wait_s=1, progress=Quiet()).objects == []
    assert Listing(root).rows()[1].name == "delta"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tied"])
def test_a_delta_is_exported_as_it_is_served(
    kind: str, root: Path, put: Adder, folders: Path, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    put("base", folders / kind)
    delta = put("delta", folders / f"{kind}-tuned", base="base", store="delta", rows=2,
                delta_budget=0.3)  # fmt: skip
    written = export(root, "delta", tmp_path / "out", Quiet())
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert torch.allclose(
        logits(root, delta), expected, rtol=1e-4, atol=1e-4 * expected.abs().max()
    )


def compressed(root: Path, put: Adder, folders: Path, share: float) -> tuple[Store, Delta]:
    put("base", folders / "llama")
    put("exact", folders / "llama-tuned", base="base")
    catalog, store = Catalog(root), Store(root)
    base, exact = (
        [catalog.unit(digest) for digest in catalog.chain(catalog.variant(name).chain).units]
        for name in ("base", "exact")
    )
    return store, compress(store, base, exact, share, Quiet())


# The smallest leaves matrices of a single rank.
@pytest.mark.parametrize("share", [1 / 4, 1 / 8, 1 / 40])
def test_the_budget_is_kept_and_used(root: Path, put: Adder, folders: Path, share: float):
    store, delta = compressed(root, put, folders, share)
    pieces = [piece for pieces in delta.pieces for piece in pieces]
    low = [piece for piece in pieces if isinstance(piece, LowRank)]
    norms = [piece.weight for piece in pieces if isinstance(piece, NormWeights)]
    digests = {*norms, *(d for piece in low for d in (piece.a, piece.b))}
    kept = sum(store.info(digest).nbytes for digest in digests)
    catalog = Catalog(root)
    whole = {
        digest
        for unit in catalog.chain(catalog.variant("exact").chain).units
        for digest in catalog.unit(unit).tensors.values()
    }
    budget = share * sum(store.info(digest).nbytes for digest in whole)
    assert 0.7 * budget < kept <= budget
    assert len(norms) == 9
    assert all(store.tensor(piece.a).shape[0] == piece.rank for piece in low)


def test_a_budget_that_norms_alone_exceed_is_refused(root: Path, put: Adder, folders: Path):
    with pytest.raises(BadCheckpoint, match="raise --delta-budget"):
        compressed(root, put, folders, 1e-4)


def test_a_delta_is_nearest_in_what_it_makes_of_its_text(
    root: Path, put: Adder, folders: Path, tmp_path: Path
):
    put("base", folders / "llama")
    tuned = builders.fine_tune(tmp_path / "tuned", folders / "llama", [""], scale=0.02)
    exact = put("exact", tuned, base="base")
    catalog, store = Catalog(root), Store(root)
    chains = [manifests_of(catalog, catalog.variant(name)) for name in ("base", "exact")]
    base, whole = ([unit for _, unit in chain.units] for chain in chains)
    # Few tokens, over and over: what they do not use counts little.
    text = torch.randint(0, 12, (24, 40), generator=torch.Generator().manual_seed(0))
    found: list[Delta] = []
    with offline(root) as runner:
        reader = runner.load(chains[1])
        known = reader.logits(text.tolist())
        divergences = []
        rooms = (0, 1)
        calibrations = [None, *(Calibration(reader, text, Quiet(), room) for room in rooms)]
        for calibration in calibrations:
            delta = compress(store, base, whole, 0.2, Quiet(), calibration)
            model = runner.load(written_out(delta.units, delta.attachments, exact.context))
            others = model.logits(text.tolist())
            pairs = zip(known, others, strict=True)
            divergences.append(sum(float((a - b).square().sum()) for a, b in pairs))
            found.append(delta)
    assert divergences[1] < 0.7 * divergences[0]
    assert found[1].attachments == found[2].attachments


def test_a_delta_reads_the_rows_that_it_is_given(
    root: Path, put: Adder, folders: Path, tmp_path: Path
):
    put("base", folders / "llama")
    rows = [{"prompt": f"say {i}", "response": f"{i} " * 40, "split": "train"} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    chains = [
        put(name, folders / "llama-tuned", base="base", store="delta", rows=2, delta_budget=0.2,
            text=text).chain
        for name, text in (("plain", None), ("fitted", path), ("again", path))
    ]  # fmt: skip
    assert chains[0] != chains[1] == chains[2]
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(BadSource, match="too little text"):
        put("short", folders / "llama-tuned", base="base", store="delta", text=path)


def test_an_equivalent_points_at_its_base_within_its_bound(
    root: Path, put: Adder, tmp_path: Path, folders: Path
):
    tuned = builders.fine_tune(tmp_path / "tuned", folders / "llama", ["layers.0."], scale=1e-5)
    strong = builders.fine_tune(tmp_path / "strong", tuned, ["layers.3."], scale=0.3, seed=9)
    base = put("base", folders / "llama")
    variant = put("tuned", strong, base="base", store="equivalent", rows=8, min_agreement=0.95)
    assert variant.measured is not None
    assert variant.bound == 0.95
    assert variant.measured.agreement.low >= 0.95
    units = [Catalog(root).chain(one.chain).units for one in (base, variant)]
    own = [place for place, pair in enumerate(zip(*units, strict=True)) if pair[0] != pair[1]]
    assert own
    assert set(own) <= {7, 8}
    assert variant.report == {"shared": 10 - len(own), "changed": len(own), "attached": 0}
    assert variant.measured.saved_bytes > 0
    written = load_file(export(root, "tuned", tmp_path / "out", Quiet()) / "model.safetensors")
    before = load_file(folders / "llama" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert written[name].equal(before[name])


def test_a_task_is_scored_beside_the_exact_one(root: Path, put: Adder, folders: Path):
    put("base", folders / "llama")
    variant = put("delta", folders / "llama-tuned", base="base", store="delta", rows=3,
                  delta_budget=0.3, task="dates")  # fmt: skip
    assert variant.measured is not None
    assert variant.measured.task == "dates"
    assert variant.measured.score == variant.measured.exact_score
    assert variant.measured.score is not None
    assert variant.measured.score.value == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "delta", "min_agreement": 0.9}, "only valid with --store equivalent"),
        ({"store": "delta", "budget": 0.1}, "only valid with --store equivalent"),
        ({"store": "equivalent", "min_agreement": 1.5}, "from 0 to 1"),
        ({"store": "equivalent", "budget": -1.0}, "from 0"),
        ({"store": "equivalent", "text": Path("rows.jsonl")}, "only valid with --store delta"),
        ({"store": "delta", "delta_budget": 0.0}, "share of the bytes"),
        ({"store": "most"}, "exact, delta or equivalent"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    put: Adder, folders: Path, options: dict[str, object], message: str
):
    with pytest.raises(UnsupportedOption, match=message):
        put("variant", folders / "llama", **options)


def test_an_adapter_has_only_one_way(put: Adder, folders: Path, tmp_path: Path):
    put("base", folders / "llama")
    adapter = builders.tiny_lora(tmp_path / "adapter", folders / "llama")
    with pytest.raises(UnsupportedOption, match="for whole fine-tunes"):
        put("tuned", adapter, base="base", store="delta")
    assert put("tuned", adapter, base="base", private=True, tenant="a").private


@pytest.mark.parametrize("store", ["delta", "equivalent"])
def test_without_a_base_there_is_nothing_to_stand_on(put: Adder, folders: Path, store: str):
    with pytest.raises(BadSource, match="give --base NAME"):
        put("variant", folders / "llama", store=store)


def test_a_failure_on_the_way_leaves_nothing(
    root: Path, put: Adder, folders: Path, monkeypatch: pytest.MonkeyPatch
):
    put("base", folders / "llama")
    before = set(Store(root).digests())

    def fail(*_: object) -> None:
        raise OSError("no more room")

    monkeypatch.setattr("zoo.adding.approximate.compress", fail)
    with pytest.raises(OSError, match="no more room"):
        put("delta", folders / "llama-tuned", base="base", store="delta")
    assert set(Store(root).digests()) == before
    assert [variant.name for variant in Catalog(root).variants()] == ["base"]
