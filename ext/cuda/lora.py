"""Low-rank attachments of a batch on CUDA, in Triton: shrink by A, expand by B, mixed ranks.

A tile is up to TILE_ROWS rows of one segment; each program finds its segment's matrices through
pointers, so segments of any number and rank go in one launch. Sums have one order per row: the
inputs are split into a fixed number of parts, each summed by one program, then added in turn. Ranks
are taken BLOCK_R at a time: what a program holds does not grow with them.
"""

import triton
import triton.language as tl

TILE_ROWS = 16
BLOCK_RANK = 128


@triton.jit(do_not_specialize=["num_tiles"])
def shrink(
    x,
    width,
    tiles,
    pointers,
    ranks,
    shrunk,
    num_tiles,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STORAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """shrunk[part, tile, row, :] = x[row] A^T over one part of the inputs; float32, rank padded.

    `tiles` [n, 3]: segment, first row, rows (0: nothing to do). `pointers` [segments, 2]: A, B."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    segment = tl.load(tiles + tile * 3)
    first = tl.load(tiles + tile * 3 + 1)
    count = tl.load(tiles + tile * 3 + 2)
    if count == 0:
        return
    rank = tl.load(ranks + segment)
    a = tl.load(pointers + segment * 2).to(tl.pointer_type(STORAGE))
    r = tl.arange(0, ROWS)
    j = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    length = tl.cdiv(tl.cdiv(width, PARTS), BLOCK_K) * BLOCK_K
    acc = tl.zeros([ROWS, BLOCK_R], tl.float32)
    for start in range(part * length, tl.minimum(width, (part + 1) * length), BLOCK_K):
        at = start + k
        rows = tl.load(
            x + (first + r).to(tl.int64)[:, None] * width + at[None, :],
            mask=(r < count)[:, None] & (at < width)[None, :],
            other=0.0,
        )
        low = tl.load(
            a + j[:, None].to(tl.int64) * width + at[None, :],
            mask=(j < rank)[:, None] & (at < width)[None, :],
            other=0.0,
        )
        acc += tl.dot(rows.to(low.dtype), tl.trans(low), input_precision=PRECISION)
    place = (part * num_tiles + tile).to(tl.int64) * ROWS
    tl.store(shrunk + (place + r)[:, None] * RANK + j[None, :], acc)


@triton.jit(do_not_specialize=["num_tiles"])
def expand(
    shrunk,
    out,
    out_width,
    tiles,
    pointers,
    ranks,
    scales,
    num_tiles,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STORAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[row] += scale * shrunk[row] B^T for a block of outputs; `out` is float32."""
    tile = tl.program_id(0)
    segment = tl.load(tiles + tile * 3)
    first = tl.load(tiles + tile * 3 + 1)
    count = tl.load(tiles + tile * 3 + 2)
    if count == 0:
        return
    rank = tl.load(ranks + segment)
    scale = tl.load(scales + segment)
    b = tl.load(pointers + segment * 2 + 1).to(tl.pointer_type(STORAGE))
    r = tl.arange(0, ROWS)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    added = tl.zeros([ROWS, BLOCK_O], tl.float32)
    for begin in range(0, RANK, BLOCK_R):
        j = begin + tl.arange(0, BLOCK_R)
        low = tl.zeros([ROWS, BLOCK_R], tl.float32)
        for part in range(PARTS):
            place = (part * num_tiles + tile).to(tl.int64) * ROWS
            low += tl.load(shrunk + (place + r)[:, None] * RANK + j[None, :])
        high = tl.load(
            b + o[:, None].to(tl.int64) * rank + j[None, :],
            mask=(o < out_width)[:, None] & (j < rank)[None, :],
            other=0.0,
        )
        added += tl.dot((low * scale).to(high.dtype), tl.trans(high), input_precision=PRECISION)
    at = out + (first + r).to(tl.int64)[:, None] * out_width + o[None, :]
    mask = (r < count)[:, None] & (o < out_width)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + added, mask=mask)
