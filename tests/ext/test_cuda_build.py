"""The CUDA kernels compile for Hopper GPUs, also where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

# What a thread block of sm_90 may have.
SHARED_BYTES = 227 << 10
ROOT = Path(__file__).parents[2]


def test_every_kernel_compiles_for_sm_90(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "tests/ext/sm90.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout)
    assert len(shared) == 14
    assert max(shared.values()) <= SHARED_BYTES
