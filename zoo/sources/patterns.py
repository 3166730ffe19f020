"""Regular expressions of others: which of them may be matched at all.

A choice within a repetition can take longer than the age of the universe, so it is refused before
anybody, peft included, tries it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from zoo.errors import BadAdapter

_MAX_CHARACTERS = 1000
_MAX_LOOPS = 4
_ENDLESS = 1 << 16
# Settings of an adapter that are patterns where they are one text, and those whose keys are.
_TEXTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_TABLES = ("rank_pattern", "alpha_pattern")


def check_patterns(settings: Mapping[str, Any], source: str) -> None:
    """Raises BadAdapter for the first pattern that is none, or that might never come to an end."""
    for name in (*_TEXTS, *_TABLES):
        value = settings.get(name)
        patterns = value if isinstance(value, dict) else [value] if isinstance(value, str) else []
        for pattern in patterns:
            try:
                _check(pattern)
            except re.error as error:
                raise BadAdapter(
                    f"a pattern in the {name} of {source} is not valid: {error}"
                ) from error


def _check(pattern: str) -> None:
    if len(pattern) > _MAX_CHARACTERS:
        raise re.error(f"it has {len(pattern)} characters, more than {_MAX_CHARACTERS}")
    try:
        parsed = _parsed(pattern)
    except RecursionError:
        raise re.error("it is nested too deeply") from None
    loops = 0
    for kind, arguments in _walk(parsed):
        if kind.endswith("_REPEAT") and arguments[1] > 1:
            loops += arguments[1] >= _ENDLESS
            if any(_is_choice(*inner) for inner in _walk(arguments[2])):
                raise re.error("it repeats a choice, which may take for ever")
    if loops > _MAX_LOOPS:
        raise re.error(f"it has {loops} repetitions, more than {_MAX_LOOPS}")


def _is_choice(kind: str, arguments: Any) -> bool:  # noqa: ANN401 the parser has no types
    return kind == "BRANCH" or (kind.endswith("_REPEAT") and arguments[0] != arguments[1])


def _parsed(pattern: str) -> Any:  # noqa: ANN401 the parser has no types
    # The only way to the parsed form.
    return re._parser.parse(pattern)  # pyright: ignore[reportAttributeAccessIssue]


def _walk(node: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 the parser has no types
    """Every operation of a parsed pattern, with its arguments."""
    if isinstance(node, re._parser.SubPattern):  # pyright: ignore[reportAttributeAccessIssue]
        for operation, arguments in node:
            yield str(operation), arguments
            yield from _walk(arguments)
    elif isinstance(node, (list, tuple)):
        for part in node:
            yield from _walk(part)
