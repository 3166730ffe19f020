"""Building and loading the native library, its memory, and a run under the sanitizers."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ext import build
from ext.build import Unavailable, library, supported
from ext.cpu import CpuOps
from ext.memory import Arena
from ext.ops import Linear

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")


def test_builds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "cpu"
    shutil.copytree(build.SOURCES, sources, ignore=shutil.ignore_patterns("_build"))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))
    path = library("avx2")
    built = path.stat().st_mtime_ns
    assert path.parent == sources / "_build"
    assert library("avx2").stat().st_mtime_ns == built
    with (sources / "exports.cpp").open("a") as file:
        file.write("// another library\n")
    assert library("avx2") != path
    assert list(path.parent.glob("tmp*")) == []


def test_builds_in_the_data_home_where_the_package_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_is_writable", lambda folder: folder.parent.parent == tmp_path)
    monkeypatch.setenv("BLOCKLLM_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "cache").mkdir(parents=True)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0", "-Dread_only"))
    assert library("avx2").parent == tmp_path / "home" / "cache"


def test_says_why_it_cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler: install no-such-compiler"):
        CpuOps()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build, "FLAGS", ("-std=c++nonsense", "-shared"))
    with pytest.raises(Unavailable, match=r"cannot build the CPU kernels: .*error"):
        library("avx2")


def test_says_why_it_cannot_run() -> None:
    with pytest.raises(Unavailable, match=r"does not run sse2 kernels, only .*avx2"):
        CpuOps(isa="sse2")


@pytest.mark.skipif(len(supported()) < 2, reason="needs a machine that runs two sets of kernels")
def test_takes_the_next_best_where_the_compiler_does_not_know_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best, other = supported()[:2]
    flags = build.ISA_FLAGS | {best: ("-mno-such-instructions",)}
    monkeypatch.setattr(build, "ISA_FLAGS", flags)
    assert CpuOps(threads=1).isa == other
    with pytest.raises(Unavailable, match="cannot build the CPU kernels"):
        CpuOps(threads=1, isa=best)


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKLLM_ISA", "avx2")
    assert CpuOps(threads=1).isa == "avx2"


def test_dropped_weights_give_their_memory_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    arena = Arena()
    sizes = [3 << 20, 100, 5 << 20, 30 << 20, 64 << 20]
    arrays = [arena.take(size) for size in sizes]
    for array, size in zip(arrays, sizes, strict=True):
        assert len(array) == size
        assert array.ctypes.data % 64 == 0
        array.fill(1)
    before = resident()
    small = arrays[1]
    del arrays, array
    assert before - resident() > 95 << 20
    assert np.all(small == 1)


def test_results_take_the_memory_of_results_that_were_dropped() -> None:
    ops = CpuOps(threads=1)
    linear, x = Linear(ops.matrix(torch.ones(1024, 8))), torch.ones(1024, 8)
    for _ in range(3):
        ops.project(x, None, (linear,), (None,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        ops.project(x, None, (linear,), (None,))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 2 * 1024, "each result took new pages"


def test_weights_do_not_keep_their_source(tmp_path: Path) -> None:
    source = torch.ones(64, 64, dtype=torch.bfloat16)
    ops = CpuOps(threads=1)
    matrix, vector = ops.matrix(source), ops.vector(source[0])
    source.zero_()
    plan = build_plan(ops)
    assert torch.all(ops.embed(np.zeros(1, np.int64), matrix, 1.0, None, plan, 0) == 1)
    assert torch.all(vector == 1)


def build_plan(ops: CpuOps) -> object:
    from ext.ops import Geometry

    tables = np.zeros((1, 1, 1), np.int32)
    return ops.plan(Geometry(np.array([0, 1], np.int32), np.array([1], np.int32), tables))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("isa", supported())
def test_runs_clean_under_the_sanitizers(isa: build.Isa) -> None:
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("this is that run")
    found = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("needs libasan")
    library(isa, sanitize=True)
    environment = os.environ | {
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "BLOCKLLM_SANITIZE": "1",
        "BLOCKLLM_ISA": isa,
    }
    tests = [
        str(Path(__file__).with_name(f"test_cpu_{kind}.py"))
        for kind in (
            "linear",
            "rounding",
            "codes",
            "attachments",
            "attention",
            "elements",
            "replay",
        )
    ]
    others = "".join(f" and not {other}" for other in supported() if isa in other and isa != other)
    chosen = f"test_cpu_replay or {isa} and not resident{others}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, *tests]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
