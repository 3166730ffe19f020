"""The frame of the zoo's command line: the app that verbs register with, the options that several
of them have, how they print, and what a refusal ends in."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from zoo.errors import (
    DamagedCatalog,
    DamagedObject,
    MissingObject,
    StoreFailure,
    ZooBusy,
    ZooError,
)
from zoo.home import zoo_path

ZooOption = Annotated[
    str | None, typer.Option("--zoo", metavar="DIR", help="The zoo's folder (default: <home>/zoo).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
WaitOption = Annotated[
    float, typer.Option("--wait", help="Seconds to queue while another process changes the zoo.")
]
Name = Annotated[str, typer.Argument(metavar="NAME")]

# Not the user's mistake: the machine, the disk, or another process.
_FAILURES = (StoreFailure, ZooBusy, DamagedObject, MissingObject, DamagedCatalog)

app = typer.Typer(
    name="python -m zoo",
    help="Keeps variants of language models as shared, content-addressed units.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_WIDE = None if sys.stdout.isatty() else 200
out = Console(highlight=False, markup=False, soft_wrap=True, width=_WIDE)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


@app.callback()
def common(context: typer.Context, zoo: ZooOption = None) -> None:
    """Options that may stand before the verb."""
    context.obj = zoo


def root_of(context: typer.Context, zoo: str | None) -> Path:
    """The zoo's folder, named after the verb, before it, or nowhere."""
    return zoo_path(zoo or context.obj)


def show(record: object, table: Table | None, lines: Sequence[str], json: bool) -> None:
    """Records as JSON for scripts, or lines and a table for a person."""
    if json:
        sys.stdout.write(msgspec.json.encode(record, enc_hook=str).decode() + "\n")
        return
    for line in lines:
        out.print(line)
    if table is not None and table.row_count:
        out.print(table)


def main() -> int:
    """Run one verb and return the exit code."""
    # Our own bars and errors say what a person needs; transformers' would come on top.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Read when torch is first imported: threads that spin while they wait would make training many
    # times slower wherever another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = app(standalone_mode=False)
    except ZooError as error:
        err.print(f"error: {error}")
        return 1 if isinstance(error, _FAILURES) else 2
    except TyperException as error:
        err.print(f"error: {error.format_message()} See python -m zoo --help.")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        err.print("stopped")
        return 1
    return code if isinstance(code, int) else 0
