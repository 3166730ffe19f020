"""What was measured of a variant that is not served exactly, as its manifest keeps it."""

import msgspec


class Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured value, and where it lies in 95 % of the samples that could have been drawn."""

    value: float
    low: float
    high: float


class Measured(
    msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True
):
    """How an approximate chain compares with the exact one on held-out text.

    `corpus` is the digest of the text as token ids, `name` what it was called; `tokens` of it, in
    `sequences`, were predicted by both chains. `kl` is the mean divergence (nats) of the next
    token's distribution from the exact one, `agreement` the share of positions with the same best
    token, `perplexity` that of the served chain and `exact_perplexity` that of the exact one.
    `score` and `exact_score` are of a task where one was given. `kept_bytes` are the tensors that
    the variant has of its own, `saved_bytes` what it would have had beside them if kept exactly."""

    corpus: str
    name: str
    sequences: int
    tokens: int
    created: float
    kl: Interval
    agreement: Interval
    perplexity: Interval
    exact_perplexity: Interval
    task: str | None = None
    score: Interval | None = None
    exact_score: Interval | None = None
    kept_bytes: int = 0
    saved_bytes: int = 0
