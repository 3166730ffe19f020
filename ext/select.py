"""Chooses the kernels for a device, once, and says which and why.

Called by the worker at start; the choice is reported by `launch` and `status`.
"""

import logging

from ext.ops import Ops
from ext.reference import TorchOps

_log = logging.getLogger(__name__)


def select_ops(device: str, wanted: str, threads: int) -> Ops:
    """Kernels for `device` ("cpu" or "cuda:N"): `wanted` "auto", "native" or "torch".

    "auto" takes the native ones where they run and falls back to torch with a warning.
    """
    if device == "cpu" and wanted != "torch":
        from ext.build import Unavailable
        from ext.cpu import CpuOps

        try:
            return CpuOps(threads=threads)
        except Unavailable as error:
            if wanted == "native":
                raise
            _log.warning("native CPU kernels are not used: %s", error)
    return TorchOps(device)
