"""10,000 short requests through 64 connections: nothing leaks, and all counters agree.

A quarter of the connections speak HTTP, the others ZeroMQ; prompts have 8 to 32 tokens, answers 1
to 8; one client in twenty leaves at a random moment (some before the engine has the request). The
load comes in parts; memory is read after each, once everything is idle. The KV memory is small, so
that its pages are all touched early, and growth after the second part of five is a leak. `soak`
serves a tiny model, so that the time goes into the engine; `soak-base` the real one.
"""

from collections.abc import Iterator
from pathlib import Path

from bench.job import Job, Outcome
from bench.result import Result
from bench.server import Server
from bench.spread import median
from bench.stage import Stage
from bench.zoos import variants

_CONNECTIONS = 64
_PARTS = 5
_REQUESTS = 10_000
_TINY_KV_BYTES, _BASE_KV_BYTES = 8 << 20, 256 << 20
_GROWTH_LIMIT = 8 << 20


def run(stage: Stage) -> Iterator[Result]:
    """On the tiny model."""
    yield _soak(stage, "tiny model", stage.zoos.tiny, _TINY_KV_BYTES)


def run_base(stage: Stage) -> Iterator[Result]:
    """On the real model."""
    yield _soak(stage, "base model", stage.zoos.loras, _BASE_KV_BYTES)


def _soak(stage: Stage, cell: str, zoo: Path, kv_bytes: int) -> Result:
    served = variants(zoo)
    requests = (_REQUESTS // 5 if stage.quick else _REQUESTS) // _PARTS
    outcomes: list[Outcome] = []
    memory: list[dict[str, int]] = []
    with stage.server(zoo, "--kv-cache-memory-bytes", str(kv_bytes)) as server:
        for part in range(_PARTS):
            stage.say(f"soak: {part * requests} of {_PARTS * requests} requests on the {cell}")
            job = Job(
                endpoint=server.endpoint,
                url=server.url,
                models=tuple(variant.name for variant in served),
                requests=requests,
                streams=_CONNECTIONS,
                connections=_CONNECTIONS,
                http_share=0.25,
                prompt_tokens=(8, 32),
                output_tokens=(1, 8),
                leave_share=0.05,
                vocabulary=served[0].vocabulary,
                seed=part,
            )
            outcomes.append(stage.load(server, job).outcome)
            server.status()
            memory.append({one.role: one.rss_bytes for one in server.memory()})
        checks, counts = _audit(server, outcomes)
    growth = {role: memory[-1][role] - memory[1][role] for role in memory[1]}
    checks |= {f"{role} does not grow": grown <= _GROWTH_LIMIT for role, grown in growth.items()}
    return Result(
        scenario="soak",
        cell=cell,
        figures={
            "requests": sum(one.requests for one in outcomes),
            "left": sum(one.left for one in outcomes),
            "requests/s": median([one.requests / one.seconds for one in outcomes]),
            "whole p99 ms": median([one.e2e_ms.p99 for one in outcomes]),
            **{f"{role} grew MB": grown / 1e6 for role, grown in growth.items()},
        },
        checks=checks,
        detail={"counts": counts, "memory": memory, "parts": outcomes},
    )


def _audit(server: Server, outcomes: list[Outcome]) -> tuple[dict[str, bool], dict[str, float]]:
    """Compare what the clients, the engine and the worker have counted. A client that leaves may
    miss tokens that were on their way, and the engine those of the wave that was running."""
    status, metrics = server.status(), server.metrics()
    worker = status["workers"][0]
    sent = sum(one.requests for one in outcomes)
    left = sum(one.left for one in outcomes)
    whole = sum(sum(one.finished.values()) for one in outcomes)
    refused = sum(sum(one.refused.values()) for one in outcomes)
    received = sum(one.output_tokens for one in outcomes)
    generated = metrics["blockllm_generation_tokens_total"]
    computed = worker["counters"]["output_tokens"]
    ended = metrics["blockllm_requests_total"]
    cancelled = metrics.get("blockllm_requests_total:cancelled", 0.0)
    checks = {
        "every request ended as it should": whole + left == sent and refused == 0,
        "the engine ended each at most once": whole <= ended <= sent,
        "only clients that left were cancelled": 0 <= cancelled <= left,
        "every token of a whole answer arrived": all(one.mismatched == 0 for one in outcomes),
        "tokens add up": received <= generated <= computed <= generated + 2 * left,
        "nothing runs or waits": (worker["running"], worker["waiting"]) == (0, 0)
        and status["requests"] == {"running": 0, "waiting": 0},
        "every page is free or cached": worker["free_pages"] + worker["cached_pages"]
        == worker["total_pages"],
    }
    counts = {
        "sent": sent,
        "whole": whole,
        "left": left,
        "refused": refused,
        "ended": ended,
        "cancelled": cancelled,
        "received_tokens": received,
        "generated_tokens": generated,
        "computed_tokens": computed,
        "free_pages": worker["free_pages"],
        "cached_pages": worker["cached_pages"],
        "total_pages": worker["total_pages"],
    }
    return checks, counts
