"""A training that can be killed and goes on: seeded batches, AdamW, and a checkpoint in a folder.

The order of batches follows from the seed and the step alone, so a training that was interrupted
ends in the same weights as one that was not. Owned by `zoo.derived.surrogate` and
`zoo.derived.stitch`.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.errors import DiskFull, StoreFailure
from zoo.progress import Progress
from zoo.store import NO_ROOM

_CLIP_NORM = 1.0
_WARM_UP = 0.05
_FINAL_SHARE = 0.05
_SAVE_EVERY_S = 60.0
_STATE = "training.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")

Loss = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Course:
    """`steps` batches of `batch` chunks; the rate rises briefly to `rate` and falls to a twentieth.
    A checkpoint is written every `save_every_s` seconds."""

    steps: int
    batch: int
    rate: float
    seed: int = 0
    save_every_s: float = _SAVE_EVERY_S


class Training:
    """Trains `tensors` in place; what it has done lies in `folder` until `finish`."""

    def __init__(self, tensors: Mapping[str, Tensor], course: Course, folder: Path) -> None:
        self._tensors = dict(tensors)
        self._course = course
        self._folder = folder
        self._optimizer = torch.optim.AdamW(
            list(self._tensors.values()), lr=course.rate, weight_decay=0.0
        )
        self.losses: list[float] = []

    def run(self, chunks: Tensor, loss: Loss, label: str, progress: Progress) -> None:
        """Go from where the folder says to the last step; `loss` gets a batch and its step."""
        done = self._restore()
        if done:
            progress.say(f"{label}: going on after {done} of {self._course.steps} steps")
        saved = time.monotonic()
        for step in progress.track(range(done, self._course.steps), label):
            self._step(loss(pick(chunks, self._course, step), step), step)
            if time.monotonic() - saved >= self._course.save_every_s:
                self._save()
                saved = time.monotonic()
        self._save()

    def finish(self) -> None:
        """Forget the checkpoint: what was trained is published."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _step(self, loss: Tensor, step: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._course.rate * _share(step, self._course.steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._tensors.values(), _CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.item())

    def _save(self) -> None:
        kept = {f"weight {name}": tensor.detach() for name, tensor in self._tensors.items()}
        for name, tensor in self._tensors.items():
            state = self._optimizer.state[tensor]
            kept |= {f"{moment} {name}": state[moment] for moment in _MOMENTS if moment in state}
        kept["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        draft = self._folder / f".{_STATE}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(kept, draft)
            os.replace(draft, self._folder / _STATE)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            if getattr(error, "errno", None) in NO_ROOM:
                raise DiskFull(f"there is no room left for {self._folder}") from error
            raise StoreFailure(f"{self._folder} cannot be written: {error}") from error

    def _restore(self) -> int:
        """Take up what the folder has, if it is of this training; the number of steps done."""
        try:
            kept = load_file(self._folder / _STATE)
        except (FileNotFoundError, SafetensorError):
            return 0
        if any(f"weight {name}" not in kept for name in self._tensors) or "losses" not in kept:
            return 0
        self.losses = kept["losses"].tolist()
        for name, tensor in self._tensors.items():
            with torch.no_grad():
                tensor.copy_(kept[f"weight {name}"])
            if f"{_MOMENTS[0]} {name}" in kept:
                state = {moment: kept[f"{moment} {name}"] for moment in _MOMENTS}
                state["step"] = torch.tensor(float(len(self.losses)))
                self._optimizer.state[tensor] = state
        return len(self.losses)


def pick(chunks: Tensor, course: Course, step: int) -> Tensor:
    """The batch of a step: every chunk once in a seeded order, then once more in another one."""
    each = max(1, len(chunks) // course.batch)
    epoch, place = divmod(step, each)
    generator = torch.Generator().manual_seed(course.seed * 1_000_003 + epoch)
    order = torch.randperm(len(chunks), generator=generator)
    return chunks[order[place * course.batch : (place + 1) * course.batch]]


def _share(step: int, steps: int) -> float:
    warm_up = max(1, round(_WARM_UP * steps))
    falling = 1 - (1 - _FINAL_SHARE) * step / max(1, steps)
    return min((step + 1) / warm_up, falling)
