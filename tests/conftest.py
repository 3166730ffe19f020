"""Fixtures and options of the whole suite."""

import os
import signal
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter where there is no device; it is read at import.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that
# interrupt their children must not depend on how the suite was started.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail, not skip, gpu tests without a device"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords or "multi_gpu" in item.keywords]
    if not marked or config.getoption("--require-gpu"):
        return
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in marked:
        needed = 2 if "multi_gpu" in item.keywords else 1
        if have < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a data home of its own."""
    path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("BLOCKLLM_HOME", str(path))
    return path
