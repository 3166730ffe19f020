"""The models that every peer runs, as transformers and peft folders: the base, eight adapters and
seven full fine-tunes, equal to those in our zoos because they come from the same seeds."""

import shutil
from collections.abc import Callable
from pathlib import Path

from bench.variants import Checkpoint
from bench.zoos import BASE, Make, Zoos, fulls, loras
from zoo.progress import Progress


class Models:
    """Folders under `root`, made when they are first wanted."""

    def __init__(self, root: Path, zoos: Zoos, progress: Progress) -> None:
        self._root = root / zoos.fingerprint
        self._zoos = zoos
        self._progress = progress

    @property
    def base(self) -> Path:
        """The base model."""
        return self._made({BASE: _copied})[BASE]

    @property
    def loras(self) -> dict[str, Path]:
        """Eight adapters by name."""
        return self._made(loras())

    @property
    def fulls(self) -> dict[str, Path]:
        """Seven full fine-tunes by name."""
        return self._made(fulls())

    def converted(self, name: str, make: Callable[[Path], None]) -> Path:
        """A file that a peer makes of them, made once."""
        path = self._root / name
        if not path.exists():
            self._root.mkdir(parents=True, exist_ok=True)
            # The suffix stays the last part: converters go by it.
            unfinished = path.with_name(f"unfinished-{path.name}")
            make(unfinished)
            unfinished.rename(path)
        return path

    def _made(self, wanted: dict[str, Make]) -> dict[str, Path]:
        folders = {name: self._root / name for name in wanted}
        missing = [name for name, folder in folders.items() if not folder.exists()]
        if missing:
            self._root.mkdir(parents=True, exist_ok=True)
            with self._zoos.checkpoint() as base:
                for name in self._progress.track(missing, "making models for the peers"):
                    unfinished = self._root / f"unfinished-{name}"
                    shutil.rmtree(unfinished, ignore_errors=True)
                    wanted[name](base, unfinished)
                    unfinished.rename(folders[name])
        return folders


def _copied(base: Checkpoint, target: Path) -> Path:
    return shutil.copytree(base.folder, target)
