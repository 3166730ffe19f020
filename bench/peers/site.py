"""Where peers are installed and what they run: handed to every peer."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.peers.environment import Workshop
from bench.peers.models import Models


@dataclass(frozen=True, slots=True)
class Site:
    """`root` is the folder of all peers, `say` shows progress."""

    root: Path
    models: Models
    say: Callable[[str], None]

    def workshop(self, name: str) -> Workshop:
        """The folder of one peer."""
        return Workshop(self.root / name, lambda text: self.say(f"{name}: {text}"))

    @property
    def cores(self) -> int:
        """Cores that this process may use."""
        return len(os.sched_getaffinity(0))
