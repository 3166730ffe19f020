"""What tests of workers that round ask for, and how far answers lie apart."""

import random

from tests.workers.local import Answer, LocalWorker


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 300) for _ in range(count)]


def scores(worker: LocalWorker, name: str, prompt: list[int]) -> list[float]:
    """Log-probabilities of a prompt's tokens."""
    answer = worker.open(name, prompt, max_tokens=1, prompt_logprobs=0)
    worker.run()
    assert not answer.failed, answer.failed
    return [scored.logprob for scored in answer.scored]


def gap(one: list[float], two: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def said(answer: Answer) -> list[tuple[int, float]]:
    assert not answer.failed, answer.failed
    return [(given.token, given.logprob) for given in answer.logprobs]
