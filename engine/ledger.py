"""Whose request is whose: a client's own ids and the engine's numbers."""

from workers.wire import RequestId


class Ledger:
    """Every request that is being prepared, waits or runs, under both of its names."""

    def __init__(self) -> None:
        self._by_client: dict[bytes, dict[int, RequestId]] = {}
        self._owners: dict[RequestId, tuple[bytes, int]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, number: RequestId) -> bool:
        return number in self._owners

    def add(self, client: bytes, name: int, number: RequestId) -> None:
        """Enter a request; `find` must have said that the client's id is free."""
        self._by_client.setdefault(client, {})[name] = number
        self._owners[number] = (client, name)

    def find(self, client: bytes, name: int) -> RequestId | None:
        """The number of a client's request."""
        return self._by_client.get(client, {}).get(name)

    def of(self, client: bytes) -> list[RequestId]:
        """All requests of a client."""
        return list(self._by_client.get(client, {}).values())

    def remove(self, number: RequestId) -> None:
        """Strike a request out; its id may be used again."""
        client, name = self._owners.pop(number)
        mine = self._by_client[client]
        del mine[name]
        if not mine:
            del self._by_client[client]
