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

_CANDIDATES = 1024


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
        self, logits: Tensor, requests: Sequence[Request]
    ) -> tuple[list[int], dict[int, Logprobs]]:
        """The next token of each row of logits [n, vocabulary] float32, and logprobs by row."""
        raw = logits
        shaped = [i for i, r in enumerate(requests) if _is_shaped(r.sampling)]
        if shaped:
            logits = logits.clone()
            for i in shaped:
                self._shape(logits[i, : requests[i].chain.vocabulary], requests[i])
        tokens = self._argmax(logits).tolist()
        drawn = [i for i, r in enumerate(requests) if r.sampling.temperature > 0]
        if drawn:
            chosen = _draw(logits[drawn], [requests[i] for i in drawn])
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
            kept = torch.tensor(s.allowed_token_ids)
            values = row[kept].clone()
            row.fill_(-torch.inf)
            row[kept] = values
        if s.logit_bias:
            ids, values = zip(*s.logit_bias, strict=True)
            row[torch.tensor(ids)] += torch.tensor(values)
        if request.outputs < s.min_tokens and s.stop_token_ids:
            row[[token for token in s.stop_token_ids if token < len(row)]] = -torch.inf
        if _has_penalties(s):
            counts = self._count(request, len(row))
            if s.repetition_penalty != 1.0:
                seen = (counts.output > 0) | counts.prompt
                scaled = torch.where(
                    row > 0, row / s.repetition_penalty, row * s.repetition_penalty
                )
                row.copy_(torch.where(seen, scaled, row))
            row -= s.frequency_penalty * counts.output
            row -= s.presence_penalty * (counts.output > 0)

    def _count(self, request: Request, vocabulary: int) -> _Counts:
        counts = self._counts.get(request.id)
        if counts is None:
            prompt = request.length - request.outputs
            own = request.tokens[request.chain.virtual : prompt].astype(np.int64)
            seen = torch.zeros(vocabulary, dtype=torch.bool)
            seen[torch.from_numpy(own)] = True
            counts = _Counts(torch.zeros(vocabulary), seen, prompt)
            self._counts[request.id] = counts
        new = torch.from_numpy(request.tokens[counts.upto : request.length].astype(np.int64))
        counts.output.index_add_(0, new, torch.ones(len(new)))
        counts.upto = request.length
        return counts


def _is_shaped(s: Sampling) -> bool:
    return bool(s.logit_bias or s.allowed_token_ids or s.min_tokens) or _has_penalties(s)


def _has_penalties(s: Sampling) -> bool:
    return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0


def uniform(seed: int, number: int) -> float:
    """Draw `number` of a seed, in [0, 1): a hash, so draws need no state and no order."""
    packed = struct.pack("<qq", seed, number)
    bits = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


def _draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Sample each row at its temperature and limits."""
    s = [r.sampling for r in requests]
    temperatures = torch.tensor([x.temperature for x in s])[:, None]
    probabilities = torch.softmax(logits / temperatures, dim=1)
    draws = [uniform(r.sampling.seed, r.outputs) for r in requests]
    min_p = torch.tensor([x.min_p for x in s])[:, None]
    if bool((min_p > 0).any()):
        floor = probabilities.amax(1, keepdim=True) * min_p
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    limited = [i for i, x in enumerate(s) if x.top_k > 0 or x.top_p < 1.0]
    free = [i for i in range(len(s)) if i not in set(limited)]
    tokens = [0] * len(s)
    if free:
        for i, token in zip(
            free, _invert(probabilities[free], [draws[i] for i in free]), strict=True
        ):
            tokens[i] = token
    for i in limited:
        tokens[i] = _draw_limited(probabilities[i], s[i], draws[i])
    return tokens


def _draw_limited(row: Tensor, s: Sampling, draw: float) -> int:
    """Sample from the top_k best and, of these, the fewest that hold top_p of the mass."""
    vocabulary = len(row)
    count = min(s.top_k or vocabulary, vocabulary)
    head = min(count, _CANDIDATES)
    values, ids = torch.topk(row, head)
    if head < count and float(values.sum()) < s.top_p * float(row.sum()):
        values, ids = torch.topk(row, count)
    mass = values.sum() if s.top_k else row.sum()
    if s.top_p < 1.0:
        before = torch.cumsum(values, 0) - values
        kept = int((before < s.top_p * mass).sum())
        values, ids = values[: max(1, kept)], ids[: max(1, kept)]
    return int(ids[_invert(values[None], [draw])[0]])


def _invert(weights: Tensor, draws: Sequence[float]) -> list[int]:
    """Index of each row of weights [n, m] >= 0 whose share of the sum holds the draw."""
    sums = torch.cumsum(weights.double(), 1)
    targets = torch.tensor(draws, dtype=torch.float64)[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, targets, right=True)[:, 0]
    last = weights.shape[1] - 1 - (weights > 0).flip(1).int().argmax(1)
    return torch.minimum(found, last).tolist()


def logprobs_of(logits: Tensor, tokens: Sequence[int], best: int) -> list[Logprobs]:
    """Natural-log probabilities of `tokens` under logits [n, vocabulary], with the `best` best."""
    logs = torch.log_softmax(logits, dim=1)
    own = logs.gather(1, torch.tensor(tokens)[:, None])
    ranks = ((logs > own).sum(1) + 1).tolist()
    values, ids = torch.topk(logs, best, dim=1) if best else (logs[:, :0], logs[:, :0])
    return [
        Logprobs(token, value, rank, tuple(map(int, i)), tuple(v))
        for token, value, rank, i, v in zip(
            tokens, own[:, 0].tolist(), ranks, ids.tolist(), values.tolist(), strict=True
        )
    ]
