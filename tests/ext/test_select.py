"""Which kernels a worker gets, and what it says where there are none."""

import sys

import pytest
import torch

from ext.build import Unavailable
from ext.select import select_ops, select_replays


@pytest.mark.parametrize(
    ("wanted", "name"), [("auto", "cpu"), ("native", "cpu"), ("torch", "torch")]
)
def test_a_cpu_has_its_own_kernels_unless_torch_is_asked_for(wanted: str, name: str) -> None:
    ops = select_ops("cpu", wanted, 1)
    assert (ops.name, ops.device.type) == (name, "cpu")


def test_steps_are_captured_for_native_kernels() -> None:
    pytest.importorskip("triton", reason="needs triton")
    from ext.cuda.ops import CudaOps

    assert select_replays(select_ops("cpu", "torch", 1)) is None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for ops in (select_ops("cpu", "native", 1), CudaOps(device)):
        replays = select_replays(ops)
        assert replays is not None
        assert (replays.counts.captured, replays.counts.replayed) == (0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_a_device_that_is_not_there_is_named_with_what_to_do(wanted: str) -> None:
    with pytest.raises(Unavailable, match=r"finds no CUDA device.*--device cpu"):
        select_ops("cuda:0", wanted, 1)


@pytest.mark.gpu
def test_a_gpu_has_its_own_kernels_or_torch_without_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert select_ops("cuda:0", "auto", 1).name == "cuda"
    for name in [name for name in sys.modules if name.startswith("ext.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert select_ops("cuda:0", "auto", 1).name == "torch"
    assert "pip install triton" in caplog.text
    with pytest.raises(Unavailable, match="pip install triton"):
        select_ops("cuda:0", "native", 1)


@pytest.mark.gpu
def test_without_flashinfer_our_own_kernels_attend_unless_it_is_insisted_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with caplog.at_level("INFO"):
        assert select_ops("cuda:0", "auto", 1).name == "cuda"
    assert "attention on cuda:0: Triton's kernels; no FlashInfer" in caplog.text
    with pytest.raises(Unavailable, match="install flashinfer-python, or use --attention-backend"):
        select_ops("cuda:0", "auto", 1, attention="flashinfer")
