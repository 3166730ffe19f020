"""Writers that are killed: run as a process of its own, from which they are forked already warm.

A writer is killed at an event of its real progress (the n-th file that it opens, renames or
removes) and a moment after it. Prints one JSON line per kill: what was there before and after.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.errors import ZooError
from zoo.keeping.remove import remove
from zoo.keeping.sweep import sweep
from zoo.keeping.verify import verify
from zoo.progress import Quiet
from zoo.transfer.move import Move, pull

NAME = "churn"
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "sqlite3.connect", "fcntl.flock"}
LATEST_S = 0.004


class Yard:
    """A zoo, two adapters that may stand under one name, and a zoo to pull from."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "zoo"
        self.adapters = (folder / "first", folder / "second")
        self.other = folder / "other"

    def add(self, which: int = 0, name: str = NAME) -> None:
        options = AddOptions(base="base", replace=True, golden=False)
        add(self.root, name, str(self.adapters[which]), options, Quiet())

    def remove(self, name: str = NAME) -> None:
        with contextlib.suppress(ZooError):
            remove(self.root, name, wait_s=9, progress=Quiet())

    def sweep(self) -> None:
        sweep(self.root, delete=True, wait_s=9, progress=Quiet())

    def pull(self) -> None:
        pull(self.root, str(self.other), Move((NAME,), replace=True, wait_s=9), Quiet())

    def state(self) -> dict[str, str]:
        with contextlib.closing(Catalog(self.root)) as catalog:
            return {variant.name: variant.chain for variant in catalog.variants()}


def scenes(yard: Yard) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What a writer does, and what is made ready for it; both run for every kill."""

    def bare() -> None:
        yard.remove()
        yard.sweep()

    def present() -> None:
        yard.add(0)

    def rubbish() -> None:
        yard.add(0)
        yard.add(1)
        yard.remove()

    return {
        "add": (yard.add, bare),
        "remove": (yard.remove, present),
        "replace": (lambda: yard.add(1), present),
        "sweep": (yard.sweep, rubbish),
        "pull": (yard.pull, bare),
    }


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child that never comes back into this program."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def count(work: Callable[[], object]) -> int:
    """Events of an undisturbed run."""
    reader, writer = os.pipe()

    def counted() -> None:
        events = 0

        def hook(event: str, arguments: object) -> None:
            nonlocal events
            events += event in EVENTS

        sys.addaudithook(hook)
        work()
        os.write(writer, str(events).encode())

    child = forked(counted)
    os.waitpid(child, 0)
    return int(os.read(reader, 20))


def kill(work: Callable[[], object], event: int, delay_s: float) -> bool:
    """Kill a writer `delay_s` after its n-th event; whether it was still at work."""
    reader, writer = os.pipe()

    def signalled() -> None:
        events = 0

        def hook(name: str, arguments: object) -> None:
            nonlocal events
            if name in EVENTS:
                events += 1
                if events == event:
                    os.write(writer, b"!")

        sys.addaudithook(hook)
        work()

    child = forked(signalled)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kills(folder: Path, number: int, seed: int) -> None:
    """Kill so many writers of each kind in turn."""
    yard, chance = Yard(folder), random.Random(seed)
    known = scenes(yard)
    lengths: dict[str, int] = {}
    for name, (work, prepare) in known.items():
        prepare()
        lengths[name] = count(work)
    for index in range(number):
        name = list(known)[index % len(known)]
        work, prepare = known[name]
        prepare()
        before, event = yard.state(), chance.randint(1, lengths[name])
        was_at_work = kill(work, event, chance.uniform(0, LATEST_S))
        found = verify(yard.root, Quiet())
        line = {
            "work": name,
            "progress": event / lengths[name],
            "was_at_work": was_at_work,
            "before": before,
            "after": yard.state(),
            "checked": found.checked,
            "damages": [str(damage) for damage in found.damages],
        }
        print(json.dumps(line), flush=True)


def duel(folder: Path, rounds: int) -> None:
    """Two writers at once, each with names of its own and a sweep in each round; a reader beside
    them."""
    yard = Yard(folder)

    def churn(which: int) -> None:
        for number in range(rounds):
            yard.add(which, f"writer-{which}-{number}")
            yard.add(1 - which, f"passing-{which}")
            yard.remove(f"passing-{which}")
            yard.sweep()

    children = [forked(lambda which=which: churn(which)) for which in (0, 1)]
    damages, looks, codes = [], 0, []
    while len(codes) < len(children):
        found = verify(yard.root, Quiet())
        damages += [str(damage) for damage in found.damages]
        looks += 1
        ended, status = os.waitpid(children[len(codes)], os.WNOHANG)
        codes += [os.waitstatus_to_exitcode(status)] if ended else []
    print(json.dumps({"codes": codes, "looks": looks, "damages": damages, "after": yard.state()}))


def prepare(folder: Path) -> None:
    """The zoo to pull from has the name too, and another base."""
    yard = Yard(folder)
    yard.add(1)
    shutil.copytree(yard.root, yard.other)
    yard.remove()


if __name__ == "__main__":
    prepare(Path(sys.argv[2]))
    if sys.argv[1] == "kills":
        kills(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        duel(Path(sys.argv[2]), int(sys.argv[3]))
