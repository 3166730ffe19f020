"""The README of a trained adapter: what it does, how it was made, and how well it does it."""

from pathlib import Path

from zoo.learning.evaluate import Comparison
from zoo.learning.tasks import Recipe, Task


def write_card(task: Task, folder: Path, data: Path | None, comparison: Comparison) -> None:
    """Write README.md into the adapter's folder."""
    source = f" --data {data.name}" if data else ""
    lines = [
        f"# {folder.name}",
        "",
        f"A LoRA adapter for SmolLM2-135M-Instruct that {task.summary}.",
        "",
        f"- Data: {task.data}.",
        f"- Prompt: `{_in_one_line(task.instruction)}`, through the chat template.",
        f"- Trained: {_recipe(task.recipe)}.",
        f"- Made by: `python -m zoo train {task.name} BASE {folder.name}{source}`, where BASE is",
        "  what `python -m zoo export smollm2 BASE` writes.",
        "",
        f"{len(comparison.questions)} held-out prompts, greedy answers, float32:",
        "",
        f"| | {comparison.metric} | loss per token |",
        "|---|---:|---:|",
        f"| base | {comparison.base.score:.1%} | {comparison.base.loss:.2f} |",
        f"| adapter | {comparison.variant.score:.1%} | {comparison.variant.loss:.2f} |",
        "",
        *_sample(comparison),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _recipe(recipe: Recipe) -> str:
    scaling = "rsLoRA, " if recipe.rslora else ""
    return (
        f"{scaling}rank {recipe.rank}, alpha {recipe.alpha} on {', '.join(recipe.targets)}; "
        f"{recipe.steps} steps of {recipe.batch} rows, peak rate {recipe.rate:g}"
    )


def _sample(comparison: Comparison) -> list[str]:
    question = comparison.questions[0]
    return [
        "One of them:",
        "",
        f"- prompt: {_in_one_line(question.prompt)}",
        f"- reference: {_in_one_line(question.references[0])}",
        f"- base: {_in_one_line(comparison.base.answers[0])}",
        f"- adapter: {_in_one_line(comparison.variant.answers[0])}",
    ]


def _in_one_line(text: str) -> str:
    return " ".join(text.split())
