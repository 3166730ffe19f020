"""Scores a trained variant beside its base on held-out rows: greedy, float32, equal prompts.

Called by the command line. The figures in the gallery's README files come from here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zoo.adapters.adapter import is_adapter
from zoo.learning.practice import Row
from zoo.learning.tasks import Question, Task
from zoo.learning.train import answer_loss, encode, end_of_turn, prompt_ids
from zoo.progress import Progress

_BATCH = 20


class Score(msgspec.Struct, frozen=True):
    """One model on the held-out rows.

    `score` is the task's metric (0 to 1), `loss` the mean over rows of the first reference's loss
    per token, `answers` what the model said, in the order of the questions.
    """

    score: float
    loss: float
    answers: tuple[str, ...]


class Comparison(msgspec.Struct, frozen=True):
    """Base and variant on the same held-out rows."""

    task: str
    metric: str
    questions: tuple[Question, ...]
    base: Score
    variant: Score


def compare(
    task: Task, base: Path, variant: Path, questions: Sequence[Question], progress: Progress
) -> Comparison:
    """Score the checkpoint folder `base`, then `variant`: another one, or an adapter folder."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    scores = [
        score(load(path, base), tokenizer, task, questions, progress) for path in (base, variant)
    ]
    return Comparison(task.name, task.metric.name, tuple(questions), *scores)


def load(path: Path, base: Path) -> PreTrainedModel:
    """A checkpoint folder, or an adapter folder merged into `base`, as a float32 model."""
    if not is_adapter(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(path)).merge_and_unload()


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    progress: Progress,
) -> Score:
    """Greedy answers to every question, scored, and the mean loss of the first references."""
    model.eval()
    # Alike lengths share a batch, so little is spent on padding.
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt))
    batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
    answers = [""] * len(questions)
    loss = 0.0
    for batch in progress.track(batches, f"scoring {task.name}"):
        texts = answer(model, tokenizer, task, [questions[index].prompt for index in batch])
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
            row = Row(questions[index].prompt, questions[index].references[0], "dev")
            loss += answer_loss(model, [encode(tokenizer, task, row)]).item()
    mean = task.metric.mean(answers, [question.references for question in questions])
    return Score(mean, loss / len(questions), tuple(answers))


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, prompts: Sequence[str]
) -> list[str]:
    """Greedy answers, at most `task.answer_tokens` tokens each."""
    asked = [prompt_ids(tokenizer, task, prompt) for prompt in prompts]
    width = max(len(ids) for ids in asked)
    fill = end_of_turn(tokenizer)
    generator: Any = model
    out = generator.generate(
        input_ids=torch.tensor([[fill] * (width - len(ids)) + ids for ids in asked]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in asked]),
        max_new_tokens=task.answer_tokens,
        do_sample=False,
        pad_token_id=fill,
    )
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def table(comparison: Comparison) -> Table:
    """Base beside variant."""
    shown = Table("", comparison.metric, "loss per token", "first answer")
    for name, one in (("base", comparison.base), ("variant", comparison.variant)):
        first = " ".join(one.answers[0].split())
        shown.add_row(name, f"{one.score:.1%}", f"{one.loss:.2f}", first)
    return shown
