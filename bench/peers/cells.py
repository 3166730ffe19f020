"""What is compared: the cells, and the one value that each takes from a load's outcome. Pure."""

import math
from collections.abc import Callable, Mapping

import msgspec

from bench.job import Job, Outcome
from bench.zoos import BASE, FULLS, LORAS

NEW, PROMPT = 64, 128
_TRACE_RATE = 0.7


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A load, for the arrangements of `group`. `primed`: its prompt was sent before. `traced`: it
    arrives as a trace says. `written`: its prompts are real text, not random tokens. `value` is
    what is compared, in `unit`; a higher one is better unless it is a time."""

    name: str
    group: str
    unit: str
    value: Callable[[Outcome], float]
    models: tuple[str, ...] = (BASE,)
    streams: int = 1
    prompt: int = PROMPT
    new: int = NEW
    primed: bool = False
    traced: bool = False
    written: bool = False

    @property
    def is_time(self) -> bool:
        """Whether less is better."""
        return self.unit == "ms"

    def gain(self, ours: float, theirs: float) -> float:
        """How many times as good ours is."""
        over, under = (theirs, ours) if self.is_time else (ours, theirs)
        return over / under if under else math.inf


class Play(msgspec.Struct, frozen=True, kw_only=True):
    """What a run settles for all its loads; `text` is what written prompts are cut from."""

    vocabulary: int
    text: tuple[int, ...] = ()
    quick: bool = False
    trace: str = "synthetic"
    speed: float = 1.0
    seconds: float = 60.0


def _rate(outcome: Outcome) -> float:
    return outcome.tokens_per_s


def _decoding(outcome: Outcome) -> float:
    """Tokens per second after the first."""
    later = outcome.output_tokens / outcome.requests - 1
    return 1000 * later / (outcome.e2e_ms.mean - outcome.ttft_ms.mean)


def _first(outcome: Outcome) -> float:
    return outcome.ttft_ms.p50


def _prefill(outcome: Outcome) -> float:
    return 1000 * outcome.prompt_tokens / outcome.ttft_ms.mean


def _late(outcome: Outcome) -> float:
    return outcome.ttft_ms.p95


CELLS: Mapping[str, Cell] = {
    "one": Cell(name="one stream", group="base", unit="tokens/s", value=_decoding),
    "text": Cell(
        name="one stream of text", group="base", unit="tokens/s", value=_decoding, written=True
    ),
    "8": Cell(name="8 streams", group="base", unit="tokens/s", value=_rate, streams=8),
    "32": Cell(name="32 streams", group="base", unit="tokens/s", value=_rate, streams=32),
    "prefill": Cell(
        name="prefill of 1,024", group="base", unit="tokens/s", value=_prefill, prompt=1024, new=1
    ),
    "first": Cell(name="first token", group="base", unit="ms", value=_first, new=1),
    "cached": Cell(
        name="first token, cached", group="base", unit="ms", value=_first, new=1, primed=True
    ),
    "loras": Cell(
        name="8 LoRA, 32 streams",
        group="adapters",
        unit="tokens/s",
        value=_rate,
        models=LORAS,
        streams=32,
    ),
    "lasts": Cell(
        name="base + 7 fine-tunes of the last 4 layers, 32 streams",
        group="tunes",
        unit="tokens/s",
        value=_rate,
        models=(BASE, *FULLS),
        streams=32,
    ),
    "tunes": Cell(
        name="base + 7 full fine-tunes, 32 streams",
        group="tunes",
        unit="tokens/s",
        value=_rate,
        models=(BASE, *FULLS),
        streams=32,
    ),
    "trace": Cell(
        name="a trace over 8 LoRA: first token, p95",
        group="adapters",
        unit="ms",
        value=_late,
        models=LORAS,
        traced=True,
    ),
}


def job_of(cell: Cell, play: Play, seed: int) -> Job:
    """The load of a cell; equal seeds give equal prompts to whoever plays it."""
    if cell.traced:
        return Job(
            models=cell.models,
            connections=4,
            prompt_tokens=(1, 192),
            output_tokens=(1, 64),
            vocabulary=play.vocabulary,
            seed=seed,
            trace=play.trace,
            rate=_TRACE_RATE,
            speed=play.speed,
            seconds=min(play.seconds, 10.0) if play.quick else play.seconds,
        )
    new = min(cell.new, 16) if play.quick else cell.new
    return Job(
        models=cell.models,
        requests=cell.streams,
        streams=cell.streams,
        prompt_tokens=(cell.prompt, cell.prompt),
        output_tokens=(new, new),
        vocabulary=play.vocabulary,
        text=play.text if cell.written else (),
        seed=seed,
    )
