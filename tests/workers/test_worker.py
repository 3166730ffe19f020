"""The worker's edges: what it refuses, how it ends, what it makes of nonsense."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.workers.family_zoo import Family
from tests.workers.local import LocalWorker
from workers import wire
from zoo.catalog import Catalog

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return Family(tmp_path_factory.mktemp("worker"), "llama")


@pytest.fixture
def worker(family):
    made = LocalWorker(family.zoo, "native", kv_bytes=4 << 20)
    made.load("base")
    return made


def test_a_request_that_never_fits_is_refused_at_once(worker):
    answer = worker.open("base", [5] * 10, max_tokens=10**6)
    worker.absorb()
    assert "do not fit this worker's KV memory" in answer.failed
    fine = worker.open("base", [5] * 10, max_tokens=3)
    worker.run()
    assert len(fine.tokens) == 3


def test_requests_wait_until_their_pages_are_free(worker):
    answers = [worker.open("base", [5 + i] * 20, max_tokens=200) for i in range(24)]
    worker.step()
    status = worker.status
    assert 0 < status.running < 24
    assert status.running + status.waiting == 24
    worker.run()
    assert all(len(a.tokens) == 200 for a in answers)


def test_pages_are_backed_with_memory_while_their_requests_run(family):
    made = LocalWorker(family.zoo, kv_bytes=16 << 20)
    made.load("base")
    before = made.open("base", [5, 6, 7], max_tokens=12)
    made.step()
    parts = 0
    while made.worker.commit():
        parts += 1
        if made.worker.has_work:
            made.step()
    made.run()
    after = made.open("base", [5, 6, 7], max_tokens=12)
    made.run()
    assert parts >= 4
    assert before.tokens == after.tokens
    assert len(before.tokens) == 12


def test_a_prompt_nobody_opened_is_dropped_and_counted(worker):
    worker.worker.take(wire.Prompt(99, b"\x01\x00\x00\x00"))
    worker.worker.take(wire.Close(99))
    assert worker.status.counters["dropped_messages"] == 1


def test_a_chain_in_use_is_evicted_only_when_its_requests_end(worker):
    answer = worker.open("base", [5] * 4, max_tokens=20)
    worker.step()
    number = worker.chains["base"]
    worker.worker.take(wire.Evict(number))
    late = worker.open("base", [5], max_tokens=1)
    worker.run()
    worker.absorb()
    assert len(answer.tokens) == 20
    assert "not loaded" in late.failed
    while worker.worker.is_loading:
        worker.worker.collect()
    assert worker.status.resident_bytes == 0


def test_a_chain_that_is_not_there_fails_in_a_sentence(worker):
    worker.worker.take(wire.Load(77, "0" * 64, 0, 10, 256))
    while worker.worker.is_loading:
        worker.worker.collect()
    failed = [r for r in worker.reports if isinstance(r, wire.Failed)]
    assert failed
    assert failed[0].chain == 77
    assert "cannot be loaded" in failed[0].reason


def test_stop_tokens_end_an_answer_once_enough_was_said(worker):
    free = worker.open("base", [9, 8, 7], max_tokens=12)
    worker.run()
    stop = free.tokens[4]
    cut = worker.open("base", [9, 8, 7], max_tokens=12, stop_token_ids=(stop,))
    worker.run()
    first = free.tokens.index(stop)
    assert cut.tokens == free.tokens[: first + 1]
    assert cut.finished == wire.STOPPED
    held = worker.open("base", [9, 8, 7], max_tokens=12, min_tokens=8, stop_token_ids=(stop,))
    worker.run()
    assert len(held.tokens) >= 8
    assert stop not in held.tokens[:8]


def test_a_replay_goes_on_where_the_answer_stopped(worker):
    options = {"max_tokens": 16, "temperature": 1.0, "seed": 3}
    whole = worker.open("base", [4, 5, 6], **options)
    worker.run()
    rest = worker.open("base", [4, 5, 6, *whole.tokens[:7]], emitted=7, **options)
    rest.tokens.extend(whole.tokens[:7])
    worker.run()
    assert rest.tokens == whole.tokens


class Process:
    """A worker process and the engine's end of its socket."""

    def __init__(self, zoo: Path, folder: Path) -> None:
        endpoint = f"ipc://{folder}/engine"
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 30_000)
        self.socket.bind(endpoint)
        config = {"name": "w0", "endpoint": endpoint, "zoo": str(zoo), "kv_bytes": 8 << 20}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workers", json.dumps(config)], cwd=ROOT, stdin=subprocess.PIPE
        )

    def receive(self) -> wire.Report:
        return wire.decode_report(self.socket.recv_multipart()[1])

    def until(self, kind: type[wire.Report]) -> wire.Report:
        while not isinstance(report := self.receive(), kind):
            pass
        return report

    def send(self, body: bytes) -> None:
        self.socket.send_multipart([b"w0", body])

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.socket.close()
        self.context.term()


@pytest.fixture
def process(family, tmp_path) -> Iterator[Process]:
    made = Process(family.zoo, tmp_path)
    yield made
    made.close()


def test_a_worker_process_greets_and_ends_with_its_engine(process):
    hello = process.until(wire.Hello)
    assert (hello.version, hello.name, hello.pid) == (wire.WIRE_VERSION, "w0", process.process.pid)
    process.process.stdin.close()
    assert process.process.wait(10) == 0


def test_nonsense_from_the_socket_is_dropped(process):
    process.until(wire.Hello)
    for body in (b"", b"\xc1", os.urandom(100), b"\x92\xa4load\x01", wire.encode(["open", 1])):
        process.send(body)
    process.send(wire.encode(wire.Drain()))
    process.until(wire.Drained)
    assert process.process.wait(10) == 0


def test_a_variant_that_does_not_fit_the_weight_budget_is_refused_and_others_serve(family):
    tight = LocalWorker(family.zoo, "torch", kv_bytes=8 << 20, weight_bytes=100_000)
    with pytest.raises(AssertionError, match="weight-memory-bytes"):
        tight.load("base")
    assert tight.status.resident_bytes == 0


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    made = Family(tmp_path_factory.mktemp("crowd"), "llama")
    for i in range(4):
        made.tune(f"t{i}", ["layers.2.", "layers.3."], seed=i)
    return made


def budget(crowd, names: list[str]) -> int:
    """Bytes that those variants need together."""
    worker = LocalWorker(crowd.zoo, "native", kv_bytes=8 << 20)
    worker.load(*names)
    return worker.status.resident_bytes


def settle(worker: LocalWorker) -> None:
    while worker.worker.has_work or worker.worker.is_loading:
        worker.worker.collect()
        worker.step()


def test_chains_that_nobody_uses_give_way_and_come_back_when_asked_for(crowd):
    limit = budget(crowd, ["base", "t0", "t1"])
    worker = LocalWorker(crowd.zoo, "native", kv_bytes=8 << 20, weight_bytes=limit)
    worker.load(*crowd.names)
    assert worker.status.resident_bytes <= limit
    asked = [(name, [7 + i, 8, 9]) for i, name in enumerate([*crowd.names, *crowd.names])]
    answers = []
    for name, prompt in asked:
        answers.append(worker.open(name, prompt, max_tokens=6))
        settle(worker)
        assert worker.status.resident_bytes <= limit
    together = [worker.open(name, prompt, max_tokens=6) for name, prompt in asked]
    settle(worker)
    free = LocalWorker(crowd.zoo, "native", kv_bytes=8 << 20)
    free.load(*crowd.names)
    wanted = [free.open(name, prompt, max_tokens=6) for name, prompt in asked]
    free.run()
    assert [a.tokens for a in answers] == [a.tokens for a in wanted]
    assert [a.tokens for a in together] == [a.tokens for a in wanted]
    assert worker.status.counters["parked_chains"] > len(crowd.names)


def test_the_least_recently_used_chain_gives_way_and_one_in_use_never_does(crowd):
    limit = budget(crowd, ["t0", "t1"])
    worker = LocalWorker(crowd.zoo, "native", kv_bytes=8 << 20, weight_bytes=limit)
    worker.load("t0", "t1")
    worker.open("t1", [5], max_tokens=1)
    settle(worker)
    long = worker.open("t0", [5, 6], max_tokens=40)
    worker.step()
    worker.load("t2")
    late = worker.open("t1", [9], max_tokens=3)
    other = worker.open("t2", [9], max_tokens=3)
    worker.step()
    assert not long.is_done
    settle(worker)
    assert (len(long.tokens), len(late.tokens), len(other.tokens)) == (40, 3, 3)


def test_a_request_that_waits_for_a_parked_chain_can_be_closed_or_fail(crowd):
    limit = budget(crowd, ["t0"])
    worker = LocalWorker(crowd.zoo, "native", kv_bytes=8 << 20, weight_bytes=limit)
    worker.load("t0", "t1")
    closed = worker.open("t0", [5], max_tokens=3)
    given_up = worker.open("t0", [6], max_tokens=3)
    worker.close(closed)
    number = worker.chains.pop("t0")
    worker.worker.take(wire.Evict(number))
    settle(worker)
    worker.absorb()
    assert closed.tokens == []
    assert "not loaded" in given_up.failed
    fine = worker.open("t1", [6], max_tokens=3)
    settle(worker)
    assert len(fine.tokens) == 3


def test_a_chain_that_is_evicted_while_it_loads_leaves_nothing(crowd):
    worker = LocalWorker(crowd.zoo, "native", kv_bytes=8 << 20)
    catalog = Catalog(crowd.zoo)
    variant = catalog.variant("t0")
    units = len(catalog.chain(variant.chain).units)
    worker.worker.take(wire.Load(3, variant.chain, 0, units, 64))
    worker.worker.take(wire.Evict(3))
    settle(worker)
    assert (worker.status.chains, worker.status.resident_bytes) == (0, 0)


def test_a_wave_that_fails_is_told_but_a_lost_device_ends_the_worker(crowd, monkeypatch):
    worker = LocalWorker(crowd.zoo, "torch", kv_bytes=8 << 20)
    worker.load("base")
    ops = worker.worker._ops

    def lost(*_: object) -> None:
        raise RuntimeError("unspecified launch failure")

    with monkeypatch.context() as broken:
        broken.setattr(ops, "plan", lost)
        refused = worker.open("base", [5], max_tokens=2)
        worker.run()
        assert "unspecified launch failure" in refused.failed
        broken.setattr(ops, "synchronize", lost)
        kept = worker.open("base", [5], max_tokens=2)
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            worker.run()
        worker.absorb()
        assert not kept.failed
    worker.run()
    assert len(kept.tokens) == 2
