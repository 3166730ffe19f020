"""The commands `chat` and `complete`, as processes with a person's input on stdin."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from engine import api
from tests.engine.fakeengine import FakeEngine

CHAT = "import sys; from engine.chat import chat; chat(sys.argv[1], sys.argv[2])"
COMPLETE = "import sys; from engine.chat import complete; complete(*sys.argv[1:])"


@pytest.fixture(name="engine")
def _engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


def run(code: str, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=typed,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_conversation_remembers_until_it_is_reset(engine: FakeEngine) -> None:
    typed = "say one\n\nsay two\n/reset\nsay three\n/quit\nsay four\n"
    done = run(CHAT, engine.endpoint, "tiny", typed=typed)
    assert done.returncode == 0, done.stderr
    # The engine answers to all that was said so far, put together.
    assert done.stdout.splitlines()[1:] == ["one", "oneonesay two", "three"]
    first, second, third = [submit.messages for submit in engine.submits()]
    assert first == [{"role": "user", "content": "say one"}]
    assert second == [
        {"role": "user", "content": "say one"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "say two"},
    ]
    assert third == [{"role": "user", "content": "say three"}]


def test_a_failed_question_is_forgotten(engine: FakeEngine) -> None:
    done = run(CHAT, engine.endpoint, "tiny", typed="reject too_long\nsay fine\n")
    assert "Rejected as too_long." in done.stdout
    assert done.stdout.rstrip().endswith("fine")
    assert engine.submits()[1].messages == [{"role": "user", "content": "say fine"}]


def test_unknown_variants_are_named_at_once(engine: FakeEngine) -> None:
    done = run(CHAT, engine.endpoint, "none")
    assert done.returncode == 1
    assert "There is no variant none; served are: tiny." in done.stderr


def test_completes(engine: FakeEngine) -> None:
    done = run(COMPLETE, engine.endpoint, "tiny", "say one two")
    assert done.stdout == "one two\n"


def test_ctrl_c_stops_the_answer(engine: FakeEngine) -> None:
    command = [sys.executable, "-c", COMPLETE, engine.endpoint, "tiny", "hang on"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == "hang"
        process.send_signal(signal.SIGINT)
        assert engine.saw(api.Cancel)
        assert process.wait(20) == 0
