"""Adds to a dummy zoo at a moment of one's choice, in a process of its own that has imported
everything by then: `python -m bench.adder DIR '<Recipe as JSON>'`, then a line on its input.

`Adding` starts that process; what it costs the machine is what publishing a variant costs.
"""

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from bench.machine import ROOT
from bench.processes import end
from zoo.catalog import Catalog
from zoo.dummy.make import make, missing
from zoo.dummy.models import read_models
from zoo.dummy.recipe import Recipe
from zoo.progress import Quiet

_READY = b"ready\n"


class AddingFailed(Exception):
    """Nothing was added; the message says why."""


class Adding:
    """`with Adding(zoo, recipe) as adding` waits for `add`, which adds the one variant that `zoo`
    lacks of the recipe: `name`."""

    def __init__(self, zoo: Path, recipe: Recipe) -> None:
        self.zoo = zoo
        self.name = missing(zoo, recipe)[0]
        words = [str(zoo.absolute()), msgspec.json.encode(recipe).decode()]
        self._command = [sys.executable, "-m", "bench.adder", *words]

    def __enter__(self) -> Self:
        """Start the process."""
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        end(self._process)

    def wait(self) -> None:
        """Until it is ready to add. Raises AddingFailed."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != _READY:
            raise AddingFailed("the process that adds variants did not start: see above")

    def add(self) -> float:
        """Add it; the time that the catalog has for it. Raises AddingFailed."""
        self._process.communicate(b"\n")
        if self._process.returncode != 0:
            raise AddingFailed("no variant was added: see above")
        with closing(Catalog(self.zoo)) as catalog:
            return catalog.variant(self.name).created


def main(root: Path, recipe: Recipe) -> None:
    """Add when a line comes."""
    read_models(recipe)
    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    sys.stdin.readline()
    make(root, recipe, Quiet())


if __name__ == "__main__":
    main(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=Recipe))
