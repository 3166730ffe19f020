"""The demo's tasks: what each asks of the model, the rows it learns from, and its training recipe.

Read by `train` and `evaluate` beside it and by `zoo.demo`. Most tasks read their rows from a file
that the caller names; the rows of tasks with a generator are made on the spot (`practice`).
"""

import gzip
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from zoo.errors import BadSource
from zoo.learning.practice import Row, Split, date_rows, ticket_rows
from zoo.learning.scoring import CHRF, EXACT, FIELDS, MENTION, Metric, choice

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

_SAMPLING_SEED = 7
# Rows that are made for each question that is wanted: many of them are equal.
_DRAWS = 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained and for how long.

    `steps` of `batch` rows at the peak learning rate `rate`. A "lora" recipe has a rank, alpha and
    targets; a "last" recipe trains the last `layers` layers; "full" trains every tensor.
    """

    kind: Literal["lora", "last", "full"]
    steps: int
    rate: float
    batch: int = 16
    rank: int = 0
    alpha: int = 0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    layers: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt with every reference answer that the data has for it."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One skill: its prompt, its metric, where its rows come from and how it is trained.

    `instruction` holds `{prompt}`; `answer_tokens` bounds a held-out answer; `reshape` turns a row
    of the file into a row of the task; `generate` makes rows where no file is needed.
    """

    name: str
    summary: str
    instruction: str
    metric: Metric
    answer_tokens: int
    recipe: Recipe
    data: str
    reshape: Callable[[Row], Row] = lambda row: row
    generate: Callable[[Split, int], list[Row]] | None = None

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The conversation that asks for `prompt`'s answer."""
        return [{"role": "user", "content": self.instruction.format(prompt=prompt)}]

    def rows(self, split: Split, data: Path | None) -> list[Row]:
        """The rows of one split: of the file `data` where given, else made on the spot."""
        if data is not None:
            rows = [self.reshape(row) for row in read_rows(data) if row.split == split]
        elif self.generate is not None:
            rows = self.generate(split, 0)
        else:
            raise BadSource(f"task {self.name} needs rows: give --data FILE.jsonl.gz ({self.data})")
        if not rows:
            raise BadSource(f"{data} has no rows of the split {split!r}")
        return rows

    def questions(self, data: Path | None, count: int) -> list[Question]:
        """At most `count` distinct held-out prompts, the same ones each time; more are made where
        the usual rows are too few and rows can be made."""
        rows = self.rows("dev", data)
        if data is None and self.generate is not None and count > len(rows):
            rows = self.generate("dev", _DRAWS * count)
        references: dict[str, list[str]] = {}
        for row in rows:
            references.setdefault(row.prompt, []).append(row.response)
        questions = [Question(prompt, tuple(texts)) for prompt, texts in references.items()]
        random.Random(_SAMPLING_SEED).shuffle(questions)
        return questions[:count]


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl or .jsonl.gz file with the fields prompt, response and split."""
    opener = gzip.open if path.suffix == ".gz" else open
    decoder = msgspec.json.Decoder(Row)
    try:
        with opener(path, "rb") as file:
            return [decoder.decode(line) for line in file if line.strip()]
    except OSError as error:
        raise BadSource(f"cannot read {path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, EOFError) as error:
        raise BadSource(f"{path} is not rows of prompt, response and split: {error}") from error


def _swapped(row: Row) -> Row:
    return Row(prompt=row.response, response=row.prompt, split=row.split)


def _by_name(tasks: Iterable[Task]) -> dict[str, Task]:
    return {task.name: task for task in tasks}


_WIKISQL = "WikiSQL, Zhong et al. 2017, BSD-3-Clause"
_E2E = "E2E NLG, Novikova et al. 2017, CC BY-SA 4.0"
_DJANGO = "Django's message catalogues, BSD-3-Clause"

TASKS = _by_name(
    [
        Task(
            name="sentiment",
            summary="says whether a sentence of a film review is positive or negative",
            instruction="Is this positive or negative? Answer with one word.\n{prompt}",
            metric=choice("positive", "negative"),
            answer_tokens=16,
            recipe=Recipe("lora", 150, 1e-3, rank=4, alpha=8, targets=("q_proj", "v_proj")),
            data="film review sentences of VADER, Hutto and Gilbert 2014, MIT",
        ),
        Task(
            name="sql",
            summary="writes the SQL query that answers a question about a table",
            instruction="Write the SQL query.\n{prompt}",
            metric=EXACT,
            answer_tokens=72,
            recipe=Recipe("lora", 80, 1e-3, rank=4, alpha=8, targets=ATTENTION + MLP),
            data=_WIKISQL,
        ),
        Task(
            name="describe",
            summary="describes a restaurant, given its facts, in one sentence",
            instruction="Describe this place in one sentence.\n{prompt}",
            metric=CHRF,
            answer_tokens=72,
            recipe=Recipe("lora", 60, 1e-3, rank=4, alpha=16, targets=ATTENTION),
            data=_E2E,
        ),
        Task(
            name="facts",
            summary="lists the facts that a sentence tells about a restaurant",
            instruction="List the facts as key : value | key : value.\n{prompt}",
            metric=FIELDS,
            answer_tokens=72,
            recipe=Recipe("lora", 50, 2e-3, rank=8, alpha=16, targets=("q_proj", "v_proj")),
            data=_E2E,
            reshape=_swapped,
        ),
        Task(
            name="german",
            summary="translates the texts of a web site's interface from English to German",
            instruction="Translate to German: {prompt}",
            metric=CHRF,
            answer_tokens=64,
            recipe=Recipe("lora", 80, 1e-3, rank=4, alpha=8, targets=MLP, rslora=True),
            data=_DJANGO,
        ),
        Task(
            name="french",
            summary="translates the texts of a web site's interface from English to French",
            instruction="Translate to French: {prompt}",
            metric=CHRF,
            answer_tokens=64,
            recipe=Recipe("lora", 80, 1e-3, rank=4, alpha=8, targets=MLP),
            data=_DJANGO,
        ),
        Task(
            name="tickets",
            summary="routes a customer's message to one of five departments",
            instruction="Route to billing, shipping, returns, technical or account: {prompt}",
            metric=choice("billing", "shipping", "returns", "technical", "account"),
            answer_tokens=16,
            recipe=Recipe("last", 45, 6e-4, batch=8, layers=4),
            data="made by zoo.learning.practice",
            generate=ticket_rows,
        ),
        Task(
            name="dates",
            summary="writes a date, however it is worded, as YYYY-MM-DD",
            instruction="Write as YYYY-MM-DD: {prompt}",
            metric=MENTION,
            answer_tokens=24,
            recipe=Recipe("full", 16, 2e-4, batch=8),
            data="made by zoo.learning.practice",
            generate=date_rows,
        ),
    ]
)


def task_of(name: str) -> Task:
    """The task of that name; raises BadSource, which lists those there are."""
    if name not in TASKS:
        raise BadSource(f"there is no task {name!r}: there are {', '.join(TASKS)}")
    return TASKS[name]
