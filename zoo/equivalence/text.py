"""Text to learn from and text to be judged on, as token chunks of one length.

Rows of the files that the caller names, else text that is always at hand: Python's own language
reference and the rows that the project makes itself. Held-out documents are never learned from.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zoo.equivalence.corpus import tokenizer_of
from zoo.errors import BadSource
from zoo.learning.practice import Row
from zoo.learning.tasks import TASKS, read_rows
from zoo.manifest import Variant
from zoo.store import Store

# Every so manieth document is held out where a file does not say which ones are.
_HELD_OUT_EACH = 8
_BUILT_IN = ("tickets", "dates")


@dataclass(frozen=True, slots=True)
class Corpus:
    """`train` and `held_out` are int64 [chunks, length]; `name` says where the text is from, and
    `digest` names the tokens themselves."""

    name: str
    train: Tensor
    held_out: Tensor
    digest: str


@dataclass(frozen=True, slots=True)
class Measure:
    """How much text: tokens of a chunk, the most chunks that are held out, and that are learned."""

    length: int = 128
    held_out: int = 48
    train: int = 8192


def read_corpus(
    store: Store, variant: Variant, data: Sequence[Path], measure: Measure, seed: int
) -> Corpus:
    """The corpus in the tokens of `variant`; raises BadSource where there is too little text."""
    tokenizer = tokenizer_of(store, variant)
    rows = [row for path in data for row in read_rows(path)] if data else _built_in_rows()
    texts = {"train": [], "dev": []} if data else _reference_texts()
    if not any(row.split == "dev" for row in rows) and not texts["dev"]:
        rows = _held_out_by_place(rows)
    for row in rows:
        texts[row.split].append(_conversation(tokenizer, row))
    named = ", ".join(path.name for path in data) or "Python's reference and practice rows"
    train = _chunks(tokenizer, texts["train"], (measure.train, measure.length), seed)
    held_out = _chunks(tokenizer, texts["dev"], (measure.held_out, measure.length), seed)
    if not len(train) or not len(held_out):
        raise BadSource(
            f"{named} is too little text: {len(train)} chunks of {measure.length} tokens to learn "
            f"from and {len(held_out)} to be judged on, and one of each is needed"
        )
    digest = hashlib.sha256(train.numpy().tobytes() + held_out.numpy().tobytes()).hexdigest()
    return Corpus(named, train, held_out, digest)


def _built_in_rows() -> list[Row]:
    rows: list[Row] = []
    for name in _BUILT_IN:
        task = TASKS[name]
        for split in ("train", "dev"):
            for row in task.rows(split, None):
                asked = task.messages(row.prompt)[0]["content"]
                rows.append(Row(asked, row.response, split))
    return rows


def _reference_texts() -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {"train": [], "dev": []}
    for index, topic in enumerate(sorted(topics)):
        texts["dev" if index % _HELD_OUT_EACH == 0 else "train"].append(topics[topic])
    return texts


def _held_out_by_place(rows: Sequence[Row]) -> list[Row]:
    """Rows of a file without a held-out split: every eighth of its distinct prompts is one."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(r.prompt for r in rows))}
    held = {prompt for prompt, place in places.items() if place % _HELD_OUT_EACH == 0}
    return [Row(r.prompt, r.response, "dev" if r.prompt in held else "train") for r in rows]


def _conversation(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    if not tokenizer.chat_template:
        return f"{row.prompt}\n{row.response}"
    turns = [
        {"role": "user", "content": row.prompt},
        {"role": "assistant", "content": row.response},
    ]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _chunks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most: tuple[int, int], seed: int
) -> Tensor:
    """Documents in a seeded order, one after the other, cut into pieces of one length: at most so
    many, and no more is read than that takes."""
    count, length = most
    ids: list[int] = []
    for text in random.Random(seed).sample(list(texts), len(texts)):
        if len(ids) >= count * length:
            break
        ids += tokenizer.encode(text, add_special_tokens=False)
        if isinstance(tokenizer.eos_token_id, int):
            ids.append(tokenizer.eos_token_id)
    whole = min(count, len(ids) // length) * length
    return torch.tensor(ids[:whole], dtype=torch.int64).view(-1, length)
