"""Traces: recorded ones as they are published, and the synthetic default."""

import gzip
from itertools import pairwise
from pathlib import Path

import pytest

from bench.job import Job, asks
from bench.traces import Arrival, TraceError, assign, read_trace, synthetic

AZURE = "t_s,prompt_tokens,output_tokens\n0.0,374,44\n4.5,396,109\n60.0,5,5\n"
SERVEGEN = "t_s,tenant,prompt_tokens,output_tokens\n0.0,20,250,572\n1.0,3,251,12\n2.0,3,1,1\n"


def packed(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_reads_a_packed_trace_up_to_its_end(tmp_path: Path):
    path = packed(tmp_path / "azure.csv.gz", AZURE)
    assert read_trace(path, speed=1.0, seconds=30.0) == [
        Arrival(0.0, 374, 44),
        Arrival(4.5, 396, 109),
    ]


def test_a_faster_trace_brings_more_into_the_same_time(tmp_path: Path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    arrivals = read_trace(path, speed=3.0, seconds=30.0)
    assert [arrival.at_s for arrival in arrivals] == [0.0, 1.5, 20.0]


def test_busiest_tenants_get_the_first_models(tmp_path: Path):
    path = packed(tmp_path / "servegen.csv.gz", SERVEGEN)
    arrivals = read_trace(path, speed=1.0, seconds=30.0)
    assert assign(arrivals, ["first", "second"]) == ["second", "first", "first"]


def test_requests_without_a_tenant_take_turns():
    arrivals = [Arrival(float(i), 1, 1) for i in range(3)]
    assert assign(arrivals, ["a", "b"]) == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("t_s,prompt_tokens\n0,1\n", "needs the columns"),
        ("t_s,prompt_tokens,output_tokens\n0,many,1\n", "needs the columns"),
        ("t_s,prompt_tokens,output_tokens\n99,1,1\n", "no request in its first"),
    ],
)
def test_says_why_a_trace_is_of_no_use(tmp_path: Path, text: str, why: str):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=why):
        read_trace(path, speed=1.0, seconds=10.0)


def test_a_missing_trace_is_named(tmp_path: Path):
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "none.csv", speed=1.0, seconds=10.0)


def test_the_synthetic_trace_keeps_its_rate_and_its_seed():
    arrivals = synthetic(rate=10.0, seconds=400.0, tenants=5, seed=3)
    assert arrivals == synthetic(rate=10.0, seconds=400.0, tenants=5, seed=3)
    assert 3000 < len(arrivals) < 5000
    assert all(a.at_s <= b.at_s for a, b in pairwise(arrivals))
    assert {arrival.tenant for arrival in arrivals} == set("01234")


def test_a_traced_job_cuts_lengths_and_keeps_times(tmp_path: Path):
    job = Job(
        endpoint="",
        models=("a",),
        prompt_tokens=(1, 100),
        output_tokens=(1, 50),
        vocabulary=500,
        trace=str(packed(tmp_path / "t.csv.gz", AZURE)),
        speed=2.0,
    )
    made = asks(job)
    assert [(len(ask.prompt), ask.max_tokens, ask.at_s) for ask in made] == [
        (100, 44, 0.0),
        (100, 50, 2.25),
        (5, 5, 30.0),
    ]
    assert all(100 <= token < 500 for token in made[0].prompt)
