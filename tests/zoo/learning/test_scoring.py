"""Scores of answers, worked out by hand."""

import pytest

from zoo.learning.scoring import CHRF, EXACT, FIELDS, MENTION, choice


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("positive", 1.0),
        ("The review is Positive.", 1.0),
        ("negative", 0.0),
        ("positive or negative", 0.0),
        ("", 0.0),
    ],
)
def test_choice_wants_the_right_label_and_no_other(answer: str, expected: float) -> None:
    assert choice("positive", "negative").score(answer, ["positive"]) == expected


def test_exact_looks_past_spaces_case_and_quotes_alone() -> None:
    assert EXACT.score('SELECT  A = "b" ;', ["SELECT a = B ;"]) == 1
    assert EXACT.score("SELECT a = b", ["SELECT a = b ;"]) == 0


def test_mention_finds_the_reference_in_a_wordy_answer() -> None:
    assert MENTION.score("The date is 2031-03-04.", ["2031-03-04"]) == 1
    assert MENTION.score("2031-03-041", ["2031-03-04"]) == 0


def test_fields_is_the_f1_of_the_pairs() -> None:
    reference = "name : Mill | area : city centre"
    assert FIELDS.score("area: City Centre | name: Mill", [reference]) == 1
    # One of two wanted, and one of three found, is right: 2 * 1 / (2 + 3).
    assert FIELDS.score("name : Mill | a : b | c : d", [reference]) == pytest.approx(0.4)
    assert FIELDS.score("a friendly pub", [reference]) == 0


def test_chrf_is_one_for_equal_texts_and_takes_the_best_reference() -> None:
    assert CHRF.score("Datei löschen", ["Datei löschen"]) == pytest.approx(1)
    assert CHRF.score("abc", ["xyz", "abd"]) == CHRF.score("abc", ["abd"])
    assert CHRF.score("", ["abc"]) == 0


def test_chrf_of_a_short_pair() -> None:
    # Orders 1, 2 and 3 have 2/3, 1/2 and 0/1 grams right on both sides; their mean is 7/18.
    assert CHRF.score("abc", ["abd"]) == pytest.approx(7 / 18)


def test_mean_runs_over_rows() -> None:
    assert EXACT.mean(["a", "b"], [["a"], ["c"]]) == 0.5
