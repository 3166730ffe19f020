"""Checkpoints made to do harm are refused in one sentence, soon, in little memory, and nothing of
them is written."""

import contextlib
import json
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import builders
from tests.zoo.conftest import Adder
from zoo.catalog import Catalog
from zoo.errors import ZooError
from zoo.keeping.verify import verify
from zoo.progress import Quiet
from zoo.store import Store

PATIENCE_S = 20.0
MEMORY_BYTES = 700 << 20
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def copy(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(checkpoints / "llama", tmp_path / "copy"))


@pytest.fixture
def bounded() -> Iterator[None]:
    """This process may take so much more memory and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def refuses(root: Path, put: Adder, bounded: None) -> Callable[..., None]:
    """Asserts that adding a source is refused with a message and leaves no trace."""

    def refuses(source: Path | str, message: str, **options: object) -> None:
        before = set(Store(root).digests())
        names = [variant.name for variant in Catalog(root).variants()]
        began = time.monotonic()
        with pytest.raises(ZooError, match=message) as caught:
            put("m", source, **options)
        assert time.monotonic() - began < PATIENCE_S
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert [variant.name for variant in Catalog(root).variants()] == names
        assert set(Store(root).digests()) == before
        assert Store(root).leftovers() == []

    return refuses


def tolerates(root: Path, put: Adder, source: Path, **options: object) -> None:
    """A source that may be refused or not, but only so, and soon."""
    began = time.monotonic()
    with contextlib.suppress(ZooError):
        put("m", source, golden=False, **options)
    assert time.monotonic() - began < PATIENCE_S
    assert verify(root, Quiet()).damages == []
    assert Store(root).leftovers() == []


Refuses = Callable[..., None]


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def headed(folder: Path, header: bytes, data: bytes = b"") -> None:
    weights(folder).write_bytes(len(header).to_bytes(8, "little") + header + data)


def header_of(folder: Path) -> tuple[dict, bytes]:
    content = weights(folder).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


# ---- weights ------------------------------------------------------------------------------------


def test_a_truncated_header(copy: Path, refuses: Refuses):
    for size in (4, 9, 500):
        content = (copy / "model.safetensors").read_bytes()[:size]
        weights(copy).write_bytes(content)
        refuses(copy, "sound safetensors file")


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 10**8 + 1, 99_999_999])
def test_a_huge_header_length(copy: Path, refuses: Refuses, length: int):
    weights(copy).write_bytes(length.to_bytes(8, "little") + weights(copy).read_bytes()[8:])
    refuses(copy, "its header claims")


@pytest.mark.parametrize("text", [b'{"a":', b"[", b'{"a":[', b'{"__metadata__":{"a":'])
def test_a_deep_header(copy: Path, refuses: Refuses, text: bytes):
    headed(copy, text * 200_000)
    refuses(copy, "header is not valid")


def test_a_header_of_millions_of_entries(copy: Path, refuses: Refuses):
    headed(copy, b"{" + b",".join(b'"%d":0' % i for i in range(4_000_000)) + b"}")
    refuses(copy, "more entries than any model has tensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h[Q].update(data_offsets=[0, h[Q]["data_offsets"][1]]), "overlaps|instead of"),
        (lambda h: h[Q].update(data_offsets=h["lm_head.weight"]["data_offsets"]), "overl|instead"),
        (lambda h: h[Q].update(data_offsets=[-1, 10]), "overlaps|instead of"),
        (lambda h: h[Q].update(data_offsets=[1 << 62, (1 << 62) + 16384]), "hole|ends after"),
        (lambda h: h[Q].update(shape=[1 << 40, 1 << 40]), "instead of"),
        (lambda h: h[Q].update(shape=[64] * 100_000), "100000 extents"),
        (lambda h: h[Q].update(shape=[1, 64, 64]), "has the shape"),
        (lambda h: h[Q].update(dtype="F4"), "'F4' is unknown"),
        (lambda h: h[Q].update(extra=1), "header is not valid"),
        (lambda h: h.update({"../../../etc/passwd": h.pop(Q)}), "holds '../../../etc/passwd'"),
        (lambda h: h.update({"a\nb\x1b[31m": h.pop(Q)}), "holds "),
        (lambda h: h.update({"x" * 1_000_000: h.pop(Q)}), "1000000 characters"),
        (lambda h: h.update({"": h.pop(Q)}), "holds ''"),
    ],
)  # fmt: skip
def test_a_header_that_lies(
    copy: Path, refuses: Refuses, edit: Callable[[dict], object], message: str
):
    header, data = header_of(copy)
    edit(header)
    headed(copy, json.dumps(header).encode(), data)
    refuses(copy, message)


def test_a_name_that_stands_twice(copy: Path, refuses: Refuses):
    header, data = header_of(copy)
    text = json.dumps(header).encode()
    again = b"," + json.dumps({Q: header[Q]}).encode()[1:]
    headed(copy, text[:-1] + again, data)
    refuses(copy, "says something twice")
    headed(copy, text.replace(b'"dtype": "F32"', b'"dtype": "I32", "dtype": "F32"', 1), data)
    refuses(copy, "says something twice")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(
    copy: Path, refuses: Refuses, value: float, dtype: torch.dtype
):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights(copy)).items()}
    tensors[Q].view(-1)[-1] = value
    save_file(tensors, weights(copy), {"format": "pt"})
    refuses(copy, f"'{Q}' .*NaN or infinite")


def test_ten_thousand_tiny_tensors(copy: Path, refuses: Refuses):
    tensors = load_file(weights(copy))
    tensors |= {f"model.layers.{i}.x.weight": torch.ones(1) for i in range(10_000)}
    save_file(tensors, weights(copy), {"format": "pt"})
    refuses(copy, r"layers\.\d+\.x\.weight', which a llama of 4 layers does not have")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl"])
def test_pickles_and_zip_bombs_are_never_opened(copy: Path, refuses: Refuses, name: str):
    weights(copy).unlink()
    # Unpickled, it would make a file.
    (copy / name).write_bytes(f"cos\nmkdir\n(S'{copy / 'owned'}'\ntR.".encode())
    refuses(copy, f"{name}, a pickle file")
    refuses(copy / name, "pickle file")
    with zipfile.ZipFile(copy / name, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(50 << 20))
    refuses(copy, f"{name}, a pickle file")
    assert not (copy / "owned").exists()


def test_a_numpy_archive_is_no_source(copy: Path, refuses: Refuses):
    weights(copy).unlink()
    np.savez_compressed(copy / "model.npz", w=np.zeros(50 << 20, np.uint8))
    refuses(copy, r"has no model\.safetensors")
    refuses(copy / "model.npz", "give the folder it lies in")


# ---- names of files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.safetensors", "not a file beside it"),
        ("/etc/passwd", "not a file beside it"),
        ("..", "cannot be read|not a file beside it|not a sound"),
        ("", "not a file beside it"),
        ("sub/model.safetensors", "not a file beside it"),
        ("a\0b", "not a file beside it|cannot be read"),
        ("x" * 5000, "cannot be read|not a file"),
    ],
)
def test_shards_lie_beside_their_index(copy: Path, refuses: Refuses, name: str, message: str):
    shutil.copy(weights(copy), copy.parent / "outside.safetensors")
    index = {"weight_map": {Q: name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(copy, message)


@pytest.mark.parametrize(
    "name", ["notes.txt", "tokenizer.json", "config.json", "model.safetensors"]
)
def test_a_link_does_not_lead_out_of_the_folder(copy: Path, refuses: Refuses, name: str):
    secret = copy.parent / "secret"
    shutil.copy(copy / name if (copy / name).exists() else copy / "config.json", secret)
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(secret)
    refuses(copy, f"{name} is a link to a file outside of")


def test_links_of_the_hubs_cache_are_followed(put: Adder, copy: Path, tmp_path: Path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(copy.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs", str(number)))
    assert put("m", snapshot).kind == "base"


def test_a_device_is_no_file(copy: Path, refuses: Refuses):
    (copy / "endless.txt").symlink_to("/dev/zero")
    weights(copy).unlink()
    weights(copy).symlink_to("/dev/zero")
    refuses(copy, r"has no model\.safetensors")


def test_a_file_that_is_too_large_for_a_side_file(copy: Path, refuses: Refuses):
    with (copy / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    refuses(copy, "more than .*: remove it")


# ---- configs ------------------------------------------------------------------------------------

Settings = dict[str, object]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 1025},
        {"num_attention_heads": 10**12},
        {"num_key_value_heads": 0},
        {"num_attention_heads": 0},
        {"hidden_size": 10**12},
        {"hidden_size": 0},
        {"head_dim": 10**12},
        {"head_dim": -2},
        {"vocab_size": 10**15},
        {"vocab_size": -1},
        {"intermediate_size": 1 << 40},
        {"max_position_embeddings": 10**15},
        {"max_position_embeddings": -5},
        {"rms_norm_eps": "tiny"},
        {"rope_parameters": {"rope_type": "llama3", "factor": 0}},
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1.0}},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"eos_token_id": ["a"]},
        {"hidden_act": "os.system"},
        {"model_type": "../../llama"},
        {"model_type": "x" * 100_000},
    ],
    ids=lambda settings: str(settings)[:40],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_config_with_numbers_that_no_model_has(
    checkpoints: Path, tmp_path: Path, refuses: Refuses, family: str, settings: Settings
):
    folder = Path(shutil.copytree(checkpoints / family, tmp_path / "copy"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if "eos_token_id" in settings:
        (folder / "generation_config.json").unlink()
    refuses(folder, ".")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"model_type":"llama","a":' * 100_000,
        "[" * 1_000_000,
        '{"model_type":"llama","model_type":"gpt2"}',
        '{"model_type":"llama","rms_norm_eps":NaN}',
        '{"model_type":"llama","hidden_size":' + "9" * 1_000_000 + "}",
    ],
    ids=lambda text: text[:30],
)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_json_that_is_none(copy: Path, refuses: Refuses, name: str, text: str):
    (copy / name).write_bytes(text.encode())
    refuses(copy, "not valid|not a valid index|is not in|says|lacks|cannot")


def test_code_that_comes_with_a_model_is_never_run(copy: Path, refuses: Refuses):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil"}
    path.write_text(json.dumps(config | {"model_type": "evil"}))
    (copy / "evil.py").write_text(f"open({str(copy / 'owned')!r}, 'w')\n")
    refuses(copy, "'evil' are not supported")
    assert not (copy / "owned").exists()


# ---- GGUF ---------------------------------------------------------------------------------------


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf(
    settings: bytes = b"", count: int = 0, tensors: bytes = b"", num_tensors: int = 0
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, count)
    return head + settings + tensors + bytes(64)


def gguf_tensor(name: bytes, extents: list[int], kind: int = 0, place: int = 0) -> bytes:
    places = struct.pack(f"<I{len(extents)}Q", len(extents), *extents)
    return gguf_text(name) + places + struct.pack("<IQ", kind, place)


def setting(name: bytes, kind: int, value: bytes) -> bytes:
    return gguf_text(name) + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 63, 0), "claims .* tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63), "claims .* settings"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "its version is 9"),
        (gguf(struct.pack("<Q", 1 << 62), 1), "bytes of a string"),
        (gguf(setting(b"a", 99, b""), 1), "unknown type 99"),
        (gguf(setting(b"a", 9, struct.pack("<IQ", 8, 1 << 60)), 1), "items of a list"),
        (gguf(setting(b"a", 9, struct.pack("<IQ", 4, 1 << 22)), 1), "ends within its head"),
        (gguf(setting(b"a", 9, struct.pack("<IQ", 9, 1)), 1), "a list of the unknown type 9"),
        (gguf(setting(b"a", 0, b"\1") * 2, 2), "says 'a' twice"),
        (gguf(setting(b"llama.block_count", 4, struct.pack("<I", 10**9)), 1), "1024 is expected"),
        (gguf(setting(b"llama.embedding_length", 10, struct.pack("<Q", 1 << 50)), 1), "expected"),
        (gguf(setting(b"llama.attention.head_count", 4, struct.pack("<I", 1 << 30)), 1), "65536"),
        (gguf(setting(b"general.alignment", 4, struct.pack("<I", 0)), 1), "alignment of 0"),
        (gguf(tensors=gguf_tensor(b"w", [1 << 40, 1 << 40]), num_tensors=1), "ends after the file"),
        (gguf(tensors=gguf_tensor(b"w", [1] * 9), num_tensors=1), "has 9 extents"),
        (gguf(tensors=gguf_tensor(b"w", [4], kind=77), num_tensors=1), "unknown type 77"),
        (gguf(tensors=gguf_tensor(b"w", [5], kind=2), num_tensors=1), "no multiple of 32"),
        (gguf(tensors=gguf_tensor(b"w", [4]) * 2, num_tensors=2), "twice"),
        (gguf(tensors=gguf_tensor(b"v", [8]) + gguf_tensor(b"w", [4], place=8), num_tensors=2),
         "overlaps"),
        (gguf(tensors=gguf_tensor(b"w", [4], place=1 << 63), num_tensors=1), "ends after"),
        (gguf(), "cannot be read as GGUF"),
    ],
)  # fmt: skip
def test_a_gguf_file_that_lies(tmp_path: Path, refuses: Refuses, content: bytes, message: str):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    refuses(path, message)


def test_a_flipped_byte_in_the_head_of_a_gguf_file_does_no_harm(
    checkpoints: Path, tmp_path: Path, put: Adder, root: Path, bounded: None
):
    whole = builders.tiny_gguf(tmp_path / "tiny.gguf", checkpoints / "llama").read_bytes()
    generator = np.random.default_rng(5)
    for place in generator.integers(4, 3000, 12):
        content = bytearray(whole)
        content[place] ^= 1 << int(generator.integers(8))
        (tmp_path / "flipped.gguf").write_bytes(content)
        tolerates(root, put, tmp_path / "flipped.gguf", replace=True)


# ---- adapters -----------------------------------------------------------------------------------


@pytest.fixture
def tuned(adapter: Path, tmp_path: Path, put: Adder, checkpoints: Path) -> Path:
    """A copy of an adapter whose base is in the zoo."""
    put("base", checkpoints / "llama")
    return Path(shutil.copytree(adapter, tmp_path / "tuned"))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"peft_type":"LORA","a":' * 100_000, '{"peft_type":"LORA","r":NaN}',
        '{"peft_type":"LORA","peft_type":"IA3"}', '{"peft_type":"../LORA"}', '{"peft_type":1}',
    ],
)  # fmt: skip
def test_an_adapters_config_that_is_none(tuned: Path, refuses: Refuses, text: str):
    (tuned / "adapter_config.json").write_text(text)
    refuses(tuned, ".", base="base")


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 10**12},
        {"r": -1},
        {"lora_alpha": 1e308},
        {"rank_pattern": {"q_proj": 10**12}},
        {"rank_pattern": {"(" * 5000: 3}},
        {"layers_to_transform": [10**9]},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**12},
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "os"}},
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_an_adapters_numbers_do_no_harm(
    tuned: Path, put: Adder, root: Path, bounded: None, settings: Settings
):
    path = tuned / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    tolerates(root, put, tuned, base="base")


def test_an_adapters_weights_are_read_as_strictly(tuned: Path, refuses: Refuses):
    path = tuned / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    refuses(tuned, "truncated", base="base")
    path.write_bytes((1 << 62).to_bytes(8, "little") + content[8:])
    refuses(tuned, "its header claims", base="base")
    path.unlink()
    path.symlink_to("/etc/passwd")
    refuses(tuned, "outside of", base="base")
    path.unlink()
    (tuned / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refuses(tuned, "pickle file", base="base")
