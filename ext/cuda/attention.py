"""Attention over pages on CUDA, in Triton: append (norm, rotate, write k and v) and attend.

Pages are [pages, 2, page, kv_heads, dim]. Attention is the online softmax of FlashAttention (Dao et
al. 2022); contexts of single rows are split over programs and combined afterwards (Flash-Decoding).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _normed(x, mean_of, width, eps, weight, bias, HAS_BIAS: tl.constexpr, LAYER: tl.constexpr):
    """x under the norm whose statistics come from `mean_of` (zeros beyond `width`)."""
    if LAYER:
        mean = tl.sum(mean_of, 0) / width
        variance = tl.sum(mean_of * mean_of, 0) / width - mean * mean
        x = (x - mean) * tl.rsqrt(variance + eps) * weight
    else:
        x = x * tl.rsqrt(tl.sum(mean_of * mean_of, 0) / width + eps) * weight
    if HAS_BIAS:
        x += bias
    return x


@triton.jit
def _head(
    source,
    d,
    DIM: tl.constexpr,
    eps,
    weight,
    bias,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    partner,
):
    """A head's elements d and those at `partner`, both normed. NORM 0: none, 1: rms, 2: layer."""
    inside = d < DIM
    x = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    if NORM > 0:
        shift, other_shift = x, x
        if HAS_BIAS:
            shift = tl.load(bias + d, mask=inside, other=0.0)
            other_shift = tl.load(bias + partner, mask=inside, other=0.0)
        own = tl.load(weight + d, mask=inside, other=0.0)
        theirs = tl.load(weight + partner, mask=inside, other=0.0)
        raw = x
        x = _normed(raw, raw, DIM, eps, own, shift, HAS_BIAS, NORM == 2)
        other = _normed(other, raw, DIM, eps, theirs, other_shift, HAS_BIAS, NORM == 2)
    return x, other


# What changes from batch to batch, sizes and places in a plan's buffer, compiles no kernel anew.
@triton.jit(do_not_specialize=["row_sequence", "row_position", "tables", "table_stride"])
def append(
    q,
    k,
    v,
    q_out,
    cache,
    row_sequence,
    row_position,
    tables,
    table_stride,
    rotary,
    q_weight,
    k_weight,
    q_bias,
    k_bias,
    q_eps,
    k_eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    Q_BIAS: tl.constexpr,
    K_BIAS: tl.constexpr,
):
    """One head of one row. q goes to `q_out`, k and v to their page; float32 in, storage out.

    `rotary` holds [positions, 2, HALF] (cos, sin); HALF 0: none."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, DIM_PAD)
    position = tl.load(row_position + row)
    turned = d < 2 * HALF
    if INTERLEAVED:
        partner = tl.where(turned, d ^ 1, d)
        index = d // 2
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(turned, tl.where(d < HALF, d + HALF, d - HALF), d)
        index = tl.where(d < HALF, d, d - HALF)
        sign = tl.where(d < HALF, -1.0, 1.0)
    cos = tl.full([DIM_PAD], 1.0, tl.float32)
    sin = tl.zeros([DIM_PAD], tl.float32)
    if HALF > 0:
        at = rotary + position.to(tl.int64) * 2 * HALF
        cos = tl.load(at + index, mask=turned, other=1.0)
        sin = tl.load(at + HALF + index, mask=turned, other=0.0) * sign
    if head < HEADS:
        place = (row * HEADS + head) * DIM
        x, other = _head(q + place, d, DIM, q_eps, q_weight, q_bias, Q_NORM, Q_BIAS, partner)
        x = x * cos + other * sin
        tl.store(q_out + place + d, x.to(q_out.dtype.element_ty), mask=d < DIM)
    else:
        sequence = tl.load(row_sequence + row).to(tl.int64)
        page = tl.load(tables + sequence * table_stride + position // PAGE).to(tl.int64)
        slot = (page * 2 * PAGE + position % PAGE) * KV_HEADS
        if head < HEADS + KV_HEADS:
            own = head - HEADS
            source = k + (row * KV_HEADS + own) * DIM
            x, other = _head(source, d, DIM, k_eps, k_weight, k_bias, K_NORM, K_BIAS, partner)
            x = x * cos + other * sin
            target = cache + (slot + own) * DIM + d
            tl.store(target, x.to(cache.dtype.element_ty), mask=d < DIM)
        else:
            own = head - HEADS - KV_HEADS
            x = tl.load(v + (row * KV_HEADS + own) * DIM + d, mask=d < DIM, other=0.0)
            target = cache + (slot + PAGE * KV_HEADS + own) * DIM + d
            tl.store(target, x.to(cache.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize=["blocks", "tables", "longest", "table_stride", "window", "num_rows"])
def attend(
    q,
    cache,
    out,
    partial,
    maxima,
    sums,
    blocks,
    tables,
    table_stride,
    longest,
    scale,
    window,
    num_rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows of one sequence, all query heads of one KV head, one span of positions.

    `blocks` [n, 4] holds sequence, first row, rows, first position. Without SPLIT the result goes
    to `out` [rows, heads, dim]; else each of the spans into which the `longest` context falls
    leaves float32 sums in `partial` [spans, rows, heads, dim], their scores' maxima (base 2) and
    sums of weights beside them."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    sequence = tl.load(blocks + block * 4).to(tl.int64)
    first_row = tl.load(blocks + block * 4 + 1)
    count = tl.load(blocks + block * 4 + 2)
    first = tl.load(blocks + block * 4 + 3)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM_PAD)
    n = tl.arange(0, BLOCK_N)
    index = m // GROUP_PAD
    member = m % GROUP_PAD
    valid = (index < count) & (member < GROUP)
    position = first + index
    heads = KV_HEADS * GROUP
    at = (first_row + index).to(tl.int64) * heads + kv_head * GROUP + member
    rows = tl.load(
        q + at[:, None] * DIM + d[None, :], mask=valid[:, None] & (d[None, :] < DIM), other=0.0
    )
    low = 0
    if window > 0:
        low = tl.maximum(0, first - window + 1)
    high = first + count
    span = 0
    if SPLIT:
        tiles = tl.cdiv(tl.load(longest), BLOCK_N)
        span = tl.cdiv(tiles, tl.num_programs(2)) * BLOCK_N
        low = tl.maximum(low, part * span)
        high = tl.minimum(high, (part + 1) * span)
    low = low // BLOCK_N * BLOCK_N
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    for start in range(low, high, BLOCK_N):
        seen = start + n
        present = seen < high
        page = tl.load(tables + sequence * table_stride + seen // PAGE, mask=present, other=0)
        slot = (page.to(tl.int64) * 2 * PAGE + seen % PAGE) * KV_HEADS + kv_head
        inside = present[:, None] & (d[None, :] < DIM)
        keys = tl.load(cache + slot[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        scores = tl.dot(rows, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        visible = present[None, :] & (seen[None, :] <= position[:, None])
        if SPLIT:
            visible = visible & (seen[None, :] >= part * span)
        if window > 0:
            visible = visible & (seen[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(best - safe)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(
            cache + (slot + PAGE * KV_HEADS)[:, None] * DIM + d[None, :], mask=inside, other=0.0
        )
        acc = acc * shrink[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision=PRECISION
        )
        best = higher
    store = valid[:, None] & (d[None, :] < DIM)
    if SPLIT:
        place = part.to(tl.int64) * num_rows * heads + at
        tl.store(partial + place[:, None] * DIM + d[None, :], acc, mask=store)
        tl.store(maxima + place, best, mask=valid)
        tl.store(sums + place, total, mask=valid)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + at[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=store)


@triton.jit(do_not_specialize=["singles", "spans", "num_rows"])
def combine(
    partial,
    maxima,
    sums,
    out,
    singles,
    spans,
    num_rows,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """One head of one single row: the spans' results weighted by their softmax sums."""
    row = tl.load(singles + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, DIM_PAD)
    best = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM_PAD], tl.float32)
    for part in range(spans):
        place = (part * num_rows + row) * HEADS + head
        own = tl.load(maxima + place)
        higher = tl.maximum(best, own)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        before = tl.exp2(best - safe)
        now = tl.exp2(own - safe)
        total = total * before + tl.load(sums + place) * now
        piece = tl.load(partial + place * DIM + d, mask=d < DIM, other=0.0)
        acc = acc * before + piece * now
        best = higher
    at = (row * HEADS + head) * DIM
    tl.store(out + at + d, (acc / total).to(out.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize=["starts", "tables", "table_stride", "layer_stride", "capacity"])
def list_pages(
    tables,
    table_stride,
    layer_stride,
    starts,
    pages,
    capacity,
    BLOCK: tl.constexpr,
):
    """pages[layer, starts[i] + p] = tables[i, layer, p] for every page p that sequence i has;
    `pages` holds `capacity` ids per layer."""
    sequence = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    first = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - first
    source = tables + sequence * table_stride + layer * layer_stride
    target = pages + layer * capacity + first
    for begin in range(0, count, BLOCK):
        p = begin + tl.arange(0, BLOCK)
        tl.store(target + p, tl.load(source + p, mask=p < count, other=0), mask=p < count)
