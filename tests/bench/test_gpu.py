"""The GPU bench on a CPU: the same code with small numbers, and what it does without a device."""

import signal
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.device import NoDevice, covered, find_device
from bench.job import Job
from bench.peers.hosted import SCRIPT, Hosted
from bench.result import Result
from bench.scenarios import gpu
from bench.stage import GpuChoice, Stage
from bench.zoos import Base, Zoos
from zoo.dummy.recipe import Recipe
from zoo.progress import Quiet

GROUPS = ["limits", "memory", "decode", "prefill", "variants", "arrival"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKLLM_HOME", str(tmp_path_factory.mktemp("home")))
        zoos = Zoos(Base(Path("nowhere"), ""), Quiet())
        said: list[str] = []
        stage = Stage(zoos, quick=True, flags=(), say=said.append, gpu=GpuChoice("cpu"))
        found = list(gpu.run(stage))
    assert said[0].startswith("gpu: limits of")
    return found


def of(results: list[Result], group: str) -> list[Result]:
    return [result for result in results if result.scenario == f"gpu: {group}"]


def test_every_figure_is_there_and_none_is_a_target(results: list[Result]):
    assert list(dict.fromkeys(one.scenario for one in results)) == [f"gpu: {g}" for g in GROUPS]
    for one in results:
        assert not one.checks
        assert one.figures
        for name, value in one.figures.items():
            assert isinstance(value, str) or value > 0 or name == "no kernel", one


def test_shares_are_of_what_the_device_can_do(results: list[Result]):
    for one in of(results, "decode"):
        assert 0 < one.figures["of roofline"] < 1
        assert 0 <= one.figures["no kernel"] < 1
    (prefill,) = of(results, "prefill")
    assert prefill.cell == "2 x 64 tokens in 1 steps"
    assert 0 < prefill.figures["of matrix rate"] < 1


def test_deltas_take_less_than_whole_copies(results: list[Result]):
    (memory,) = of(results, "memory")
    assert memory.figures["GB"] < memory.figures["as whole copies GB"]
    assert memory.figures["GB"] < memory.figures["with all variants GB"]


def test_variants_stand_beside_their_base(results: list[Result]):
    cells = [one.cell.rpartition(" ")[2] for one in of(results, "variants")]
    assert cells == ["lora", "last", "delta"]


def test_activities_that_overlap_count_once():
    assert covered([]) == 0
    assert covered([(3, 5), (0, 2), (4, 7), (4, 5)]) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(NoDevice, match="give --device cpu"):
        find_device("auto")
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", "--out", str(tmp_path / "out.jsonl")])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main() == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    told = " ".join(capsys.readouterr().err.split())
    assert told == "error: no GPU was found: give --device cpu to try this on the CPU"
    assert not list(tmp_path.iterdir())


def test_libraries_get_shapes_and_no_weights(tmp_path: Path):
    (tmp_path / "config.json").write_bytes(Recipe("tiny").config_json())
    command = [
        *(sys.executable, SCRIPT, "--dummy", "--mode", "mixed", "--model", tmp_path),
        *("--dtype", "bfloat16", "--threads", "1", "--variant", "a=4", "--variant", "b=2"),
    ]
    job = Job(models=("a", "b"), requests=2, prompt_tokens=(9, 9), output_tokens=(5, 5),
              vocabulary=512)  # fmt: skip
    with Hosted(command, tmp_path / "log") as hosted:
        found = hosted.play(job)
    assert (found.output_tokens, found.mismatched) == (10, 0)


@pytest.mark.gpu
def test_kernels_are_seen_and_limits_are_a_gpus():
    device = find_device("cuda")
    limits = device.limits()
    assert limits.read_bytes_per_s > 1e11
    assert limits.flops_per_s > 1e12
    a = torch.randn(4096, 4096, device=device.name)
    assert device.busy_s(lambda: [a @ a for _ in range(4)] and None) > 0
