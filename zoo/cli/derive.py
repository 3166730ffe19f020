"""Verbs that make and measure models of other models: surrogate, stitch, profile."""

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.app import JsonOption, Name, WaitOption, ZooOption, app, err, root_of, show
from zoo.console import ConsoleProgress

DataOption = Annotated[
    list[Path] | None,
    typer.Option("--data", metavar="FILE", help="Rows to learn from: .jsonl or .jsonl.gz."),
]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Training steps.")]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Pieces of text in a step.")]
RateOption = Annotated[float, typer.Option("--rate", help="The peak learning rate.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
LengthOption = Annotated[int, typer.Option("--length", min=8, help="Tokens in a piece of text.")]
AsOption = Annotated[
    str | None, typer.Option("--as", metavar="NEWNAME", help="What to serve the result as.")
]


@app.command("surrogate")
def surrogate_command(  # noqa: PLR0913 one parameter per option
    context: typer.Context,
    name: Name,
    ratio: Annotated[
        float, typer.Option("--ratio", help="Share of the layers' weights that stays.")
    ] = 0.5,
    width: Annotated[
        float, typer.Option("--width", help="Share of the stream's channels that stays.")
    ] = 1.0,
    data: DataOption = None,
    steps: StepsOption = 200,
    batch: BatchOption = 8,
    rate: RateOption = 3e-4,
    length: LengthOption = 128,
    seed: SeedOption = 0,
    new_name: AsOption = None,
    wait: WaitOption = 600.0,
    json: JsonOption = False,
    zoo: ZooOption = None,
) -> None:
    """Make a cheaper stand-in of a variant: pruned, then taught by it. What was killed goes on.
    --json: a zoo.derived.surrogate.SurrogateFinding."""
    from zoo.derived.surrogate import SurrogateOptions, make_surrogate
    from zoo.derived.tables import surrogate_lines, surrogate_table
    from zoo.derived.training import Course
    from zoo.equivalence.text import Measure

    options = SurrogateOptions(
        ratio=ratio,
        width=width,
        data=tuple(data or ()),
        measure=Measure(length),
        course=Course(steps, batch, rate, seed),
        name=new_name,
        wait_s=wait,
    )
    finding = make_surrogate(root_of(context, zoo), name, options, ConsoleProgress(err))
    show(finding, surrogate_table(finding), surrogate_lines(finding), json)


@app.command("stitch")
def stitch_command(  # noqa: PLR0913 one parameter per option
    context: typer.Context,
    first: Annotated[str, typer.Argument(metavar="A", help="The variant that begins.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The variant that ends.")],
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="JOINS",
            help="BELOW:ABOVE,...: layers of A below, first layer of B above (default: at a "
            "quarter, half and three quarters).",
        ),
    ] = None,
    data: DataOption = None,
    steps: StepsOption = 80,
    batch: BatchOption = 4,
    rate: RateOption = 3e-4,
    length: LengthOption = 128,
    seed: SeedOption = 0,
    new_name: AsOption = None,
    wait: WaitOption = 600.0,
    json: JsonOption = False,
    zoo: ZooOption = None,
) -> None:
    """Train maps that let a request begin in A and end in B. What was killed goes on.
    --json: a zoo.derived.stitch.StitchFinding."""
    from zoo.derived.stitch import StitchOptions, make_stitch
    from zoo.derived.tables import stitch_lines, stitch_table
    from zoo.derived.training import Course
    from zoo.equivalence.text import Measure

    options = StitchOptions(
        at=at,
        data=tuple(data or ()),
        measure=Measure(length, held_out=24),
        course=Course(steps, batch, rate, seed),
        name=new_name,
        wait_s=wait,
    )
    finding = make_stitch(root_of(context, zoo), (first, second), options, ConsoleProgress(err))
    show(finding, stitch_table(finding), stitch_lines(finding), json)


@app.command("profile")
def profile_command(  # noqa: PLR0913 one parameter per option
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One variant (default: all).")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto or cpu.")] = "auto",
    again: Annotated[
        bool, typer.Option("--again", help="Measure what is known once more.")
    ] = False,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="Threads of the kernels (0: torch's number).")
    ] = 0,
    seed: SeedOption = 0,
    wait: WaitOption = 600.0,
    json: JsonOption = False,
    zoo: ZooOption = None,
) -> None:
    """Measure what each block costs on this machine: time, loading, bytes.
    --json: an array of zoo.derived.profile.BlockProfile."""
    from zoo.derived.profile import ProfileOptions, profile
    from zoo.derived.tables import profile_table

    options = ProfileOptions(device=device, again=again, threads=threads, seed=seed, wait_s=wait)
    rows = profile(root_of(context, zoo), name, options, ConsoleProgress(err))
    show(rows, profile_table(rows), [] if rows else ["the zoo is empty"], json)
