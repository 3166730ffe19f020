"""Packed forms beside the zoo: read back whole or not at all, and never in anybody's way."""

import logging
import os
from pathlib import Path

import pytest

from zoo.manifest import ObjectDigest
from zoo.packed import Form, PackedForms, packed_files

ONE, OTHER = ObjectDigest("1" * 64), ObjectDigest("2" * 64)
BYTES = bytes(range(256)) * 40


def read(forms: PackedForms, form: Form) -> bytes | None:
    content = forms.map(form)
    return None if content is None else bytes(content)


@pytest.fixture
def forms(tmp_path: Path) -> PackedForms:
    forms = PackedForms(tmp_path, "avx2-1")
    forms.write(Form(ONE, turned=False), memoryview(BYTES))
    return forms


def test_what_was_written_is_read(forms: PackedForms, tmp_path: Path):
    assert read(forms, Form(ONE, turned=False)) == BYTES
    assert read(PackedForms(tmp_path, "avx2-1"), Form(ONE, turned=False)) == BYTES


def test_another_form_layout_or_object_is_not_taken_for_it(forms: PackedForms, tmp_path: Path):
    assert read(forms, Form(ONE, turned=True)) is None
    assert read(forms, Form(OTHER, turned=False)) is None
    assert read(PackedForms(tmp_path, "avx512-1"), Form(ONE, turned=False)) is None
    (path, _), *_ = packed_files(tmp_path)
    path.rename(path.with_name(OTHER))
    moved = path.parent.parent / OTHER[:2]
    path.parent.rename(moved)
    assert read(forms, Form(OTHER, turned=False)) is None


@pytest.mark.parametrize("change", [-1, 1, -len(BYTES)])
def test_a_file_of_another_size_is_no_form(forms: PackedForms, tmp_path: Path, change: int):
    (path, _), *_ = packed_files(tmp_path)
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size + change)
    assert read(forms, Form(ONE, turned=False)) is None
    forms.write(Form(ONE, turned=False), memoryview(BYTES))
    assert read(forms, Form(ONE, turned=False)) == BYTES


def test_a_place_that_takes_nothing_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "packed").write_text("in the way")
    forms = PackedForms(tmp_path, "avx2-1")
    with caplog.at_level(logging.WARNING):
        for turned in (False, True):
            forms.write(Form(ONE, turned), memoryview(BYTES))
    assert len(caplog.records) == 1
    assert "packed" in caplog.text
    assert read(forms, Form(ONE, turned=False)) is None


def test_files_are_listed_with_the_object_they_are_of(forms: PackedForms, tmp_path: Path):
    forms.write(Form(OTHER, turned=True), memoryview(BYTES))
    (path, _), *_ = packed_files(tmp_path)
    left = path.with_name(".tmp-1-abc")
    left.write_bytes(b"")
    path.with_name("notes").write_bytes(b"")
    found = {p.name: digest for p, digest in packed_files(tmp_path)}
    assert found == {ONE: ONE, f"{OTHER}.t": OTHER, left.name: None}
