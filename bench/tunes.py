"""Real full fine-tunes of the base on two tasks, and the weaker ones between them and the base.

Trained once per base model, for about a minute each, and kept; what costs no training is the way
back: base + share * (tuned - base) is a fine-tune of its own, with the structure of a real one.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from bench.variants import Checkpoint
from zoo.learning.tasks import TASKS, Recipe, Task
from zoo.learning.train import train
from zoo.progress import Progress

# Every tensor is trained, also where the demo trains the last layers alone.
TUNED: Mapping[str, Task] = {
    "dates": TASKS["dates"],
    "tickets": replace(TASKS["tickets"], recipe=Recipe("full", 40, 2e-4, batch=8)),
}
_SHARES = {"dates": (1.0, 0.95, 0.9, 0.85), "tickets": (1.0, 0.95, 0.9)}
TUNES = tuple(f"{task}-{place}" for task, shares in _SHARES.items() for place in range(len(shares)))
REAL = tuple(f"{task}-0" for task in TUNED)


class Tunes:
    """Makes fine-tunes under `home` when they are first wanted."""

    def __init__(self, home: Path, progress: Progress) -> None:
        self._home = home
        self._progress = progress

    def makes(self) -> dict[str, Callable[[Checkpoint, Path], Path]]:
        """How each of TUNES is written, given the base."""
        return {
            f"{task}-{place}": lambda base, to, task=task, share=share: self._fade(
                base, task, share, to
            )
            for task, shares in _SHARES.items()
            for place, share in enumerate(shares)
        }

    def _trained(self, base: Checkpoint, task: str) -> Checkpoint:
        folder = self._home / task
        if not (folder / "model.safetensors").exists():
            train(TUNED[task], base.folder, folder, None, self._progress)
        return Checkpoint(folder)

    def _fade(self, base: Checkpoint, task: str, share: float, target: Path) -> Path:
        trained = self._trained(base, task)
        shutil.copytree(trained.folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        before, tensors = base.tensors(), trained.tensors()
        for name, tensor in tensors.items() if share < 1 else ():
            start = before[name].float()
            tensors[name] = (start + share * (tensor.float() - start)).to(tensor.dtype)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target
