"""Activations at the branches of chains, kept in pages beside keys and values.

Prompts that variants share are computed once up to where their chains part: what stands there is
kept by full pages, and put back where another variant's step enters.
"""

import torch
from torch import Tensor

from ext.ops import Cache
from workers.batcher import Stage, Step
from workers.memory import KvMemory
from workers.requests import Requests
from workers.running import Running


class Boundaries:
    """Keeps and restores the boundary activations of requests' pages."""

    def __init__(self, memory: KvMemory, requests: Requests) -> None:
        self._page = memory.page
        self._requests = requests

    def keep(self, running: Running, stage: Stage) -> None:
        """Keep the activations of full prompt pages where other chains part from this one."""
        for i in stage.steps:
            step = running.wave.steps[i]
            chain = step.request.chain
            if not step.request.is_prefilling or stage.last not in chain.branches:
                continue
            if stage.last >= chain.full_depth:
                continue
            first = -(-step.span.first // self._page)
            for column in range(first, step.end // self._page):
                row = int(running.wave.starts[i]) + column * self._page - step.span.first
                self._store(running, step, stage.last, column, row)

    def _store(self, running: Running, step: Step, depth: int, column: int, row: int) -> None:
        flat = _as_floats(running.cache)
        width = step.request.chain.width(depth)
        x = running.x(width)[row : row + self._page].reshape(-1)
        pages = -(-x.numel() // flat.shape[1])
        ids = self._requests.keep_boundary(step.request, column, depth, pages)
        if ids is not None:
            padded = x.new_zeros(pages * flat.shape[1])
            padded[: x.numel()] = x
            flat[torch.from_numpy(ids).long()] = padded.view(pages, -1)

    def restore(self, running: Running) -> None:
        """Put kept activations where steps enter above the bottom."""
        flat = _as_floats(running.cache)
        for i, step in enumerate(running.wave.steps):
            if step.span.depth == 0:
                continue
            width = step.request.chain.width(step.span.depth)
            x = running.x(width)
            for column in range(step.span.first // self._page, step.end // self._page):
                ids = step.request.held[column].boundaries[step.span.depth]
                row = int(running.wave.starts[i]) + column * self._page - step.span.first
                kept = flat[torch.from_numpy(ids).long()].view(-1)[: self._page * width]
                x[row : row + self._page] = kept.view(self._page, -1)


def _as_floats(cache: Cache) -> Tensor:
    """Pages as float32 [pages, floats of a page], whatever KV they hold: activations stay exact."""
    return cache.data.view(len(cache.data), -1).view(torch.float32)
