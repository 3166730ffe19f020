"""JSON of others, read as strictly as it was meant: no key twice, no depth without end, no NaN.

Two readers may take a file with a repeated key for two different ones; this one refuses it.
"""

import json
from typing import Any

import msgspec


def check_json(data: bytes) -> Any:  # noqa: ANN401 whatever the file holds
    """What the JSON says; raises msgspec.DecodeError in words that follow "... is not valid:"."""
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None
    except ValueError as error:
        raise msgspec.DecodeError(" ".join(str(error).split())) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it says {twice[:100]!r} twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
