"""The two ends of a chain, where rows meet tokens: embeddings and logits, with what variants have
upon them (soft prompts, rows of their own, added tokens, low-rank pieces)."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ext.ops import Matrix
from workers.attachments import Worn
from workers.block import EmbedUnit, HeadUnit
from workers.layers import Context, normed
from workers.pieces import Prompt, ResidentAttachment, TokenLowRank, TokenRows


def embed(unit: EmbedUnit, tokens: np.ndarray, worn: Worn, at: Context) -> Tensor:
    """tokens int64 [rows] -> x [rows, hidden]. Negative tokens are virtual, those beyond the table
    added; whoever has no row for a token gets another's, and only admission lets it come so far."""
    known = (tokens >= 0) & (tokens < unit.tokens.out_features)
    x = look_up(unit, np.where(known, tokens, 0), at)
    for pieces, first, last in worn.embed:
        own = tokens[first:last]
        for table, scale, index in _replacements(pieces, own, unit.scale):
            rows = np.flatnonzero(index >= 0)
            if len(rows):
                ids = np.zeros_like(tokens)
                ids[first + rows] = index[rows]
                at_rows = torch.from_numpy(first + rows)
                x[at_rows] = _look_up(unit, table, ids, scale, at)[at_rows]
        for low in pieces.all(TokenLowRank, "tokens"):
            _add_low_rank(x, low, tokens, slice(first, last), at)
    return x


def look_up(unit: EmbedUnit, tokens: np.ndarray, at: Context) -> Tensor:
    """What the unit's own table has for tokens int64 [rows]: x [rows, hidden]."""
    return _look_up(unit, unit.tokens, tokens, unit.scale, at)


def _look_up(unit: EmbedUnit, table: Matrix, ids: np.ndarray, scale: float, at: Context) -> Tensor:
    return at.ops.embed(ids, table, scale, unit.positions, at.plan, unit.offset)


def _replacements(
    pieces: ResidentAttachment, tokens: np.ndarray, scale: float
) -> Iterator[tuple[Matrix, float, np.ndarray]]:
    """Tables in place of the unit's own: (table, scale, row of each token or -1)."""
    if prompt := pieces.one(Prompt, "tokens"):
        yield prompt.table, 1.0, np.where(tokens < 0, -1 - tokens, -1)
    if rows := pieces.one(TokenRows, "tokens"):
        ids = rows.ids.numpy()
        index = np.minimum(np.searchsorted(ids, tokens), len(ids) - 1)
        yield rows.table, scale, np.where(ids[index] == tokens, index, -1)


def _add_low_rank(
    x: Tensor, low: TokenLowRank, tokens: np.ndarray, rows: slice, at: Context
) -> None:
    known = (tokens >= 0) & (tokens < low.table.out_features)
    ids = np.where(known, tokens, 0)
    inner = at.ops.embed(ids, low.table, low.scale, None, at.plan, 0)
    if not known[rows].all():
        inner[torch.from_numpy(~known)] = 0.0
    at.ops.accumulate(x[rows], inner[rows], low.up, None)


def head(unit: HeadUnit, x: Tensor, worn: Worn, at: Context) -> Tensor:
    """x [rows, hidden] -> logits [rows, vocabulary]; rows of variants with fewer tokens than the
    batch's widest end in -inf."""
    logits = at.ops.project(x, unit.norm, (unit.output,), (worn.linears.get("head"),))[0]
    if worn.head:
        logits = _with_own_rows(unit, x, logits, worn, at)
    return logits if unit.scale == 1.0 else logits.mul_(unit.scale)


def best(unit: HeadUnit, x: Tensor, worn: Worn, at: Context) -> Tensor:
    """x [rows, hidden] -> the likeliest token of each row, int64 [rows]: the argmax of `head`."""
    if ends_in_best(unit, worn):
        return at.ops.best(x, unit.norm, unit.output, worn.linears.get("head"))
    return at.ops.argmax(head(unit, x, worn, at))


def ends_in_best(unit: HeadUnit, worn: Worn) -> bool:
    """Whether the likeliest tokens are what its one linear gives most for."""
    return unit.scale == 1.0 and not worn.head


def _with_own_rows(unit: HeadUnit, x: Tensor, logits: Tensor, worn: Worn, at: Context) -> Tensor:
    width = max(logits.shape[1], *(run.rows.width for run in worn.head))
    if width > logits.shape[1]:
        wide = logits.new_full((len(logits), width), -torch.inf)
        wide[:, : logits.shape[1]] = logits
        logits = wide
    y = normed(x, unit.norm, at.ops)
    for run in worn.head:
        part = y[run.first : run.last]
        (own,) = at.ops.project(part, None, (run.rows.linear,), (run.patch,))
        logits[run.first : run.last, run.rows.ids.to(own.device)] = own
    return logits
