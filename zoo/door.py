"""The zoo's one door to the workers: chains run in this process, to measure what will be served.

The zoo stores and the workers run, and imports go from the workers to the zoo. Where the zoo has to
run a chain (the golden check of `add`, comparing, profiling, training stitches) it asks here, so
that what it measures are the very units, kernels and batches that clients get. The workers are
imported when they are first asked for: the zoo's read side stays light."""

from pathlib import Path
from typing import TYPE_CHECKING

from zoo.manifest import Manifests

if TYPE_CHECKING:
    from workers.offline import Model, Offline

__all__ = ["Manifests", "Model", "Offline", "offline"]


def offline(root: Path, *, ops: str = "auto", threads: int = 0) -> "Offline":
    """A context manager that loads and runs chains over the objects of the zoo at `root`."""
    from workers.offline import Offline

    return Offline(root, ops=ops, threads=threads)
