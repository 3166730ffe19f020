"""A wave on its way through its stages: its activations, the plans made for it, what it leaves."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ext.ops import Cache, Plan
from ext.replays import Relay
from workers.batcher import Members, Stage, Step, Wave
from workers.chains import ServedChain


@dataclass(eq=False, slots=True)
class Logits:
    """What a wave leaves of some rows: row i belongs to step `steps[i]` at position `positions[i]`.
    `data` are logits [n, vocabulary], float32 on the device, where rows of narrower variants end in
    -inf; or None, where only the likeliest tokens are wanted: `best`, int64 [n], which lie there
    until the next wave."""

    data: Tensor | None
    steps: Sequence[Step]
    positions: Sequence[int]
    best: Tensor | None = None


@dataclass(eq=False, slots=True)
class Running:
    """A wave on its way: activations by the width of the stream, a row for each of the wave's, the
    plans made so far, logits collected. If it is `greedy`, the likeliest tokens are all that is
    wanted. While only captured steps have run, `relay` has noted them, those of the stages `begins`
    over tokens, those of `heads` for the best of each row; `tails` are other heads."""

    wave: Wave
    greedy: bool
    chain: ServedChain
    cache: Cache
    device: torch.device
    streams: dict[int, Tensor] = field(default_factory=dict)
    plans: dict[Members, Plan] = field(default_factory=dict)
    logits: list[Logits] = field(default_factory=list)
    relay: Relay | None = None
    begins: list[Stage] = field(default_factory=list)
    heads: list[Stage] = field(default_factory=list)
    tails: list[Stage] = field(default_factory=list)
    ends: list[int] = field(init=False)  # behind the last position of each step

    def __post_init__(self) -> None:
        self.ends = [step.end for step in self.wave.steps]

    def x(self, width: int) -> Tensor:
        """The stream of that width [rows, width]."""
        if width not in self.streams:
            self.streams[width] = torch.empty(self.wave.num_rows, width, device=self.device)
        return self.streams[width]

    def wanted(self, stage: Stage) -> tuple[Sequence[Step], Sequence[int]]:
        """The step and the position of each row of a stage whose logits somebody wants."""
        wave = self.wave
        if wave.is_bare and len(stage.steps) == len(wave.steps):
            return wave.steps, [end - 1 for end in self.ends]
        steps: list[Step] = []
        positions: list[int] = []
        for i in stage.steps:
            step, wanted = wave.steps[i], wave.wanted[i]
            steps += [step] * len(wanted)
            positions += [step.span.first + row for row in wanted]
        return steps, positions
