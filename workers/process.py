"""A worker as a process: its configuration, its socket, and the loop between them.

Polls one DEALER socket beside the loop. Ends when the engine asks for a drain, or when its standard
input closes, which means that the engine is gone.
"""

import logging
import os
import select
import signal
import sys
import time
from pathlib import Path

import msgspec
import torch
import zmq

from ext.build import Unavailable
from ext.memory import host_memory
from ext.select import require_cuda, select_ops
from workers import wire
from workers.budget import NoBudget, Shares, parked, share
from workers.gauge import Gauge
from workers.worker import Worker
from zoo.errors import ZooError
from zoo.keeping.census import weigh

_log = logging.getLogger(__name__)
_IDLE_MS, _LOADING_MS = 200, 2
# Plain integers: putting flags together costs as much as asking.
_EVENTS, _READABLE = int(zmq.EVENTS), int(zmq.POLLIN)
# A step that is no replay makes hundreds of calls that give up the interpreter's lock, and may wait
# that long to have it back from the loader's threads.
_SWITCH_S = 0.0005
# Of a GPU's memory, for activations, captured steps and what attention keeps of split contexts.
_WORKSPACE_BYTES = 5 << 28


def run(argument: str) -> int:
    """Serve until told to stop, with a WorkerConfig as JSON; the exit code."""
    config = msgspec.json.decode(argument, type=wire.WorkerConfig)
    # Memory for pages that was asked for is taken from the start; what the worker chose itself is a
    # ceiling.
    commits = config.kv_bytes > 0
    logging.basicConfig(
        level=config.log_level.upper(),
        format=f"%(levelname)s %(asctime)s [{config.name}] %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    # The engine decides when to stop: an interrupt from the terminal reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_S)
    try:
        config = _resolve(config)
        torch.set_num_threads(config.threads)
        ops = select_ops(config.device, config.ops, config.threads, config.dtype, config.attention)
    except (Unavailable, NoBudget) as error:
        _log.error("%s", error)
        return 1
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, config.name.encode())
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
    socket.connect(config.endpoint)
    gauge = Gauge(config.device)
    worker = Worker(
        config, ops, lambda report: socket.send(wire.encode(report)), lambda: gauge.reading
    )
    socket.send(wire.encode(worker.hello()))
    try:
        with torch.inference_mode():
            _serve(worker, socket, config.heartbeat_s, commits=commits)
    finally:
        worker.close()
        gauge.stop()
        socket.close()
        context.term()
    return 0


def _serve(worker: Worker, socket: zmq.Socket[bytes], heartbeat_s: float, *, commits: bool) -> None:
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    next_beat = 0.0
    while not worker.is_done:
        _receive(worker, socket)
        if worker.is_loading:
            worker.collect()
        busy = worker.has_work and worker.step()
        now = time.monotonic()
        if now >= next_beat:
            socket.send(wire.encode(worker.status()))
            next_beat = now + heartbeat_s
        elif busy:
            continue
        if not busy:
            began = time.perf_counter()
            commits = commits and (worker.is_loading or worker.commit())
            poller.poll(_LOADING_MS if worker.is_loading else 0 if commits else _IDLE_MS)
            worker.clock.idle += time.perf_counter() - began
        if _is_orphan():
            return
    socket.send(wire.encode(worker.status()))
    socket.send(wire.encode(wire.Drained()))


def _receive(worker: Worker, socket: zmq.Socket[bytes]) -> None:
    """Act on every command that has arrived."""
    while int(socket.getsockopt(_EVENTS)) & _READABLE:
        try:
            command = wire.decode_command(socket.recv(zmq.NOBLOCK))
        except msgspec.MsgspecError as error:
            _log.warning("a message from the engine was dropped: %s", error)
            continue
        worker.take(command)


def _is_orphan() -> bool:
    """Whether the engine is gone."""
    readable, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(readable) and not os.read(sys.stdin.fileno(), 4096)


def _resolve(config: wire.WorkerConfig) -> wire.WorkerConfig:
    """Settle what was left to the worker: threads, memory, rows of a wave."""
    threads = config.threads or len(os.sched_getaffinity(0))
    if config.device == "cpu":
        kv_bytes = config.kv_bytes or min(4 << 30, host_memory().available // 4)
        shares, parked_bytes = Shares(kv_bytes, config.weight_bytes), 0
    else:
        shares, parked_bytes = _shares(config)
    # A CPU is saturated by few rows; more would only hold up the streams that decode beside them.
    max_rows = config.max_rows or (512 if config.device == "cpu" else 2048)
    return msgspec.structs.replace(
        config,
        threads=threads,
        kv_bytes=shares.kv_bytes,
        weight_bytes=shares.weight_bytes,
        parked_bytes=parked_bytes,
        max_rows=max_rows,
    )


def _shares(config: wire.WorkerConfig) -> tuple[Shares, int]:
    """Memory of a GPU, what others hold of it taken off, and bytes of the host for weights that do
    not fit. Raises Unavailable, NoBudget."""
    require_cuda()
    free, total = torch.cuda.mem_get_info(config.device)
    budget = int(total * config.memory_utilization) - (total - free) - _WORKSPACE_BYTES
    try:
        known = weigh(Path(config.zoo))
    except ZooError:
        known = 0  # Every chain that is loaded will say what is wrong with the zoo.
    shares = share(budget, known, config.kv_bytes, config.weight_bytes)
    available = host_memory().available
    return shares, parked(known, shares.weight_bytes, available, torch.cuda.device_count())
