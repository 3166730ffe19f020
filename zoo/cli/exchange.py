"""Verbs between zoos: push and pull."""

from typing import TYPE_CHECKING, Annotated

import typer

from zoo.cli.app import JsonOption, WaitOption, ZooOption, app, err, root_of, show
from zoo.console import ConsoleProgress
from zoo.keeping.sizes import size

if TYPE_CHECKING:
    from zoo.transfer.move import Moved

Place = Annotated[
    str, typer.Argument(metavar="DIR|URL", help="A zoo's folder, or what fsspec can reach.")
]
Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAMES]...", help="NAME or NAME@N (default: all).")
]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Publish under names that mean something else there.")
]


@app.command("push")
def push_command(  # noqa: PLR0913 one parameter per option
    context: typer.Context,
    place: Place,
    names: Names = None,
    replace: ReplaceOption = False,
    wait: WaitOption = 600.0,
    json: JsonOption = False,
    zoo: ZooOption = None,
) -> None:
    """Send variants to another zoo: only what it lacks. --json: a zoo.transfer.move.Moved."""
    from zoo.transfer.move import Move, push

    wanted = Move(tuple(names or ()), replace, wait)
    moved = push(root_of(context, zoo), place, wanted, ConsoleProgress(err))
    show(moved, None, _lines("pushed", moved), json)


@app.command("pull")
def pull_command(  # noqa: PLR0913 one parameter per option
    context: typer.Context,
    place: Place,
    names: Names = None,
    replace: ReplaceOption = False,
    wait: WaitOption = 600.0,
    json: JsonOption = False,
    zoo: ZooOption = None,
) -> None:
    """Fetch variants from another zoo, checked as they come. --json: a zoo.transfer.move.Moved."""
    from zoo.transfer.move import Move, pull

    wanted = Move(tuple(names or ()), replace, wait)
    moved = pull(root_of(context, zoo), place, wanted, ConsoleProgress(err))
    show(moved, None, _lines("pulled", moved), json)


def _lines(verb: str, moved: "Moved") -> list[str]:
    lines = [f"{verb} {', '.join(moved.names)}"] if moved.names else []
    if moved.known:
        lines.append(f"there already: {', '.join(moved.known)}")
    travelled = f"{moved.objects} objects, {size(moved.bytes)} of {size(moved.needed_bytes)}"
    return [*lines, f"{travelled} that these variants need"]
