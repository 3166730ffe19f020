"""Verbs about the zoo as a whole: blocks, stats, verify, sweep, versions, alias, fit."""

from typing import Annotated

import typer

from zoo.catalog import Catalog
from zoo.cli.app import JsonOption, Name, WaitOption, ZooOption, app, err, out, root_of, show
from zoo.console import ConsoleProgress
from zoo.keeping.listing import Listing
from zoo.keeping.sizes import parsed_size


@app.command("blocks")
def blocks_command(context: typer.Context, json: JsonOption = False, zoo: ZooOption = None) -> None:
    """List the blocks that the variants share. --json: an array of zoo.keeping.listing.BlockRow."""
    from zoo.keeping.tables import blocks_table

    rows = Listing(root_of(context, zoo)).blocks()
    show(rows, blocks_table(rows), [] if rows else ["the zoo is empty"], json)


@app.command("stats")
def stats_command(context: typer.Context, json: JsonOption = False, zoo: ZooOption = None) -> None:
    """Say what sharing saves. --json: a zoo.keeping.listing.Stats."""
    from zoo.keeping.tables import stats_lines, variants_table

    stats = Listing(root_of(context, zoo)).stats()
    show(stats, variants_table(stats.by_variant), stats_lines(stats), json)


@app.command("verify")
def verify_command(context: typer.Context, json: JsonOption = False, zoo: ZooOption = None) -> None:
    """Hash every object again; exit 1 if one is bad. --json: a zoo.keeping.verify.Verdict."""
    from zoo.keeping.tables import damage_lines
    from zoo.keeping.verify import verify

    verdict = verify(root_of(context, zoo), ConsoleProgress(err))
    show(verdict, None, damage_lines(verdict), json)
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
    """Delete objects that no variant needs. --json: a zoo.keeping.sweep.Rubbish."""
    from zoo.keeping.sweep import sweep
    from zoo.keeping.tables import rubbish_lines

    rubbish = sweep(root_of(context, zoo), delete=yes, wait_s=wait, progress=ConsoleProgress(err))
    show(rubbish, None, rubbish_lines(rubbish, deleted=yes), json)


@app.command("versions")
def versions_command(
    context: typer.Context, name: Name, json: JsonOption = False, zoo: ZooOption = None
) -> None:
    """List what a name has meant, oldest first.

    --json: an array of zoo.keeping.history.VersionRow."""
    from zoo.keeping.history import history
    from zoo.keeping.tables import versions_table

    rows = history(root_of(context, zoo), name)
    show(rows, versions_table(rows), [], json)


@app.command("alias")
def alias_command(  # noqa: PLR0913 one parameter per option
    context: typer.Context,
    alias: Annotated[str | None, typer.Argument(metavar="[ALIAS]")] = None,
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="NAME, NAME@N or another alias.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Forget the alias.")] = False,
    wait: WaitOption = 600.0,
    json: JsonOption = False,
    zoo: ZooOption = None,
) -> None:
    """Name one version of a variant, whatever its own name comes to mean. Without arguments: list
    the aliases (--json: an array of zoo.catalog.Alias)."""
    from zoo.keeping.aliases import pin, unpin
    from zoo.keeping.tables import aliases_table

    root, progress = root_of(context, zoo), ConsoleProgress(err)
    if alias is None:
        rows = Catalog(root).aliases()
        show(rows, aliases_table(rows), [] if rows else ["there are no aliases"], json)
    elif remove and target is None:
        unpin(root, alias, wait_s=wait, progress=progress)
        out.print(f"removed the alias {alias}")
    elif target is not None and not remove:
        made = pin(root, alias, target, wait_s=wait, progress=progress)
        show(made, None, [f"{alias} is {made.reference}"], json)
    else:
        raise typer.BadParameter("give ALIAS TARGET, or ALIAS --remove.")


@app.command("fit")
def fit_command(  # noqa: PLR0913 one parameter per option
    context: typer.Context,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="What there is: 80GB, 24GiB, 500MB.")
    ],
    positions: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Positions per sequence (default: the longest)."),
    ] = None,
    sequences: Annotated[int, typer.Option("--sequences", min=0, help="Served at once.")] = 1,
    kv_width: Annotated[
        int, typer.Option("--kv-width", min=1, help="Bytes of a number in keys and values.")
    ] = 2,
    add: Annotated[
        str | None,
        typer.Option("--add", metavar="KIND|SOURCE", help="What would one more add? e.g. lora:16"),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="NAME", help="Of --add KIND.")
    ] = None,
    json: JsonOption = False,
    zoo: ZooOption = None,
) -> None:
    """Say from the catalog alone how many variants fit a memory. --json: a zoo.keeping.fit.Fit."""
    from zoo.keeping.census import census
    from zoo.keeping.fit import Load, fit
    from zoo.keeping.prospect import prospect
    from zoo.keeping.tables import fit_lines, fit_table

    root = root_of(context, zoo)
    there = census(root, kv_width)
    load = Load(parsed_size(memory), positions or there.context, sequences)
    more = prospect(root, add, base, ConsoleProgress(err)) if add else None
    found = fit(there.residents, there.sizes, load, more)
    show(found, fit_table(found), fit_lines(found), json)
