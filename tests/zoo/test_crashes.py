"""Writers that are killed, that run out of room, or that meet: the zoo stays valid."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.zoo.conftest import Adder
from zoo.catalog import Catalog
from zoo.errors import DiskFull
from zoo.progress import Quiet
from zoo.store import Store
from zoo.sweep import sweep
from zoo.verify import verify

# Adds, removes and sweeps one adapter for ever, and says where it is, so that a kill can be aimed.
CHURN = """
import sys
from pathlib import Path
from zoo.add import AddOptions, add
from zoo.remove import remove
from zoo.sweep import sweep

class Told:
    def say(self, text):
        pass

    def track(self, items, label):
        print(label.split()[0], flush=True)
        yield from items
        print("after", label.split()[0], flush=True)

root, source = Path(sys.argv[1]), sys.argv[2]
while True:
    add(root, "churn", source, AddOptions(base="base", replace=True), Told())
    print("remove", flush=True)
    remove(root, "churn", wait_s=9, progress=Told())
    sweep(root, delete=True, wait_s=9, progress=Told())
"""
# Where the writer is when it is killed, and how long after.
MOMENTS = [
    ("storing", 0.0),
    ("storing", 0.03),
    ("after storing", 0.0),
    ("after storing", 0.01),
    ("after storing", 0.03),
    ("remove", 0.0),
    ("remove", 0.005),
    ("sweeping", 0.0),
    ("sweeping", 0.002),
]


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def add_command(root: Path, name: str, source: Path, *more: str) -> subprocess.Popen[str]:
    return start(
        "-m", "zoo", "--zoo", root, "add", name, source, "--base", "base", "--wait", "30", *more
    )


def test_a_kill_at_any_moment_leaves_a_valid_zoo(
    root: Path, put: Adder, checkpoints: Path, adapter: Path
):
    base = put("base", checkpoints / "llama")
    for place, delay_s in MOMENTS:
        process = start("-c", CHURN, root, adapter)
        assert process.stdout is not None
        assert any(line.strip() == place for line in process.stdout), process.communicate()[1]
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert verify(root, Quiet()).damages == []
        assert Catalog(root).variant("base") == base
        assert {variant.name for variant in Catalog(root).variants()} <= {"base", "churn"}
    put("churn", adapter, replace=True)
    sweep(root, delete=True, wait_s=1, progress=Quiet())
    assert Store(root).leftovers() == []
    assert set(Store(root).digests()) == set(Catalog(root).objects())
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
    names = [f"a{number}" for number in range(3)]
    processes = [add_command(root, name, adapter) for name in names]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert [variant.name for variant in Catalog(root).variants()] == [*names, "base"]
    assert verify(root, Quiet()).damages == []


def test_two_adds_of_one_name_make_one_variant(
    root: Path, put: Adder, checkpoints: Path, adapter: Path
):
    put("base", checkpoints / "llama")
    processes = [add_command(root, "same", adapter) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
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
