"""Tasks: rows from files and from generators, and held-out questions."""

import gzip
import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from zoo.errors import BadSource
from zoo.learning.practice import date_rows, ticket_rows
from zoo.learning.tasks import TASKS, Question, read_rows, task_of

GENERATED = [task for task in TASKS.values() if task.generate is not None]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("make", [ticket_rows, date_rows])
def test_generated_rows_are_the_same_each_time_and_held_out_ones_are_new(make) -> None:
    train, held_out = make("train"), make("dev")
    assert make("train") == train
    assert {row.split for row in train} == {"train"}
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}


def test_held_out_tickets_share_no_wording_with_the_training_ones() -> None:
    fillers = re.compile(r"(lamp|kettle|bicycle|jacket|camera|tent|desk|blender)")
    seen = {fillers.sub("X", row.prompt) for row in ticket_rows("train")}
    new = {fillers.sub("X", row.prompt) for row in ticket_rows("dev")}
    assert not seen & new
    assert not any(fillers.search(row.prompt) for row in ticket_rows("dev"))


def test_tickets_come_in_equal_numbers_per_label() -> None:
    counts: dict[str, int] = {}
    for row in ticket_rows("dev"):
        counts[row.response] = counts.get(row.response, 0) + 1
    assert set(counts.values()) == {40}
    assert len(counts) == 5


def test_dates_are_right_and_held_out_years_are_new() -> None:
    years: dict[str, set[int]] = {"train": set(), "dev": set()}
    for row in (*date_rows("train"), *date_rows("dev")):
        day = date.fromisoformat(row.response)
        years[row.split].add(day.year)
        assert re.search(rf"\b{day.day}(st|nd|rd|th)?\b", row.prompt)
        assert str(day.year) in row.prompt
        assert day.strftime("%b") in row.prompt
    assert not years["train"] & years["dev"]


def test_more_questions_are_made_where_the_usual_are_too_few() -> None:
    for make in (ticket_rows, date_rows):
        assert make("dev", 500)[:200] == make("dev")
    dates, tickets = TASKS["dates"], TASKS["tickets"]
    assert len(dates.questions(None, 200)) < 200
    assert len(dates.questions(None, 600)) == 600
    few, many = (tickets.questions(None, count) for count in (200, 600))
    assert {one.prompt for one in few} < {one.prompt for one in many}
    # There are no more that differ.
    assert len(many) == len(tickets.questions(None, 900)) < 200


def test_file_rows_are_grouped_into_questions_with_all_their_references(tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "rows.jsonl.gz",
        [
            {"prompt": "a", "response": "1", "split": "train"},
            {"prompt": "b", "response": "2", "split": "dev", "rating": "ignored"},
            {"prompt": "b", "response": "3", "split": "dev"},
        ],
    )
    task = TASKS["describe"]
    assert [row.prompt for row in task.rows("train", data)] == ["a"]
    assert task.questions(data, 5) == [Question("b", ("2", "3"))]
    assert TASKS["facts"].questions(data, 5) == TASKS["facts"].questions(data, 5)
    assert {q.prompt for q in TASKS["facts"].questions(data, 5)} == {"2", "3"}


def test_a_task_without_its_rows_says_what_to_give() -> None:
    with pytest.raises(BadSource, match="give --data FILE"):
        TASKS["sql"].rows("train", None)


def test_a_split_without_rows_is_named(tmp_path: Path) -> None:
    row = {"prompt": "a", "response": "1", "split": "train"}
    data = write_rows(tmp_path / "rows.jsonl.gz", [row])
    with pytest.raises(BadSource, match="no rows of the split 'dev'"):
        TASKS["sql"].rows("dev", data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plain.jsonl", b'{"prompt": "a"}\n', "is not rows of prompt, response and split"),
        ("broken.jsonl", b"{\n", "is not rows"),
        ("fake.jsonl.gz", b"not gzip", "cannot read"),
    ],
)
def test_bad_files_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadSource, match=rf"{name}.*{message}|{message}.*{name}"):
        read_rows(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match=r"cannot read .*absent.jsonl"):
        read_rows(tmp_path / "absent.jsonl")


def test_messages_carry_braces_of_a_prompt_unchanged() -> None:
    task = replace(TASKS["german"], instruction="Sum up: {prompt}")
    assert task.messages("f'{x}'") == [{"role": "user", "content": "Sum up: f'{x}'"}]


def test_an_unknown_task_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadSource, match=r"no task 'poetry': there are sentiment, sql"):
        task_of("poetry")
