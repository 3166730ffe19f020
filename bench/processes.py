"""Child processes: free ports for them, and their end with all that they started."""

import contextlib
import socket
import subprocess

import psutil


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def family(pid: int) -> tuple[int, ...]:
    """A process and its descendants; nothing if it has ended."""
    try:
        parent = psutil.Process(pid)
        return (pid, *(child.pid for child in parent.children(recursive=True)))
    except psutil.NoSuchProcess:
        return ()


def end(process: subprocess.Popen[bytes], grace_s: float = 20.0) -> None:
    """Ask it to end, wait, close its pipes, and leave none of its descendants behind."""
    started = family(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    for pid in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
