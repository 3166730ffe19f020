"""Which devices the workers get."""

import os
from pathlib import Path

from engine.config import Config, ConfigError

_NVIDIA = Path("/proc/driver/nvidia/gpus")


def devices(config: Config) -> list[str]:
    """A device for each worker: "cpu", or "cuda:0" and so on. Raises ConfigError."""
    if config.device == "cuda" and config.weights != "exact":
        raise ConfigError(
            f"--weights {config.weights} is for CPU workers: give --device cpu, or leave it away"
        )
    if config.device != "cuda":
        return ["cpu"] * (1 if config.workers == "auto" else config.workers)
    found = len(list(_NVIDIA.iterdir())) if _NVIDIA.is_dir() else 0
    if not found:
        raise ConfigError("no CUDA device was found: use --device cpu")
    wanted = found if config.workers == "auto" else config.workers
    return [f"cuda:{index % found}" for index in range(wanted)]


def threads(config: Config, num_workers: int) -> int:
    """Threads of each worker; 0 where one worker may choose for itself."""
    if config.threads or num_workers == 1:
        return config.threads
    return max((os.cpu_count() or 1) // num_workers, 1)
