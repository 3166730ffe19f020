"""Who may wait and who goes next."""

import pytest

from engine.admission import Admission, Ticket
from workers.wire import ChainId, RequestId


def ticket(number: int, tenant: str = "a", **fields: int) -> Ticket:
    return Ticket(
        RequestId(number),
        tenant,
        ChainId(fields.get("chain", 1)),
        fields.get("tokens", 10),
        fields.get("priority", 0),
    )


def queue(*tickets: Ticket, limit: int = 100) -> Admission:
    admission = Admission(limit)
    for each in tickets:
        assert admission.admit(each) is None
    return admission


def order(admission: Admission, serves: set[int] | None = None) -> list[int]:
    """The numbers in the order in which they are taken."""
    taken: list[int] = []
    while (
        found := admission.take(lambda chain: serves is None or chain in serves, 0.0)
    ) is not None:
        taken.append(found.request)
    return taken


def test_oldest_goes_first() -> None:
    assert order(queue(ticket(1), ticket(2), ticket(3))) == [1, 2, 3]


def test_lowest_priority_number_goes_first_then_the_oldest() -> None:
    admission = queue(ticket(1, priority=5), ticket(2), ticket(3, priority=-1), ticket(4))
    assert order(admission) == [3, 2, 4, 1]


def test_a_chain_that_is_not_loaded_holds_up_nobody() -> None:
    admission = queue(ticket(1, chain=1), ticket(2, chain=2), ticket(3, chain=1))
    assert order(admission, serves={2}) == [2]
    assert order(admission, serves={1, 2}) == [1, 3]


def test_tenants_take_turns_by_tokens_served() -> None:
    # a's first prompt is as long as two of b's: b goes twice before a goes again.
    admission = queue(
        ticket(1, "a", tokens=20),
        ticket(2, "a", tokens=20),
        ticket(3, "b", tokens=11),
        ticket(4, "b", tokens=11),
        ticket(5, "b", tokens=11),
    )
    assert order(admission) == [1, 3, 4, 2, 5]


def test_priority_does_not_reach_over_tenants() -> None:
    admission = queue(ticket(1, "a", priority=-100), ticket(2, "a", priority=-100), ticket(3, "b"))
    assert order(admission) == [1, 3, 2]


def test_answers_count_twice() -> None:
    admission = queue(ticket(1, "a", tokens=1), ticket(2, "b", tokens=10))
    admission.take(lambda _: True, 0.0)
    admission.charge("a", 50)
    admission.put_back(ticket(3, "a"))
    admission.put_back(ticket(4, "b"))
    assert order(admission) == [2, 4, 3]


def test_who_was_idle_has_saved_nothing_up() -> None:
    admission = queue(ticket(1, "a"))
    order(admission)
    admission.charge("a", 1_000_000)
    admission.put_back(ticket(2, "a", tokens=1))
    admission.put_back(ticket(3, "b", tokens=1))
    admission.put_back(ticket(4, "b", tokens=1))
    # b begins where a stands, so both take turns from now on.
    assert order(admission) == [2, 3, 4]


def test_full_queue_refuses_the_newcomer_of_a_single_tenant() -> None:
    admission = queue(ticket(1), ticket(2), limit=2)
    newcomer = ticket(3)
    assert admission.admit(newcomer) is newcomer
    assert len(admission) == 2


def test_full_queue_turns_away_the_latest_of_the_tenant_with_most() -> None:
    admission = queue(ticket(1), ticket(2, priority=9), ticket(3), limit=3)
    refused = admission.admit(ticket(4, "b"))
    assert refused is not None
    assert refused.request == 2
    assert sorted(order(admission)) == [1, 3, 4]


def test_put_back_ignores_the_limit_and_keeps_its_turn() -> None:
    admission = queue(ticket(5), ticket(6), limit=2)
    admission.put_back(ticket(1))
    assert order(admission) == [1, 5, 6]


def test_removed_requests_are_not_taken_and_leave_nothing() -> None:
    admission = queue(*(ticket(n) for n in range(1, 1001)), limit=1000)
    for number in range(2, 1001):
        assert admission.remove(RequestId(number))
    assert not admission.remove(RequestId(2))
    assert len(admission) == 1
    assert sum(len(lane) for t in admission._tenants.values() for lane in t.lanes.values()) < 100
    assert order(admission) == [1]


@pytest.mark.parametrize(("pace_s", "low", "high"), [(0.001, 1.0, 1.0), (0.5, 4.0, 7.0)])
def test_advice_follows_the_pace(pace_s: float, low: float, high: float) -> None:
    admission = Admission(1000)
    for number in range(200):
        admission.admit(ticket(number))
    for number in range(190):
        admission.take(lambda _: True, number * pace_s)
    assert low <= admission.retry_after_s() <= high
