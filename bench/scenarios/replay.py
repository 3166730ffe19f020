"""A trace, played in real time against every variant: latency as clients see it (p50 / p95 / p99).

Default: the synthetic trace of `bench/traces.py`; `--trace FILE` plays a recorded one, `--speed`
times as fast, for `--seconds`. Tenants get variants, busiest first. Requests are sent when the
trace says whether or not earlier ones have ended; `lag` is how late the sender was (p99). Prompts
are cut to 512 tokens, answers to 128.
"""

from collections.abc import Iterator

from bench.job import Job
from bench.result import Result
from bench.stage import Stage
from bench.zoos import BASE, LAST, LORAS, variants

_RATE = 0.7


def run(stage: Stage) -> Iterator[Result]:
    """One pass."""
    zoo = stage.zoos.whole
    trace = stage.trace
    with stage.server(zoo) as server:
        stage.say(f"replay: {trace.source} for {trace.seconds:g} s")
        job = Job(
            endpoint=server.endpoint,
            models=(BASE, *LORAS, *LAST),
            connections=4,
            prompt_tokens=(1, 512),
            output_tokens=(1, 128),
            vocabulary=variants(zoo)[0].vocabulary,
            seed=1,
            trace=trace.source,
            rate=_RATE,
            speed=trace.speed,
            seconds=min(trace.seconds, 15.0) if stage.quick else trace.seconds,
        )
        played = stage.load(server, job)
    outcome = played.outcome
    times = {"TTFT": outcome.ttft_ms, "ITL": outcome.itl_ms, "whole": outcome.e2e_ms}
    spreads = {
        f"{name} ms": f"{one.p50:.0f} / {one.p95:.0f} / {one.p99:.0f}"
        for name, one in times.items()
    }
    yield Result(
        scenario="replay",
        cell=trace.source.rpartition("/")[2],
        figures={
            "requests": outcome.requests,
            "tokens/s": outcome.tokens_per_s,
            **spreads,
            "lag ms": outcome.lag_ms.p99,
            "others": played.others,
        },
        checks={
            "every answer is whole": outcome.finished == {"length": outcome.requests}
            and not outcome.mismatched
        },
        detail={"outcome": outcome},
    )
