"""The slots of a link, as each end keeps them: who may write, what has arrived, what is free again.

One protocol for every way of moving bytes: the outlet takes a free slot, fills it and announces
(slot, sequence); the inlet uses it and gives it back with a credit that repeats both. Pure state
machines: whatever breaks the order is refused by name, since silence would be wrong activations.
"""


class OutOfStep(Exception):
    """The two ends of a link disagree on a slot; the message says how."""


class Outgoing:
    """The sending end: which of `count` slots are free, and what is under way in the others."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._under_way: dict[int, int] = {}
        self._next = 0

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free)

    @property
    def under_way(self) -> int:
        """Slots that the other end has not given back."""
        return len(self._under_way)

    def take(self) -> tuple[int, int] | None:
        """A free slot and its sequence number, or None while the other end holds all."""
        if not self._free:
            return None
        slot, sequence = self._free.pop(), self._next
        self._under_way[slot] = sequence
        self._next += 1
        return slot, sequence

    def credit(self, slot: int, sequence: int) -> None:
        """Take a slot back. Raises OutOfStep unless it is under way with that number."""
        if self._under_way.get(slot) != sequence:
            raise OutOfStep(
                f"slot {slot} was given back for message {sequence}, but "
                f"{self._under_way.get(slot, 'nothing')} is under way in it"
            )
        del self._under_way[slot]
        self._free.append(slot)


class Incoming:
    """The receiving end: what has arrived in which of `count` slots and is still in use."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._held: dict[int, int] = {}
        self._next = 0

    @property
    def held(self) -> int:
        """Slots that have arrived and were not released."""
        return len(self._held)

    def arrive(self, slot: int, sequence: int) -> None:
        """Note an announcement. Raises OutOfStep if it is not the next or the slot is in use."""
        if not 0 <= slot < self._count:
            raise OutOfStep(f"slot {slot} was announced, and the link has {self._count}")
        if sequence != self._next:
            raise OutOfStep(f"message {sequence} was announced, and {self._next} is next")
        if slot in self._held:
            raise OutOfStep(f"slot {slot} was announced again before it was given back")
        self._held[slot] = sequence
        self._next += 1

    def release(self, slot: int) -> tuple[int, int]:
        """Be done with a slot: what to send as its credit. Raises OutOfStep if it is not held."""
        if slot not in self._held:
            raise OutOfStep(f"slot {slot} was released, and nothing is in it")
        return slot, self._held.pop(slot)
