"""The command line: `python -m bench [SCENARIO ...]`.

Exit status: 0 every check holds, 1 one does not or something failed, 2 wrong usage.
"""

import argparse
import importlib.util
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from transformers.utils import logging

from bench.adder import AddingFailed
from bench.device import NoDevice
from bench.load import LoadFailed
from bench.loop import WorkerFailed
from bench.machine import ROOT, commit, this_machine, versions
from bench.peers.cells import CELLS
from bench.report import append, markdown, tables
from bench.result import Context, Line, Result
from bench.scenarios import (
    adding,
    codecs,
    derived,
    foreign,
    gpu,
    gpu_libraries,
    kinds,
    memory,
    parity,
    peers,
    prefix,
    profile,
    quantized,
    replay,
    soak,
    start,
    stores,
    throughput,
)
from bench.server import ServerFailed
from bench.stage import GpuChoice, PeerChoice, Scenario, Stage, Trace
from bench.traces import TraceError
from bench.zoos import Base, NoBase, Zoos, demo_base
from zoo.console import ConsoleProgress
from zoo.errors import ZooError
from zoo.home import zoo_path
from zoo.progress import Progress

SCENARIOS: Mapping[str, Scenario] = {
    "throughput": throughput.run,
    "memory": memory.run,
    "prefix": prefix.run,
    "soak": soak.run,
    "soak-base": soak.run_base,
    "profile": profile.run,
    "start": start.run,
    "adding": adding.run,
    "replay": replay.run,
    "parity": parity.run,
    "stores": stores.run,
    "kinds": kinds.run,
    "codecs": codecs.run,
    "derived": derived.run,
    "profiles": derived.run_profiles,
    "foreign": foreign.run,
    "quantized": quantized.run,
    "peers": peers.run,
    "gpu": gpu.run,
    "gpu-libraries": gpu_libraries.run,
}
# They bring shapes of their own.
_BASELESS = {"gpu", "gpu-libraries"}
# With the real model these are a matter of many minutes: only when asked for by name.
_LONG = {
    "adding",
    "kinds",
    "soak-base",
    "parity",
    "stores",
    "codecs",
    "derived",
    "profiles",
    "foreign",
    "quantized",
    "peers",
    *_BASELESS,
}
DEFAULT = tuple(name for name in SCENARIOS if name not in _LONG)


def main() -> int:
    """Run scenarios, write what they find as they find it, show it."""
    parser = _parser()
    given = parser.parse_args()
    unknown = [name for name in given.scenario if name not in SCENARIOS]
    if unknown:
        parser.error(f"there is no scenario {unknown[0]!r}: there are {', '.join(SCENARIOS)}")
    # Libraries' own bars would run through ours.
    logging.disable_progress_bar()
    # So that whoever ends this process ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console(stderr=True, highlight=False)
    context = _context(given.flag)
    out = given.out or ROOT / "bench" / "results" / _file_name(context)
    results: list[Result] = []
    code = 0
    try:
        progress = ConsoleProgress(console)
        zoos = Zoos(_base(given, progress), progress)
        trace = Trace(given.trace or "synthetic", given.speed, given.seconds)
        flags = tuple(word for flag in given.flag for word in shlex.split(flag))
        device = GpuChoice(given.device, given.shapes)
        stage = Stage(zoos, given.quick, flags, progress.say, trace, _choice(given), device)
        for name in given.scenario or DEFAULT:
            for result in SCENARIOS[name](stage):
                results.append(result)
                append(out, result, context)
    except (NoBase, NoDevice, TraceError) as error:
        console.print(f"error: {error}")
        return 2
    except (AddingFailed, LoadFailed, ServerFailed, WorkerFailed, ZooError) as error:
        console.print(f"error: {error}")
        code = 1
    except KeyboardInterrupt:
        code = 1
    return _conclude(results, context, out) or code


def _conclude(results: list[Result], context: Context, out: Path) -> int:
    """Show and keep what there is; 1 if a check fails."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    if not results:
        return 1
    for table in tables(results):
        console.print(table)
    # The table beside the file shows all that the file holds, earlier runs included.
    kept = [msgspec.json.decode(line, type=Line).result for line in out.read_bytes().splitlines()]
    out.with_suffix(".md").write_text(markdown(kept, context))
    _draw(results, out.with_suffix(".svg"), console)
    checks = [holds for result in results for holds in result.checks.values()]
    console.print(f"{sum(checks)} of {len(checks)} checks hold; written to {out} and its .md")
    return 0 if all(checks) else 1


def _draw(results: list[Result], path: Path, console: Console) -> None:
    """The picture of a comparison with peers, where there is one and something to draw with."""
    if not any(result.scenario.startswith("peers: ") for result in results):
        return
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no picture was drawn: pip install -e '.[bench]' brings what draws")
        return
    from bench.peers.plots import draw

    if draw(results, path):
        console.print(f"drawn: {path}")


def _context(flags: list[str]) -> Context:
    return Context(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        command=shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        machine=msgspec.to_builtins(this_machine()),
        versions=versions(),
        flags=tuple(flags),
    )


def _file_name(context: Context) -> str:
    return f"{context.date[:10]}-{this_machine().kind}.jsonl"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure this machine with the real server; about ten minutes by default.",
    )
    names = ", ".join(SCENARIOS)
    parser.add_argument(
        "scenario",
        nargs="*",
        metavar="SCENARIO",
        help=f"of {names} (default: all but {', '.join(SCENARIOS.keys() - set(DEFAULT))})",
    )
    parser.add_argument(
        "--base", help="a variant of the zoo, or a folder (default: the demo's base model)"
    )
    parser.add_argument("--zoo", help="where the base is a variant (default: <home>/zoo)")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter loads")
    parser.add_argument(
        "--flag", action="append", default=[], help='more of launch\'s flags: --flag "--ops torch"'
    )
    parser.add_argument("--trace", help='file that the replay plays, or "synthetic" (default)')
    parser.add_argument("--speed", type=float, default=1.0, help="times as fast as recorded")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the replay lasts")
    peer = parser.add_argument_group("peers")
    peer.add_argument("--only", type=_listed(peers.PEERS), help=", ".join(peers.PEERS))
    cells = f"{', '.join(CELLS)} (default: all; trace only if --trace is given)"
    peer.add_argument("--cells", type=_listed(CELLS), help=cells)
    peer.add_argument("--peers", type=Path, help="where they are installed")
    device = parser.add_argument_group("gpu")
    device.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU"
    )
    device.add_argument(
        "--shapes",
        default="",
        help="llama-3.1-8b (default on a GPU) and the like, or a config.json",
    )
    return parser


def _listed(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A type of argument: some of the known words, with commas between."""

    def read(text: str) -> tuple[str, ...]:
        words = tuple(text.split(","))
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(
                    f"there is no {word!r}: there are {', '.join(known)}"
                )
        return words

    return read


def _base(given: argparse.Namespace, progress: Progress) -> Base:
    zoo = zoo_path(given.zoo)
    if given.scenario and _BASELESS.issuperset(given.scenario):
        return Base(zoo, given.base or "")
    return Base(zoo, given.base) if given.base else demo_base(zoo, progress)


def _choice(given: argparse.Namespace) -> PeerChoice:
    default = (key for key, cell in CELLS.items() if given.trace or not cell.traced)
    return PeerChoice(given.only or (), given.cells or tuple(default), given.peers)


if __name__ == "__main__":
    sys.exit(main())
