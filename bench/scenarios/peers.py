"""Other engines beside ours on the same prompts and lengths: ratios, memory, the machine's limits.

The peers are installed in environments of their own when they are first wanted (`bench/peers`); one
that cannot be had is left out, and said so. Loads come over HTTP from a process of their own; what
has no server gets its batches through a pipe. Cells are played in turns (A B A B) by everybody;
values are medians, `swing` is (largest - smallest) / median, `ours / it` how many times as good
ours is, `MB` the most memory that all processes of the arrangement took together, each shared page
counted once (`RSS MB`: once for each process that has it, as other tools count), `others` the cores
that other processes kept busy. A fine-tune is a whole model to every peer, whatever part of it was
tuned.
"""

from collections.abc import Iterator, Sequence

import msgspec

from bench.ceiling import best, measure
from bench.peers.cells import CELLS, Cell, Play, job_of
from bench.peers.judge import results, roofline
from bench.peers.libraries import Libraries
from bench.peers.llama_cpp import LlamaCpp
from bench.peers.models import Models
from bench.peers.ours import EXACT, LAST_LAYERS, ROUNDED, Ours
from bench.peers.peer import Arrangement, Peer, PeerMissing
from bench.peers.rounds import Rounds, Row
from bench.peers.site import Site
from bench.peers.vllm_cpu import VllmCpu
from bench.prose import prose
from bench.result import Result
from bench.roofline import Limits, Shape
from bench.stage import Stage
from bench.weigh import weigh
from bench.zoos import BASE, FULLS, LAST, LORAS, variants
from zoo.equivalence.corpus import tokenizer_of
from zoo.home import zoo_path
from zoo.store import Store

# Characters of text that prompts are cut from.
_PROSE = 100_000
PEERS = {"llama.cpp": LlamaCpp, "vllm": VllmCpu, "transformers": Libraries}


def run(stage: Stage) -> Iterator[Result]:
    """Install, then play group by group."""
    arrangements: list[Arrangement] = []
    for peer in _peers(stage):
        try:
            version = peer.install()
            arrangements += peer.arrangements()
        except PeerMissing as error:
            stage.say(f"peers: without {peer.name}: {error}")
            version = f"missing: {error}"
        yield Result(scenario="peers: engines", cell=peer.name, figures={"version": version})
    base = variants(stage.zoos.plain)[0]
    play = Play(
        vocabulary=base.vocabulary,
        text=tuple(tokenizer_of(Store(stage.zoos.plain), base).encode(prose()[:_PROSE])),
        quick=stage.quick,
        trace=stage.trace.source,
        speed=stage.trace.speed,
        seconds=stage.trace.seconds,
    )
    limits = [measure()]
    done: list[tuple[Cell, Row]] = []
    for cell, rows in _play(stage, play, arrangements):
        yield from results(cell, rows)
        done += [(cell, row) for row in rows]
    limits.append(measure())
    yield from _against_limits(stage, play, done, best(limits))


def _peers(stage: Stage) -> list[Peer]:
    root = (stage.peers.root or zoo_path().parent / "bench" / "peers").absolute()
    models = Models(root / "models", stage.zoos, stage.zoos.progress)
    site = Site(root, models, stage.say)
    wanted = stage.peers.only or tuple(PEERS)
    return [Ours(stage), *(PEERS[name](site) for name in wanted)]


def _play(
    stage: Stage, play: Play, arrangements: Sequence[Arrangement]
) -> Iterator[tuple[Cell, list[Row]]]:
    rounds = Rounds(play, stage.say)
    for group in dict.fromkeys(cell.group for cell in CELLS.values()):
        wanted = [key for key in stage.peers.cells if CELLS[key].group == group]
        players = [one for one in arrangements if one.group == group and {*one.cells} & {*wanted}]
        yield from rounds.group(players, wanted)


def _against_limits(
    stage: Stage, play: Play, done: Sequence[tuple[Cell, Row]], limits: Limits
) -> Iterator[Result]:
    """Each of our rows beside the least time that the machine needs for it."""
    zoos = stage.zoos
    for cell, row in done:
        if not row.arrangement.is_ours:
            continue
        name, rounds = row.arrangement.name, row.arrangement.name.startswith(ROUNDED)
        match cell.group, name.partition(", ")[2]:
            case "base", _:
                weights = weigh(zoos.plain, BASE)
            case "adapters", _:
                weights = weigh(zoos.loras, BASE, LORAS)
            case _, what if what == LAST_LAYERS:
                weights = weigh(zoos.lasts, BASE, LAST)
            case _, what if what == EXACT:
                weights = weigh(zoos.fulls, BASE, FULLS)
            case _:
                continue
        if rounds:
            weights = msgspec.structs.replace(weights, kv_bytes=weights.kv_bytes // 2)
        job = job_of(cell, play, seed=0)
        shape = Shape(cell.streams, job.prompt_tokens[1], job.output_tokens[1])
        found = roofline(cell, row, weights, limits.rounded if rounds else limits, shape)
        if found is not None:
            yield found
    yield Result(
        scenario="peers: limits",
        cell="machine",
        figures={
            "read GB/s": limits.read_bytes_per_s / 1e9,
            "GFLOP/s": limits.flops_per_s / 1e9,
            "GFLOP/s, rounded": limits.rounded.flops_per_s / 1e9,
        },
    )
