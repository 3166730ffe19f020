"""Compiles the native CPU kernels: `library(isa)` gives the path of a library, built once.

A library is plain C++17 behind a C interface, so it depends on neither torch nor Python headers,
takes seconds to build and is kept in a cache folder under a name that covers sources, compiler and
flags. `python -m ext.build` builds ahead of the first use. With `--sanitize` the library checks
addresses and undefined behaviour; a process uses that one where BLOCKLLM_SANITIZE is 1 (and
libasan is preloaded).
"""

import argparse
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal, get_args

Isa = Literal["avx2", "avx512", "avx512bf16", "amx"]

SOURCES = Path(__file__).parent / "cpu"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX512BF16 = (*_AVX512, "-mavx512bf16")
ISA_FLAGS: dict[Isa, tuple[str, ...]] = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": _AVX512BF16,
    "amx": (*_AVX512BF16, "-mamx-tile", "-mamx-bf16"),
}
# Of flags whose feature /proc/cpuinfo spells otherwise.
_OTHER_NAMES = {"-mavx512bf16": "avx512_bf16"}
# No contraction: a row's bits must not depend on which copy of a loop the compiler fused where.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-pthread",
)
SANITIZE_FLAGS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
CPU_FEATURES: dict[Isa, frozenset[str]] = {
    isa: frozenset(_OTHER_NAMES.get(flag, flag[2:].replace("-", "_")) for flag in flags)
    for isa, flags in ISA_FLAGS.items()
}
_BEST_FIRST: tuple[Isa, ...] = ("amx", "avx512bf16", "avx512", "avx2")
# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux lends a process AMX's registers when it
# asks for them.
_ASK_FOR_TILES = (158, 0x1023, 18)
NO_MACHINE = "the native CPU kernels need an x86-64 Linux machine with AVX2, FMA and F16C"


class Unavailable(Exception):
    """The native kernels cannot run here; the message is one sentence that says why."""


@cache
def supported() -> tuple[Isa, ...]:
    """The instruction sets this machine can run, best first; empty where the kernels cannot run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    flags = {word for line in lines if line.startswith("flags") for word in line.split()}
    found: list[Isa] = [isa for isa in _BEST_FIRST if flags >= CPU_FEATURES[isa]]
    if "amx" in found and not _has_tiles():
        found.remove("amx")
    return tuple(found)


def _has_tiles() -> bool:
    """Whether the system lets this process use AMX; from then on it does."""
    return ctypes.CDLL(None).syscall(*_ASK_FOR_TILES) == 0


def library(isa: Isa, *, sanitize: bool = False) -> Path:
    """The compiled library for `isa`, built now if the cache lacks it. Raises Unavailable."""
    compiler = _compiler()
    flags = (*FLAGS, *ISA_FLAGS[isa], *(SANITIZE_FLAGS if sanitize else ()))
    name = f"blockllm-{isa}{'-sanitized' if sanitize else ''}-{_digest(compiler, flags)}.so"
    folders = _cache_folders()
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    folder = next((folder for folder in folders if _is_writable(folder)), None)
    if folder is None:
        raise Unavailable(f"no folder to build the CPU kernels in: make {folders[1]} writable")
    _compile(compiler, flags, folder / name)
    return folder / name


def _compiler() -> str:
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise Unavailable(
            f"no C++ compiler: install {name}, or set CXX to one, to use the native CPU kernels"
        )
    return path


def _digest(compiler: str, flags: tuple[str, ...]) -> str:
    """Names what a library depends on: sources, flags and the compiler's version."""
    hasher = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    for part in (version, " ".join(flags).encode(), *(path.read_bytes() for path in _files("*"))):
        hasher.update(hashlib.sha256(part).digest())
    return hasher.hexdigest()[:16]


def _files(pattern: str) -> list[Path]:
    return sorted(path for path in SOURCES.glob(pattern) if path.suffix in (".cpp", ".h"))


def _cache_folders() -> tuple[Path, Path]:
    home = Path(os.environ.get("BLOCKLLM_HOME") or Path.home() / ".blockllm")
    return SOURCES / "_build", home / "cache"


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Builds beside the target and renames, so that a reader never meets half a library."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [compiler, *flags, *map(str, _files("*.cpp")), "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reason = next(
                (line for line in result.stderr.splitlines() if "error" in line), "no message"
            )
            raise Unavailable(f"{compiler} cannot build the CPU kernels: {reason.strip()}")
        built.replace(target)


def main(arguments: list[str] | None = None) -> int:
    """Builds the libraries and prints their paths."""
    parser = argparse.ArgumentParser(
        prog="python -m ext.build", description="Build the native CPU kernels."
    )
    parser.add_argument(
        "--isa", choices=get_args(Isa), help="default: the best this machine can run"
    )
    parser.add_argument(
        "--sanitize", action="store_true", help="with address and undefined sanitizers"
    )
    options = parser.parse_args(arguments)
    chosen = [options.isa] if options.isa else list(supported()[:1])
    if not chosen:
        sys.stderr.write(f"{NO_MACHINE}\n")
        return 1
    try:
        for isa in chosen:
            sys.stdout.write(f"{library(isa, sanitize=options.sanitize)}\n")
    except Unavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
