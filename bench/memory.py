"""Memory of a process and its descendants, as the kernel counts it."""

import msgspec
import psutil


class Footprint(msgspec.Struct, frozen=True):
    """One process: its resident set, and its share of it where pages are shared with others
    (PSS)."""

    role: str
    pid: int
    rss_bytes: int
    pss_bytes: int


def footprints(pid: int) -> list[Footprint]:
    """The process and its descendants."""
    parent = psutil.Process(pid)
    found: list[Footprint] = []
    for process in (parent, *parent.children(recursive=True)):
        try:
            memory = process.memory_full_info()
            role = _role(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        found.append(Footprint(role, process.pid, memory.rss, memory.pss))
    return found


def _role(command: list[str]) -> str:
    """engine, http or worker: the module that Python was started with."""
    modules = {"engine": "engine", "engine.http": "http", "workers": "worker"}
    module = command[command.index("-m") + 1] if "-m" in command else ""
    return modules.get(module, module or "other")
