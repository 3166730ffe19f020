"""Settings: where they come from, which one wins, and what is said of wrong ones."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from engine.config import (
    Config,
    ConfigError,
    add_flags,
    is_loopback,
    parse_address,
    resolve,
    unknown_variables,
)
from engine.devices import devices, threads
from engine.keys import read_keys


def flags(*words: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(words))


def test_nothing_given_gives_the_defaults() -> None:
    assert resolve(flags(), {}) == Config()


def test_every_field_has_a_flag_with_its_meaning() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    for field in Config.__struct_fields__:
        assert "--" + field.replace("_", "-") in options
    assert all(action.help for action in parser._actions)


def test_command_line_wins_over_file_wins_over_variable(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('max_num_seqs = 2\nblock_size = 32\nworkers = "auto"\n')
    environ = {"BLOCKLLM_MAX_NUM_SEQS": "3", "BLOCKLLM_BLOCK_SIZE": "64", "BLOCKLLM_THREADS": "4"}
    config = resolve(flags("--config", str(file), "--max-num-seqs", "1"), environ)
    assert (config.max_num_seqs, config.block_size, config.threads) == (1, 32, 4)


def test_switches_can_be_turned_off() -> None:
    assert not resolve(flags("--no-enable-prefix-caching"), {}).enable_prefix_caching
    assert resolve(flags(), {"BLOCKLLM_LOG_JSON": "true"}).log_json


@pytest.mark.parametrize(
    ("words", "environ", "told"),
    [
        (["--max-num-seqs", "none"], {}, "--max-num-seqs"),
        (["--max-num-seqs", "0"], {}, "--max-num-seqs"),
        (["--device", "tpu"], {}, "write one of auto, cpu, cuda"),
        (["--kv-cache-dtype", "fp8"], {}, "write one of auto, float32, bfloat16"),
        (["--weights", "int2"], {}, "write one of exact, int8, int4"),
        (["--device", "cuda:x"], {}, "write one of auto, cpu, cuda"),
        (["--gpu-memory-utilization", "1.5"], {}, "--gpu-memory-utilization"),
        (["--workers", "-1"], {}, "--workers"),
        (["--http", "8000"], {}, "write HOST:PORT"),
        (["--http", "127.0.0.1:99999"], {}, "write HOST:PORT"),
        (["--zmq", "127.0.0.1:5570"], {}, "write tcp://HOST:PORT"),
        (["--zmq", "udp://127.0.0.1:5570"], {}, "write tcp://HOST:PORT"),
        (["--http", "0.0.0.0:8000"], {}, "--api-keys FILE"),
        (["--zmq", "tcp://*:5570"], {}, "--api-keys FILE"),
        ([], {"BLOCKLLM_THREADS": "many"}, "BLOCKLLM_THREADS"),
        (["--config", "/nowhere.toml"], {}, "cannot be read"),
    ],
)
def test_wrong_values_are_named_in_one_line(
    words: list[str], environ: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(flags(*words), environ)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_num_sequences = 1", 'the unknown key "max_num_sequences"'),
        ('max_num_seqs = "1"', '"max_num_seqs" in'),
        ("max_num_seqs = ", "is not TOML"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "engine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        resolve(flags("--config", str(file)), {})


def test_an_open_address_needs_keys_or_an_ugly_flag() -> None:
    open_to_all = ["--http", "0.0.0.0:8000", "--zmq", "tcp://0.0.0.0:5570"]
    assert resolve(flags(*open_to_all, "--allow-insecure-bind"), {}).allow_insecure_bind
    assert resolve(flags(*open_to_all, "--api-keys", "file"), {}).api_keys == "file"


def test_slips_in_variable_names_are_found() -> None:
    environ = {"BLOCKLLM_HTPP": "", "BLOCKLLM_HTTP": "", "BLOCKLLM_HOME": "", "OTHER": ""}
    assert unknown_variables(environ) == ["BLOCKLLM_HTPP"]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:0", "127.0.0.1", 0), ("[::1]:80", "::1", 80), ("localhost:1", "localhost", 1)],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert is_loopback(host)


def test_codes_are_for_cpu_workers() -> None:
    assert devices(Config(weights="int8", device="cpu")) == ["cpu"]
    with pytest.raises(ConfigError, match="--weights int8 is for CPU workers"):
        devices(Config(weights="int8", device="cuda"))


def test_http_can_be_left_out() -> None:
    assert Config(http="none").http_address is None
    assert Config(http="").http_address is None


def test_cpu_workers_share_the_cores() -> None:
    assert devices(Config()) == ["cpu"]
    assert devices(Config(workers=3)) == ["cpu", "cpu", "cpu"]
    assert threads(Config(), 1) == 0
    assert threads(Config(), 1000) == 1
    assert threads(Config(threads=5), 3) == 5


@pytest.mark.parametrize(
    ("settings", "found", "expected"),
    [
        ({"device": "auto"}, 2, ["cuda:0", "cuda:1"]),
        ({"device": "cuda"}, 1, ["cuda:0"]),
        ({"device": "cuda", "workers": 3}, 2, ["cuda:0", "cuda:1", "cuda:0"]),
        ({"device": "cuda:1"}, 2, ["cuda:1"]),
        ({"device": "cuda:1", "workers": 2}, 2, ["cuda:1", "cuda:1"]),
    ],
)
def test_gpus_get_a_worker_each(settings: dict[str, Any], found: int, expected: list[str]) -> None:
    assert devices(Config(**settings), lambda _: found) == expected


@pytest.mark.parametrize(
    ("device", "found", "advice"),
    [("cuda", 0, "use --device cpu"), ("cuda:2", 2, "devices 0 to 1 were found")],
)
def test_a_gpu_that_is_not_there_is_refused(device: str, found: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        devices(Config(device=device), lambda _: found)


@pytest.mark.parametrize(
    "text",
    ["one alice\n# none\n\ntwo bob # his\nthree", '{"one": "alice", "two": "bob", "three": ""}'],
)
def test_key_files_name_tenants(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    keys = read_keys(str(file))
    assert keys
    assert (keys.tenant("one"), keys.tenant("two")) == ("alice", "bob")
    assert keys.tenant("four") is None
    assert keys.tenant("") is None
    own = keys.tenant("three")
    assert own is not None
    assert "three" not in own
    assert keys.salt("alice") != keys.salt("bob")
    assert 0 < keys.salt("alice") < 1 << 63


def test_without_keys_everyone_is_one_tenant() -> None:
    keys = read_keys("")
    assert not keys
    assert keys.tenant("anything") == keys.tenant("")
    assert keys.salt("anyone") == 0


@pytest.mark.parametrize("text", ["", "# none", "a b c", '{"a": 1}', '{"a"'])
def test_wrong_key_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(str(file))
    assert str(file) in str(caught.value)
