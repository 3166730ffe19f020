"""Decode steps of a worker replayed on the CPU: every row gets its own tokens, whoever is there."""

import gc
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ext.build import supported
from ext.ops import LoraSegment
from ext.relay import Relay
from tests.workers.family_zoo import Family, mixed
from tests.workers.local import LocalWorker
from tests.workers.replayed import (
    Asked,
    assert_captures_leave_with_their_variant,
    assert_own_tokens,
    assert_runs_unit_by_unit,
)
from tests.workers.rounded import tokens

pytestmark = pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return mixed(tmp_path_factory.mktemp("replayed"))


def test_mixed_batches_are_replayed_while_requests_come_and_go(family: Family) -> None:
    worker = LocalWorker(family.zoo, "native", max_rows=64)
    worker.load(*family.names)
    asked: Asked = []
    draw = random.Random(0)
    for number in range(24):
        name = draw.choice(family.names)
        given = tokens(draw.randrange(1, 20), number)
        asked.append((name, given, worker.open(name, given, max_tokens=draw.randrange(2, 12))))
        worker.step()
    worker.run()
    assert_own_tokens(family, asked)
    counters = worker.status.counters
    assert counters["replayed_steps"] > counters["captured_steps"] > 0


def test_a_batch_that_lasts_is_captured_once(family: Family) -> None:
    worker = LocalWorker(family.zoo, "native")
    worker.load("base", "qv")
    asked: Asked = []
    for name in ("base", "qv", "base"):
        asked.append((name, tokens(4, 1), worker.open(name, tokens(4, 1), max_tokens=9)))
    worker.run()
    assert_own_tokens(family, asked)
    counters = worker.status.counters
    # One of the prompts, up to the last attention, and one of what follows.
    assert counters["captured_steps"] == 2
    assert counters["replayed_steps"] == 7


@pytest.fixture
def relayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many heads each relay that ran had."""
    made: list[int] = []
    run = Relay.run

    def counted(self: Relay, given: Sequence[np.ndarray]) -> None:
        run(self, given)
        made.append(len(self.best))

    monkeypatch.setattr(Relay, "run", counted)
    return made


def test_a_wave_that_decodes_on_is_one_call(family: Family, relayed: list[int]) -> None:
    worker = LocalWorker(family.zoo, "native")
    names = ("base", "last", "qv", "last", "base")
    worker.load(*sorted(set(names)))
    asked: Asked = []
    for number, name in enumerate(names):
        given = tokens(4 + number, number)
        # Page tables are laid out anew at the 129th position.
        asked.append((name, given, worker.open(name, given, max_tokens=150)))
    worker.run()
    assert_own_tokens(family, asked)
    # All but the first two waves of these steps, and where tables end.
    assert len(relayed) > 120
    assert sum(relayed) == len(relayed)
    first = len(relayed)
    late = worker.open("last", tokens(5, 9), max_tokens=9)
    worker.run()
    assert_own_tokens(family, [("last", tokens(5, 9), late)])
    assert len(relayed) > first


def test_heads_that_are_sampled_from_run_behind_that_call(
    family: Family, relayed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers() -> list[list[int]]:
        worker = LocalWorker(family.zoo, "native")
        names = ("base", "last", "qv", "last")
        worker.load(*sorted(set(names)))
        options = {"max_tokens": 40, "temperature": 0.9, "seed": 5}
        asked = [worker.open(name, tokens(6, i), **options) for i, name in enumerate(names)]
        asked.append(worker.open("base", tokens(6, 9), max_tokens=40, logprobs=2))
        worker.run()
        assert not any(answer.failed for answer in asked)
        return [answer.tokens for answer in asked]

    one_call = answers()
    assert len(relayed) > 30
    assert not any(relayed)
    monkeypatch.setattr(Relay, "close", lambda _: False)
    relayed.clear()
    assert answers() == one_call
    assert not relayed


def test_a_variant_that_leaves_takes_its_captures_along(family: Family) -> None:
    worker = LocalWorker(family.zoo, "native")
    assert_captures_leave_with_their_variant(family, worker)


def test_an_adapter_that_leaves_is_held_by_no_capture(family: Family) -> None:
    family.lora("odd", rank=13)
    worker = LocalWorker(family.zoo, "native")
    worker.load("base", "odd")
    asked: Asked = []
    for name in ("odd", "base", "odd"):
        asked.append((name, tokens(4, 1), worker.open(name, tokens(4, 1), max_tokens=4)))
        worker.run()
    assert_own_tokens(family, asked)
    assert worker.status.counters["captured_steps"] > 0
    assert resident_factors(13) > 0
    worker.evict("odd")
    assert resident_factors(13) == 0


def resident_factors(rank: int) -> int:
    """Low-rank pieces of a rank that something still holds."""
    gc.collect()
    return sum(type(o) is LoraSegment and o.a.shape[0] == rank for o in gc.get_objects())


def test_what_no_capture_can_exchange_runs_unit_by_unit(tmp_path: Path) -> None:
    assert_runs_unit_by_unit(tmp_path, "native", max_tokens=5)
