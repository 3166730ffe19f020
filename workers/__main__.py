"""Starts a worker: `python -m workers '<WorkerConfig as JSON>'`. Called by the engine's fleet."""

import gc
import sys


def main(argument: str) -> int:
    """Import what a worker needs, then serve; the exit code."""
    # Nothing of what is imported is ever garbage: looking for some takes a tenth of the start, and
    # later a moment from whoever waits for a token.
    gc.disable()
    from workers.process import run

    gc.freeze()
    gc.enable()
    return run(argument)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
