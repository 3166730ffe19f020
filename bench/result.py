"""What a scenario finds: one `Result` per cell of its table."""

from typing import Any

import msgspec

Figure = float | int | str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A cell: `figures` are its row in the table, `checks` what must hold, `detail` the rest."""

    scenario: str
    cell: str
    figures: dict[str, Figure]
    checks: dict[str, bool] = {}
    detail: dict[str, Any] = {}


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What every line of a results file repeats, so that a line can be read alone."""

    date: str
    commit: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    flags: tuple[str, ...] = ()


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a results file."""

    result: Result
    context: Context
