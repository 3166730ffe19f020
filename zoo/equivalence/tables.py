"""Comparisons as lines and a table for a person; the same records go out whole with --json."""

from collections.abc import Sequence

from rich.table import Table

from zoo.equivalence.compare import Comparison
from zoo.equivalence.edges import Edge
from zoo.measured import Interval, Measured


def edges_table(edges: Sequence[Edge]) -> Table:
    """One row per edge, in the order that they were planned in."""
    table = Table(
        "swapped", "cosine", "rel. norm", "KL", "agreement", "perplexity change", "tokens"
    )
    for edge in edges:
        span = str(edge.first) if edge.last - edge.first == 1 else f"{edge.first}-{edge.last - 1}"
        table.add_row(
            "whole chain" if edge.level == "chain" else f"{edge.level} {span}",
            f"{edge.weights.cosine:.6f}" if edge.weights else "",
            f"{edge.weights.relative:.2e}" if edge.weights else "",
            _spread(edge.kl, "{:.2e}") if edge.kl else "too far apart",
            _spread(edge.agreement, "{:.1%}"),
            _spread(edge.perplexity_change, "{:+.1%}"),
            str(edge.tokens),
        )
    return table


def lines(comparison: Comparison) -> list[str]:
    """What the table is of, and the tensors that moved most."""
    pair = f"{comparison.other} beside {comparison.one}"
    found = [f"{pair} on {comparison.text} text: means with 95 % intervals"]
    moved = sorted(comparison.tensors.items(), key=lambda item: -item[1].relative)[:3]
    if moved:
        names = ", ".join(f"{name} ({one.relative:.1e})" for name, one in moved)
        found.append(f"{len(comparison.tensors)} tensors differ, most of all unit {names}")
    return found


def measured_line(measured: Measured) -> str:
    """What an approximate variant was measured at when it was added."""
    found = (
        f"beside the exact one on {measured.tokens} tokens of {measured.name} text: "
        f"{_spread(measured.agreement, '{:.1%}')} of best tokens agree, "
        f"KL {_spread(measured.kl, '{:.1e}')}"
    )
    if measured.score is not None:
        scores = (_spread(one, "{:.1%}") for one in (measured.score, measured.exact_score))
        found += ", {} {} where the exact one has {}".format(measured.task, *scores)
    return f"{found}; {measured.saved_bytes / 1e6:.1f} MB saved"


def _spread(interval: Interval | None, form: str) -> str:
    if interval is None:
        return ""
    value, low, high = (form.format(x) for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"
