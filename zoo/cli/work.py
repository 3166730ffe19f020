"""Verbs that make and score variants: demo, dummy, train, evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.app import JsonOption, WaitOption, ZooOption, app, err, out, root_of, show
from zoo.console import ConsoleProgress

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="One of the project's tasks.")]
BaseFolder = Annotated[Path, typer.Argument(metavar="BASE", help="A transformers folder.")]
DummyFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The zoo's folder.")]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
RowsOption = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FILE", help="Rows: .jsonl or .jsonl.gz (see zoo.learning.tasks)."
    ),
]


@app.command("demo")
def demo_command(context: typer.Context, zoo: ZooOption = None) -> None:
    """Fill the zoo with a real small model and its variants."""
    from zoo.demo import demo

    demo(root_of(context, zoo), console=err)


@app.command("dummy")
def dummy_command(  # noqa: PLR0913 one parameter per option
    folder: DummyFolder,
    config: Annotated[
        str,
        typer.Option(
            metavar="SHAPES", help="llama-3.1-8b and the like, a config.json, or its folder."
        ),
    ],
    loras: Annotated[int, typer.Option(help="LoRA adapters on every linear layer.")] = 0,
    rank: Annotated[int, typer.Option(help="Their rank.")] = 16,
    lasts: Annotated[int, typer.Option(help="Fine-tunes of the last layers.")] = 0,
    last_layers: Annotated[int, typer.Option(help="How many layers these have tuned.")] = 4,
    fulls: Annotated[int, typer.Option(help="Full fine-tunes.")] = 0,
    deltas: Annotated[int, typer.Option(help="Full fine-tunes kept as differences.")] = 0,
    delta_rank: Annotated[int, typer.Option(help="The rank of these differences.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.")] = 0,
    wait: WaitOption = 600.0,
) -> None:
    """Make a zoo of shapes without weights, for launch --load-format dummy."""
    from zoo.dummy.make import make
    from zoo.dummy.recipe import Recipe

    recipe = Recipe(
        config=config,
        seed=seed,
        dtype=dtype,
        loras=loras,
        rank=rank,
        lasts=lasts,
        last_layers=last_layers,
        fulls=fulls,
        deltas=deltas,
        delta_rank=delta_rank,
    )
    added = make(folder, recipe, ConsoleProgress(err), wait)
    out.print(f"added {len(added)} variants to {folder}: launch --load-format dummy --zoo {folder}")


@app.command("train")
def train_command(
    task: TaskName, base: BaseFolder, out: OutFolder, data: RowsOption = None
) -> None:
    """Train a variant of the demo."""
    from zoo.learning.tasks import task_of
    from zoo.learning.train import train

    train(task_of(task), base, out, data, ConsoleProgress(err))


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
    """Score a variant beside its base on held-out rows.

    --json: a zoo.learning.evaluate.Comparison."""
    from zoo.learning.card import write_card
    from zoo.learning.evaluate import compare, table
    from zoo.learning.tasks import task_of

    chosen = task_of(task)
    questions = chosen.questions(data, rows)
    comparison = compare(chosen, base, variant, questions, ConsoleProgress(err))
    if card:
        write_card(chosen, variant, data, comparison)
    show(comparison, table(comparison), [f"{task}: {len(questions)} held-out prompts"], json)
