"""`launch` as people and supervisors use it: addresses, signals, exit statuses."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.client import Client
from engine.errors import EngineError
from tests.engine import rig

PATIENCE_S = 30
READY = re.compile(r"BlockLLM is ready: (?:HTTP (\S+)  )?ZMQ (\S+)\n")


@contextlib.contextmanager
def launched(zoo: Path, *flags: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    folder = tempfile.TemporaryDirectory(prefix="blk-")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.fakelaunch", "--zoo", str(zoo), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": folder.name} | environ,
    )
    watchdog = threading.Timer(PATIENCE_S, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
        folder.cleanup()


def ready(process: subprocess.Popen[str]) -> tuple[str, str]:
    """HTTP and ZeroMQ addresses from the one line."""
    assert process.stdout is not None
    line = process.stdout.readline()
    found = READY.fullmatch(line)
    assert found, line
    return found[1], found[2]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


LOCAL = ("--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0")


def test_prints_one_line_with_both_addresses_and_serves(zoo: Path) -> None:
    with launched(zoo, *LOCAL) as process:
        http, zmq = ready(process)
        port = int(http.removeprefix("http://127.0.0.1:"))
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with Client(zmq) as client:
            assert client.complete("base", [65], max_tokens=4).token_ids == rig.expected(65, 4)
            status = client.status()
            assert (status["state"], status["http"], status["zmq"]) == ("ready", http, zmq)
        process.send_signal(signal.SIGINT)
        code, out, err = ended(process)
        assert (code, out) == (0, "")
        assert re.search(r"^INFO \d\d-\d\d \d\d:\d\d:\d\d \[engine\] ", err, re.MULTILINE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_answers_end_and_exits_0(zoo: Path, number: signal.Signals) -> None:
    script = '{"interval_s": 0.02}'
    with launched(zoo, *LOCAL, "--http", "none", FAKEWORKER=script) as process:
        _, zmq = ready(process)
        with Client(zmq) as client:
            stream = client.stream("base", [65], max_tokens=50)
            next(stream)
            process.send_signal(number)
            assert list(stream)[-1].finish_reason == "length"
        assert ended(process)[0] == 0


def test_a_second_signal_does_not_wait(zoo: Path) -> None:
    script = '{"interval_s": 1.0}'
    with launched(zoo, *LOCAL, "--http", "none", FAKEWORKER=script) as process:
        _, zmq = ready(process)
        with Client(zmq) as client:
            stream = client.stream("base", [65], max_tokens=100)
            next(stream)
            process.send_signal(signal.SIGINT)
            time.sleep(1.0)
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            assert ended(process)[0] == 1
            assert time.monotonic() - began < 5


def test_children_die_with_a_killed_engine(zoo: Path) -> None:
    with launched(zoo, *LOCAL) as process:
        http, zmq = ready(process)
        with Client(zmq) as client:
            worker = client.status()["workers"][0]["pid"]
        process.kill()
        process.wait()
        end = time.monotonic() + 10
        while Path(f"/proc/{worker}").exists() and "Z" not in _state(worker):
            assert time.monotonic() < end
            time.sleep(0.05)
        port = int(http.rpartition(":")[2])
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                break
            assert time.monotonic() < end
            time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_an_empty_zoo_is_served_until_variants_come(tmp_path: Path) -> None:
    zoo = tmp_path / "none"
    with launched(zoo, *LOCAL, "--http", "none") as process:
        _, zmq = ready(process)
        rig.publish(zoo, rig.variant_of(zoo, "base"))
        with Client(zmq) as client:
            assert client.complete("base", [65], max_tokens=2).token_ids == rig.expected(65, 2)
        process.send_signal(signal.SIGTERM)
        code, _, err = ended(process)
        assert code == 0
        assert "is empty" in err


def test_addresses_in_use_are_refused_with_2(zoo: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags in (
            ("--zmq", f"tcp://127.0.0.1:{port}", "--http", "none"),
            ("--zmq", "tcp://127.0.0.1:0", "--http", f"127.0.0.1:{port}"),
        ):
            with launched(zoo, *flags) as process:
                code, out, err = ended(process)
                assert (code, out) == (2, "")
                assert len(err.splitlines()) == 1
                assert str(port) in err


def test_a_worker_that_cannot_start_is_exit_status_1(zoo: Path) -> None:
    with launched(zoo, *LOCAL, FAKEWORKER='{"exits_at_once": true}') as process:
        code, out, err = ended(process)
        assert (code, out) == (1, "")
        assert "cannot be started" in err.splitlines()[-2]


def test_log_lines_can_be_json_and_hold_no_prompt(zoo: Path) -> None:
    with launched(zoo, *LOCAL, "--http", "none", "--log-json", "--log-level", "debug") as process:
        _, zmq = ready(process)
        with Client(zmq) as client:
            client.complete("base", "the secret prompt", max_tokens=2)
            with pytest.raises(EngineError):
                client.complete("base", "the secret prompt", max_tokens=1000)
        process.send_signal(signal.SIGTERM)
        code, _, err = ended(process)
        assert code == 0
        assert "secret" not in err
        lines = [json.loads(line) for line in err.splitlines()]
        assert any("on base: length after 17 + 2 tokens" in line["message"] for line in lines)


def test_a_server_that_rounds_says_so_at_its_start(zoo: Path) -> None:
    for flags, told in (((), False), (("--kv-cache-dtype", "bfloat16"), True)):
        with launched(zoo, *LOCAL, "--http", "none", *flags) as process:
            ready(process)
            process.send_signal(signal.SIGTERM)
            assert ("answers are approximate: KV pages hold bfloat16" in ended(process)[2]) == told


def test_a_misspelt_variable_is_reported(zoo: Path) -> None:
    with launched(zoo, *LOCAL, "--http", "none", BLOCKLLM_MAX_SEQS="3") as process:
        ready(process)
        process.send_signal(signal.SIGTERM)
        assert "BLOCKLLM_MAX_SEQS is not known" in ended(process)[2]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 2, "COMMAND"),
        (["dance"], 2, "invalid choice"),
        (["launch", "--speed"], 2, "unrecognized arguments: --speed"),
        (["launch", "--http", "nowhere"], 2, "write HOST:PORT"),
        (["chat"], 2, "NAME"),
    ],
)
def test_wrong_usage_is_one_line_and_2(words: list[str], code: int, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert len(done.stderr.splitlines()) == 1
    assert told in done.stderr
