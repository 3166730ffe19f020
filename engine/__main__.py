"""The command line: `python -m engine launch | status | top | chat | complete`.

Exit status: 0 fine, 2 wrong usage or configuration (one line that says what to do), 1 otherwise.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from engine import config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, not the usage."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main() -> int:
    """Run one command."""
    given = vars(_parser().parse_args())
    command = given.pop("command")
    try:
        if command == "launch":
            return _launch(given)
        return _talk(command, given)
    except config.ConfigError as error:
        return _complain(2, error)
    except KeyboardInterrupt:
        return 1


def _launch(flags: dict[str, object]) -> int:
    # Imported here so that the other commands need neither tokenizers nor a zoo.
    from engine.launch import launch

    return launch(config.resolve(flags, os.environ), os.environ)


def _talk(command: str, given: dict[str, Any]) -> int:
    """A command that is a client of a running engine."""
    from engine import chat, status
    from engine.errors import EngineError

    bodies: dict[str, Callable[..., None]] = {
        "status": status.status,
        "top": status.top,
        "chat": chat.chat,
        "complete": chat.complete,
    }
    try:
        bodies[command](**given)
    except EngineError as error:
        return _complain(1, error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m engine", description="Serve the variants of a zoo.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    launch = commands.add_parser("launch", help="start an engine and its workers")
    config.add_flags(launch)
    client = _Parser(add_help=False)
    client.add_argument(
        "--zmq",
        dest="endpoint",
        metavar="ENDPOINT",
        default=os.environ.get("BLOCKLLM_ZMQ", config.Config().zmq),
        help="the engine's ZeroMQ endpoint (default: %(default)s)",
    )
    client.add_argument("--api-key", metavar="KEY", default=os.environ.get("BLOCKLLM_API_KEY"))
    status = commands.add_parser("status", parents=[client], help="what a running engine does")
    status.add_argument("--json", action="store_true", dest="as_json", help="as JSON")
    commands.add_parser("top", parents=[client], help="the same, live")
    chat = commands.add_parser("chat", parents=[client], help="talk to a variant")
    chat.add_argument("name", metavar="NAME")
    complete = commands.add_parser(
        "complete", parents=[client], help="let a variant continue a text"
    )
    complete.add_argument("name", metavar="NAME")
    complete.add_argument("prompt", metavar="PROMPT")
    complete.add_argument(
        "--max-tokens", type=int, metavar="N", default=argparse.SUPPRESS, help="longest answer"
    )
    return parser


def _complain(code: int, error: Exception) -> int:
    sys.stderr.write(f"{error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
