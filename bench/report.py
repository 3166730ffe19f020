"""Results as JSON lines, as a Markdown file and as tables on the screen."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from bench.result import Context, Figure, Line, Result


def append(path: Path, result: Result, context: Context) -> None:
    """Add a result to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(Line(result=result, context=context)) + b"\n")


def markdown(results: Sequence[Result], context: Context) -> str:
    """A document with one table per scenario and what was measured on."""
    machine = context.machine
    parts = [
        f"# Measured on {context.date}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"kernels {'/'.join(machine['isa']) or 'torch'}; commit {context.commit[:12]}"
        f"{'+dirty' if context.commit.endswith('+dirty') else ''}; "
        + ", ".join(f"{name} {number}" for name, number in context.versions.items()),
        f"`{context.command}`",
    ]
    for scenario, cells in _grouped(results):
        columns = _columns(cells)
        rows = [["", *columns], ["---", *["---:"] * len(columns)]]
        rows += [[cell.cell, *_row(cell, columns)] for cell in cells]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts += [f"## {scenario}", "\n".join(lines), *_verdicts(cells)]
    return "\n\n".join(parts) + "\n"


def tables(results: Sequence[Result]) -> list[Table]:
    """One table per scenario for the screen; cells that fail a check say so."""
    made: list[Table] = []
    for scenario, cells in _grouped(results):
        columns = _columns(cells)
        table = Table(title=scenario, title_justify="left")
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right")
        table.add_column("checks")
        for cell in cells:
            broken = [name for name, holds in cell.checks.items() if not holds]
            verdict = "ok" if cell.checks and not broken else "; ".join(broken)
            table.add_row(cell.cell, *_row(cell, columns), verdict)
        made.append(table)
    return made


def shown(figure: Figure) -> str:
    """A figure in the digits that matter."""
    if isinstance(figure, str):
        return figure
    if isinstance(figure, int):
        return f"{figure:,}"
    if abs(figure) >= 1000:
        return f"{figure:,.0f}"
    return f"{figure:.3g}" if abs(figure) < 100 else f"{figure:.1f}"


def _grouped(results: Iterable[Result]) -> list[tuple[str, list[Result]]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.scenario, []).append(result)
    return list(groups.items())


def _columns(cells: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell.figures))


def _row(cell: Result, columns: Sequence[str]) -> list[str]:
    return [shown(cell.figures[name]) if name in cell.figures else "" for name in columns]


def _verdicts(cells: Sequence[Result]) -> list[str]:
    lines = [
        f"- {'holds' if holds else '**FAILS**'}: {cell.cell}: {check}"
        for cell in cells
        for check, holds in cell.checks.items()
    ]
    return ["\n".join(lines)] if lines else []
