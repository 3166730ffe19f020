"""The verbs surrogate, stitch and profile, as a user types them."""

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from zoo.__main__ import main
from zoo.derived.profile import BlockProfile
from zoo.derived.stitch import StitchFinding
from zoo.derived.surrogate import SurrogateFinding

TEXT = ("--steps", "2", "--batch", "4", "--length", "32")
Zoo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def zoo(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Zoo:
    """Runs a verb in this process: its exit code, what it printed, what it said."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["zoo", "--zoo", str(root), *words])
        code = main()
        printed, said = capsys.readouterr()
        return code, printed, said

    return run


def test_each_verb_prints_its_record(zoo: Zoo) -> None:
    code, printed, _ = zoo("surrogate", "model", "--ratio", "0.5", "--as", "small", *TEXT, "--json")
    assert code == 0
    surrogate = msgspec.json.decode(printed, type=SurrogateFinding)
    assert (surrogate.name, surrogate.of, surrogate.ratio) == ("small", "model", 0.5)
    code, printed, _ = zoo("stitch", "model", "small", "--at", "2:1", *TEXT, "--json")
    assert code == 0
    stitch = msgspec.json.decode(printed, type=StitchFinding)
    assert [(join.below, join.above) for join in stitch.joins] == [(2, 1)]
    code, printed, _ = zoo("profile", "small", "--threads", "1", "--json")
    assert code == 0
    profiles = msgspec.json.decode(printed, type=list[BlockProfile])
    code, printed, _ = zoo("profile", "small", "--threads", "1")
    assert all(row.block[:12] in printed for row in profiles)


def test_wrong_usage_is_one_line_and_exits_with_2(zoo: Zoo) -> None:
    for words in (("surrogate", "nobody"), ("surrogate", "model", "--ratio", "3")):
        code, _, said = zoo(*words)
        assert code == 2
        assert said.startswith("error: ")
        assert said.count("\n") == 1
