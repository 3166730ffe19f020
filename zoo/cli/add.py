"""The verb that adds a variant, and its options."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from zoo.adding.options import DEFAULT_DELTA_BUDGET
from zoo.cli.app import Name, WaitOption, ZooOption, app, err, out, root_of
from zoo.console import ConsoleProgress
from zoo.manifest import Variant

Source = Annotated[
    str,
    Argument(metavar="SOURCE", help="A folder, a .gguf file, a hub id, or a sum: a+0.5*b."),
]
Base = Annotated[str | None, Option(metavar="NAME", help="The variant it was made from.")]
Store = Annotated[
    str, Option(metavar="HOW", help="How to keep a fine-tune: exact, delta or equivalent.")
]
DeltaBudget = Annotated[float, Option(help="delta: the share of its bytes that may be kept.")]
MinAgreement = Annotated[
    float | None, Option(help="equivalent: the share of best tokens to keep (default 0.99).")
]
Budget = Annotated[float | None, Option(help="equivalent: the most divergence, nats per token.")]
Data = Annotated[
    Path | None, Option(metavar="FILE", help="Held-out rows to measure delta or equivalent on.")
]
Text = Annotated[
    Path | None,
    Option(metavar="FILE", help="delta: training rows like what it will read, to be best at them."),
]
Rows = Annotated[int, Option(min=1, help="Held-out rows to read.")]
Task = Annotated[str | None, Option(help="Score this task too while measuring.")]
Private = Annotated[bool, Option("--private", help="Never compare it with another tenant's.")]
Tenant = Annotated[str, Option(help="Whose it is.")]
Replace = Annotated[bool, Option("--replace", help="Publish under a name that is taken.")]
Dtype = Annotated[str, Option(help="What a .gguf is stored as: float32, bfloat16, float16.")]
Golden = Annotated[bool, Option(help="Prove that its chain computes what its source computes.")]


@app.command("add")
def add_command(  # noqa: PLR0913 one parameter per option
    context: typer.Context,
    name: Name,
    source: Source,
    base: Base = None,
    store: Store = "exact",
    delta_budget: DeltaBudget = DEFAULT_DELTA_BUDGET,
    min_agreement: MinAgreement = None,
    budget: Budget = None,
    text: Text = None,
    data: Data = None,
    rows: Rows = 64,
    task: Task = None,
    private: Private = False,
    tenant: Tenant = "",
    replace: Replace = False,
    dtype: Dtype = "float32",
    golden: Golden = True,
    wait: WaitOption = 600.0,
    zoo: ZooOption = None,
) -> None:
    """Add a variant: a whole model, a fine-tune, an adapter, or a weighted sum of adapters."""
    from zoo.adding.add import AddOptions, add

    options = AddOptions(
        base=base,
        store=store,
        min_agreement=min_agreement,
        replace=replace,
        dtype=dtype,
        wait_s=wait,
        golden=golden,
        delta_budget=delta_budget,
        budget=budget,
        text=text,
        data=data,
        rows=rows,
        task=task,
        private=private,
        tenant=tenant,
    )
    _tell(add(root_of(context, zoo), name, source, options, ConsoleProgress(err)))


def _tell(variant: Variant) -> None:
    """What became of its units, and what was measured."""
    report = variant.report
    made_of = f" upon {variant.base}" if variant.base else ""
    out.print(
        f"added {variant.name} ({variant.kind}{made_of}): {report['shared']} units shared, "
        f"{report['changed']} changed, {report['attached']} with an attachment"
    )
    if variant.measured is not None:
        from zoo.equivalence.tables import measured_line

        out.print(measured_line(variant.measured))
