"""Chooses the kernels for a device, once, and says which and why.

Called by the worker at start; the choice is reported by `launch` and `status`.
"""

import logging
import re
from typing import TYPE_CHECKING, Literal, cast

import torch

from ext.build import Unavailable
from ext.ops import Dtype, Ops
from ext.parking import Parking
from ext.reference import TorchOps
from ext.replays import Replays

if TYPE_CHECKING:
    from ext.cpu import CpuOps
    from ext.cuda.flash import FlashAttention

_log = logging.getLogger(__name__)

# Whose kernels attend on CUDA; "auto": FlashInfer's where it is installed and has the shape.
AttentionBackend = Literal["auto", "flashinfer", "triton"]
# Up to so many rows products of a CPU may take little longer than reading what they multiply.
_FEW_ROWS = 8
# Versions of FlashInfer whose interface `ext.cuda.flash` was written to.
FLASHINFER, FLASHINFER_AFTER = (0, 6, 14), (0, 7)


def select_ops(
    device: str,
    wanted: str,
    threads: int,
    dtype: Dtype = "auto",
    attention: AttentionBackend = "auto",
) -> Ops:
    """Kernels for `device` ("cpu" or "cuda:N"): `wanted` "auto", "native" or "torch". `dtype`
    "auto" is exact: float32, on CUDA what the weights are. What cannot round stays exact.
    `attention` is for CUDA alone; "flashinfer" insists.

    "auto" takes the native ones where they run and falls back to torch with a warning. Raises
    Unavailable where a device, or what was insisted on, is not to be had.
    """
    if device != "cpu":
        require_cuda()
        if dtype == "float32":
            _log.info("kernels for %s: torch's, which alone multiply float32", device)
            return TorchOps(device)
    if wanted != "torch":
        try:
            if device == "cpu":
                return _cpu_ops(threads, dtype)
            return _cuda_ops(device, dtype, attention)
        except Unavailable as error:
            if wanted == "native" or attention == "flashinfer":
                raise
            _log.warning("native kernels for %s are not used: %s", device, error)
    return TorchOps(device)


def select_replays(ops: Ops) -> Replays | None:
    """Captured decode steps for these kernels; None where steps are run as they are."""
    if ops.name == "cpu":
        from ext.recordings import Recordings

        return Recordings(cast("CpuOps", ops))
    if ops.name == "cuda":
        from ext.cuda.graphs import Graphs

        return Graphs(ops.device)
    return None


def select_guessing(ops: Ops) -> int:
    """Rows up to which a wave of these kernels waits for memory, so that guessed tokens are
    verified at little cost; 0 where rows may depend on what shares their wave, or where captured
    steps have one row of a sequence."""
    return _FEW_ROWS if ops.name == "cpu" else 0


def select_parking(ops: Ops, limit_bytes: int) -> Parking | None:
    """Host memory for weights that leave these kernels' device; None where they lie in host memory
    anyway, or have none left to themselves."""
    if ops.name != "cuda" or limit_bytes <= 0:
        return None
    from ext.cuda.parked import Parked

    return Parked(limit_bytes, ops.device)


def require_cuda() -> None:
    """Raises Unavailable where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise Unavailable(
            f"torch {torch.__version__} finds no CUDA device: install its CUDA build and NVIDIA's "
            "driver, or use --device cpu"
        )


def _cpu_ops(threads: int, dtype: Dtype) -> Ops:
    from ext.cpu import CpuOps

    return CpuOps(threads=threads, rounding=dtype == "bfloat16")


def _cuda_ops(device: str, dtype: Dtype, attention: AttentionBackend) -> Ops:
    try:
        import triton

        from ext.cuda.ops import CudaOps
    except ImportError as error:
        raise Unavailable(
            f"triton cannot be imported ({error}): install it beside torch, pip install triton"
        ) from error
    # Triton launches on the device that is current.
    torch.cuda.set_device(device)
    flash = None if attention == "triton" else _flash(device, attention)
    name = torch.cuda.get_device_name(device)
    _log.info("kernels for %s: cuBLAS, Triton %s (%s)", device, triton.__version__, name)
    return cast("Ops", CudaOps(device, dtype, flash))


def _flash(device: str, attention: AttentionBackend) -> "FlashAttention | None":
    """FlashInfer, if there is one of a version that we know how to call."""
    from ext.cuda.flash import FlashAttention

    try:
        import flashinfer  # pyright: ignore[reportMissingImports] - an extra

        require_flashinfer(flashinfer.__version__)
    except Exception as error:  # importing it runs checks of its own
        if attention == "flashinfer":
            raise Unavailable(
                f"FlashInfer cannot be used ({error}): install flashinfer-python, or use "
                "--attention-backend triton"
            ) from error
        _log.info("attention on %s: Triton's kernels; no FlashInfer (%s)", device, error)
        return None
    version = flashinfer.__version__
    _log.info("attention on %s: FlashInfer %s where it has the shape", device, version)
    return FlashAttention(flashinfer, torch.device(device))


def require_flashinfer(version: str) -> None:
    """Raises Unavailable unless a version of FlashInfer has the interface that is called here."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if not FLASHINFER <= numbers < FLASHINFER_AFTER:
        known = ".".join(map(str, FLASHINFER))
        raise Unavailable(f"version {version} is not {known} or a later one of that line")
