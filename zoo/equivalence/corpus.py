"""Held-out text that chains are compared on, as token ids; built in, or rows of a file.

The built-in rows are those that `zoo.learning.practice` holds out. A row is a conversation of one
turn, and only its answer is predicted: what a variant was asked is not what it has to agree about.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from zoo.errors import BadSource
from zoo.learning.practice import Row
from zoo.learning.tasks import TASKS, read_rows
from zoo.manifest import Variant
from zoo.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = "built-in"
_LONGEST = 512


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids, of which those from `first` on (at least 1) are predicted."""

    ids: tuple[int, ...]
    first: int

    @property
    def num_predicted(self) -> int:
        """Positions that count."""
        return len(self.ids) - self.first


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages with a name for people and a digest of their token ids."""

    name: str
    digest: str
    passages: tuple[Passage, ...]


def read_corpus(
    tokenizer: "PreTrainedTokenizerBase", data: Path | None, rows: int, longest: int
) -> Corpus:
    """Held-out rows of `data`, or the built-in ones: `rows` of them, evenly spread; none is longer
    than `longest` tokens."""
    if data is None:
        name, held_out = BUILT_IN, _built_in()
    else:
        name, held_out = data.name, [row for row in read_rows(data) if row.split == "dev"]
        if not held_out:
            raise BadSource(f"{data} has no rows of the split 'dev'")
    chosen = (
        [held_out[i * len(held_out) // rows] for i in range(rows)]
        if (len(held_out) > rows)
        else held_out
    )
    return corpus_of(name, [_passage(tokenizer, row, min(longest, _LONGEST)) for row in chosen])


def corpus_of(name: str, passages: Sequence[Passage]) -> Corpus:
    """Passages with their digest; those in which nothing is predicted are left out."""
    kept = tuple(passage for passage in passages if passage.num_predicted > 0)
    if not kept:
        raise BadSource(f"the held-out text {name} has no row whose answer can be predicted")
    listing = msgspec.json.encode([(passage.ids, passage.first) for passage in kept])
    return Corpus(name, hashlib.sha256(listing).hexdigest(), kept)


def tokenizer_of(store: Store, variant: Variant) -> "PreTrainedTokenizerBase":
    """A variant's tokenizer, from the files that the zoo keeps of it. Raises BadSource."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="blockllm-tokenizer-") as scratch:
        for name, digest in variant.files.items():
            (Path(scratch) / Path(name).name).write_bytes(store.blob(digest))
        try:
            return AutoTokenizer.from_pretrained(scratch, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise BadSource(f"{variant.name} has no tokenizer, so no text can be put to it") from (
                error
            )


def tokenizer_print(store: Store, variant: Variant) -> str:
    """A digest of what a tokenizer does: how every piece of text becomes ids."""
    digest = variant.files.get("tokenizer.json")
    if digest is not None:
        told = msgspec.json.decode(store.blob(digest))
        # Padding and truncation are settings of the caller's, not of the vocabulary.
        kept = {key: told.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
        kept["added"] = [[piece["id"], piece["content"]] for piece in told.get("added_tokens", [])]
        return hashlib.sha256(msgspec.json.encode(kept, order="deterministic")).hexdigest()
    vocabulary = tokenizer_of(store, variant).get_vocab()
    return hashlib.sha256(msgspec.json.encode(sorted(vocabulary.items()))).hexdigest()


def _built_in() -> list[Row]:
    """What the generated tasks hold out, one row of each task after the other."""
    made = [
        [Row(task.instruction.format(prompt=row.prompt), row.response, "dev") for row in rows]
        for task in TASKS.values()
        if task.generate is not None
        for rows in [task.generate("dev", 0)]
    ]
    return [row for rows in zip(*made, strict=True) for row in rows]


def _passage(tokenizer: "PreTrainedTokenizerBase", row: Row, longest: int) -> Passage:
    if tokenizer.chat_template:
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row.prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    else:
        text = f"{row.prompt}\n"
    asked = tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)
    end = cast("int | None", tokenizer.eos_token_id)
    answer = tokenizer.encode(row.response, add_special_tokens=False)
    ids = (*asked, *answer, *(() if end is None else (end,)))[:longest]
    return Passage(tuple(ids), max(1, min(len(asked), len(ids))))
