"""Chooses the kernels for a device, once, and says which and why.

Called by the worker at start; the choice is reported by `launch` and `status`.
"""

import logging
from typing import cast

import torch

from ext.build import Unavailable
from ext.ops import Dtype, Ops, Replays
from ext.reference import TorchOps

_log = logging.getLogger(__name__)


def select_ops(device: str, wanted: str, threads: int, dtype: Dtype = "auto") -> Ops:
    """Kernels for `device` ("cpu" or "cuda:N"): `wanted` "auto", "native" or "torch". `dtype`
    "auto" is exact: float32, on CUDA what the weights are. What cannot round stays exact.

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
            return _cpu_ops(threads, dtype) if device == "cpu" else _cuda_ops(device, dtype)
        except Unavailable as error:
            if wanted == "native":
                raise
            _log.warning("native kernels for %s are not used: %s", device, error)
    return TorchOps(device)


def select_replays(ops: Ops) -> Replays | None:
    """Captured decode steps for these kernels; None where steps are run as they are."""
    if ops.name != "cuda":
        return None
    from ext.cuda.graphs import Graphs

    return Graphs(ops.device)


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


def _cuda_ops(device: str, dtype: Dtype) -> Ops:
    try:
        import triton

        from ext.cuda.ops import CudaOps
    except ImportError as error:
        raise Unavailable(
            f"triton cannot be imported ({error}): install it beside torch, pip install triton"
        ) from error
    # Triton launches on the device that is current.
    torch.cuda.set_device(device)
    name = torch.cuda.get_device_name(device)
    _log.info("kernels for %s: cuBLAS, Triton %s (%s)", device, triton.__version__, name)
    return cast("Ops", CudaOps(device, dtype))
