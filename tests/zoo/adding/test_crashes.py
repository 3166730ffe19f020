"""Writers that are killed, that run out of room, or that meet: the zoo stays valid."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests import builders
from tests.zoo.conftest import Adder
from zoo.catalog import Catalog
from zoo.errors import DiskFull
from zoo.keeping.sweep import sweep
from zoo.keeping.verify import verify
from zoo.progress import Quiet
from zoo.store import Store

# Writers killed by `tests.zoo.killing`: 50 in the suite, more for who has the time.
KILLS = int(os.environ.get("BLOCKLLM_KILLS", "50"))
# Each process reads torch and transformers before it does anything.
PATIENCE_S = 150
WORKS = {"add", "remove", "replace", "sweep", "pull"}


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def add_command(root: Path, name: str, source: Path, *more: str) -> subprocess.Popen[str]:
    return start(
        "-m", "zoo", "--zoo", root, "add", name, source, "--base", "base", "--wait", "140", *more
    )


@pytest.fixture
def yard(root: Path, put: Adder, checkpoints: Path, tmp_path: Path) -> Path:
    """What `tests.zoo.killing` works in."""
    put("base", checkpoints / "llama")
    for seed, name in enumerate(("first", "second")):
        builders.tiny_lora(tmp_path / name, checkpoints / "llama", seed=seed)
    return tmp_path


def killing(*arguments: object) -> list[dict]:
    process = start("-m", "tests.zoo.killing", *arguments)
    output, errors = process.communicate(timeout=170 + KILLS)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


def test_kills_at_random_moments_leave_a_valid_zoo(yard: Path, root: Path):
    lines = killing("kills", yard, KILLS, 7)
    assert len(lines) == KILLS
    seen: dict[str, set[str | None]] = {work: set() for work in WORKS}
    for line in lines:
        assert line["damages"] == [], line
        assert line["checked"] > 40
        before, after = line["before"], line["after"]
        assert after["base"] == before["base"]
        assert after.keys() <= {"base", "churn"}
        if line["work"] == "sweep":
            assert after == before
        seen[line["work"]].add(after.get("churn"))
    # Old, new or nothing: each piece of work ends in the state before it or in the one after it.
    assert len(seen["replace"] - {None}) == len(seen["replace"]) <= 2
    assert all(len(seen[work]) <= 2 for work in WORKS)
    killed = [line["progress"] for line in lines if line["was_at_work"]]
    assert len(killed) > KILLS / 2, "too few were killed while they worked"
    assert min(killed) < 0.3
    assert max(killed) > 0.7
    sweep(root, delete=True, wait_s=1, progress=Quiet())
    assert Store(root).leftovers() == []
    assert set(Store(root).digests()) == set(Catalog(root).objects())
    assert verify(root, Quiet()).damages == []


def test_two_writers_and_a_reader_at_once(yard: Path, root: Path):
    (line,) = killing("duel", yard, 4)
    assert line["codes"] == [0, 0]
    assert line["damages"] == []
    assert line["looks"] > 3
    names = {f"writer-{which}-{number}" for which in (0, 1) for number in range(4)}
    assert line["after"].keys() == names | {"base"}
    assert verify(root, Quiet()).damages == []


def test_what_a_killed_writer_left_is_swept(root: Path, put: Adder, checkpoints: Path):
    put("base", checkpoints / "llama")
    folder = next((root / "objects").glob("??/??"))
    (folder / ".tmp-1-abc").write_bytes(b"half an obj")
    orphan = Store(root).put_blob(b"never published")
    rubbish = sweep(root, delete=True, wait_s=1, progress=Quiet())
    assert rubbish.objects == [orphan]
    assert [path.name for path in rubbish.leftovers] == [".tmp-1-abc"]
    assert Store(root).leftovers() == []


def test_two_adds_at_once_both_succeed(root: Path, put: Adder, checkpoints: Path, adapter: Path):
    put("base", checkpoints / "llama")
    names = [f"a{number}" for number in range(2)]
    processes = [add_command(root, name, adapter) for name in names]
    for process in processes:
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
    assert [variant.name for variant in Catalog(root).variants()] == [*names, "base"]
    assert verify(root, Quiet()).damages == []


def test_two_adds_of_one_name_make_one_variant(
    root: Path, put: Adder, checkpoints: Path, adapter: Path
):
    put("base", checkpoints / "llama")
    processes = [add_command(root, "same", adapter) for _ in range(2)]
    errors = [process.communicate(timeout=PATIENCE_S)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    assert any("a variant is already called 'same'" in text for text in errors)


def test_a_full_disk_takes_back_what_was_written(root: Path, put: Adder, checkpoints: Path):
    put("small", checkpoints / "tied")
    before = set(root.rglob("*.safetensors"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Norms fit, matrices do not: the add fails in the middle.
    resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 10, hard))
    try:
        with pytest.raises(DiskFull, match="free some space"):
            put("big", checkpoints / "qwen3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(root.rglob("*.safetensors")) == before
    assert Store(root).leftovers() == []
    assert [variant.name for variant in Catalog(root).variants()] == ["small"]
    put("big", checkpoints / "qwen3")
