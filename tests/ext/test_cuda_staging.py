"""Weights reach the device unchanged, on a stream of their own, whatever else runs."""

import threading

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from ext.cuda.ops import CudaOps
from ext.cuda.staging import Staging

pytestmark = pytest.mark.gpu
PIECE = 32 << 20


@pytest.mark.parametrize("count", [0, 1, PIECE - 1, PIECE, 5 * PIECE + 7])
def test_every_byte_arrives_in_order(count: int) -> None:
    staging = Staging(torch.device("cuda:0"))
    source = torch.randint(0, 255, (count,), dtype=torch.uint8)
    with staging.loading():
        first = staging.copy(source)
        second = staging.copy(source.flip(0))
    assert torch.equal(first.cpu(), source)
    assert torch.equal(second.cpu(), source.flip(0))


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_what_was_stored(transposed: bool) -> None:
    ops = CudaOps("cuda:0")
    weight = torch.randn(300, 70).bfloat16()
    with ops.loading():
        matrix = ops.matrix(weight, transposed=transposed)
    assert matrix.data.is_contiguous()
    assert torch.equal(matrix.data.cpu(), weight.t() if transposed else weight)


def test_another_thread_loads_while_a_step_is_captured() -> None:
    ops = CudaOps("cuda:0")
    weight, loaded = torch.randn(1 << 12, 1 << 12), []

    def load() -> None:
        for _ in range(20):
            with ops.loading():
                loaded.append(ops.matrix(weight))

    thread = threading.Thread(target=load)
    x = torch.ones(1 << 20, device="cuda:0")
    thread.start()
    for _ in range(20):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = x * 2
        graph.replay()
    thread.join()
    assert float(y.sum()) == 2 * len(x)
    assert len(loaded) == 20
    assert torch.equal(loaded[-1].data.cpu(), weight)


def test_too_much_is_told_in_a_sentence() -> None:
    ops = CudaOps("cuda:0")
    with pytest.raises(MemoryError, match="cuda:0 has no memory left"), ops.loading():
        torch.empty(1 << 40, device=ops.device)
    with ops.loading():
        assert ops.matrix(torch.ones(2, 2)).data.sum().item() == 4
