"""What Triton says of a kernel that a device cannot run reaches the worker as an error it knows."""

from collections.abc import Callable
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="needs triton")

from triton.runtime.errors import OutOfResources

from ext.cuda.launches import Kernels


class Huge:
    """A kernel that takes more than there is once its constant SIZE is over 100."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*given: list[object], SIZE: int) -> None:  # noqa: N803
            if SIZE > 100:
                raise OutOfResources(SIZE, 100, "shared memory")
            given[0].append((grid, SIZE))

        return launch


def test_a_kernel_that_does_not_fit_is_an_error_of_the_device() -> None:
    module = ModuleType("kernels")
    module.huge = Huge()  # type: ignore[attr-defined]
    kernels = Kernels(module)
    seen: list[object] = []
    for _ in range(2):
        kernels.huge[(3, 4)](seen, SIZE=7)
    assert seen == [((3, 4), 7)] * 2
    with pytest.raises(RuntimeError, match=r"cannot run the kernel huge: .*shared memory"):
        kernels.huge[(1,)](seen, SIZE=101)
    with pytest.raises(AttributeError):
        kernels.other  # noqa: B018
