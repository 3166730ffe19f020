"""Guessed tokens: what is guessed and when, and that answers are those without guesses."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ext.build import supported
from tests.workers.family_zoo import Family, mixed
from tests.workers.local import Answer, LocalWorker
from tests.workers.rounded import tokens
from tests.workers.test_batcher import chain
from workers.batcher import arrange, decide, follow
from workers.guesses import Costs, Guesses
from workers.requests import Request, Span
from workers.wire import Sampling

OURS = chain(1, [(0, 0, 5)])
OURS.units = ()
SAID = [9, 8, 1, 2, 3, 4, 5, 6, 1, 2, 3]


def asking(
    known: Sequence[int], number: int = 1, *, room: int = 40, outputs: int = 0, **options: object
) -> Request:
    sampling = Sampling(**{"max_tokens": room, **options})
    row = np.zeros(len(known) + room, np.int32)
    row[: len(known)] = known
    return Request(number, OURS, sampling, 0, 0, 0.0, row, len(known), outputs)


def guessed(request: Request, count: int) -> list[int]:
    return request.tokens[request.length : request.length + count].tolist()


def say(request: Request, *said: int) -> None:
    for token in said:
        request.tokens[request.length] = token
        request.length += 1
        request.outputs += 1


def able(
    most: int = 7, rows: int = 8, ratios: dict[tuple[int, int], float] | None = None
) -> Guesses:
    """Guesses that know how long waves take: 20 ms without any, with some so many times that."""
    guesses = Guesses(most, rows)
    bare = {(number, number): 1.0 for number in range(1, 8)}
    for (requests, count), ratio in (bare | (ratios or {})).items():
        for _ in range(3):
            guesses.took([asking([])] * requests, count, 0.02 * ratio)
    return guesses


def made_for(guesses: Guesses, request: Request) -> list[int]:
    return guessed(request, guesses.make([request]).get(request.id, 0))


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    assert made_for(able(4, 8), asking(SAID)) == [4, 5, 6, 1]


def test_the_latest_of_several_places_counts_and_a_longer_match_more() -> None:
    assert made_for(able(2, 8), asking([1, 2, 3, 4, 0, 1, 2, 3, 7, 7, 1, 2, 3])) == [7, 7]
    assert made_for(able(2, 8), asking([1, 2, 3, 4, 0, 9, 2, 3, 7, 7, 1, 2, 3])) == [4, 0]


def test_a_circle_is_guessed_around() -> None:
    assert made_for(able(7, 8), asking([5, 1, 2, 1, 2])) == [1, 2, 1, 2, 1, 2, 1]


@pytest.mark.parametrize("known", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [3, 1, 2, 4, 3, 2, 1]])
def test_nothing_is_guessed_of_what_was_never_said(known: list[int]) -> None:
    assert not able(7, 8).make([asking(known)])


def test_what_is_said_meanwhile_is_known() -> None:
    request = asking(SAID[:8])
    guesses = able(2, 8)
    assert not guesses.make([request])
    say(request, 1)
    assert not guesses.make([request])
    say(request, 2)
    assert made_for(guesses, request) == [3, 4]
    say(request, 7, 1, 2)
    assert made_for(guesses, request) == [7, 1]


def test_nothing_is_guessed_until_waves_without_guesses_were_seen() -> None:
    guesses, request = Guesses(7, 8), asking(SAID)
    for _ in range(2):
        assert not guesses.make([request])
        guesses.took([request], 1, 0.02)
    assert guesses.make([request]) == {1: 7}


def test_so_much_is_guessed_as_pays() -> None:
    steep = {(1, 2): 1.1, (1, 3): 1.8, (1, 4): 2.5, (1, 5): 3, (1, 6): 4, (1, 7): 5, (1, 8): 6}
    assert len(made_for(able(ratios=steep), asking(SAID))) == 1
    assert len(made_for(able(ratios={(1, 2): 1.1, (1, 3): 1.25}), asking(SAID))) == 7
    # Of what has never been tried no more is known than that it takes no less.
    assert len(made_for(able(ratios={(1, 2): 1.1}), asking(SAID))) == 7
    dear = {(1, rows): 1.0 * rows for rows in range(2, 9)}
    assert made_for(able(ratios=dear), asking(SAID)) == []


def test_rows_go_to_who_is_guessed_best() -> None:
    guesses = able(ratios={(3, 7): 2.0})
    one, two, new = asking(SAID, 1), asking(SAID, 2), asking([1, 2, 3], 3)
    assert guesses.make([one, two, new]) == {1: 2, 2: 1}
    for _ in range(20):
        guesses.learn(one, 1, 0)
        guesses.learn(two, 1, 1)
    assert guesses.make([one, two, new]) == {2: 3}
    assert able().make([one, new, asking([4, 5], 4)]) == {1: 5}


def test_wrong_guesses_become_fewer_and_are_tried_again() -> None:
    guesses = able(ratios={(1, 2): 1.1, (1, 3): 1.2, (1, 8): 1.25})
    request, counts = asking(SAID), []
    for _ in range(400):
        made = guesses.make([request]).get(1, 0)
        guesses.took([request], 1 + made, 0.02 * {1: 1.0, 2: 1.1, 8: 1.25}.get(1 + made, 1.2))
        if made:
            guesses.learn(request, made, 0)
        counts.append(made)
    tried = [count for count in counts if count]
    assert tried[0] == 6
    assert tried == sorted(tried, reverse=True)
    assert counts[50:].count(0) > 300
    assert 1 in counts[100:]
    for _ in range(12):
        guesses.learn(request, 1, 1)
    assert guesses.make([request]) == {1: 7}


def test_a_wave_that_took_long_once_is_not_held_against_its_kind() -> None:
    costs = Costs()
    costs.learn(1, 1, 0.02)
    assert costs.of(1, 4) is None
    costs.learn(1, 1, 0.02)
    assert costs.of(1, 4) == 1.0
    costs.learn(1, 4, 0.18)
    assert costs.of(1, 4) == 1.0
    costs.learn(1, 4, 0.04)
    assert [costs.of(1, rows) for rows in (2, 3, 4, 8)] == [1, 1, 2, 2]
    costs.learn(1, 4, 0.2)
    assert costs.of(1, 4) == pytest.approx(3.0)
    for _ in range(9):
        costs.learn(1, 4, 0.04)
    assert costs.of(1, 4) == pytest.approx(2.0, rel=0.01)


def test_what_is_old_is_measured_anew_and_at_once() -> None:
    costs = Costs()
    for _ in range(3):
        costs.learn(1, 1, 0.02)
        costs.learn(1, 4, 0.3)
    for _ in range(600):
        costs.learn(1, 1, 0.02)
    assert costs.of(1, 4) == 1.0
    costs.learn(1, 4, 0.03)
    assert costs.of(1, 4) == pytest.approx(1.5)
    for _ in range(130):
        costs.learn(1, 4, 0.06)
    assert costs.of(1, 4) is None
    costs.learn(1, 1, 0.04)
    costs.learn(1, 4, 0.06)
    assert costs.of(1, 4) == pytest.approx(2.25)


def test_waves_of_other_chains_count_for_themselves() -> None:
    wide = chain(3, [(0, 0, 5)], hidden=16)
    wide.units = ()
    guesses, other = able(), asking(SAID)
    other.chain = wide
    assert not guesses.make([other])
    assert guesses.make([asking(SAID)])


def test_who_has_ended_is_forgotten() -> None:
    guesses = able()
    guesses.make([asking(SAID, 1), asking(SAID, 2)])
    assert len(guesses) == 2
    guesses.forget(1)
    guesses.forget(3)
    assert len(guesses) == 1


def test_no_more_is_guessed_than_rows_and_the_answer_have_room_for() -> None:
    guesses = able()
    crowd = [asking(SAID, number) for number in range(4)]
    assert guesses.make(crowd[:2]) == dict.fromkeys(range(2), 3)
    assert not guesses.make([*crowd, *(asking([4], number) for number in range(5, 9))])
    assert guesses.make(crowd) == dict.fromkeys(range(4), 1)
    assert sum(guesses.make([*crowd, asking(SAID, 9)]).values()) == 3
    assert made_for(able(7, 8), asking(SAID, room=2)) == [4]
    assert made_for(able(7, 8), asking(SAID, room=1)) == []
    assert made_for(able(1, 8), asking(SAID)) == [4]
    assert not able(0, 8).make([asking(SAID)])
    assert not able(7, 0).make([asking(SAID)])
    assert not able(7, 1).make([asking(SAID)])
    assert not guesses.make([])


def test_nothing_is_guessed_beside_a_prompt_or_where_tokens_shape_the_next() -> None:
    prompt = asking(SAID, 2)
    prompt.spans = [Span(0, 0, len(SAID))]
    assert not able(7, 8).make([asking(SAID), prompt])
    for shape in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": ((1, 1.0),)},
        {"allowed_token_ids": (1, 2)},
        {"min_tokens": 3},
    ):
        assert not able(7, 8).make([asking(SAID, **shape)]), shape


def test_virtual_positions_are_never_guessed() -> None:
    with_prefix = chain(2, [(0, 0, 5)])
    with_prefix.units, with_prefix.virtual = (), 3
    request = asking([-1, -2, -3, 1, 2, 3, 4, 1, 2, 3])
    request.chain = with_prefix
    assert made_for(able(3, 8), request) == [4, 1, 2]
    request = asking([-1, -2, -3, 1, 2])
    request.chain = with_prefix
    assert made_for(able(3, 8), request) == []


def test_a_step_has_rows_for_its_guesses_and_wants_the_logits_of_all() -> None:
    requests = [asking(SAID, number) for number in range(2)]
    for request in requests:
        request.computed = len(SAID) - 1
    steps = decide(requests, max_rows=64, page=16, now=0.0, last_turn={}, guesses={1: 3})
    wave = arrange(steps)
    assert [(s.request.id, s.count, s.guesses) for s in wave.steps] == [(0, 1, 0), (1, 4, 3)]
    assert wave.wanted == (range(1), range(4))
    assert follow(wave, {r.id: r for r in requests}) is None
    narrow = decide(requests, max_rows=3, page=16, now=0.0, last_turn={}, guesses={1: 3})
    assert [s.count for s in narrow] == [1, 1]


# ---- real workers -------------------------------------------------------------------------------


@pytest.fixture
def everything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long waves took does not decide."""
    monkeypatch.setattr(Costs, "of", lambda *_: 1.0)


needs_kernels = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return mixed(tmp_path_factory.mktemp("guessed"))


def workers(family: Family, **config: object) -> list[LocalWorker]:
    """One that does not guess, and one that does."""
    both = [LocalWorker(family.zoo, "native", speculative_tokens=n, **config) for n in (0, 7)]
    for worker in both:
        worker.load(*family.names)
    return both


def same_answers(both: list[LocalWorker], asks: list[tuple[str, list[int], dict]]) -> int:
    """Asks both, expects equal answers; how many steps guesses saved."""
    steps = []
    answers: list[list[Answer]] = []
    for worker in both:
        before = worker.status.steps
        answers.append([worker.open(name, given, **options) for name, given, options in asks])
        worker.run()
        steps.append(worker.status.steps - before)
    for one, two in zip(*answers, strict=True):
        assert not one.failed
        assert (one.tokens, one.finished) == (two.tokens, two.finished)
        assert one.logprobs == two.logprobs
    return steps[0] - steps[1]


@needs_kernels
@pytest.mark.usefixtures("everything_pays")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_answers_are_those_without_guesses_in_fewer_steps(family: Family, dtype: str) -> None:
    both = workers(family, dtype=dtype)
    saved = 0
    for number in range(12):
        names = family.names[: 1 + number % 4]
        circle = tokens(3 + number % 5, number) * 6
        asks = [(name, circle, {"max_tokens": 60, "logprobs": 2}) for name in names]
        saved += same_answers(both, asks)
    counters = both[1].status.counters
    assert saved > 100
    assert 0 < counters["accepted_tokens"] < counters["draft_tokens"]
    assert counters["output_tokens"] == both[0].status.counters["output_tokens"]
    assert counters["replayed_steps"] > counters["captured_steps"]


@needs_kernels
@pytest.mark.usefixtures("everything_pays")
def test_sampled_answers_are_the_same_ones(family: Family) -> None:
    both = workers(family)
    saved = 0
    for number in range(12):
        options = {"max_tokens": 60, "temperature": 0.05 + 0.1 * (number % 3), "seed": number}
        saved += same_answers(both, [("base", tokens(4, number) * 6, options)])
    assert saved > 0
    # Waves with guesses are replayed as others are.
    replays = [
        w.status.counters["captured_steps"] + w.status.counters["replayed_steps"] for w in both
    ]
    waves = [worker.status.steps for worker in both]
    assert replays[1] * waves[0] == replays[0] * waves[1] > 0


@needs_kernels
@pytest.mark.usefixtures("everything_pays")
def test_an_answer_ends_at_a_stop_token_among_guesses(family: Family) -> None:
    both = workers(family)
    given = tokens(4, 1) * 6
    free = both[0].open("base", given, max_tokens=60)
    both[0].run()
    for stop in sorted(set(free.tokens)):
        same_answers(both, [("base", given, {"max_tokens": 60, "stop_token_ids": (stop,)})])
    # Here the answer stands in the prompt, so that a stop is guessed with others behind it.
    saved = 0
    for number, stop in enumerate(free.tokens[:40]):
        options = {"max_tokens": 60, "stop_token_ids": (stop,)}
        told = given + free.tokens + given + free.tokens[: number // 2]
        saved += same_answers(both, [("base", told, options)])
    assert saved > 0
    for most in range(1, 20):
        same_answers(both, [("base", given, {"max_tokens": most})])


@needs_kernels
@pytest.mark.usefixtures("everything_pays")
def test_pages_of_guessed_tokens_serve_later_prompts(family: Family) -> None:
    both = workers(family)
    given = tokens(4, 1) * 6
    said = both[1].open("base", given, max_tokens=60)
    both[1].run()
    later = given + said.tokens + tokens(3, 2)
    fresh = both[0].open("base", later, max_tokens=20)
    found = both[1].open("base", later, max_tokens=20)
    for worker in both:
        worker.run()
    assert found.cached >= 64
    assert fresh.tokens == found.tokens


@needs_kernels
@pytest.mark.usefixtures("everything_pays")
def test_requests_come_and_go_among_guesses(family: Family) -> None:
    both = workers(family, max_rows=64)
    answers: list[list[Answer]] = []
    for worker in both:
        draw = random.Random(0)
        asked = []
        for number in range(40):
            given = tokens(draw.randrange(1, 5), number) * draw.randrange(1, 6)
            name = draw.choice(family.names)
            asked.append(worker.open(name, given, max_tokens=draw.randrange(2, 40)))
            for _ in range(draw.randrange(12)):
                worker.step()
            if draw.random() < 0.2:
                worker.close(asked.pop(draw.randrange(len(asked))))
        worker.run()
        answers.append(asked)
    assert both[1].status.counters["accepted_tokens"] > 0
    for one, two in zip(*answers, strict=True):
        assert one.is_done
        assert (one.tokens, one.finished) == (two.tokens, two.finished)


def test_kernels_whose_rows_may_mind_each_other_are_not_guessed_for(family: Family) -> None:
    worker = LocalWorker(family.zoo, "torch", speculative_tokens=7)
    worker.load("base")
    worker.open("base", tokens(4, 1) * 6, max_tokens=40)
    worker.run()
    assert worker.status.counters["draft_tokens"] == 0


def test_layers_of_other_classes_are_not_guessed_for(tmp_path: Path) -> None:
    made = Family(tmp_path, "olmo2")
    worker = LocalWorker(made.zoo, "native", speculative_tokens=7)
    worker.load("base")
    worker.open("base", tokens(4, 1) * 6, max_tokens=40)
    worker.run()
    assert worker.status.counters["draft_tokens"] == 0
