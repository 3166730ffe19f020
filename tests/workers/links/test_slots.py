"""The protocol of slots: any order of work keeps both ends in step, and what breaks it is named."""

import random

import pytest

from workers.links.slots import Incoming, Outgoing, OutOfStep


@pytest.mark.parametrize("count", [1, 2, 7])
def test_both_ends_agree_whatever_the_order(count: int) -> None:
    chance = random.Random(count)
    going, coming = Outgoing(count), Incoming(count)
    announced: list[tuple[int, int]] = []
    given_back: list[tuple[int, int]] = []
    in_use: list[int] = []
    sent = 0
    for _ in range(2000):
        match chance.randrange(4):
            case 0:
                was_full = going.under_way == count
                taken = going.take()
                assert (taken is None) == was_full
                if taken is not None:
                    assert taken[1] == sent
                    sent += 1
                    announced.append(taken)
            case 1 if announced:
                slot, sequence = announced.pop(0)
                coming.arrive(slot, sequence)
                in_use.append(slot)
            case 2 if in_use:
                given_back.append(coming.release(in_use.pop(chance.randrange(len(in_use)))))
            case 3 if given_back:
                going.credit(*given_back.pop(chance.randrange(len(given_back))))
        assert going.under_way == len(announced) + len(in_use) + len(given_back)
        assert coming.held == len(in_use)
        assert going.has_room == (going.under_way < count)
    assert sent > 100


def test_what_breaks_the_order_is_refused() -> None:
    going, coming = Outgoing(2), Incoming(2)
    slot, sequence = going.take() or (-1, -1)
    with pytest.raises(OutOfStep, match="given back for message 5"):
        going.credit(slot, 5)
    with pytest.raises(OutOfStep, match="nothing is under way"):
        going.credit(1 - slot, 0)
    with pytest.raises(OutOfStep, match="the link has 2"):
        coming.arrive(2, 0)
    with pytest.raises(OutOfStep, match="0 is next"):
        coming.arrive(slot, sequence + 1)
    coming.arrive(slot, sequence)
    with pytest.raises(OutOfStep, match="announced again"):
        coming.arrive(slot, sequence + 1)
    coming.release(slot)
    with pytest.raises(OutOfStep, match="nothing is in it"):
        coming.release(slot)
