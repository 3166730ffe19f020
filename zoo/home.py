"""Where a zoo lies: an explicit folder, else `$BLOCKLLM_HOME/zoo`, else `~/.blockllm/zoo`."""

import os
from pathlib import Path


def zoo_path(explicit: str | None = None) -> Path:
    """The zoo's folder; it need not exist yet."""
    if explicit:
        return Path(explicit).expanduser()
    home = os.environ.get("BLOCKLLM_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".blockllm") / "zoo"
