"""The device that is measured: what it can do at most, and how long its kernels are busy."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from bench.ceiling import cores, measure
from bench.opsclock import OpsClock
from bench.roofline import Limits
from bench.spread import median
from ext.ops import Ops
from ext.select import select_ops

_COPY_BYTES = 2 << 30
_SIZE = 8192
_REPEATS = 10


class NoDevice(Exception):
    """There is no device of the kind that was asked for; the message says what to do."""


class Device(Protocol):
    """What a bench needs of the place where the blocks run. `name` is the worker's word for it,
    `ops` its kernels."""

    name: str
    title: str
    ops: Ops

    def limits(self) -> Limits:
        """Its memory bandwidth and its rate in matrix products, measured now."""
        ...

    def finish(self) -> None:
        """Wait for all that was started."""
        ...

    def free(self) -> None:
        """Give back memory that nothing uses."""
        ...

    def busy_s(self, work: Callable[[], None]) -> float:
        """Seconds of `work` in which a kernel ran or data was copied."""
        ...


class CudaDevice:
    """The first GPU."""

    name = "cuda:0"

    def __init__(self) -> None:
        self._device = torch.device(self.name)
        self.title = torch.cuda.get_device_name(self._device)
        self.ops = select_ops(self.name, "auto", 0)

    def limits(self) -> Limits:
        """See `Device`. A copy counts twice: what is read and what is written. Both on random bf16,
        which draws as much power as weights do."""
        draw = torch.Generator(self._device).manual_seed(0)
        data = torch.empty(_COPY_BYTES // 2, dtype=torch.bfloat16, device=self._device)
        data.normal_(generator=draw)
        target = torch.empty_like(data)
        copy_s = self._median_s([lambda: target.copy_(data)])
        a, b, c, d = data[: 4 * _SIZE * _SIZE].view(4, _SIZE, _SIZE)
        pairs = ((a, b), (c, d))
        product_s = self._median_s([lambda x=x, y=y: torch.mm(x, y) for x, y in pairs])
        return Limits(2 * _COPY_BYTES / copy_s, 2 * _SIZE**3 / product_s)

    def finish(self) -> None:
        """See `Device`."""
        torch.cuda.synchronize(self._device)

    def free(self) -> None:
        """See `Device`."""
        torch.cuda.empty_cache()

    def busy_s(self, work: Callable[[], None]) -> float:
        """See `Device`; from torch's profiler, which slows what lies between kernels."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            work()
            self.finish()
        found = [
            one.time_range for one in profiler.events() or [] if one.device_type == DeviceType.CUDA
        ]
        return covered([(span.start, span.end) for span in found]) / 1e6

    def _median_s(self, works: Sequence[Callable[[], Tensor]]) -> float:
        """Seconds of one of the works, which take turns so that no cache holds their data."""
        times: list[float] = []
        for number in range(_REPEATS + len(works)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            works[number % len(works)]()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        return median(times[len(works) :])


class CpuDevice:
    """This machine's cores."""

    name = "cpu"

    def __init__(self) -> None:
        torch.set_num_threads(cores())
        self.title = f"{cores()} cores"
        self.ops = select_ops("cpu", "auto", cores())
        self._clock = OpsClock(self.ops)

    def limits(self) -> Limits:
        """See `Device`."""
        return measure()

    def finish(self) -> None:
        """Nothing is ever under way."""

    def free(self) -> None:
        """It goes back by itself."""

    def busy_s(self, work: Callable[[], None]) -> float:
        """See `Device`."""
        self._clock.reset()
        work()
        return sum(self._clock.seconds.values())


def find_device(kind: str) -> Device:
    """The device of a kind: "cuda", "cpu", or "auto" for a GPU. Raises NoDevice."""
    if kind == "cpu":
        return CpuDevice()
    if not torch.cuda.is_available():
        raise NoDevice("no GPU was found: give --device cpu to try this on the CPU")
    return CudaDevice()


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The time within at least one of the spans (start, end)."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
