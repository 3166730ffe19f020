"""The bytes behind the pages of a device: one arena, seen as pages of every shape that is served.

Keys and values of a wave are written by the kernels; what a request brings or takes over before it
starts, here."""

from collections.abc import Sequence

import numpy as np
import torch

from ext.memory import commit, host_memory
from ext.ops import Cache, Ops
from workers.chains import KvElement, KvShape
from workers.memory import KvMemory
from workers.pieces import Prefix
from workers.prefix import Column
from workers.requests import Request

# At a time: a request that comes meanwhile waits for some milliseconds.
_COMMITTED_BYTES = 4 << 20
# With less left, pages are taken only as they are written.
_SPARED_BYTES = 1 << 30
_DTYPES: dict[KvElement, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Caches:
    """The pages of `memory`. `pads`: rows that pad a batch write to a page behind the arena, of
    whatever shape."""

    def __init__(self, ops: Ops, memory: KvMemory, *, pads: bool) -> None:
        self._ops = ops
        self._memory = memory
        self._pads = pads
        spare = memory.arena.slab_bytes if pads else 0
        self._arena = ops.memory(memory.arena.total_bytes + spare)
        self._committed = 0
        self._by_shape: dict[KvShape, Cache] = {}

    def of(self, shape: KvShape) -> Cache:
        """The arena seen as pages of a shape, with one more for padding where rows are padded."""
        if shape not in self._by_shape:
            size = self._memory.page_bytes(shape)
            count = self._memory.arena.total_bytes // size + self._pads
            data = self._arena[: count * size].view(_DTYPES[shape.element])
            page = self._memory.page
            data = data.view(count, 2, page, shape.kv_heads, shape.head_dim)
            self._by_shape[shape] = Cache(data, page)
        return self._by_shape[shape]

    def commit(self) -> bool:
        """Back some more of the pages with memory, ahead of their first use, which then does not
        wait for it; False when nothing is left to do, or the system refuses, or has little left."""
        memory, first = self._arena, self._committed
        self._committed += _COMMITTED_BYTES
        if memory.device.type != "cpu" or first >= memory.nbytes:
            return False
        if host_memory().available < _SPARED_BYTES:
            return False
        return commit(memory, first, self._committed)

    @torch.inference_mode()
    def fill(self, request: Request, prefixes: Sequence[Prefix]) -> None:
        """Write the given keys and values of a request that starts, one prefix for each layer, but
        for those it found, and copy the page that it would write into."""
        if request.copied is not None:
            self._copy(request, request.copied)
        chain, page = request.chain, self._memory.page
        first, last = request.found, chain.seeded
        if first >= last:
            return
        positions = np.arange(first, last)
        table = self._memory.table(request.slot, chain.num_layers, self._memory.pages(last))
        data = self.of(chain.kv).data
        offsets = torch.from_numpy(positions % page)
        for layer, prefix in enumerate(prefixes):
            pages = torch.from_numpy(table[layer, positions // page].astype(np.int64))
            data[pages, 0, offsets] = prefix.keys[first:last].to(data.dtype)
            data[pages, 1, offsets] = prefix.values[first:last].to(data.dtype)

    def _copy(self, request: Request, column: Column) -> None:
        """Fill the last page of a prompt with that of another request, in every layer."""
        layers, last = request.chain.num_layers, (request.length - 1) // self._memory.page
        source = np.empty(layers, np.int32)
        column.fill(source)
        target = self._memory.table(request.slot, layers, last + 1)[:, last]
        data = self.of(request.chain.kv).data
        data[self._ops.indices(target)] = data[self._ops.indices(source)]
