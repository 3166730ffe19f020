"""A stitch between two widths: better than what needs no training, run by the workers as trained,
and refused where it makes no sense."""

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch

from tests.builders import tiny_llama
from tests.zoo.derived.conftest import MEASURE
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.derived.join import fitted, identity, joined, read_joins
from zoo.derived.network import Part
from zoo.derived.stitch import KIND, StitchFinding, StitchOptions, make_stitch
from zoo.derived.subject import read_subject
from zoo.derived.surrogate import SurrogateOptions, make_surrogate
from zoo.derived.training import Course
from zoo.door import offline
from zoo.errors import NameTaken, UnknownVariant, UnsupportedOption
from zoo.export import export
from zoo.findings import Findings
from zoo.progress import Quiet

OPTIONS = StitchOptions(measure=MEASURE, course=Course(steps=40, batch=8, rate=2e-3), name="both")


@pytest.fixture(scope="module")
def pair(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with "model" (64 channels) and "narrow" (48), made from it."""
    root = copytree(taught, tmp_path_factory.mktemp("pair") / "zoo")
    course = Course(steps=60, batch=8, rate=3e-3)
    options = SurrogateOptions(0.9, 0.75, measure=MEASURE, course=course, name="narrow")
    finding = make_surrogate(root, "model", options, Quiet())
    assert finding.shape.groups == 2
    assert read_subject(root, "narrow").variant.hidden == 48
    return root


@pytest.fixture(scope="module")
def stitched(pair: Path) -> StitchFinding:
    return make_stitch(pair, ("model", "narrow"), OPTIONS, Quiet())


def test_it_is_better_than_what_needs_no_training(stitched: StitchFinding) -> None:
    assert len(stitched.joins) >= 2
    for join in stitched.joins:
        kl = {name: quality.kl for name, quality in join.quality.items()}
        assert kl["trained"].high < kl["untrained"].low
        assert kl["trained"].high < kl["identity"].low
        assert kl["trained"].value < kl["fitted"].value
        assert (join.spec.hidden, join.spec.width) == (64, 48)
    assert stitched.best.quality["trained"].kl.value == min(
        join.quality["trained"].kl.value for join in stitched.joins
    )


def test_the_workers_run_the_chain_that_was_trained(pair: Path, stitched: StitchFinding) -> None:
    made = read_subject(pair, "both")
    assert made.variant.kind == "stitched"
    theirs = {*read_subject(pair, "model").digests, *read_subject(pair, "narrow").digests}
    assert len(set(made.digests) - theirs) == 1
    ids = torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), offline(pair) as door:
        wanted = made.network(torch.float32).logits(ids)
        model = door.load(read_subject(pair, "model").manifests)
        both = door.load(made.manifests)
        mixed = door.logits([(m, row.tolist()) for row in ids for m in (both, model)])
        true = read_subject(pair, "model").network(torch.float32).logits(ids)
    for row in range(3):
        torch.testing.assert_close(mixed[2 * row], wanted[row], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mixed[2 * row + 1], true[row], atol=1e-4, rtol=1e-4)


def test_what_no_config_can_say_is_not_exported(
    pair: Path, stitched: StitchFinding, tmp_path: Path
) -> None:
    assert stitched.name is not None
    with pytest.raises(UnsupportedOption, match="it is served only"):
        export(pair, stitched.name, tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


def test_it_is_kept_and_made_the_same_again(pair: Path, stitched: StitchFinding) -> None:
    (kept,) = Findings(Catalog(pair)).all(KIND, StitchFinding).values()
    assert kept == stitched
    named = Findings(Catalog(pair)).objects()
    assert {t for join in stitched.joins for t in join.tensors.values()} <= named.keys()
    again = make_stitch(pair, ("model", "narrow"), replace(OPTIONS, name=None), Quiet())
    assert [j.tensors for j in again.joins] == [j.tensors for j in stitched.joins]


def test_a_fit_finds_the_map_and_what_positions_add(root: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, 24, generator=generator)
    weight, first = torch.randn(12, 24, generator=generator), torch.zeros(16, 12)
    first[0] = 50.0
    part = fitted([(x, x @ weight.T + first)])
    torch.testing.assert_close(part.weights["map.weight"], weight, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(part.weights["positions.weight"][0], first[0], atol=0.5, rtol=1e-2)
    network = read_subject(root, "model").network(torch.float32)
    join = read_joins("2:2", network, network)[0]
    same = joined(network, network, join, Part(*_fields(identity(64, 64))))
    ids = torch.arange(3, 35)[None]
    torch.testing.assert_close(same.logits(ids), network.logits(ids), atol=1e-5, rtol=1e-5)


def _fields(part: Part) -> tuple:
    return part.spec, part.weights


def test_refusals(pair: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other")
    (other / "tokenizer.json").write_text(
        (other / "tokenizer.json").read_text().replace("<|im_end|>", "<|the_end|>")
    )
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (other / name).unlink(missing_ok=True)
    add(pair, "foreign", str(other), AddOptions(), Quiet())
    plain = replace(OPTIONS, name=None)
    with pytest.raises(UnsupportedOption, match="different tokenizers"):
        make_stitch(pair, ("model", "foreign"), plain, Quiet())
    with pytest.raises(UnknownVariant, match="no variant is called 'nobody'"):
        make_stitch(pair, ("model", "nobody"), plain, Quiet())
    for at in ("x", "1", "9:0", "0:1", "1:9"):
        with pytest.raises(UnsupportedOption, match="join"):
            make_stitch(pair, ("model", "narrow"), replace(plain, at=at), Quiet())
    with pytest.raises(NameTaken):
        make_stitch(pair, ("model", "narrow"), replace(plain, name="random"), Quiet())
