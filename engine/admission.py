"""Pure: who may wait, and who goes next. No clock and no I/O; time comes as an argument.

Between tenants the one that was served fewest tokens goes first (the virtual token counter of
"Fairness in Serving Large Language Models", OSDI 2024: answer tokens weigh twice a prompt's).
Within a tenant the lowest priority number goes first, then the oldest. So no tenant's number of
requests, nor its priorities, delay another tenant's.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from workers.wire import ChainId, RequestId

PROMPT_WEIGHT = 1
ANSWER_WEIGHT = 2
SMOOTHING = 0.1
# Places of cancelled requests that a lane may hold before it is made anew.
SLACK = 64


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request's place in the queue."""

    request: RequestId
    tenant: str
    chain: ChainId
    prompt_tokens: int
    priority: int = 0


# Requests are numbered in the order of their arrival, so equal priorities go oldest first.
Place = tuple[int, RequestId]


@dataclass(slots=True)
class Tenant:
    """What one tenant has waiting, by chain, and what it was served."""

    served: float = 0.0
    waiting: dict[RequestId, Ticket] = field(default_factory=dict)
    lanes: dict[ChainId, list[Place]] = field(default_factory=dict)


class Admission:
    """The bounded, fair queue of requests that no worker has yet."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tenants: dict[str, Tenant] = {}
        self._owners: dict[RequestId, str] = {}
        self._last_take: float | None = None
        self._interval_s = 1.0

    def __len__(self) -> int:
        return len(self._owners)

    def admit(self, ticket: Ticket) -> Ticket | None:
        """Let a request wait. Returns the ticket that must be refused because the queue is full:
        this one, or the latest of a tenant that holds more of the queue than this one does."""
        refused = self._displaced_by(ticket) if len(self) >= self.limit else None
        if refused is ticket:
            return ticket
        if refused is not None:
            self.remove(refused.request)
        self.put_back(ticket)
        return refused

    def put_back(self, ticket: Ticket) -> None:
        """Let a request wait (again), whatever the limit: it had been admitted before."""
        tenant = self._tenants.setdefault(ticket.tenant, Tenant())
        if not tenant.waiting:
            # An idle tenant must not have saved up a claim on everyone else's time.
            busy = [other.served for other in self._tenants.values() if other.waiting]
            tenant.served = max(tenant.served, min(busy, default=0.0))
        tenant.waiting[ticket.request] = ticket
        lane = tenant.lanes.setdefault(ticket.chain, [])
        heapq.heappush(lane, (ticket.priority, ticket.request))
        self._owners[ticket.request] = ticket.tenant

    def take(self, can_serve: Callable[[ChainId], bool], now: float) -> Ticket | None:
        """Take out the request that goes next among those whose chain can be served."""
        waiting = [tenant for tenant in self._tenants.values() if tenant.waiting]
        for tenant in sorted(waiting, key=lambda tenant: tenant.served):
            heads = [
                lane[0]
                for chain, lane in tenant.lanes.items()
                if _trim(lane, tenant.waiting) and can_serve(chain)
            ]
            if heads:
                ticket = tenant.waiting[min(heads)[1]]
                self.remove(ticket.request)
                tenant.served += PROMPT_WEIGHT * ticket.prompt_tokens
                self._note_take(now)
                return ticket
        return None

    def remove(self, request: RequestId) -> bool:
        """Take a request out of the queue; False if it does not wait there."""
        owner = self._owners.pop(request, None)
        if owner is None:
            return False
        tenant = self._tenants[owner]
        ticket = tenant.waiting.pop(request)
        lane = tenant.lanes[ticket.chain]
        if not _trim(lane, tenant.waiting):
            del tenant.lanes[ticket.chain]
        elif len(lane) > 2 * len(tenant.waiting) + SLACK:
            lane[:] = sorted(place for place in lane if place[1] in tenant.waiting)
        return True

    def charge(self, tenant: str, answer_tokens: int) -> None:
        """Count tokens that a tenant was given."""
        account = self._tenants.get(tenant)
        if account is not None:
            account.served += ANSWER_WEIGHT * answer_tokens

    def retry_after_s(self) -> float:
        """How long the present queue takes at the recent pace, between 1 and 60 seconds."""
        return min(max(len(self) * self._interval_s, 1.0), 60.0)

    def _displaced_by(self, ticket: Ticket) -> Ticket:
        longest = max(self._tenants.values(), key=lambda tenant: len(tenant.waiting))
        mine = self._tenants.get(ticket.tenant, Tenant())
        if len(mine.waiting) + 1 >= len(longest.waiting):
            return ticket
        return max(longest.waiting.values(), key=lambda other: (other.priority, other.request))

    def _note_take(self, now: float) -> None:
        if self._last_take is not None:
            elapsed = min(now - self._last_take, 60.0)
            self._interval_s += SMOOTHING * (elapsed - self._interval_s)
        self._last_take = now


def _trim(lane: list[Place], waiting: dict[RequestId, Ticket]) -> bool:
    """Drop places of requests that left the queue otherwise; whether any place is left."""
    while lane and lane[0][1] not in waiting:
        heapq.heappop(lane)
    return bool(lane)
