"""How well a chain does a task: greedy answers to held-out questions, run as they are served."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zoo.equivalence.chains import bounded
from zoo.learning.tasks import Question, Task
from zoo.manifest import Manifests
from zoo.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zoo.door import Offline

_BATCH = 16


def scores(
    offline: "Offline",
    chain: Manifests,
    tokenizer: "PreTrainedTokenizerBase",
    asked: tuple[Task, Sequence[Question]],
    progress: Progress,
) -> list[float]:
    """The score of each question's answer, 0 to 1, in the order of the questions."""
    from zoo.learning.train import end_of_turn, prompt_ids

    task, questions = asked
    prompts = [prompt_ids(tokenizer, task, question.prompt) for question in questions]
    context = max(len(prompt) for prompt in prompts) + task.answer_tokens + 1
    model = offline.load(bounded(chain, context))
    try:
        found: list[float] = []
        starts = range(0, len(prompts), _BATCH)
        for start in progress.track(list(starts), f"scoring {task.name}"):
            batch = prompts[start : start + _BATCH]
            answers = model.generate(batch, task.answer_tokens, [end_of_turn(tokenizer)])
            for question, ids in zip(questions[start : start + _BATCH], answers, strict=True):
                text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
                found.append(task.metric.score(text, question.references))
        return found
    finally:
        offline.drop(model)
