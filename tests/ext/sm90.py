"""Compiles every Triton kernel for sm_90, which needs no device: prints their shared memory as
JSON. Run as a process of its own, since the suite's own process interprets kernels."""

import json
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ext.cuda import attention, lora, pointwise

# The shape of Llama-3.1-8B: 32 heads on 8, 128 wide.
HEAD = {"DIM": 128, "DIM_PAD": 128, "PAGE": 16}
SHARED: dict[str, Any] = {"PARTS": 8, "ROWS": 16, "STORAGE": tl.bfloat16, "PRECISION": "ieee"}
# What takes most: float32 pieces of deltas.
LARGE_RANK = {"RANK": 1024, "BLOCK_R": lora.BLOCK_RANK, "STORAGE": tl.float32}
TYPES = {
    "q_out": "*bf16", "cache": "*bf16", "tiles": "*i32", "ranks": "*i32", "blocks": "*i32",
    "tables": "*i32", "singles": "*i32", "slots": "*i32", "row_sequence": "*i32",
    "row_position": "*i32", "pointers": "*i64", "weights": "*i64", "biases": "*i64",
    "gains": "*i64", "longest": "*i32", "eps": "fp32", "q_eps": "fp32", "k_eps": "fp32",
    "scale": "fp32",
}  # fmt: skip
NUMBERS = {
    "width", "num_tiles", "out_width", "count", "table_stride", "window", "num_rows", "spans",
    "layer_stride", "capacity",
}  # fmt: skip


def attend(rows: int, padded: int, *, split: bool) -> dict[str, Any]:
    group = {"KV_HEADS": 8, "GROUP": 4, "GROUP_PAD": padded, "BLOCK_M": rows, "BLOCK_N": 64}
    return HEAD | group | {"SPLIT": split, "PRECISION": "ieee", "q": "*bf16", "out": "*bf16"}


def append(norm: int) -> dict[str, Any]:
    biases = {"Q_NORM": norm, "K_NORM": norm, "Q_BIAS": norm == 2, "K_BIAS": norm == 2}
    return HEAD | biases | {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "INTERLEAVED": False}


def rows(*, slotted: bool, add: bool) -> dict[str, Any]:
    flags = {"HAS_BIAS": True, "SLOTTED": slotted, "ADD": add}
    return flags if slotted else flags | {"slots": None, "gains": None, "biases": None}


CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("append", attention.append, append(0)),
    ("append with norms", attention.append, append(2)),
    ("attend to single rows", attention.attend, attend(16, 16, split=True)),
    ("attend to chunks", attention.attend, attend(64, 4, split=False)),
    ("list pages", attention.list_pages, {"pages": "*i32", "starts": "*i32", "BLOCK": 64}),
    ("combine", attention.combine, {"HEADS": 32, "DIM": 128, "DIM_PAD": 128, "out": "*bf16"}),
    ("shrink", lora.shrink, SHARED | {"RANK": 64, "BLOCK_R": 64, "BLOCK_K": 64}),
    ("shrink by large ranks", lora.shrink, SHARED | LARGE_RANK | {"BLOCK_K": 64}),
    ("expand", lora.expand, SHARED | {"RANK": 64, "BLOCK_R": 64, "BLOCK_O": 128}),
    ("expand by large ranks", lora.expand, SHARED | LARGE_RANK | {"BLOCK_O": 128}),
    ("activate", pointwise.activate, {"GATED": True, "KIND": 2, "BLOCK": 1024}),
    ("finish", pointwise.finish_rows, rows(slotted=True, add=True) | {"BLOCK": 1024}),
    ("finish plainly", pointwise.finish_rows, rows(slotted=False, add=False) | {"BLOCK": 1024}),
    (
        "norm",
        pointwise.norm_rows,
        rows(slotted=True, add=False) | {"LAYER": True, "WIDTH_PAD": 4096, "out": "*bf16"},
    ),
]


def compiled(kernel: Any, given: dict[str, Any]) -> Any:
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        value = given.get(name, TYPES.get(name, "i32" if name in NUMBERS else "*fp32"))
        is_type = isinstance(value, str) and name == name.lower()
        signature[name] = value if is_type else "constexpr"
        if not is_type:
            constants[(index,)] = value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


if __name__ == "__main__":
    found = {name: compiled(kernel, given).metadata.shared for name, kernel, given in CASES}
    json.dump(found, sys.stdout)
