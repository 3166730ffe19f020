"""What a load process is told and what it answers; both cross its boundary as JSON."""

import random
from pathlib import Path

import msgspec

from bench.dialects import Route
from bench.spread import Spread
from bench.traces import assign, read_trace, synthetic

# Lower ids are special tokens in the tokenizers of the families served here.
FIRST_PLAIN_TOKEN = 100


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A load. `models` take turns; lengths are drawn evenly from [low, high].

    Prompts are cut from `text`, or drawn at random where there is none.
    Without `trace`, `requests` requests go through `streams` streams, each of which sends its next
    one when the last has ended. With `trace` (a file, or "synthetic") they are sent when it says,
    for `seconds`; `rate` is the synthetic one's, `speed` that of a recorded one, and lengths are
    cut to the `high`s. `http_share` of the connections speak HTTP. With `routes`, all do, to the
    servers that these name for each model. `leave_share` of the clients leave within
    `leave_within_s`, wherever their answer is. Gaps between the tokens of an answer count from
    `settling_s` after its request on.
    """

    endpoint: str = ""
    url: str = ""
    models: tuple[str, ...]
    requests: int = 1
    streams: int = 1
    connections: int = 1
    http_share: float = 0.0
    routes: dict[str, Route] = {}
    prompt_tokens: tuple[int, int] = (128, 128)
    output_tokens: tuple[int, int] = (64, 64)
    leave_share: float = 0.0
    leave_within_s: float = 0.2
    settling_s: float = 0.0
    vocabulary: int
    text: tuple[int, ...] = ()
    seed: int = 0
    trace: str = ""
    rate: float = 1.0
    speed: float = 1.0
    seconds: float = 60.0


class Ask(msgspec.Struct, frozen=True):
    """One request to send; a client that leaves does so `leave_after_s` after it has sent it."""

    model: str
    prompt: list[int]
    max_tokens: int
    at_s: float = 0.0
    leave_after_s: float | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a load.

    `output_tokens` were received, `told_tokens` are the engine's own count for the answers that
    ended; `mismatched` counts those of them where the two differ. `seconds` pass from the first
    request to the last end. Times to first token, between tokens and of whole answers are in ms;
    `lag_ms` is how late requests were sent. `cpu_s` is what this load cost its own process.
    """

    requests: int
    finished: dict[str, int]
    left: int
    refused: dict[str, int]
    mismatched: int
    prompt_tokens: int
    output_tokens: int
    left_tokens: int
    told_tokens: int
    cached_tokens: int
    seconds: float
    tokens_per_s: float
    cpu_s: float
    ttft_ms: Spread
    itl_ms: Spread
    e2e_ms: Spread
    lag_ms: Spread
    errors: tuple[str, ...] = ()


def asks(job: Job) -> list[Ask]:
    """The requests of a job, the same for the same seed."""
    draw = random.Random(job.seed)
    if job.trace:
        return _traced(job, draw)
    return [
        Ask(
            job.models[i % len(job.models)],
            _prompt(draw, job, draw.randint(*job.prompt_tokens)),
            draw.randint(*job.output_tokens),
            leave_after_s=_leaving(job, draw),
        )
        for i in range(job.requests)
    ]


def _traced(job: Job, draw: random.Random) -> list[Ask]:
    if job.trace == "synthetic":
        arrivals = synthetic(
            rate=job.rate, seconds=job.seconds, tenants=len(job.models), seed=job.seed
        )
    else:
        arrivals = read_trace(Path(job.trace), speed=job.speed, seconds=job.seconds)
    return [
        Ask(
            model,
            _prompt(draw, job, min(arrival.prompt_tokens, job.prompt_tokens[1])),
            min(arrival.output_tokens, job.output_tokens[1]),
            at_s=arrival.at_s,
            leave_after_s=_leaving(job, draw),
        )
        for arrival, model in zip(arrivals, assign(arrivals, job.models), strict=True)
    ]


def _prompt(draw: random.Random, job: Job, length: int) -> list[int]:
    if job.text:
        first = draw.randrange(len(job.text) - length)
        return list(job.text[first : first + length])
    return [draw.randrange(FIRST_PLAIN_TOKEN, job.vocabulary) for _ in range(length)]


def _leaving(job: Job, draw: random.Random) -> float | None:
    return draw.uniform(0, job.leave_within_s) if draw.random() < job.leave_share else None
