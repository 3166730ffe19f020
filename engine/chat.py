"""The commands `chat` and `complete`: talk to a variant of a running engine."""

import sys
from collections.abc import Generator
from contextlib import closing

from engine.answers import Chunk
from engine.client import Client
from engine.errors import EngineError, EngineUnreachable, InvalidRequest, ModelNotFound

_RESET, _QUIT = "/reset", "/quit"
_HELP = f"{_RESET} forgets the conversation, {_QUIT} or Ctrl-D ends it, Ctrl-C stops an answer.\n"
_PROMPT = "> "


def chat(endpoint: str, name: str, api_key: str | None = None) -> None:
    """Talk until the input ends. Raises EngineError if there is no engine or no such variant."""
    with Client(endpoint, api_key) as client:
        _check(client, name)
        _say(_HELP)
        messages: list[dict[str, str]] = []
        while (line := _read()) not in (None, _QUIT):
            if line == _RESET:
                messages = []
            elif line:
                messages = _turn(client, name, [*messages, {"role": "user", "content": line}])


def complete(
    endpoint: str, name: str, prompt: str, api_key: str | None = None, max_tokens: int = 256
) -> None:
    """Print how the variant continues the prompt. Raises EngineError."""
    with Client(endpoint, api_key) as client:
        _show(client.stream(name, prompt, max_tokens=max_tokens))


def _check(client: Client, name: str) -> None:
    """Complain before the first question rather than after it."""
    known = {model.id: model for model in client.models()}
    if name not in known:
        names = ", ".join(sorted(known)) or "none"
        raise ModelNotFound(f"There is no variant {name}; served are: {names}.")
    if not known[name].has_chat_template:
        raise InvalidRequest(f"{name} has no chat template: use `python -m engine complete`.")


def _turn(client: Client, name: str, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """One answer; the conversation with it, or without the question if it failed."""
    try:
        answer = _show(client.stream_chat(name, messages))
    except EngineUnreachable:
        raise
    except EngineError as error:
        _say(f"{error}\n")
        return messages[:-1]
    return [*messages, {"role": "assistant", "content": answer}]


def _show(chunks: Generator[Chunk]) -> str:
    """Print an answer as it comes, up to a Ctrl-C; the text that was printed."""
    shown: list[str] = []
    with closing(chunks):
        try:
            for chunk in chunks:
                shown.append(chunk.text)
                _say(chunk.text)
        except KeyboardInterrupt:
            # What has been said stays part of the conversation.
            pass
        finally:
            _say("\n")
    return "".join(shown)


def _read() -> str | None:
    """The next line; None when the input ends or Ctrl-C is pressed."""
    try:
        return input(_PROMPT if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        _say("\n")
        return None


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
