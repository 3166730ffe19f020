"""A safetensors header is believed only after all of it was checked."""

import json
from pathlib import Path

import pytest

from zoo.errors import BadTensorFile
from zoo.sources.tensorfile import TensorFile


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def test_tensors_are_found_by_name(tmp_path: Path):
    header = {"__metadata__": {"format": "pt"}, "b": entry(2, 5), "a": entry(0, 2)}
    file = TensorFile(write(tmp_path / "f", header, b"abcde"))
    assert {name: bytes(file.data(name)) for name in file.entries} == {"a": b"ab", "b": b"cde"}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "not valid"),
        (b"{", b"", "not valid"),
        (b"[1]", b"", "not valid"),
        (b"\xff\xfe", b"", "not valid"),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"a", "not valid"),
        ({"a": entry(0, 1, shape=[-1])}, b"a", "tensor 'a' .*negative"),
        ({"a": entry(0, 1, "Q4")}, b"a", "tensor 'a' .*Q4"),
        ({"a": entry(0, 1, shape=[2])}, b"a", "'a' has 1 bytes instead of 2"),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"abc", "'b' overlaps"),
        ({"a": entry(0, 1), "b": entry(2, 3)}, b"abc", "'b' leaves a hole"),
        ({"a": entry(0, 9)}, b"abc", "'a' ends after the file"),
        ({"a": entry(0, 1)}, b"abc", "2 bytes belong to no tensor"),
        ({"a": entry(0, 1, shape=[1 << 62, 1 << 62])}, b"a", "instead of"),
    ],
)
def test_a_bad_header_is_refused_by_what_is_wrong(
    tmp_path: Path, header: object, data: bytes, message: str
):
    with pytest.raises(BadTensorFile, match=message):
        TensorFile(write(tmp_path / "f", header, data))


@pytest.mark.parametrize(
    ("length", "message"),
    [(1 << 63, "more than"), (10**8 + 1, "more than"), (5000, "but the file has")],
)
def test_a_header_length_is_bounded_before_it_is_used(tmp_path: Path, length: int, message: str):
    with pytest.raises(BadTensorFile, match=message):
        TensorFile(write(tmp_path / "f", {}, b"", length))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(BadTensorFile, match="too few"):
        TensorFile(tmp_path / "f")


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(BadTensorFile, match="gone cannot be read"):
        TensorFile(tmp_path / "gone")
