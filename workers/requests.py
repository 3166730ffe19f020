"""Live requests of a worker: their tokens, pages and what is left to compute.

A request waits until all pages it can ever need are free, takes them at once, then runs: `computed`
chases `length`, whether by prefill chunks or single tokens. Owned by the worker's loop; the batcher
reads it, the runner fills the pages, and only this file changes a request's state.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from workers.chains import ServedChain
from workers.memory import KvMemory
from workers.prefix import Column, Hit, Key, PrefixCache, extend_hashes
from workers.wire import RequestId, Sampling


class Span(NamedTuple):
    """Positions [first, last) that enter the chain at unit `depth`: 0, or a branch whose boundary
    activations the cache holds."""

    depth: int
    first: int
    last: int


@dataclass(eq=False, slots=True)
class Request:
    """One request. `tokens[:length]` are known; the array has room for all it may grow to. The
    chain's virtual tokens stand before the request's own, as -1, -2, ... `outputs` counts generated
    tokens, those of an earlier worker included. `found` positions came from the cache; where that
    is the whole prompt, the pages of the column `copied` are copied before the last position is
    computed anew. `spans` are what remains of the prompt. `own_from[p]` is the first attention
    layer of page column p that belongs to the request itself; the layers below belong to
    `held[p]`."""

    id: RequestId
    chain: ServedChain
    sampling: Sampling
    salt: int
    priority: int
    opened_at: float
    tokens: np.ndarray
    length: int
    outputs: int
    slot: int = -1
    computed: int = 0
    found: int = 0
    copied: Column | None = None
    spans: list[Span] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    held: dict[int, Column] = field(default_factory=dict)
    own_from: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    announced: deque[tuple[int, Key]] = field(default_factory=deque)
    boundaries: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that came from the client, those of an earlier worker's answer not counted."""
        return self.length - self.outputs - self.chain.virtual

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were found in the cache."""
        return max(0, self.found - self.chain.virtual)

    @property
    def is_prefilling(self) -> bool:
        """Whether a part of the prompt is still to be computed."""
        return bool(self.spans)

    @property
    def next_span(self) -> Span:
        """What the next step computes, at most."""
        return self.spans[0] if self.spans else Span(0, self.computed, self.length)

    def guess(self, tokens: np.ndarray) -> None:
        """Lay what may come next behind the known tokens."""
        self.tokens[self.length : self.length + len(tokens)] = tokens

    def is_guessed(self, token: int) -> bool:
        """Whether the next token, were it this one, is as it was guessed."""
        return bool(self.tokens[self.length] == token)


class Requests:
    """All requests of a worker, waiting and running."""

    def __init__(self, memory: KvMemory, cache: PrefixCache, *, use_prefixes: bool = True) -> None:
        self.waiting: list[Request] = []
        self.running: dict[RequestId, Request] = {}
        self._memory = memory
        self._cache = cache
        self._use_prefixes = use_prefixes
        self._announced: set[Key] = set()
        self.shared_pages = 0
        self.query_tokens = 0
        self.hit_tokens = 0

    def find(self, request: RequestId) -> Request | None:
        """A request that waits or runs."""
        running = self.running.get(request)
        return running or next((r for r in self.waiting if r.id == request), None)

    # ---- opening --------------------------------------------------------------------------------

    def open(self, request: Request) -> None:
        """Queue a request; a lower priority number goes first, then the order of arrival."""
        request.chain.users += 1
        if self._is_cached(request):
            tokens = request.tokens[: request.length]
            extend_hashes(request.hashes, tokens, self._memory.page, request.salt)
        index = len(self.waiting)
        while index and self.waiting[index - 1].priority > request.priority:
            index -= 1
        self.waiting.insert(index, request)

    def start(self) -> Iterator[Request]:
        """Start waiting requests whose pages are free, in order; one whose prompt is just being
        computed by another waits for it and lets those behind it pass. What a request copies must
        be copied before the next one is asked for."""
        for request in list(self.waiting):
            if not self._memory.free_slots:
                return
            hits = self._find_hits(request)
            if hits is None:
                continue
            taken = next(self._taken(request, hits), None)
            if taken is None:
                return
            self._plan_spans(request, taken)
            self._announce(request)
            self.waiting.remove(request)
            self.running[request.id] = request
            self.query_tokens += request.length - request.chain.virtual
            self.hit_tokens += request.cached_tokens
            try:
                yield request
            finally:
                if request.copied is not None:
                    self._cache.release(request.copied)
                    request.copied = None

    def _is_cached(self, request: Request) -> bool:
        """Whether its pages may come from or go to the prefix cache: logprobs of a prompt need
        every position computed."""
        return self._use_prefixes and request.sampling.prompt_logprobs < 0

    def _find_hits(self, request: Request) -> list[Hit] | None:
        """Cached columns for the leading pages of a prompt, or for all of it; its last token is
        computed nevertheless. None: a better hit is about to be there."""
        hits: list[Hit] = []
        depths = request.chain.index_depths()
        for digest in request.hashes[: request.length // self._memory.page]:
            hit = self._cache.find(depths, digest)
            known = len(depths) if hit is None else [d for _, d in depths].index(hit.depth)
            if any((lineage, digest) in self._announced for lineage, _ in depths[:known]):
                return None
            if hit is None:
                break
            hits.append(hit)
        if self._is_all(request, hits) and any(hit.depth is not None for hit in hits):
            hits.pop()
        return hits

    def _is_all(self, request: Request, hits: list[Hit]) -> bool:
        """Whether so many columns are the whole prompt."""
        return len(hits) * self._memory.page == request.length

    def _taken(self, request: Request, hits: list[Hit]) -> Iterator[list[Hit]]:
        """The ways to take a request's pages that there is room for, taken as they are asked for:
        with all its hits, which it holds; without that of which it shares nothing; with none, where
        no other request will free a page."""
        ways = [hits]
        if self._is_all(request, hits):
            ways.append(hits[:-1])
        if hits and not self.running:
            ways.append([])
        return (some for some in ways if self._take_pages(request, some))

    def _take_pages(self, request: Request, hits: list[Hit]) -> bool:
        """Take every page the request can need and lay out its table, or leave all as it was."""
        chain, memory = request.chain, self._memory
        columns = memory.pages(len(request.tokens))
        shares = hits[:-1] if self._is_all(request, hits) else hits
        own_from = np.zeros(columns, np.int32)
        own_from[: len(shares)] = [_layers_below(chain, hit.depth) for hit in shares]
        shared = int(own_from.sum())
        pool = memory.pool(chain.kv)
        for hit in hits:
            self._cache.acquire(hit.column)
        if not self._cache.make_room(pool, columns * chain.num_layers - shared):
            for hit in reversed(hits):
                self._cache.release(hit.column)
            return False
        request.slot, table = memory.take_slot(chain.num_layers, columns)
        for p, hit in enumerate(shares):
            hit.column.fill(table[: own_from[p], p])
            request.held[p] = hit.column
        request.copied = hits[-1].column if len(shares) < len(hits) else None
        table[_own(own_from, chain)] = pool.take(columns * chain.num_layers - shared)
        request.own_from = own_from
        self.shared_pages += shared
        return True

    def _plan_spans(self, request: Request, hits: list[Hit]) -> None:
        """Pages of which only the lower units were found are computed from there; the rest of the
        prompt from the bottom."""
        page = self._memory.page
        for p, hit in enumerate(hits):
            if hit.depth is None:
                continue
            last = request.spans[-1] if request.spans else None
            if last is not None and last.depth == hit.depth and last.last == p * page:
                request.spans[-1] = Span(hit.depth, last.first, (p + 1) * page)
            else:
                request.spans.append(Span(hit.depth, p * page, (p + 1) * page))
        request.found = min(len(hits) * page, request.length - 1)
        first = max(request.found, request.chain.seeded)
        request.spans.append(Span(0, first, request.length))
        request.computed = request.spans[0].first

    def _announce(self, request: Request) -> None:
        """Let others know which columns this request is about to compute."""
        depths = request.chain.index_depths()
        first = min(request.found, request.computed) // self._memory.page
        for p, digest in enumerate(request.hashes[first:], first):
            for lineage, _ in depths:
                key = (lineage, digest)
                if key not in self._announced and not self._cache.has(key):
                    self._announced.add(key)
                    request.announced.append((p, key))

    # ---- running --------------------------------------------------------------------------------

    def advance(self, request: Request, span: Span, count: int) -> None:
        """Take in that the first `count` positions of `span` have been computed."""
        end = span.first + count
        if request.spans:
            if end < span.last:
                request.spans[0] = Span(span.depth, end, span.last)
            else:
                del request.spans[0]
        request.computed = request.spans[0].first if request.spans else end
        # Given keys and values become full columns with the first that are computed after them.
        is_seeded = span.first == request.chain.seeded
        begin = min(request.found, span.first) if is_seeded else span.first
        first, last = begin // self._memory.page, end // self._memory.page
        if first < last and self._is_cached(request):
            self._publish(request, first, last)

    def append(self, request: Request, token: int) -> None:
        """Take in a generated token."""
        request.tokens[request.length] = token
        request.length += 1
        request.outputs += 1

    def _publish(self, request: Request, first: int, last: int) -> None:
        """Hand the full columns [first, last) to the cache, unless it has them."""
        chain, memory = request.chain, self._memory
        depths = chain.index_depths()
        layers = chain.num_layers
        table = memory.table(request.slot, layers, len(request.own_from))
        extend_hashes(
            request.hashes, request.tokens[: last * memory.page], memory.page, request.salt
        )
        for p in range(first, last):
            digest = request.hashes[p]
            lowest = int(request.own_from[p])
            if lowest == layers or self._cache.has((depths[0][0], digest)):
                continue
            column = Column(
                ids=table[lowest:, p].copy(),
                first_layer=lowest,
                below=request.held.get(p),
                boundaries=request.boundaries.pop(p, {}),
                pool=memory.pool(chain.kv),
                refs=1,
            )
            usable = [x for x, d in depths if d is None or d in column.boundaries]
            self._cache.publish(column, [(lineage, digest) for lineage in usable])
            request.held[p] = column
            request.own_from[p] = layers
        self._retract(request, last)

    def _retract(self, request: Request, last: int) -> None:
        """Withdraw the announcements of columns before `last`."""
        while request.announced and request.announced[0][0] < last:
            self._announced.discard(request.announced.popleft()[1])

    def keep_boundary(
        self, request: Request, column: int, depth: int, pages: int
    ) -> np.ndarray | None:
        """Pages for the activations of one page column at a branch; None if memory is short."""
        pool = self._memory.pool(request.chain.kv)
        if not self._is_cached(request) or pool.missing(pages):
            return None
        ids = pool.take(pages)
        request.boundaries.setdefault(column, {})[depth] = ids
        return ids

    # ---- ending ---------------------------------------------------------------------------------

    def close(self, request: Request) -> None:
        """End a request: its pages return at once; columns in the cache stay for others."""
        request.chain.users -= 1
        if request.slot < 0:
            self.waiting.remove(request)
            return
        chain, memory = request.chain, self._memory
        del self.running[request.id]
        self._retract(request, len(request.hashes))
        pool = memory.pool(chain.kv)
        table = memory.table(request.slot, chain.num_layers, len(request.own_from))
        pool.free(table[_own(request.own_from, chain)])
        for kept in request.boundaries.values():
            for ids in kept.values():
                pool.free(ids)
        # Later columns are released first, so that they are also evicted first.
        for p in sorted(request.held, reverse=True):
            self._cache.release(request.held[p])
        memory.give_slot(request.slot)


def laid_out(chain: ServedChain, tokens: Sequence[int] | np.ndarray, room: int) -> np.ndarray:
    """A request's token array: the chain's virtual tokens, its own, and room for `room` in all."""
    array = np.zeros(chain.virtual + room, np.int32)
    array[: chain.virtual] = -1 - np.arange(chain.virtual)
    array[chain.virtual : chain.virtual + len(tokens)] = tokens
    return array


def _layers_below(chain: ServedChain, depth: int | None) -> int:
    return chain.num_layers if depth is None else chain.layers[depth]


def _own(own_from: np.ndarray, chain: ServedChain) -> np.ndarray:
    """Mask [layers, columns] of the pages that are a request's own."""
    return np.arange(chain.num_layers)[:, None] >= own_from[None, :]
