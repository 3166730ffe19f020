"""Page lists as FlashInfer reads them: a batch's page ids one after the other, layer by layer.

Where each sequence's begin and how full its last page is follows from the contexts, on the host;
the ids are gathered on the device, where the page tables are."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ext.cuda import attention
from ext.cuda.launches import Kernels
from ext.cuda.parcel import to_device

_kernels = Kernels(attention)
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Bounds:
    """Sequence i has the pages `starts[i]` up to `starts[i + 1]` of a list, int32 [S + 1], the last
    of which holds `last[i]` positions, 1 up to a whole page, int32 [S]."""

    starts: np.ndarray
    last: np.ndarray

    @property
    def total(self) -> int:
        """Pages of all sequences."""
        return int(self.starts[-1])


def bounds(contexts: np.ndarray, page: int) -> Bounds:
    """How sequences of these contexts (none is empty) share a list of pages of `page` positions."""
    counts = -(-contexts // page)
    starts = np.zeros(len(contexts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return Bounds(starts, (contexts - (counts - 1) * page).astype(np.int32))


def listed(tables: Tensor, bound: Bounds, pages: Tensor) -> Tensor:
    """Fill `pages` [layers, at least bound.total] int32 from page tables [S, layers, P]."""
    sequences, layers, _ = tables.shape
    _kernels.list_pages[(sequences, layers)](
        tables,
        tables.stride(0),
        tables.stride(1),
        to_device(bound.starts, tables.device),
        pages,
        pages.stride(0),
        BLOCK=_BLOCK,
    )
    return pages


def room(layers: int, pages: int, device: torch.device) -> Tensor:
    """Memory for the lists of `layers`, `pages` ids each."""
    return torch.zeros((layers, pages), dtype=torch.int32, device=device)
