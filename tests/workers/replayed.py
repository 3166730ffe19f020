"""What captured decode steps must hold to, whichever kernels capture them."""

from pathlib import Path

from tests.workers.family_zoo import Family, wrong_tokens
from tests.workers.hand_made import Base, Tuned
from tests.workers.local import Answer, LocalWorker
from tests.workers.rounded import tokens

Asked = list[tuple[str, list[int], Answer]]


def assert_own_tokens(family: Family, asked: Asked) -> None:
    for name, given, answer in asked:
        assert not answer.failed, answer.failed
        wrong, _ = wrong_tokens(family.reference(name), given, answer.tokens)
        assert wrong == 0, f"{name}: {wrong} tokens differ from the model's"


def assert_captures_leave_with_their_variant(family: Family, worker: LocalWorker) -> None:
    worker.load("last", "base")
    asked: Asked = []

    def ask(name: str) -> int:
        given = tokens(3, len(asked))
        asked.append((name, given, worker.open(name, given, max_tokens=3)))
        worker.run()
        return worker.status.counters["captured_steps"]

    before = ask("last")
    worker.evict("last")
    between = ask("base")
    worker.load("last")
    assert before < between < ask("last")
    assert_own_tokens(family, asked)


def assert_runs_unit_by_unit(root: Path, kernels: str, max_tokens: int) -> None:
    """What no capture can exchange: norms, gains of inputs, prefixes, bottlenecks."""
    base = Base(root, "llama")
    names = [
        Tuned(base, "norms", 1).norm(1, "a", "norm").input_gain(2, "down").publish(),
        Tuned(base, "prefix", 2).with_prefix(5).gain(1, "q").bias(2, "o").publish(),
        Tuned(base, "adapter", 3).bottleneck(1, "o", "stream").publish(),
    ]
    answers = []
    for ops in ("torch", kernels):
        worker = LocalWorker(base.zoo, ops)
        worker.load(*names)
        together = [worker.open(name, tokens(4, 2), max_tokens=max_tokens) for name in names]
        worker.run()
        answers.append([answer.tokens for answer in together])
    assert answers[0] == answers[1]
