"""What the batcher decides: tables of cases, each order with its reason."""

import numpy as np
import pytest

from workers.batcher import arrange, decide, follow, schedule
from workers.chains import BlockRange, KvShape, ServedChain
from workers.requests import Request, Span
from workers.wire import Sampling

KV = KvShape(1, 8)


def chain(
    number: int,
    blocks: list[tuple[int, int, int]],
    limit: int = 512,
    hidden: int = 8,
    tail: int | None = None,
):
    """A chain of blocks (key, first, last); every other unit attends, but for the head."""
    units = blocks[-1][2]
    layers = tuple(min((d + 1) // 2, units // 2) for d in range(units + 1))
    return ServedChain(
        id=number,
        unit_digests=("u",) * units,
        attachment_digests=(None,) * units,
        units=(None,) * units,
        attachments=(None,) * units,
        context=1000,
        lineages=tuple(str(d) for d in range(units + 1)),
        layers=layers,
        tail=units - 1 if tail is None else tail,
        kv=KV,
        hidden=hidden,
        vocabulary=8,
        blocks=tuple(BlockRange(k, a, b, limit) for k, a, b in blocks),
    )


def request(
    number: int, on: ServedChain, length: int, computed: int, *, at=0.0, priority=0, depth=0
):
    made = Request(
        number, on, Sampling(), 0, priority, at, np.zeros(length + 50, np.int32), length, 0
    )
    made.computed = computed
    if length - computed > 1:
        made.spans = [Span(depth, computed, length)]
        if depth:
            made.spans.append(Span(0, length, length + 10))
    return made


def picked(requests, rows=64, now=0.0, turns=None):
    steps = decide(requests, max_rows=rows, page=16, now=now, last_turn=turns or {})
    return [(s.request.id, s.span.first, s.count) for s in steps]


ONE = chain(1, [(0, 0, 5)])


def test_tokens_go_before_prompts():
    assert picked([request(1, ONE, 40, 0), request(2, ONE, 20, 19)]) == [(2, 19, 1), (1, 0, 40)]


def test_a_prompt_is_cut_at_a_page_to_fit_the_budget():
    assert picked([request(1, ONE, 100, 0), request(2, ONE, 20, 19)]) == [(2, 19, 1), (1, 0, 48)]


def test_the_rest_of_a_prompt_begins_at_a_page():
    assert picked([request(1, ONE, 100, 48)]) == [(1, 48, 52)]


def test_a_block_that_is_full_is_left_alone():
    narrow = chain(2, [(0, 0, 3), (7, 3, 5)], limit=2)
    tokens = [request(i, narrow, 20, 19) for i in range(4)]
    assert [p[0] for p in picked(tokens)] == [0, 1]


def test_the_prompt_that_waited_longest_goes_first():
    new, old = request(1, ONE, 40, 0, at=9.0), request(2, ONE, 40, 0, at=1.0)
    assert picked([new, old], rows=40, now=10.0)[0][0] == 2


def test_priority_goes_first_until_waiting_outweighs_it():
    urgent = request(1, ONE, 40, 0, at=10.0, priority=-1)
    plain = request(2, ONE, 40, 0, at=9.0)
    assert picked([plain, urgent], rows=40, now=10.0)[0][0] == 1
    assert picked([plain, urgent], rows=40, now=30.0)[0][0] == 1
    aged = request(2, ONE, 40, 0, at=0.0)
    assert picked([aged, urgent], rows=40, now=12.0)[0][0] == 2


def test_deeper_entries_go_before_prompts_from_the_bottom():
    deep = request(1, ONE, 33, 16, depth=3)
    assert picked([request(2, ONE, 40, 0), deep])[0][0] == 1


def test_widths_take_turns():
    wide = chain(3, [(9, 0, 5)], hidden=16)
    both = [request(1, ONE, 20, 19), request(2, wide, 20, 19)]
    assert [p[0] for p in picked(both, turns={ONE.group: 5, wide.group: 4})] == [2]
    assert [p[0] for p in picked(both, turns={ONE.group: 5, wide.group: 6})] == [1]


X, YA, YB, H = (0, 0, 3), (1, 3, 5), (2, 3, 5), (3, 5, 6)


@pytest.mark.parametrize(
    ("paths", "expected", "why"),
    [
        ([[X, YA, H], [X, YB, H]], [X, YA, YB, H], "the head waits for both"),
        ([[X, YA, H], [YB, H]], [X, YA, YB, H], "the earliest in the chain first"),
        ([[X, H], [X, YB, H]], [X, YB, H], "a shorter chain waits at the join"),
        ([[X, YA], [YA, X]], [X, YA, X], "opposite orders cannot both wait"),
    ],
)
def test_blocks_run_once_for_all_that_pass_them(paths, expected, why):
    assert [piece for piece, _ in schedule(paths)] == expected, why


def test_rows_of_a_block_lie_together():
    a, b = chain(1, [X, YA, H]), chain(2, [X, YB, H])
    requests = [request(i, (a, b)[i % 2], 20, 19) for i in range(6)]
    wave = arrange(decide(requests, max_rows=64, page=16, now=0.0, last_turn={}))
    assert [(s.block, s.rows) for s in wave.stages] == [
        (0, slice(0, 6)),
        (1, slice(0, 3)),
        (2, slice(3, 6)),
        (3, slice(0, 6)),
    ]
    assert [(c.id, first, last) for c, first, last in wave.stages[0].runs] == [(1, 0, 3), (2, 3, 6)]


def test_an_entry_above_the_bottom_joins_the_rest_of_its_block():
    deep = request(1, ONE, 33, 16, depth=3)
    wave = arrange(
        decide([deep, request(2, ONE, 20, 19)], max_rows=64, page=16, now=0, last_turn={})
    )
    assert [(s.first, s.last, len(s.steps)) for s in wave.stages] == [
        (0, 3, 1),
        (3, 4, 2),
        (4, 5, 2),
    ]
    assert wave.stages[0].rows == slice(0, 1)


# Units 4, which attends, and 5, the head, see of other rows keys and values alone; of the other
# chain units 3 and 4 see each row alone.
TAIL = chain(4, [(0, 0, 5), (3, 5, 6)], tail=4)
LOW = chain(5, [(7, 0, 5)], tail=3)


def stages_of(requests, **options):
    wave = arrange(decide(requests, max_rows=64, page=16, now=0, last_turn={}), **options)
    return wave, [
        (s.first, s.last, s.rows if isinstance(s.rows, slice) else s.rows.tolist())
        for s in wave.stages
    ]


def test_only_rows_whose_logits_are_wanted_reach_the_tail():
    whole, part = request(1, TAIL, 20, 0), request(2, TAIL, 100, 0)
    wave, stages = stages_of([request(3, TAIL, 9, 8), whole, part])
    assert [s.count for s in wave.steps] == [1, 20, 32]
    everything = slice(0, 53)
    assert stages == [(0, 4, everything), (4, 4, everything), (4, 5, [0, 20]), (5, 6, [0, 20])]
    assert [(s.writes, s.written) for s in wave.stages] == [
        (False, False),
        (True, False),
        (False, True),
        (False, False),
    ]
    assert [(s.steps, s.counts) for s in wave.stages[1:3]] == [
        ((0, 1, 2), (1, 20, 32)),
        ((0, 1), (1, 1)),
    ]
    assert [(c.id, a, b) for c, a, b in wave.stages[2].runs] == [(4, 0, 2)]


def test_a_tail_that_attends_to_nothing_has_no_keys_to_write():
    _, stages = stages_of([request(1, LOW, 9, 8), request(2, LOW, 20, 0)])
    assert stages == [(0, 3, slice(0, 21)), (3, 4, [0, 20]), (4, 5, [0, 20])]


def test_where_a_block_begins_with_attention_its_keys_are_of_that_block():
    own = [chain(i, [(0, 0, 4), (i, 4, 5), (9, 5, 6)], tail=4) for i in (1, 2)]
    wave = arrange(
        decide(
            [request(1, own[0], 20, 0), request(2, own[1], 9, 8)],
            max_rows=64,
            page=16,
            now=0,
            last_turn={},
        )
    )
    assert [(s.block, s.first, s.last, s.counts, s.written) for s in wave.stages] == [
        (0, 0, 4, (20, 1), False),
        (1, 4, 4, (20,), False),
        (1, 4, 5, (1,), True),
        (2, 4, 5, (1,), False),
        (9, 5, 6, (1, 1), False),
    ]


def test_all_rows_reach_the_tail_where_that_is_asked():
    _, stages = stages_of([request(1, TAIL, 20, 0)], whole=True)
    assert stages == [(0, 5, slice(0, 20)), (5, 6, slice(19, 20))]


def test_logprobs_of_a_prompt_want_every_row_of_it():
    scored = request(1, TAIL, 20, 0)
    scored.sampling = Sampling(prompt_logprobs=0)
    _, stages = stages_of([request(2, TAIL, 30, 0), scored])
    wanted = slice(29, 50)
    assert stages == [(0, 4, slice(0, 50)), (4, 4, slice(0, 50)), (4, 5, wanted), (5, 6, wanted)]


def test_a_chunk_inside_a_prompt_ends_below_the_tail():
    _, stages = stages_of([request(1, TAIL, 100, 0)])
    assert stages == [(0, 4, slice(0, 64)), (4, 4, slice(0, 64))]


def decoding(numbers):
    requests = [request(i, TAIL, 20, 19) for i in numbers]
    return {r.id: r for r in requests}


def test_a_wave_is_followed_by_its_like_while_the_same_requests_decode():
    running = decoding([1, 2])
    wave = arrange(decide(running.values(), max_rows=64, page=16, now=0, last_turn={}))
    for r in running.values():
        r.computed, r.length = r.length, r.length + 1
    after = follow(wave, running)
    assert [(s.request.id, s.span, s.count) for s in after.steps] == [
        (1, Span(0, 20, 21), 1),
        (2, Span(0, 20, 21), 1),
    ]
    assert (after.starts, after.stages) == (wave.starts, wave.stages)


@pytest.mark.parametrize("why", ["one more", "one less", "another", "a prompt"])
def test_a_wave_is_decided_anew_when_requests_change(why):
    running = decoding([1, 2])
    if why == "a prompt":
        running[2] = request(2, TAIL, 20, 10)
    wave = arrange(decide(running.values(), max_rows=64, page=16, now=0, last_turn={}))
    match why:
        case "one more":
            running |= decoding([3])
        case "one less":
            del running[1]
        case "another":
            running |= decoding([2])
    assert follow(wave, running) is None
