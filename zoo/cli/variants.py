"""Verbs about one variant: list, show, remove, export."""

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.app import JsonOption, Name, WaitOption, ZooOption, app, err, out, root_of, show
from zoo.console import ConsoleProgress
from zoo.keeping.listing import Listing


@app.command("list")
def list_command(context: typer.Context, json: JsonOption = False, zoo: ZooOption = None) -> None:
    """List the variants. --json: an array of zoo.keeping.listing.VariantRow."""
    from zoo.keeping.tables import variants_table

    rows = Listing(root_of(context, zoo)).rows()
    show(rows, variants_table(rows), [] if rows else ["the zoo is empty"], json)


@app.command("show")
def show_command(
    context: typer.Context, name: Name, json: JsonOption = False, zoo: ZooOption = None
) -> None:
    """Show what a variant is made of. --json: a zoo.keeping.listing.VariantDetail."""
    from zoo.keeping.tables import detail_lines, detail_table

    detail = Listing(root_of(context, zoo), name).detail(name)
    show(detail, detail_table(detail), detail_lines(detail), json)


@app.command("remove")
def remove_command(
    context: typer.Context, name: Name, wait: WaitOption = 600.0, zoo: ZooOption = None
) -> None:
    """Forget a variant; `sweep` frees its disk space later."""
    from zoo.keeping.remove import remove

    remove(root_of(context, zoo), name, wait_s=wait, progress=ConsoleProgress(err))
    out.print(f"removed {name}: run sweep --yes to free what only it used")


@app.command("export")
def export_command(
    context: typer.Context,
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Absent or empty.")],
    zoo: ZooOption = None,
) -> None:
    """Write a variant back as a folder for transformers, or for peft if it is an adapter."""
    from zoo.export import export

    written = export(root_of(context, zoo), name, folder, ConsoleProgress(err))
    out.print(f"exported {name} to {written}")
