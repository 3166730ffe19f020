"""What a device tells of itself: utilization, memory, power and links, for placement and people.

NVML answers slowly and for a sliding window, so a thread asks it once a second and the worker's
loop reads the last answer. Devices are addressed by PCI bus id: ordinals differ between NVML and
CUDA. A machine without a driver tells what its processors do.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

from ext.memory import host_memory

_log = logging.getLogger(__name__)
_PERIOD_S = 1.0

Reading = dict[str, float]


class Gauge:
    """The last reading of a device, renewed every `period_s` seconds until `stop`."""

    def __init__(self, device: str, period_s: float = _PERIOD_S) -> None:
        self._read = _reader(device)
        self._period_s = period_s
        self._stopped = threading.Event()
        self.reading: Reading = self._read()
        self._thread = threading.Thread(target=self._renew, name="gauge", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._stopped.wait(self._period_s):
            self.reading = self._read()


def _reader(device: str) -> Callable[[], Reading]:
    if not device.startswith("cuda"):
        psutil.cpu_percent()
        return read_host
    try:
        return _nvml_reader(device)
    except _nvml_errors() as error:
        _log.warning("%s tells nothing of itself: %s", device, error)
        return dict


def read_host() -> Reading:
    """Utilization of all processors since the last call (0 to 1) and memory of the machine,
    bytes."""
    memory = host_memory()
    return {
        "utilization": psutil.cpu_percent() / 100,
        "memory_used_bytes": float(memory.total - memory.available),
        "memory_total_bytes": float(memory.total),
    }


def _nvml_errors() -> tuple[type[BaseException], ...]:
    import pynvml

    return (pynvml.NVMLError, OSError)


def _nvml_reader(device: str) -> Callable[[], Reading]:
    import pynvml

    pynvml.nvmlInit()
    about = torch.cuda.get_device_properties(device)
    bus = f"{about.pci_domain_id:08X}:{about.pci_bus_id:02X}:{about.pci_device_id:02X}.0"
    handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus.encode())
    fixed = dict(_topology(pynvml, handle))

    def read() -> Reading:
        reading = dict(fixed)
        with contextlib.suppress(pynvml.NVMLError):
            reading |= _load(pynvml, handle)
        return reading

    return read


def _load(nvml: Any, handle: Any) -> Reading:  # noqa: ANN401 - NVML's own objects have no types
    """Utilization (0 to 1, a kernel ran in the last window), memory in bytes, power in watts, PCIe
    traffic in bytes per second."""
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    reading = {
        "utilization": rates.gpu / 100,
        "memory_utilization": rates.memory / 100,
        "memory_used_bytes": float(memory.used),
        "memory_total_bytes": float(memory.total),
    }
    optional = {
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "temperature_c": lambda: float(
            nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        ),
        "pcie_sent_bytes_per_s": lambda: _pcie(nvml, handle, nvml.NVML_PCIE_UTIL_TX_BYTES),
        "pcie_received_bytes_per_s": lambda: _pcie(nvml, handle, nvml.NVML_PCIE_UTIL_RX_BYTES),
    }
    for name, ask in optional.items():
        # Virtual machines and older cards leave some of these out.
        with contextlib.suppress(nvml.NVMLError):
            reading[name] = ask()
    return reading


def _pcie(nvml: Any, handle: Any, counter: int) -> float:  # noqa: ANN401
    return nvml.nvmlDeviceGetPcieThroughput(handle, counter) * 1024.0


def _topology(nvml: Any, handle: Any) -> Iterator[tuple[str, float]]:  # noqa: ANN401
    """Links of the device: PCIe generation and width, NVLinks in use, and how near each other
    device is (NVML's levels: 10 same board .. 50 another node)."""
    with contextlib.suppress(nvml.NVMLError):
        yield "pcie_generation", float(nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle))
        yield "pcie_width", float(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle))
    links = 0
    with contextlib.suppress(nvml.NVMLError):
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            links += nvml.nvmlDeviceGetNvLinkState(handle, link)
    yield "nvlinks", float(links)
    with contextlib.suppress(nvml.NVMLError):
        for index in range(nvml.nvmlDeviceGetCount()):
            other = nvml.nvmlDeviceGetHandleByIndex(index)
            bus = nvml.nvmlDeviceGetPciInfo(other).busId
            if bus != nvml.nvmlDeviceGetPciInfo(handle).busId:
                level = nvml.nvmlDeviceGetTopologyCommonAncestor(handle, other)
                name = bus.decode() if isinstance(bus, bytes) else bus
                yield f"distance:{name}", float(level)
