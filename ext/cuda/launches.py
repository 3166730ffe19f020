"""Triton's kernels under their names, whose failures come in our words.

A kernel that a device has no room for is found when it is first launched, with an error that is no
RuntimeError: translated, it fails a batch as any other error of a device does, not the worker."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from triton.runtime.errors import TritonError


class Kernels:
    """The kernels of a module: `kernels.name[grid](...)` launches one."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> "_Kernel":
        kernel = _Kernel(name, getattr(self._module, name))
        setattr(self, name, kernel)
        return kernel


class _Kernel:
    def __init__(self, name: str, kernel: Any) -> None:  # noqa: ANN401 - Triton's, not typed
        self._name = name
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        launch = self._kernel[grid]

        def run(*given: object, **constants: object) -> None:
            try:
                launch(*given, **constants)
            except TritonError as error:
                raise RuntimeError(
                    f"this device cannot run the kernel {self._name}: {error}"
                ) from error

        return run
