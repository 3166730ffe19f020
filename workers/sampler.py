"""Chooses next tokens from logits: greedy, temperature, top-k, top-p, min-p, penalties, bias,
seeds.

One call per wave. Rows that are plainly greedy cost one argmax for all; the others are shaped one
by one where they ask for it and drawn together. A draw depends on (seed, number of the draw) alone,
so a request's tokens do not depend on what shares its batch. Order of operations as in vLLM: bias
and penalties, temperature, min-p, top-k, top-p."""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.requests import Request
from workers.wire import Logprobs, RequestId, Sampling

# How many of the best are looked for at first, and where those do not suffice, before all are.
_CANDIDATES = (128, 2048, 16384)


@dataclass(eq=False, slots=True)
class _Counts:
    """Tokens seen so far [vocabulary]: how often in the output, whether in the prompt."""

    output: Tensor
    prompt: Tensor
    upto: int


class Sampler:
    """Samples for many requests; remembers token counts of those with penalties. `argmax` is the
    kernels' own."""

    def __init__(self, argmax: Callable[[Tensor], Tensor]) -> None:
        self._argmax = argmax
        self._counts: dict[RequestId, _Counts] = {}

    def forget(self, request: RequestId) -> None:
        """Drop what is remembered of a request."""
        self._counts.pop(request, None)

    def choose(
        self, logits: Tensor, requests: Sequence[Request], numbers: Sequence[int] | None = None
    ) -> tuple[list[int], dict[int, Logprobs]]:
        """The next token of each row of logits [n, vocabulary] float32, and logprobs by row: each
        the output token of that number, by default its request's next one. The rows stay on their
        device: only what was chosen is asked of it."""
        raw = logits
        numbers = [r.outputs for r in requests] if numbers is None else numbers
        shaped = [i for i, r in enumerate(requests) if is_shaped(r.sampling)]
        if shaped:
            logits = logits.clone()
            for i in shaped:
                self._shape(logits[i, : requests[i].chain.vocabulary], requests[i])
        drawn = [i for i, r in enumerate(requests) if r.sampling.temperature > 0]
        everything = len(drawn) == len(requests)
        tokens: list[int] = [0] * len(drawn) if everything else self._argmax(logits).tolist()
        if drawn:
            rows = logits if everything else logits[drawn]
            draws = [uniform(requests[i].sampling.seed, numbers[i]) for i in drawn]
            chosen = _draw(rows, [requests[i].sampling for i in drawn], draws)
            for i, token in zip(drawn, chosen, strict=True):
                tokens[i] = token
        wanted = [i for i, r in enumerate(requests) if r.sampling.logprobs >= 0]
        logprobs = {
            i: logprobs_of(raw[i : i + 1], [tokens[i]], requests[i].sampling.logprobs)[0]
            for i in wanted
        }
        return tokens, logprobs

    def _shape(self, row: Tensor, request: Request) -> None:
        """Apply bias, allowed tokens, minimum length and penalties to a row, in place."""
        s = request.sampling
        if s.allowed_token_ids:
            kept = torch.tensor(s.allowed_token_ids, device=row.device)
            values = row[kept].clone()
            row.fill_(-torch.inf)
            row[kept] = values
        if s.logit_bias:
            ids, values = zip(*s.logit_bias, strict=True)
            row[torch.tensor(ids, device=row.device)] += torch.tensor(values, device=row.device)
        if request.outputs < s.min_tokens and s.stop_token_ids:
            row[[token for token in s.stop_token_ids if token < len(row)]] = -torch.inf
        if _has_penalties(s):
            counts = self._count(request, row)
            if s.repetition_penalty != 1.0:
                seen = (counts.output > 0) | counts.prompt
                scaled = torch.where(
                    row > 0, row / s.repetition_penalty, row * s.repetition_penalty
                )
                row.copy_(torch.where(seen, scaled, row))
            row -= s.frequency_penalty * counts.output
            row -= s.presence_penalty * (counts.output > 0)

    def _count(self, request: Request, row: Tensor) -> _Counts:
        counts = self._counts.get(request.id)
        if counts is None:
            prompt = request.length - request.outputs
            own = torch.from_numpy(request.tokens[request.chain.virtual : prompt].astype(np.int64))
            seen = torch.zeros(len(row), dtype=torch.bool, device=row.device)
            seen[own.to(row.device)] = True
            counts = _Counts(torch.zeros(len(row), device=row.device), seen, prompt)
            self._counts[request.id] = counts
        new = torch.from_numpy(request.tokens[counts.upto : request.length].astype(np.int64))
        ones = torch.ones(len(new), device=row.device)
        counts.output.index_add_(0, new.to(row.device), ones)
        counts.upto = request.length
        return counts


def is_greedy(s: Sampling) -> bool:
    """Whether the likeliest token is all that a request wants of its logits."""
    scored = s.logprobs >= 0 or s.prompt_logprobs >= 0
    return s.temperature <= 0 and not scored and not is_shaped(s)


def is_shaped(s: Sampling) -> bool:
    """Whether logits are changed by what a request asks for, or by its tokens so far."""
    return bool(s.logit_bias or s.allowed_token_ids or s.min_tokens) or _has_penalties(s)


def _has_penalties(s: Sampling) -> bool:
    return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0


def uniform(seed: int, number: int) -> float:
    """Draw `number` of a seed, in [0, 1): a hash, so draws need no state and no order."""
    packed = struct.pack("<qq", seed, number)
    bits = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


def _draw(logits: Tensor, s: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Sample each row at its temperature and limits."""
    probabilities = torch.softmax(logits / _column([x.temperature for x in s], logits), dim=1)
    if any(x.min_p > 0 for x in s):
        floor = probabilities.amax(1, keepdim=True) * _column([x.min_p for x in s], logits)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    limited = [i for i, x in enumerate(s) if x.top_k > 0 or x.top_p < 1.0]
    free = [i for i, x in enumerate(s) if x.top_k <= 0 and x.top_p >= 1.0]
    tokens = [0] * len(s)
    for some, draw in ((free, _draw_free), (limited, _draw_limited)):
        if some:
            rows = probabilities if len(some) == len(s) else probabilities[some]
            chosen = draw(rows, [s[i] for i in some], [draws[i] for i in some])
            for i, token in zip(some, chosen, strict=True):
                tokens[i] = token
    return tokens


def _draw_free(rows: Tensor, _: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Sample each row from all it has."""
    return _invert(rows, draws).tolist()


def _draw_limited(rows: Tensor, s: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Sample each row from its top_k best and, of these, the fewest that hold top_p of the mass. As
    many of the best are looked for as the row itself needs, whatever others do."""
    vocabulary = rows.shape[1]
    # One by one: torch sums a row in another order where it has several.
    sums = torch.stack([row.sum() for row in rows])
    tokens = [0] * len(s)
    left = list(range(len(s)))
    for most in (*(k for k in _CANDIDATES if k < vocabulary), vocabulary):
        tried = [i for i in left if min(s[i].top_k, vocabulary) <= most]
        if not tried:
            continue
        everything = len(tried) == len(s)
        part, masses = (rows, sums) if everything else (rows[tried], sums[tried])
        own = [s[i] for i in tried], [draws[i] for i in tried]
        for i, (token, is_held) in zip(tried, _draw_best(part, masses, most, *own), strict=True):
            if is_held:
                tokens[i] = token
                left.remove(i)
    return tokens


def _draw_best(
    rows: Tensor, sums: Tensor, most: int, s: Sequence[Sampling], draws: Sequence[float]
) -> list[list[int]]:
    """Sample each row, whose sum is known, from its `most` best, and say whether those hold all
    that it is sampled from: int64 [n, 2]."""
    values, ids = torch.topk(rows, most)
    limits = torch.tensor([x.top_k if x.top_k > 0 else most for x in s], device=rows.device)
    has_top_k = torch.tensor([x.top_k > 0 for x in s], device=rows.device)[:, None]
    place = torch.arange(most, device=rows.device)
    values = values.masked_fill(place >= limits[:, None], 0.0)
    through = torch.cumsum(values, 1)
    wanted = _column([x.top_p for x in s], rows)
    mass = wanted * torch.where(has_top_k, through[:, -1:], sums[:, None])
    # The best is always one of them; a top_p of 1 ends nothing.
    over = (through - values >= mass) & (wanted < 1.0) & (place > 0)
    found = _invert(values.masked_fill(over, 0.0), draws)[:, None]
    held = has_top_k | (through[:, -1:] >= mass) | (most == rows.shape[1])
    return torch.cat((ids.gather(1, found), held.long()), 1).tolist()


def _invert(weights: Tensor, draws: Sequence[float]) -> Tensor:
    """Index of each row of weights [n, m] >= 0 whose share of the sum holds the draw: int64 [n]."""
    sums = torch.cumsum(weights.double(), 1)
    targets = torch.tensor(draws, dtype=torch.float64, device=weights.device)[:, None]
    found = torch.searchsorted(sums, targets * sums[:, -1:], right=True)[:, 0]
    last = weights.shape[1] - 1 - (weights > 0).flip(1).int().argmax(1)
    return torch.minimum(found, last)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """A value for each row, float32 [n, 1]."""
    return torch.tensor(values, device=like.device)[:, None]


def logprobs_of(logits: Tensor, tokens: Sequence[int], best: int) -> list[Logprobs]:
    """Natural-log probabilities of `tokens` under logits [n, vocabulary], with the `best` best."""
    logs = torch.log_softmax(logits, dim=1)
    own = logs.gather(1, torch.tensor(tokens, device=logs.device)[:, None])
    ranks = ((logs > own).sum(1) + 1).tolist()
    values, ids = torch.topk(logs, best, dim=1) if best else (logs[:, :0], logs[:, :0])
    return [
        Logprobs(token, value, rank, tuple(map(int, i)), tuple(v))
        for token, value, rank, i, v in zip(
            tokens, own[:, 0].tolist(), ranks, ids.tolist(), values.tolist(), strict=True
        )
    ]
