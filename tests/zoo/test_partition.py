"""Blocks are the longest runs that every chain using them uses whole."""

import random

import pytest

from zoo.partition import cut, partition


@pytest.mark.parametrize(
    ("chains", "blocks", "reason"),
    [
        ([], [], "no chain, no block"),
        ([""], [], "a chain without units has none either"),
        (["abcd"], ["abcd"], "a first model is one block"),
        (["abcd", "abcd"], ["abcd"], "an adapter's chain has its base's units"),
        (["abcd", "abxd"], ["ab", "c", "d", "x"], "one changed unit parts three blocks"),
        (["abcd", "abcy"], ["abc", "d", "y"], "a changed end parts two"),
        (["abcd", "wxyz"], ["abcd", "wxyz"], "strangers share nothing"),
        (["abcd", "abcy", "xbcd"], ["a", "bc", "d", "y", "x"], "three ways to part"),
        (["abcd", "ab"], ["ab", "cd"], "a chain may end where another goes on"),
        (["abcd", "cd"], ["ab", "cd"], "or begin inside it"),
        (["abab"], ["ab"], "a block may be used twice by one chain"),
        (["aab"], ["a", "b"], "a unit that follows itself stands alone"),
        (["abc", "acb"], ["a", "b", "c"], "the same units in another order"),
    ],
)
def test_blocks_are_maximal_shared_runs(chains: list[str], blocks: list[str], reason: str):
    found = partition(chains)
    assert sorted("".join(block) for block in found) == sorted(blocks), reason


def test_every_chain_is_cut_into_whole_blocks_and_none_could_be_longer():
    draw = random.Random(0)
    for _ in range(200):
        chains = [
            [draw.choice((f"{i}", f"{i}x", f"{i}y")) for i in range(8)]
            for _ in range(draw.randint(1, 5))
        ]
        blocks = partition(chains)
        assert len({unit for block in blocks for unit in block}) == sum(map(len, blocks))
        for chain in chains:
            spans = cut(chain, blocks)
            assert [unit for first, last in spans for unit in chain[first:last]] == chain
        followers = {
            (tuple(chain[a:b]), tuple(chain[b:c]))
            for chain in chains
            for (a, b), (_, c) in zip(cut(chain, blocks), cut(chain, blocks)[1:], strict=False)
        }
        for left, right in followers:
            alone = sum(left == pair[0] for pair in followers) == 1
            sole = sum(right == pair[1] for pair in followers) == 1
            assert not (alone and sole), "two blocks that always meet are one"


def test_cut_refuses_blocks_of_other_chains():
    with pytest.raises(ValueError, match="position 1"):
        cut("ab", [("a",), ("b", "c")])
