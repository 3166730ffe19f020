"""Patterns of adapters: those that peft writes pass, those that never end do not."""

import time

import pytest

from zoo.errors import BadAdapter
from zoo.sources.patterns import check_patterns


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "^model.layers.2.mlp.down_proj",
        r"[02]\.self_attn\.v_proj",
        r".*layers\.[01]\.mlp\.(up|gate)_proj",
        r".*\.layers\.\d+\.(self_attn\.(q|k|v|o)|mlp\.(gate|up|down))_proj",
        r"(.*\.)?lm_head",
        r"layers\.(1[0-9]|2[0-3])\..*",
        "",
    ],
)
def test_patterns_that_people_write_pass(pattern: str):
    check_patterns({"target_modules": pattern, "rank_pattern": {pattern: 4}}, "here")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$", "(a|a)*b", "(?:x{1,3})+", "(?=(a+)+)b", "((a*)*)*", "(a+){30}", "(a?){30}a{30}",
        ".*" * 12 + "x", "(" * 400, "(" * 499 + ")" * 499, "a" * 5000, "[", "(?P<x",
    ],
)  # fmt: skip
def test_patterns_that_are_none_or_might_never_end_are_refused(pattern: str):
    for settings in ({"target_modules": pattern}, {"alpha_pattern": {pattern: 1}}):
        began = time.monotonic()
        with pytest.raises(BadAdapter, match="of here is not valid") as caught:
            check_patterns(settings, "here")
        assert time.monotonic() - began < 1
        assert len(str(caught.value)) < 300


def test_what_is_no_pattern_is_left_alone():
    check_patterns({"target_modules": ["(a+)+"], "r": 3, "rank_pattern": None}, "here")
