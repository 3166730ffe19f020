"""Which devices the workers get."""

import os
from collections.abc import Callable
from importlib import metadata

import pynvml  # pyright: ignore[reportMissingTypeStubs]

from engine.config import Config, ConfigError


def usable_gpus(asked: str) -> int:
    """CUDA devices for "cpu" (none), "cuda" (all that are there), or "auto": all, but none where
    torch was built without CUDA."""
    # torch itself is not loaded for that.
    if asked == "cpu" or (asked == "auto" and metadata.version("torch").endswith("+cpu")):
        return 0
    return _visible_gpus()


def devices(config: Config, count: Callable[[str], int] = usable_gpus) -> list[str]:
    """A device for each worker: "cpu", or "cuda:0" and so on. Raises ConfigError."""
    kind, _, ordinal = config.device.partition(":")
    if kind == "cuda" and config.weights != "exact":
        raise ConfigError(
            f"--weights {config.weights} is for CPU workers: give --device cpu, or leave it away"
        )
    found = 0 if config.weights != "exact" else count(kind)
    if kind == "cuda" and not found:
        raise ConfigError("no CUDA device was found: use --device cpu")
    if ordinal and int(ordinal) >= found:
        raise ConfigError(f"there is no {config.device}: devices 0 to {found - 1} were found")
    if not found:
        return ["cpu"] * (1 if config.workers == "auto" else config.workers)
    usable = [f"cuda:{ordinal}"] if ordinal else [f"cuda:{index}" for index in range(found)]
    wanted = len(usable) if config.workers == "auto" else config.workers
    return [usable[index % len(usable)] for index in range(wanted)]


def threads(config: Config, num_workers: int) -> int:
    """Threads of each worker; 0 where one worker may choose for itself."""
    if config.threads or num_workers == 1:
        return config.threads
    return max((os.cpu_count() or 1) // num_workers, 1)


def _visible_gpus() -> int:
    """CUDA devices that a process started now would see."""
    try:
        pynvml.nvmlInit()
        try:
            found = int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError, OSError):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return min(found, len([name for name in visible.split(",") if name.strip()]))
