"""Kernel speeds beside torch's and the machine's limits: `python -m bench.kernels`.

Each linear shape of a 135M-parameter model runs with bfloat16 weights in the native kernels and
with float32 weights in torch, in turns (A B A B), from as many copies as do not fit the caches.
Prints a table and a whole decode step; `--json FILE` appends one line per measurement. The limits
are measured in the same run: bytes read per second and float32 multiply-adds per second. On a busy
machine, `--alone` measures one thread by the time it really ran.
"""

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import Busy, commit, this_machine
from ext.build import ISA_FLAGS, SOURCES, Isa
from ext.cpu import CpuOps
from ext.ops import Attention, Cache, Geometry, Linear, Norm, Ops, Place

SHAPES = ((576, 1536), (576, 576), (1536, 576), (576, 49152))
ROWS = (1, 8, 32, 128, 512)
COLD_BYTES = 64 << 20
ROUNDS = 5
MIN_S = 0.03
Clock = Callable[[], float]
WIDTH, KV_WIDTH, INNER, LAYERS, VOCABULARY, HEAD = 576, 192, 1536, 30, 49152, 64


class Limits(msgspec.Struct, frozen=True):
    """What the machine can do with the given number of threads; `rounded_gflop_s` with vectors of
    bfloat16, 0 where it has no products of them."""

    threads: int
    read_gb_s: float
    gflop_s: float
    rounded_gflop_s: float = 0.0

    def products(self, ops: Ops) -> float:
        """GFLOP/s of products as these kernels may make them."""
        rounds = ops.dtype == "bfloat16"
        return max(self.gflop_s, self.rounded_gflop_s) if rounds else self.gflop_s


class Speed(msgspec.Struct, frozen=True):
    """One shape: seconds per call, and the shares of the limit that binds (reading the weights as
    they are stored, or multiplying)."""

    inputs: int
    outputs: int
    rows: int
    native_s: float
    torch_s: float
    gflop_s: float
    read_gb_s: float
    share: float


class Step(msgspec.Struct, frozen=True):
    """One decode step of the whole model at a context of 160 tokens, by operation, in seconds."""

    rows: int
    total_s: float
    limit_s: float
    parts_s: dict[str, float]


class Line(msgspec.Struct, frozen=True):
    """A line of the results file, readable alone."""

    result: Limits | Speed | Step
    isa: str
    threads: int
    others_busy: float
    machine: str
    commit: str
    rounding: bool = False


def seconds(body: Callable[[], object], clock: Clock) -> float:
    """Seconds per call of `body`, over at least MIN_S."""
    calls, begin = 0, clock()
    while (elapsed := clock() - begin) < MIN_S:
        body()
        calls += 1
    return elapsed / calls


def in_turns(clock: Clock, *bodies: Callable[[], object]) -> list[float]:
    """The median seconds of each body, measured in turns."""
    found: list[list[float]] = [[] for _ in bodies]
    for _ in range(ROUNDS):
        for times, body in zip(found, bodies, strict=True):
            times.append(seconds(body, clock))
    return [statistics.median(times) for times in found]


@contextmanager
def probes(isa: Isa) -> Iterator[ctypes.CDLL]:
    """bench/limits.cpp, compiled for this run."""
    source = Path(__file__).with_name("limits.cpp")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "limits.so"
        flags = ["-O2", "-std=c++17", f"-I{SOURCES}", *ISA_FLAGS[isa], "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(source), "-o", str(target)], check=True)
        native = ctypes.CDLL(str(target))
        native.limits_read.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        native.limits_operations.restype = ctypes.c_int64
        native.limits_multiply_add.argtypes = (ctypes.c_int64,)
        native.limits_dots.argtypes = (ctypes.c_int64,)
        native.limits_dots.restype = ctypes.c_bool
        yield native


def limits(ops: CpuOps, clock: Clock) -> Limits:
    """Best of several rounds: other processes only ever take away."""
    threads, size, rounds = ops.threads, 128 << 20, 2_000_000
    buffers = [ops.memory(size).fill_(1) for _ in range(threads)]

    def rate(pool: ThreadPoolExecutor, call: Callable[[int], object], work: float) -> float:
        def timed(i: int) -> float:
            begin = clock()
            call(i)
            return work / (clock() - begin)

        return max(sum(pool.map(timed, range(threads))) for _ in range(8)) / 1e9

    with probes(ops.isa) as native, ThreadPoolExecutor(threads) as pool:
        read = rate(pool, lambda i: native.limits_read(buffers[i].data_ptr(), size), size)
        work = rounds * native.limits_operations()
        fused = rate(pool, lambda _: native.limits_multiply_add(rounds), work)
        dots = 0.0
        if native.limits_dots(1):
            dots = rate(pool, lambda _: native.limits_dots(rounds), 2 * work)
    return Limits(threads, read, fused, dots)


def speed(ops: CpuOps, limit: Limits, clock: Clock, shape: tuple[int, int], rows: int) -> Speed:
    """One shape, ours beside torch's."""
    inputs, outputs = shape
    copies = max(1, COLD_BYTES // (2 * inputs * outputs))
    x = torch.randn(rows, inputs)
    ours = [(Linear(ops.matrix(torch.randn(outputs, inputs).bfloat16())),) for _ in range(copies)]
    theirs = [torch.randn(outputs, inputs) for _ in range(max(1, copies // 2))]
    turn = iter(range(1 << 60))
    native_s, torch_s = in_turns(
        clock,
        lambda: ops.project(x, None, ours[next(turn) % len(ours)], (None,)),
        lambda: F.linear(x, theirs[next(turn) % len(theirs)]),
    )
    work, weight = 2e-9 * rows * inputs * outputs, 2e-9 * inputs * outputs
    bound_s = max(work / limit.products(ops), weight / limit.read_gb_s)
    return Speed(
        inputs,
        outputs,
        rows,
        native_s,
        torch_s,
        work / native_s,
        weight / native_s,
        bound_s / native_s,
    )


class Model:
    """A model of random weights with the shapes of SmolLM2-135M."""

    def __init__(self, ops: Ops) -> None:
        def linear(out: int, width: int) -> Linear:
            return Linear(ops.matrix((torch.randn(out, width) / width**0.5).bfloat16()))

        self.ops = ops
        self.norm = Norm("rms", 1e-5, torch.ones(WIDTH))
        self.table = linear(VOCABULARY, WIDTH)
        self.layers = [
            (
                [linear(out, WIDTH) for out in (WIDTH, KV_WIDTH, KV_WIDTH)],
                linear(WIDTH, WIDTH),
                [linear(INNER, WIDTH) for _ in range(2)],
                linear(WIDTH, INNER),
            )
            for _ in range(LAYERS)
        ]
        frequencies = [10000.0 ** (-i / (HEAD // 2)) for i in range(HEAD // 2)]
        self.how = Attention(HEAD**-0.5, ops.rotary(frequencies, 1.0, False, 1024))
        weights = [w for a, b, c, d in self.layers for w in (*a, b, *c, d)]
        self.nbytes = sum(linear.weight.nbytes for linear in (*weights, self.table))

    def step(self, place: Geometry, cache: Cache, note: Callable[[str], None]) -> Tensor:
        """One step; `note` is told the name of each operation as it ends."""
        ops, plan = self.ops, self.ops.plan(place)
        x = ops.embed(np.arange(place.num_rows), self.table.weight, 1.0, None, plan, 0)
        note("plan, embed")
        for index, (qkv, out, gate_up, down) in enumerate(self.layers):
            q, k, v = ops.project(x, self.norm, qkv, (None,) * 3)
            note("q, k, v")
            attended = ops.attend(q, k, v, self.how, Place(cache, index, plan))
            note("attend")
            ops.accumulate(x, attended, out, None)
            note("out")
            gate, up = ops.project(x, self.norm, gate_up, (None,) * 2)
            note("gate, up")
            inner = ops.activate(gate, up, "silu")
            note("activate")
            ops.accumulate(x, inner, down, None)
            note("down")
        (logits,) = ops.project(x, self.norm, (self.table,), (None,))
        note("head")
        tokens = ops.argmax(logits)
        note("argmax")
        return tokens


def decode(model: Model, limit: Limits, clock: Clock, rows: int, context: int = 160) -> Step:
    """The fastest of several steps, and the step's limit: each operation's bytes or products."""
    pages = -(-context // 16)
    tables = np.arange(rows * LAYERS * pages, dtype=np.int32).reshape(rows, LAYERS, pages)
    contexts = np.full(rows, context, np.int32)
    place = Geometry(np.arange(rows + 1, dtype=np.int32), contexts, tables)
    dtype = torch.bfloat16 if model.ops.dtype == "bfloat16" else torch.float32
    kv_bytes = tables.size * 2 * 16 * KV_WIDTH * dtype.itemsize
    cache = Cache(model.ops.memory(kv_bytes).view(dtype).view(-1, 2, 16, 3, HEAD))
    best: dict[str, float] = {}
    for _ in range(ROUNDS + 2):
        parts: dict[str, float] = {}
        last = clock()

        def note(name: str) -> None:
            nonlocal last
            now = clock()
            parts[name] = parts.get(name, 0.0) + now - last  # noqa: B023 (called within the round)
            last = now

        model.step(place, cache, note)
        if not best or sum(parts.values()) < sum(best.values()):
            best = parts
    # Two operations per weight of two bytes.
    products_s = rows * model.nbytes / 1e9 / limit.products(model.ops)
    read_s = model.nbytes / 1e9 / limit.read_gb_s
    limit_s = max(products_s, read_s) + kv_bytes / 1e9 / limit.read_gb_s
    return Step(rows, sum(best.values()), limit_s, best)


def text(result: Limits | Speed | Step) -> str:
    """A result as a line of the table."""
    match result:
        case Limits(threads, read, fused, dots):
            rounded = f", bfloat16 {dots:.0f}" if dots else ""
            rates = f"multiply {fused:.0f} GFLOP/s{rounded}"
            return f"limits, {threads} threads: read {read:.1f} GB/s, {rates}"
        case Speed():
            shape = f"{result.inputs} x {result.outputs}, {result.rows} rows"
            return (
                f"{shape:26} {1e6 * result.native_s:10.1f} us {result.gflop_s:7.1f} GFLOP/s"
                f" {result.read_gb_s:6.1f} GB/s {result.share:5.0%} of the limit"
                f" {result.torch_s / result.native_s:6.2f} x torch f32"
            )
        case Step():
            parts = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in result.parts_s.items())
            return (
                f"step of {result.rows} rows: {1e3 * result.total_s:.2f} ms ="
                f" {result.rows / result.total_s:.0f} tokens/s,"
                f" {result.limit_s / result.total_s:.0%} of the limit; ms: {parts}"
            )


def results(ops: CpuOps, clock: Clock) -> Iterator[Limits | Speed | Step]:
    """Everything, in the order of the table."""
    limit = limits(ops, clock)
    yield limit
    for shape in SHAPES:
        for rows in ROWS:
            yield speed(ops, limit, clock, shape, rows)
    model = Model(ops)
    for rows in (1, 8, 32):
        yield decode(model, limit, clock, rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default="auto", help="auto, avx2, avx512, avx512bf16 or amx")
    parser.add_argument(
        "--rounding", action="store_true", help="round what is multiplied, where that is faster"
    )
    parser.add_argument("--json", type=Path, help="append the measurements to this file")
    parser.add_argument("--alone", action="store_true", help="one thread, by its processor time")
    options = parser.parse_args()
    threads, clock = options.threads, time.perf_counter
    if options.alone:
        threads, clock = 1, time.thread_time
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ops = CpuOps(threads, options.isa, options.rounding)
    machine, revision, busy = this_machine().cpu, commit(), Busy()
    how = "rounding" if ops.rounding else "exact"
    print(f"{machine}, {ops.isa}, {how}, {ops.threads} threads")
    lines = []
    for result in results(ops, clock):
        print(text(result), flush=True)
        where = (machine, revision, ops.rounding)
        lines.append(Line(result, ops.isa, ops.threads, busy.others(), *where))
    print(f"other processes kept {lines[-1].others_busy:.2f} cores busy")
    if options.json is not None:
        with options.json.open("ab") as file:
            file.writelines(msgspec.json.encode(line) + b"\n" for line in lines)


if __name__ == "__main__":
    main()
