"""Names of variants and aliases: what one may look like."""

import re

from zoo.errors import BadName

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


def checked_name(name: str) -> str:
    """`name` if a variant may be called so; raises BadName."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 200 else name[:200] + "..."
        raise BadName(
            f"{shown!r} is not a name for a variant: use up to 128 letters, digits and . _ : / - "
            "that start with a letter or a digit"
        )
    return name
