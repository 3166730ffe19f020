"""Native activations and choices among logits, against float64 and torch."""

import pytest
import torch
from torch import Tensor

from ext.build import supported
from ext.cpu import CpuOps
from ext.ops import Activation

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")


@pytest.fixture(scope="module", params=supported())
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(threads=2, isa=request.param)


def exact(x: Tensor, kind: Activation) -> Tensor:
    x = x.double()
    if kind == "silu":
        return x * torch.sigmoid(x)
    if kind == "gelu":
        return x * torch.special.erfc(-x / 2**0.5) / 2
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activations_are_good_to_a_few_millionths_of_their_value(
    ops: CpuOps, kind: Activation
) -> None:
    x = torch.cat((torch.linspace(-6, 6, 200_001), torch.linspace(-1e-3, 1e-3, 1001)))
    got, right = ops.activate(None, x.view(1, -1), kind)[0].double(), exact(x, kind)
    bound = 3e-6 if kind == "gelu" else 6e-6 if kind == "gelu_tanh" else 1e-6
    assert ((got - right).abs() <= bound * right.abs() + 1e-38).all()


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activations_of_extreme_values_stay_finite(ops: CpuOps, kind: Activation) -> None:
    x = torch.tensor([[-3e38, -1e4, -100.0, -50.0, -0.0, 0.0, 50.0, 1e4, 3e38]])
    got = ops.activate(None, x, kind)
    torch.testing.assert_close(got, torch.clamp(x, min=0.0), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (1, 1536), (7, 1531), (40, 1536)])
def test_gates(ops: CpuOps, rows: int, width: int) -> None:
    gate, up = torch.randn(2, rows, width)
    torch.testing.assert_close(ops.activate(gate, up, "silu"), torch.nn.functional.silu(gate) * up)
    with pytest.raises(ValueError, match="differ"):
        ops.activate(gate, up[:, 1:].contiguous() if width > 1 else up[:0], "silu")


@pytest.mark.parametrize("width", [1, 3, 8, 100, 49_152, 50_257])
def test_argmax_is_the_first_of_the_largest(ops: CpuOps, width: int) -> None:
    logits = torch.randn(5, width)
    logits[1, width // 2 :] = 9.0
    logits[2] = -torch.inf
    assert ops.argmax(logits).tolist() == [row.tolist().index(max(row.tolist())) for row in logits]
