"""A device's own readings."""

import time

import pytest

from workers.gauge import Gauge


def test_a_host_tells_its_load_and_memory() -> None:
    gauge = Gauge("cpu", period_s=0.02)
    first = gauge.reading
    deadline = time.monotonic() + 10
    while gauge.reading is first and time.monotonic() < deadline:
        time.sleep(0.01)
    gauge.stop()
    assert gauge.reading is not first
    assert 0 <= gauge.reading["utilization"] <= 1
    assert 0 < gauge.reading["memory_used_bytes"] < gauge.reading["memory_total_bytes"]


def test_a_device_without_a_driver_tells_nothing() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    gauge = Gauge("cuda:0", period_s=0.02)
    gauge.stop()
    assert gauge.reading == {}


@pytest.mark.gpu
def test_a_gpu_tells_its_load_memory_and_power() -> None:
    gauge = Gauge("cuda:0", period_s=0.05)
    time.sleep(0.3)
    gauge.stop()
    assert 0 <= gauge.reading["utilization"] <= 1
    assert gauge.reading["memory_total_bytes"] > 1 << 30
    assert gauge.reading["power_w"] > 0
