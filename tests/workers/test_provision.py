"""Which chains give way when the weight budget lacks room."""

import pytest

from workers.provision import victims

FREEABLE = {1: 100, 2: 0, 3: 50, 4: 200}


@pytest.mark.parametrize(
    ("needed", "idle", "chosen"),
    [
        (10, [1, 3, 4], [1]),  # the longest unused first, and no more than needed
        (120, [1, 3, 4], [1, 3]),
        (10, [2, 3], [3]),  # what would free nothing stays
        (1000, [3, 1], [3, 1]),  # all that is idle, then the loader says what still lacks
        (10, [], []),  # what is in use never gives way
        (10, [9], []),  # its weights are not there
    ],
)
def test_the_longest_unused_chains_that_free_anything_give_way(needed, idle, chosen):
    assert victims(needed, FREEABLE, idle) == chosen
