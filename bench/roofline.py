"""The least time that a machine needs for a load, from its measured limits. Pure.

A wave of `rows` rows over some weights takes at least

    max(bytes read / read bandwidth, floating-point operations / multiply-add rate)

where bytes are the weights of every block that the wave runs, once (2 or 4 per weight, as they are
stored), and the keys and values that its rows attend to; operations are 2 per weight and row.
A load of S streams that start together costs one prefill of all prompts (the head runs for the last
row of each prompt alone) and `new - 1` decoding waves of S rows with a mean context of
prompt + new / 2. The sum over these waves is the bound; a cell's share of it is bound / measured.
"""

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """What the machine can do at most, all cores together. `rounded_flops_per_s` is what is left to
    products whose activations may be rounded to bfloat16."""

    read_bytes_per_s: float
    flops_per_s: float
    rounded_flops_per_s: float = 0.0

    @property
    def rounded(self) -> "Limits":
        """The limits of who rounds."""
        flops = max(self.flops_per_s, self.rounded_flops_per_s)
        return msgspec.structs.replace(self, flops_per_s=flops)


class Weights(msgspec.Struct, frozen=True):
    """What a load computes with. `body_bytes` and `head_bytes` are those of the base model,
    `element_bytes` the size of its weights; `own_bytes` are further weights that a decoding wave
    reads because variants do not share them, `own_weights` those that each row multiplies with on
    top. `kv_bytes` are those of one token."""

    body_bytes: int
    head_bytes: int
    element_bytes: int
    kv_bytes: int
    own_bytes: int = 0
    own_weights: float = 0.0

    @property
    def body_weights(self) -> float:
        """Weights that every row multiplies with."""
        return self.body_bytes / self.element_bytes + self.own_weights

    @property
    def head_weights(self) -> float:
        """Weights of the head."""
        return self.head_bytes / self.element_bytes


class Shape(msgspec.Struct, frozen=True):
    """A load: `streams` requests at once, each of `prompt` and `new` tokens."""

    streams: int
    prompt: int
    new: int


def least_seconds(shape: Shape, weights: Weights, limits: Limits) -> float:
    """The bound of the module's text."""
    return prefill_seconds(shape, weights, limits) + (shape.new - 1) * decode_seconds(
        shape, weights, limits
    )


def prefill_seconds(shape: Shape, weights: Weights, limits: Limits) -> float:
    """All prompts, computed together."""
    rows = shape.streams * shape.prompt
    flops = 2 * (rows * weights.body_weights + shape.streams * weights.head_weights)
    read = weights.body_bytes + weights.head_bytes + weights.own_bytes
    return max(flops / limits.flops_per_s, read / limits.read_bytes_per_s)


def decode_seconds(shape: Shape, weights: Weights, limits: Limits) -> float:
    """One wave of one token per stream."""
    context = shape.prompt + shape.new / 2
    read = weights.body_bytes + weights.head_bytes + weights.own_bytes
    read += shape.streams * context * weights.kv_bytes
    flops = 2 * shape.streams * (weights.body_weights + weights.head_weights)
    return max(flops / limits.flops_per_s, read / limits.read_bytes_per_s)
