"""Packed forms in the loading of chains: the second start packs nothing and gives the same bits."""

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ext.select import select_ops
from tests.workers.family_zoo import Family
from tests.workers.local import LocalWorker
from workers.packer import Packer, packer_for
from zoo.manifest import ObjectDigest
from zoo.packed import Form, packed_files

PROMPT = [5, 9, 2, 7, 11, 3]


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return Family(tmp_path, "llama").zoo


def answer(zoo: Path) -> list[int]:
    worker = LocalWorker(zoo, "native")
    worker.load("base")
    given = worker.open("base", PROMPT, max_tokens=12)
    worker.run()
    wait_for_forms(zoo)
    worker.worker.close()
    return given.tokens


def wait_for_forms(zoo: Path) -> None:
    before, now = -1, 0
    while now != before:
        time.sleep(0.1)
        before, now = now, len(list(packed_files(zoo)))


def test_the_second_load_packs_nothing_and_answers_alike(
    zoo: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "workers.packer"):
        first = answer(zoo)
        assert "packed" in caplog.text
        caplog.clear()
        assert answer(zoo) == first
        assert "packed" not in caplog.text


def test_forms_of_another_zoo_s_objects_are_not_needed(zoo: Path):
    first = answer(zoo)
    files = [path for path, _ in packed_files(zoo)]
    assert files
    for path in files:
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1])
    assert answer(zoo) == first
    shutil.rmtree(zoo / "packed")
    (zoo / "packed").write_text("in the way")
    assert answer(zoo) == first


@pytest.fixture
def packer(tmp_path: Path) -> Iterator[Packer]:
    packer = packer_for(select_ops("cpu", "native", 2), tmp_path)
    assert packer is not None
    yield packer
    packer.close()


def test_what_cannot_be_read_fails_the_load_and_leaves_nothing_under_way(packer: Packer):
    def fails() -> torch.Tensor:
        raise OSError("the disk is gone")

    form = Form(ObjectDigest("3" * 64), turned=False)
    for weight in (lambda: torch.ones(8, 4), fails, lambda: torch.ones(8, 4)):
        packer.matrix(form, (8, 4), torch.float32, weight)
    with pytest.raises(OSError, match="the disk is gone"):
        packer.settle()
    packer.settle()


def test_a_turned_form_is_packed_as_its_transpose(packer: Packer):
    ops = select_ops("cpu", "native", 2)
    weight = torch.randn(24, 40)
    form = Form(ObjectDigest("4" * 64), turned=True)
    made = packer.matrix(form, (40, 24), torch.float32, lambda: weight)
    packer.settle()
    assert (made.memory == ops.matrix(weight, transposed=True).memory).all()  # pyright: ignore
