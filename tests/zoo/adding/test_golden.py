"""Logits that are the reference's pass; where float32 itself is unsure, float64 decides."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bench import adapters
from tests import builders
from zoo.adapters.adapter import read_adapter
from zoo.adding.add import AddOptions, add
from zoo.adding.golden import TOLERANCE, departure
from zoo.adding.reference import Expected, in_float64, run
from zoo.adding.witness import call_witness
from zoo.catalog import Catalog
from zoo.compose import ground_of
from zoo.progress import Quiet
from zoo.store import Store

TOKENS = [7, 300, 2, 45, 8, 9, 250, 3, 120, 121, 122, 5, 6, 64, 310, 1]


class Cancelling(nn.Module):
    """A network that takes away again what it added, and so loses digits: the more, the larger."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self._size = size
        self.table = nn.Parameter(torch.linspace(-1, 1, 32 * 8).reshape(32, 8).sin())

    def forward(self, input_ids: Tensor, output_hidden_states: bool) -> SimpleNamespace:
        assert output_hidden_states
        found = self.table[input_ids]
        return SimpleNamespace(logits=found + self._size - self._size, hidden_states=(found, found))


def expected_of(size: float) -> Expected:
    return run(Cancelling(size), [[3], [1, 5, 9, 30]])


def moved(expected: Expected, by: float) -> list[Tensor]:
    """Logits whose farthest lies `by` of their size away."""
    away = [logits.clone() for logits in expected.logits]
    away[1][2, 3] += by * expected.logits[1].abs().max()
    return away


def test_what_agrees_in_float32_is_compared_there():
    expected = expected_of(0.0)
    for by, passes in ((0.0, True), (0.9 * TOLERANCE, True), (1.2 * TOLERANCE, False)):
        found = departure(moved(expected, by), expected)
        assert found.passes is passes
        assert found.error == pytest.approx(by, rel=0.01, abs=1e-7)


def test_where_float32_parts_float64_decides():
    """This one loses digits: its own float32 is not within the tolerance of the truth."""
    truth = in_float64(expected_of(2e4))
    assert truth is not None
    unsure = departure(truth.logits, expected_of(2e4))
    assert unsure.passes
    assert unsure.error < 1e-6, "ours is the true one, whatever the reference rounds"
    assert TOLERANCE < unsure.bound <= 1e-3
    for by, passes in ((0.9, True), (1.1, False)):
        found = departure(moved(truth, by * unsure.bound), expected_of(2e4))
        assert found.passes is passes
        assert found.error == pytest.approx(by * unsure.bound, rel=0.01)


def test_no_noise_excuses_more_than_a_bound():
    truth = in_float64(expected_of(1e6))
    assert truth is not None
    found = departure(moved(truth, 1.2e-3), expected_of(1e6))
    assert found.bound == pytest.approx(1e-3)
    assert not found.passes


def test_what_is_no_number_or_of_another_shape_never_passes():
    expected = expected_of(0.0)
    assert not departure(moved(expected, float("nan")), expected).passes
    assert not departure([logits[:, 1:] for logits in expected.logits], expected).passes


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", *adapters.BOTTLENECKS])
def test_a_tuned_reference_runs_in_float64_too(tmp_path: Path, kind: str):
    folder = builders.tiny_llama(tmp_path / "base")
    root = tmp_path / "zoo"
    base = add(root, "base", str(folder), AddOptions(golden=False), Quiet())
    source = adapters.make(kind, tmp_path / "source", folder)
    catalog, store = Catalog(root), Store(root)
    units = [catalog.unit(unit) for unit in catalog.chain(base.chain).units]
    adapter = read_adapter(source, str(source))
    single = run(call_witness(store, base, adapter, ground_of(store, base, units), 0), [TOKENS])
    double = in_float64(single)
    assert double is not None
    assert next(double.model.parameters()).dtype is torch.float64
    error = float((single.logits[0] - double.logits[0]).abs().max())
    assert 0 < error / float(double.logits[0].abs().max()) < 2e-5
