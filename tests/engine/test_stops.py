"""Stop strings: the result is that of a search character by character, however the text is cut."""

import itertools
import random

import pytest

from engine.stops import StopFinder

CASES = [
    # text, stops, shown, stop, and why
    ("one two", ["two"], "one ", "two", "a plain match"),
    ("one two", [], "one two", None, "no stop strings"),
    ("one two", [""], "one two", None, "an empty stop string never matches"),
    ("abc", ["abc", "b"], "a", "b", "b is complete first"),
    ("xabc", ["abc", "bc"], "x", "abc", "both end at c: the longer one counts"),
    ("aab", ["ab"], "a", "ab", "a false start is given back"),
    ("ababac", ["abac"], "ab", "abac", "starts overlap"),
    ("end", ["ending"], "end", None, "held back at the end and then shown"),
    ("日本語です", ["語で"], "日本", "語で", "characters beyond ASCII"),
]


def run(text: str, cuts: list[int], stops: list[str], include: bool) -> tuple[str, str | None]:
    """Push `text` in pieces."""
    finder = StopFinder(stops, include=include)
    shown = ""
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        piece, stop = finder.push(text[start:end])
        shown += piece
        if stop is not None:
            return shown, stop
    return shown + finder.flush(), None


def searched(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The same by brute force: look at each beginning of the text in turn."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@pytest.mark.parametrize(("text", "stops", "shown", "stop", "why"), CASES)
def test_cuts_at_the_stop_string(
    text: str, stops: list[str], shown: str, stop: str | None, why: str
) -> None:
    for cuts in ([], list(range(1, len(text)))):
        assert run(text, cuts, stops, include=False) == (shown, stop), why


def test_equals_brute_force_for_every_cut() -> None:
    dice = random.Random(5)
    for _ in range(3000):
        text = "".join(dice.choices("abc", k=dice.randrange(14)))
        stops = ["".join(dice.choices("abc", k=dice.randrange(1, 5))) for _ in range(3)]
        cuts = sorted(dice.sample(range(len(text) + 1), dice.randrange(len(text) + 1)))
        include = dice.random() < 0.5
        assert run(text, cuts, stops, include) == searched(text, stops, include)


def test_holds_back_no_more_than_could_become_a_stop_string() -> None:
    finder = StopFinder(["</answer>"])
    assert finder.push("42 </ans") == ("42 ", None)
    assert finder.push("x") == ("</ansx", None)
    assert finder.push("<") == ("", None)
    assert finder.flush() == "<"
    assert finder.flush() == ""
