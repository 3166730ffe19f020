"""Chat templates: Jinja in the sandbox and with the names that transformers gives them.

Rendering is done here rather than by transformers because its module imports torch.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, NoReturn

import msgspec
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import TextError

# What a template may raise while it runs over messages that it does not expect.
_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class _TextPart(msgspec.Struct, frozen=True):
    text: str
    type: Literal["text"] = "text"


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here it shows its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a variable of the instance

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `endgeneration`, as if the tags were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter would escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    # jinja2 leaves the types of these two open.
    environment.filters["tojson"] = _tojson  # pyright: ignore[reportUnknownMemberType]
    environment.globals.update(  # pyright: ignore[reportUnknownMemberType]
        raise_exception=_raise_exception, strftime_now=_strftime_now
    )
    return environment


_ENVIRONMENT = _environment()


class ChatTemplate:
    """A variant's compiled template; `tokens` are its named special tokens (bos_token, ...)."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except TemplateError as error:
            raise TextError(f"This model's chat template does not compile: {error}.") from error
        self._tokens = dict(tokens)

    def render(self, messages: list[dict[str, Any]], extra: Mapping[str, Any]) -> str:
        """The prompt for `messages`; `extra` are further variables of the template."""
        plain = [_plain(number, message) for number, message in enumerate(messages)]
        variables = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._tokens,
            **extra,
            "messages": plain,
        }
        try:
            return self._template.render(variables)
        except _FAULTS as error:
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise TextError(f"The chat template refuses these messages: {reason}.") from error


def _plain(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message without empty keys and with its text parts joined into one string."""
    if not isinstance(message.get("role"), str):
        raise TextError(f"messages[{number}] needs a role such as user, assistant or system.")
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content")
    if content is not None:
        kept["content"] = _joined(number, content)
    return kept


def _joined(number: int, content: object) -> str:
    try:
        parts = msgspec.convert(content, str | list[str | _TextPart])
    except msgspec.ValidationError:
        raise TextError(
            f"messages[{number}].content must be a string or a list of text parts."
        ) from None
    if isinstance(parts, str):
        return parts
    return "\n".join(part if isinstance(part, str) else part.text for part in parts)
