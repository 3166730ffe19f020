"""The zoo's command line: `python -m zoo [--zoo DIR] VERB ...`.

Exit codes: 0 fine, 2 wrong usage or input (one line on stderr that says what to do), 1 anything
else. Heavy libraries are imported by the verbs that need them, so that listings answer at once.
"""

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

from zoo.catalog import Catalog
from zoo.console import ConsoleProgress
from zoo.errors import (
    DamagedCatalog,
    DamagedObject,
    MissingObject,
    StoreFailure,
    ZooBusy,
    ZooError,
)
from zoo.home import zoo_path
from zoo.listing import Listing

ZooOption = Annotated[
    str | None, typer.Option("--zoo", metavar="DIR", help="The zoo's folder (default: <home>/zoo).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
WaitOption = Annotated[
    float, typer.Option("--wait", help="Seconds to queue while another process changes the zoo.")
]
Name = Annotated[str, typer.Argument(metavar="NAME")]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="One of the project's tasks.")]
BaseFolder = Annotated[Path, typer.Argument(metavar="BASE", help="A transformers folder.")]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
RowsOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Rows: .jsonl or .jsonl.gz (see zoo.tasks)."),
]

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
_out = Console(highlight=False, markup=False, soft_wrap=True, width=_WIDE)
_err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


@app.callback()
def common(context: typer.Context, zoo: ZooOption = None) -> None:
    """Options that may stand before the verb."""
    context.obj = zoo


@app.command("add")
def add_command(  # noqa: PLR0913 one parameter per option
    context: typer.Context,
    name: Name,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a .gguf file or a hub id.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", metavar="NAME", help="The variant it was made from.")
    ] = None,
    store: Annotated[
        str, typer.Option("--store", help="How to store a fine-tune: exact.")
    ] = "exact",
    min_agreement: Annotated[
        float | None, typer.Option("--min-agreement", help="With --store equivalent.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Publish under a name that is taken.")
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="What a .gguf is stored as: float32, bfloat16, float16.")
    ] = "float32",
    wait: WaitOption = 600.0,
    zoo: ZooOption = None,
) -> None:
    """Add a variant: a whole model, a fine-tune, or a PEFT LoRA adapter."""
    from zoo.add import AddOptions, add

    options = AddOptions(base, store, min_agreement, replace, dtype, wait)
    variant = add(_root(context, zoo), name, source, options, ConsoleProgress(_err))
    report = variant.report
    made_of = f" upon {variant.base}" if variant.base else ""
    _out.print(
        f"added {name} ({variant.kind}{made_of}): {report['shared']} units shared, "
        f"{report['changed']} changed, {report['attached']} with an attachment"
    )


@app.command("list")
def list_command(context: typer.Context, json: JsonOption = False, zoo: ZooOption = None) -> None:
    """List the variants. --json: an array of zoo.listing.VariantRow."""
    from zoo.tables import variants_table

    rows = Listing(_root(context, zoo)).rows()
    _show(rows, variants_table(rows), [] if rows else ["the zoo is empty"], json)


@app.command("show")
def show_command(
    context: typer.Context, name: Name, json: JsonOption = False, zoo: ZooOption = None
) -> None:
    """Show what a variant is made of. --json: a zoo.listing.VariantDetail."""
    from zoo.tables import detail_lines, detail_table

    root = _root(context, zoo)
    detail = Listing(root).detail(Catalog(root).variant(name))
    _show(detail, detail_table(detail), detail_lines(detail), json)


@app.command("blocks")
def blocks_command(context: typer.Context, json: JsonOption = False, zoo: ZooOption = None) -> None:
    """List the blocks that the variants share. --json: an array of zoo.listing.BlockRow."""
    from zoo.tables import blocks_table

    rows = Listing(_root(context, zoo)).blocks()
    _show(rows, blocks_table(rows), [] if rows else ["the zoo is empty"], json)


@app.command("stats")
def stats_command(context: typer.Context, json: JsonOption = False, zoo: ZooOption = None) -> None:
    """Say what sharing saves. --json: a zoo.listing.Stats."""
    from zoo.tables import stats_lines, variants_table

    stats = Listing(_root(context, zoo)).stats()
    _show(stats, variants_table(stats.by_variant), stats_lines(stats), json)


@app.command("verify")
def verify_command(context: typer.Context, json: JsonOption = False, zoo: ZooOption = None) -> None:
    """Hash every object again; exit 1 if one is bad. --json: a zoo.verify.Verdict."""
    from zoo.tables import damage_lines
    from zoo.verify import verify

    verdict = verify(_root(context, zoo), ConsoleProgress(_err))
    _show(verdict, None, damage_lines(verdict), json)
    if verdict.damages:
        raise typer.Exit(1)


@app.command("sweep")
def sweep_command(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only say what.")] = False,
    wait: WaitOption = 600.0,
    json: JsonOption = False,
    zoo: ZooOption = None,
) -> None:
    """Delete objects that no variant needs. --json: a zoo.sweep.Rubbish."""
    from zoo.sweep import sweep
    from zoo.tables import size

    rubbish = sweep(_root(context, zoo), delete=yes, wait_s=wait, progress=ConsoleProgress(_err))
    count = len(rubbish.objects) + len(rubbish.leftovers)
    done = "deleted" if yes else "would delete (give --yes to do so)"
    _show(rubbish, None, [f"{done}: {count} objects, {size(rubbish.bytes)}"], json)


@app.command("remove")
def remove_command(
    context: typer.Context, name: Name, wait: WaitOption = 600.0, zoo: ZooOption = None
) -> None:
    """Forget a variant; `sweep` frees its disk space later."""
    from zoo.remove import remove

    remove(_root(context, zoo), name, wait_s=wait, progress=ConsoleProgress(_err))
    _out.print(f"removed {name}: run sweep --yes to free what only it used")


@app.command("export")
def export_command(
    context: typer.Context,
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Absent or empty.")],
    zoo: ZooOption = None,
) -> None:
    """Write a variant back as a folder for transformers, or for peft if it is an adapter."""
    from zoo.export import export

    written = export(_root(context, zoo), name, folder, ConsoleProgress(_err))
    _out.print(f"exported {name} to {written}")


@app.command("demo")
def demo_command(context: typer.Context, zoo: ZooOption = None) -> None:
    """Fill the zoo with a real small model and its variants."""
    from zoo.demo import demo

    demo(_root(context, zoo), console=_err)


@app.command("train")
def train_command(
    task: TaskName, base: BaseFolder, out: OutFolder, data: RowsOption = None
) -> None:
    """Train a variant of the demo."""
    from zoo.tasks import task_of
    from zoo.train import train

    train(task_of(task), base, out, data, ConsoleProgress(_err))


@app.command("evaluate")
def evaluate_command(  # noqa: PLR0913 one parameter per option
    task: TaskName,
    base: BaseFolder,
    variant: Annotated[
        Path, typer.Argument(metavar="VARIANT", help="What train wrote from that base.")
    ],
    data: RowsOption = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Held-out prompts to ask.")] = 100,
    card: Annotated[
        bool, typer.Option("--card", help="Write the scores to the adapter's README.md.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Score a variant beside its base on held-out rows. --json: a zoo.evaluate.Comparison."""
    from zoo.card import write_card
    from zoo.evaluate import compare, table
    from zoo.tasks import task_of

    chosen = task_of(task)
    questions = chosen.questions(data, rows)
    comparison = compare(chosen, base, variant, questions, ConsoleProgress(_err))
    if card:
        write_card(chosen, variant, data, comparison)
    _show(comparison, table(comparison), [f"{task}: {len(questions)} held-out prompts"], json)


def _root(context: typer.Context, zoo: str | None) -> Path:
    return zoo_path(zoo or context.obj)


def _show(record: object, table: Table | None, lines: Sequence[str], json: bool) -> None:
    """Records as JSON for scripts, or lines and a table for a person."""
    if json:
        sys.stdout.write(msgspec.json.encode(record, enc_hook=str).decode() + "\n")
        return
    for line in lines:
        _out.print(line)
    if table is not None and table.row_count:
        _out.print(table)


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
        _err.print(f"error: {error}")
        return 1 if isinstance(error, _FAILURES) else 2
    except TyperException as error:
        _err.print(f"error: {error.format_message()} See python -m zoo --help.")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _err.print("stopped")
        return 1
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
