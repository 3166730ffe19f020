"""Which steps run next, and in which order blocks take them: pure decisions.

`decide` picks the steps of one wave: tokens of running requests first, then prompts, deepest entry
first, the longest waiting before the newest, within a budget of rows and each block's own limit.
`arrange` orders the wave: a block runs once for all rows that pass it, and waits for siblings that
are still on their way to it (variants that part and meet again share both ends). `follow` repeats a
wave while nothing but tokens changes. Called by the worker's loop; no clock, no I/O, no weights."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise

import msgspec
import numpy as np

from workers.chains import ServedChain
from workers.requests import Request, Span
from workers.wire import RequestId

AGE_S = 5.0
Group = tuple[object, ...]
Piece = tuple[int, int, int]
Members = tuple[tuple[int, ...], tuple[int, ...]]


class Step(msgspec.Struct, frozen=True, gc=False):
    """The next `count` positions of a request, entering its chain at `span.depth`; at the last
    `guesses` of them stand tokens that were guessed."""

    request: Request
    span: Span
    count: int
    guesses: int = 0

    @property
    def end(self) -> int:
        return self.span.first + self.count

    @property
    def wanted(self) -> range:
        """Its positions whose logits are wanted, counted from its first: those of the newest token
        and of guesses, or for logprobs of the prompt all but virtual ones."""
        if self.request.sampling.prompt_logprobs >= 0 and self.request.is_prefilling:
            virtual = self.request.chain.virtual - self.span.first
            return range(min(max(0, virtual), self.count), self.count)
        newest = self.request.length - 1 - self.span.first
        return range(min(newest, self.count), self.count)


@dataclass(frozen=True, slots=True)
class Stage:
    """Units [first, last) run for steps [steps of the wave by index] over `rows`: a slice where
    they lie together, else row numbers. These are all rows of the steps, `counts` of each, or in
    the tail of their chain those whose logits are wanted. `runs` are (chain, first row, last row)
    within them.

    Where a tail begins with attention, a stage of no units goes before it, in which that writes the
    keys and values of all rows; the next finds them `written`."""

    block: int
    first: int
    last: int
    steps: tuple[int, ...]
    counts: tuple[int, ...]
    rows: slice | np.ndarray
    runs: tuple[tuple[ServedChain, int, int], ...]
    written: bool = False

    @property
    def members(self) -> Members:
        """Its steps, and how many rows of each."""
        return self.steps, self.counts

    @property
    def writes(self) -> bool:
        """Whether it writes keys and values, and does nothing else."""
        return self.first == self.last


@dataclass(frozen=True, slots=True)
class Wave:
    """One advance of many requests: steps in row order, rows [starts[i], starts[i + 1]) each, and
    the stages that carry them through their chains. `wanted` are the rows of each step, counted
    from its first, whose logits somebody wants; it `decodes` where every step is a token behind a
    whole prompt, with guesses behind it or none."""

    steps: tuple[Step, ...]
    starts: np.ndarray
    wanted: tuple[range, ...]
    decodes: bool
    stages: tuple[Stage, ...]

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    @property
    def is_bare(self) -> bool:
        """Whether each step is one token behind a whole prompt, and nothing is guessed."""
        return self.decodes and self.num_rows == len(self.steps)


def decide(
    running: Iterable[Request],
    *,
    max_rows: int,
    page: int,
    now: float,
    last_turn: Mapping[Group, int],
    guesses: Mapping[RequestId, int] | None = None,
) -> list[Step]:
    """Steps of the next wave. Chains of different widths cannot share one: the group whose last
    turn (`last_turn`, a growing number) is longest ago goes first. `guesses` says how many tokens
    were guessed of whom."""
    budget = _Budget(max_rows)
    steps: list[Step] = []
    prompts: list[Request] = []
    for request in next_group(running, last_turn):
        if request.is_prefilling:
            prompts.append(request)
            continue
        guessed = 0 if guesses is None else guesses.get(request.id, 0)
        if guessed and budget.take(request.chain, 0, 1 + guessed):
            steps.append(Step(request, request.next_span, 1 + guessed, guessed))
        elif budget.take(request.chain, 0, 1):
            steps.append(Step(request, request.next_span, 1))
    prompts.sort(key=lambda r: _urgency(r, now))
    for request in prompts:
        span = request.next_span
        wanted = span.last - span.first
        room = budget.room(request.chain, span.depth)
        count = wanted if wanted <= room else room - (span.first + room) % page
        if count > 0 and budget.take(request.chain, span.depth, count):
            steps.append(Step(request, span, count))
    return steps


def next_group(running: Iterable[Request], last_turn: Mapping[Group, int]) -> list[Request]:
    """The requests whose turn it is; see `decide`."""
    groups: dict[Group, list[Request]] = {}
    for request in running:
        groups.setdefault(request.chain.group, []).append(request)
    return groups[min(groups, key=lambda g: last_turn.get(g, -1))] if groups else []


def _urgency(request: Request, now: float) -> tuple[float, int, float]:
    """Smaller goes first: priority, lowered by one for every AGE_S of waiting; depth; arrival."""
    aged = request.priority - (now - request.opened_at) // AGE_S
    return (aged, -request.next_span.depth, request.opened_at)


class _Budget:
    """Rows still free in a wave, in all and per block."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._used: dict[int, int] = {}

    def room(self, chain: ServedChain, depth: int) -> int:
        free = [b.limit - self._used.get(b.key, 0) for b in chain.blocks if b.last > depth]
        return min(self._rows, *free)

    def take(self, chain: ServedChain, depth: int, count: int) -> bool:
        if count > self.room(chain, depth):
            return False
        self._rows -= count
        for block in chain.blocks:
            if block.last > depth:
                self._used[block.key] = self._used.get(block.key, 0) + count
        return True


def arrange(steps: Sequence[Step], cuts: Sequence[int] = (), *, whole: bool = False) -> Wave:
    """Put steps in an order that keeps rows of a block together and lay out the stages; none passes
    over a depth in `cuts`. If `whole`, all rows pass everything but the head."""
    paths_of = {s.request.chain.id: s.request.chain.path for s in steps}
    ordered = sorted(
        steps, key=lambda s: (paths_of[s.request.chain.id], s.request.chain.id, s.span.depth)
    )
    counts = np.fromiter((s.count for s in ordered), np.int64, len(ordered))
    starts = np.zeros(len(ordered) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    runs = _runs(ordered)
    wanted = tuple(step.wanted for step in ordered)
    bounds = {*cuts, *_cuts(ordered)}
    tails: set[tuple[int, int]] = set()
    if not whole:
        unwanted = (s for s, own in zip(ordered, wanted, strict=True) if len(own) < s.count)
        tails = {(b.key, s.request.chain.tail) for s in unwanted for b in s.request.chain.blocks}
    paths = [_pieces(ordered[first], bounds, tails) for first, _ in runs]
    decodes = all(
        s.count == 1 + s.guesses and not s.span.depth and not s.request.is_prefilling
        for s in ordered
    )
    wave = Wave(tuple(ordered), starts, wanted, decodes, ())
    made = [
        (piece, _stage(piece, [runs[i] for i in members], wave, whole=whole))
        for piece, members in schedule(paths)
    ]
    written = {piece[:2] for piece, stage in made if stage.writes}
    stages = (replace(s, written=True) if p[:2] in written and not s.writes else s for p, s in made)
    return replace(wave, stages=tuple(stage for stage in stages if stage.runs))


def follow(wave: Wave, running: Mapping[RequestId, Request]) -> Wave | None:
    """The wave behind one that decodes, where the same requests and no others go on: arranged as it
    was. None: there is something to decide. Chains must be cut as they were."""
    if not wave.is_bare or len(running) != len(wave.steps):
        return None
    requests = [step.request for step in wave.steps]
    if [running.get(request.id) for request in requests] != requests:
        return None
    steps = [Step(r, Span(0, r.computed, r.length), 1) for r in requests]
    return Wave(tuple(steps), wave.starts, wave.wanted, True, wave.stages)


def schedule(paths: Sequence[Sequence[Piece]]) -> list[tuple[Piece, list[int]]]:
    """Merge paths into one order of pieces, each with the paths that pass it then.

    A piece runs when no other path will still reach it; of several that could, the one earliest in
    the chains. Paths that pass two pieces in opposite orders cannot both wait: the piece that most
    paths stand at goes first.
    """
    at = [0] * len(paths)
    order: list[tuple[Piece, list[int]]] = []
    while standing := _standing(paths, at):
        ready = [
            piece
            for piece, members in standing.items()
            if not any(piece in path[at[i] :] for i, path in enumerate(paths) if i not in members)
        ]
        if ready:
            piece = min(ready, key=lambda p: (p[1], p[0]))
        else:
            piece = max(standing, key=lambda p: (len(standing[p]), -p[1]))
        members = standing[piece]
        for i in members:
            at[i] += 1
        order.append((piece, members))
    return order


def _standing(paths: Sequence[Sequence[Piece]], at: Sequence[int]) -> dict[Piece, list[int]]:
    standing: dict[Piece, list[int]] = {}
    for i, path in enumerate(paths):
        if at[i] < len(path):
            standing.setdefault(path[at[i]], []).append(i)
    return standing


def _runs(steps: Sequence[Step]) -> list[tuple[int, int]]:
    """Ranges of consecutive steps of one chain that enter at one depth."""
    runs: list[tuple[int, int]] = []
    for i, step in enumerate(steps):
        before = steps[i - 1]
        alike = before.request.chain is step.request.chain and before.span.depth == step.span.depth
        if i and alike:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def _cuts(steps: Sequence[Step]) -> set[int]:
    """Depths within blocks where a stage must end: entries, and branches that prompts pass, whose
    activations are kept there."""
    cuts = {s.span.depth for s in steps}
    cuts.update(d for s in steps if s.request.is_prefilling for d in s.request.chain.branches)
    return cuts


def _pieces(step: Step, cuts: Set[int], tails: Set[tuple[int, int]]) -> list[Piece]:
    """What a step runs through: (block, first unit, last unit); the head unit stands alone. `cuts`
    are depths at which every block is cut, `tails` such of certain blocks, where attention is two
    pieces: see `Stage`."""
    chain, depth = step.request.chain, step.span.depth
    bounds = {*cuts, len(chain.units) - 1}
    pieces: list[Piece] = []
    for block in chain.blocks:
        inside = range(block.first + 1, block.last)
        inner = [d for d in inside if d in bounds or (block.key, d) in tails]
        for first, last in zip([block.first, *inner], [*inner, block.last], strict=True):
            if first < depth:
                continue
            if (block.key, first) in tails and chain.layers[first] < chain.layers[first + 1]:
                pieces.append((block.key, first, first))
            pieces.append((block.key, first, last))
    return pieces


def _stage(piece: Piece, runs: list[tuple[int, int]], wave: Wave, *, whole: bool) -> Stage:
    _, first_unit, last_unit = piece
    members: list[int] = []
    counts: list[int] = []
    chains: list[tuple[ServedChain, int, int]] = []
    ranges: list[range] = []
    row = 0
    for first, last in runs:
        chain = wave.steps[first].request.chain
        above = first_unit >= (len(chain.units) - 1 if whole else chain.tail)
        narrow = above and first_unit < last_unit
        before = row
        for i in range(first, last):
            begin, own = int(wave.starts[i]), wave.wanted[i]
            rows = (
                range(begin + own.start, begin + own.stop)
                if narrow
                else range(begin, int(wave.starts[i + 1]))
            )
            if rows:
                members.append(i)
                counts.append(len(rows))
                ranges.append(rows)
                row += len(rows)
        if row == before:
            continue
        if chains and chains[-1][0] is chain:
            chains[-1] = (chain, chains[-1][1], row)
        else:
            chains.append((chain, before, row))
    return Stage(*piece, tuple(members), tuple(counts), _together(ranges), tuple(chains))


def _together(ranges: Sequence[range]) -> slice | np.ndarray:
    """Row numbers, as a slice where they lie together."""
    if not ranges:
        return slice(0, 0)
    if all(a.stop == b.start for a, b in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    return np.concatenate([np.arange(r.start, r.stop) for r in ranges])
