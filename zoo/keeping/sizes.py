"""Sizes as people write and read them: decimal units, as disks are sold, or binary ones."""

import re

from zoo.errors import UnsupportedOption

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([kKMGTP]?)(i?)B?")
_LARGEST = 1 << 60


def parsed_size(text: str) -> int:
    """Bytes of "80GB", "24 GiB", "1.5M" or "123"; raises UnsupportedOption."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise UnsupportedOption(f"{text!r} is no size: write it as 80GB, 24GiB, 500MB or in bytes")
    step = 1024 if match[3] else 1000
    count = float(match[1]) * step ** " KMGTP".index(match[2].upper() or " ")
    if count > _LARGEST:
        raise UnsupportedOption(f"{text!r} is more than any machine has")
    return int(count)


def size(count: int) -> str:
    """Bytes in decimal units, as disks are sold."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
