"""Cells played in turns: every arrangement of a cell once, then all again (A B A B), so that what
is compared ran side by side.

All arrangements of a group are started first and idle while another one plays. A cell is repeated
until each has played it `LEAST` times, and more often, up to `MOST`, while it has taken less than
`ENOUGH_S` seconds; who needs over `SLOW_S` for it plays it once.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec

from bench.job import Job, Outcome
from bench.load import LoadFailed
from bench.machine import Busy
from bench.memory import footprints
from bench.peers.cells import CELLS, Cell, Play, job_of
from bench.peers.peer import Arrangement, PeerMissing, Playing

LEAST, MOST, ENOUGH_S, SLOW_S = 2, 6, 60.0, 45.0
_WARM_TOKENS = 16
_OTHER_PROMPTS = 500


class Turn(msgspec.Struct, frozen=True):
    """One arrangement's play of one cell. `memory_bytes` counts a page that several processes share
    once, `rss_bytes` once for each; `spent` is what the worker's clocks counted meanwhile."""

    outcome: Outcome
    memory_bytes: int
    rss_bytes: int
    others: float
    spent: dict[str, float]


@dataclass(slots=True)
class Row:
    """An arrangement in a cell: its turns, and why it played no more."""

    arrangement: Arrangement
    start_s: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    trouble: str = ""

    @property
    def is_slow(self) -> bool:
        """Whether one turn must do."""
        return bool(self.turns) and self.turns[0].outcome.seconds > SLOW_S


@dataclass(frozen=True, slots=True)
class Rounds:
    """Plays groups. `play` settles the loads, `say` shows progress."""

    play: Play
    say: Callable[[str], None]

    def group(
        self, arrangements: Sequence[Arrangement], wanted: Sequence[str]
    ) -> Iterator[tuple[Cell, list[Row]]]:
        """The cells of one group as they are done. What does not start is left out, with a word."""
        with ExitStack() as stack:
            playing = self._start(arrangements, stack)
            for key in wanted:
                rows = [
                    Row(arrangement, playing[id(arrangement.start)].start_s)
                    for arrangement in arrangements
                    if key in arrangement.cells and id(arrangement.start) in playing
                ]
                if rows:
                    self._cell(CELLS[key], rows, playing)
                    yield CELLS[key], rows

    def _start(self, arrangements: Sequence[Arrangement], stack: ExitStack) -> dict[int, Playing]:
        """What could be started, by the identity of its `start`."""
        playing: dict[int, Playing] = {}
        firsts: dict[int, Arrangement] = {}
        for arrangement in arrangements:
            firsts.setdefault(id(arrangement.start), arrangement)
        for arrangement in firsts.values():
            self.say(f"peers: starting {arrangement.name}")
            try:
                one = stack.enter_context(arrangement.start())
                self._warm_up(arrangement, one)
            except (PeerMissing, LoadFailed) as error:
                self.say(f"peers: without {arrangement.name}: {error}")
                continue
            playing[id(arrangement.start)] = one
        return playing

    def _warm_up(self, arrangement: Arrangement, playing: Playing) -> None:
        """A short load over all its models."""
        models = arrangement.models or CELLS[arrangement.cells[0]].models
        job = Job(
            models=models,
            requests=len(models),
            streams=len(models),
            prompt_tokens=(_WARM_TOKENS, _WARM_TOKENS),
            output_tokens=(2, 2),
            vocabulary=self.play.vocabulary,
            seed=-1,
        )
        playing.play(job)

    def _cell(self, cell: Cell, rows: list[Row], playing: dict[int, Playing]) -> None:
        least, most = (1, 1) if self.play.quick or cell.traced else (LEAST, MOST)
        began = time.monotonic()
        for number in range(most):
            if number >= least and time.monotonic() - began > ENOUGH_S:
                break
            for row in rows:
                if not row.trouble and not row.is_slow:
                    self._take(cell, row, playing, number)

    def _take(self, cell: Cell, row: Row, playing: dict[int, Playing], number: int) -> None:
        name = row.arrangement.name
        try:
            turn = self._turn(cell, row.arrangement, playing, number)
        except (PeerMissing, LoadFailed) as error:
            row.trouble = str(error)
            self.say(f"peers: {name} failed: {error}")
            return
        row.turns.append(turn)
        value = f"{cell.value(turn.outcome):.1f} {cell.unit}"
        self.say(f"peers: {cell.name}, round {number + 1}: {name}: {value}")

    def _turn(
        self, cell: Cell, arrangement: Arrangement, playing: dict[int, Playing], number: int
    ) -> Turn:
        one = playing[id(arrangement.start)]
        seed = 1000 * number + len(cell.name) + _OTHER_PROMPTS * arrangement.own_prompts
        job = job_of(cell, self.play, seed)
        if arrangement.models:
            job = msgspec.structs.replace(job, models=arrangement.models)
        if cell.primed:
            one.play(job)
        before = one.spent()
        busy = Busy(one.pids)
        outcome = one.play(job)
        others = busy.others(outcome.cpu_s)
        spent = Counter(one.spent())
        spent.subtract(before)
        return Turn(outcome, *_memory(one.pids), others, dict(spent))


def _memory(pids: Sequence[int]) -> tuple[int, int]:
    """Of all processes together: their shares of shared pages (PSS), and what each has (RSS)."""
    found = {one.pid: one for pid in pids for one in footprints(pid)}.values()
    return sum(one.pss_bytes for one in found), sum(one.rss_bytes for one in found)
