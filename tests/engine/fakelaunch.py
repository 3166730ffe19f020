"""`launch` as a process of its own, with workers and an HTTP process that need no model.

python -m tests.engine.fakelaunch [flags of launch]
python -m tests.engine.fakelaunch http '<HttpConfig JSON>'
"""

import argparse
import os
import socket
import sys

import msgspec

from engine.config import ConfigError, HttpConfig, add_flags, resolve
from engine.launch import Commands, launch

COMMANDS = Commands(
    worker=(sys.executable, "-m", "tests.engine.fakeworker"),
    http=(sys.executable, "-m", "tests.engine.fakelaunch", "http"),
)


def listen(config: HttpConfig) -> None:
    """An HTTP process that only listens, until its stdin closes."""
    with socket.create_server((config.host, config.port)) as server:
        sys.stdout.write(f"ready {server.getsockname()[1]}\n")
        sys.stdout.flush()
        sys.stdin.read()


def main() -> int:
    """One process."""
    if sys.argv[1:2] == ["http"]:
        listen(msgspec.json.decode(sys.argv[2], type=HttpConfig))
        return 0
    parser = argparse.ArgumentParser()
    add_flags(parser)
    try:
        config = resolve(vars(parser.parse_args()), os.environ)
        return launch(config, os.environ, COMMANDS)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
