"""Row by row work on CUDA, in Triton: norms, activations, and what ends a linear layer."""

import triton
import triton.language as tl


@triton.jit
def norm_rows(
    x,
    out,
    width,
    eps,
    weight,
    bias,
    slots,
    weights,
    biases,
    HAS_BIAS: tl.constexpr,
    LAYER: tl.constexpr,
    SLOTTED: tl.constexpr,
    ADD: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
):
    """out[row] = norm(x[row]) (ADD: +=). SLOTTED: a row with slot s > 0 takes the weights at the
    addresses weights[s], biases[s] (0: none) in place of the norm's own."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH_PAD)
    inside = c < width
    values = tl.load(x + row * width + c, mask=inside, other=0.0).to(tl.float32)
    if LAYER:
        values = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    w = weight
    shift = tl.zeros([WIDTH_PAD], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + c, mask=inside, other=0.0)
    if SLOTTED:
        slot = tl.load(slots + row)
        if slot > 0:
            w = tl.load(weights + slot).to(tl.pointer_type(tl.float32))
            address = tl.load(biases + slot)
            shift = tl.zeros([WIDTH_PAD], tl.float32)
            if address != 0:
                shift = tl.load(address.to(tl.pointer_type(tl.float32)) + c, mask=inside, other=0.0)
    values = values * tl.load(w + c, mask=inside, other=0.0) + shift
    at = out + row * width + c
    if ADD:
        values += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish_rows(
    y,
    out,
    width,
    bias,
    slots,
    gains,
    biases,
    HAS_BIAS: tl.constexpr,
    SLOTTED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[row] = gain * y[row] + bias (ADD: +=), float32. A row with slot s > 0 takes the vectors
    at the addresses gains[s] (0: ones) and biases[s] (0: the layer's own)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    values = tl.load(y + row * width + c, mask=inside, other=0.0)
    shift = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + c, mask=inside, other=0.0)
    if SLOTTED:
        slot = tl.load(slots + row)
        if slot > 0:
            gain = tl.load(gains + slot)
            if gain != 0:
                values *= tl.load(gain.to(tl.pointer_type(tl.float32)) + c, mask=inside, other=0.0)
            own = tl.load(biases + slot)
            if own != 0:
                shift = tl.load(own.to(tl.pointer_type(tl.float32)) + c, mask=inside, other=0.0)
    values += shift
    at = out + row * width + c
    if ADD:
        values += tl.load(at, mask=inside, other=0.0)
    tl.store(at, values, mask=inside)


@triton.jit
def activate(
    gate,
    up,
    out,
    count,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = act(gate) * up, or act(up). KIND 0: silu, 1: gelu, 2: gelu by tanh."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    b = tl.load(up + i, mask=inside, other=0.0)
    a = b
    if GATED:
        a = tl.load(gate + i, mask=inside, other=0.0)
    if KIND == 0:
        curved = a / (1.0 + tl.exp(-a))
    elif KIND == 1:
        curved = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (a + 0.044715 * a * a * a)
        curved = a / (1.0 + tl.exp(-2.0 * inner))
    if GATED:
        curved *= b
    tl.store(out + i, curved.to(out.dtype.element_ty), mask=inside)
