"""The verb that measures how alike two variants are: compare."""

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.app import JsonOption, WaitOption, ZooOption, app, err, root_of, show
from zoo.console import ConsoleProgress


@app.command("compare")
def compare_command(  # noqa: PLR0913 one parameter per option
    context: typer.Context,
    one: Annotated[str, typer.Argument(metavar="A", help="The variant to stand beside.")],
    other: Annotated[str, typer.Argument(metavar="B", help="Whose units are put into A.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Held-out rows: .jsonl or .jsonl.gz."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to read of it.")] = 64,
    units: Annotated[bool, typer.Option("--units", help="Each unit by itself too.")] = False,
    wait: WaitOption = 600.0,
    json: JsonOption = False,
    zoo: ZooOption = None,
) -> None:
    """Measure how alike two variants are: chain, blocks, units. --json: a
    zoo.equivalence.compare.Comparison."""
    from zoo.equivalence.compare import CompareOptions, compare
    from zoo.equivalence.tables import edges_table, lines

    options = CompareOptions(data, rows, units, wait)
    found = compare(root_of(context, zoo), one, other, options, ConsoleProgress(err))
    show(found, edges_table(found.edges), lines(found), json)
