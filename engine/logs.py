"""Log lines of the engine's processes: one line each, for people or as JSON, on stderr."""

import logging
import sys
from datetime import UTC, datetime

import msgspec


class TextFormatter(logging.Formatter):
    """`INFO 11-22 10:00:00 [engine] message`"""

    def __init__(self, process: str) -> None:
        super().__init__(
            f"%(levelname)s %(asctime)s [{process}] %(message)s", datefmt="%m-%d %H:%M:%S"
        )


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def configure(process: str, level: str, *, as_json: bool = False) -> None:
    """Send the log lines of this process to stderr; call it once, at the start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if as_json else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
