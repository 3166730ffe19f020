"""FlashInfer's two wrappers in plain torch, by what their documentation says: what they check, what
they read when they are planned, and what when they run. On a CPU they stand in for the library."""

import torch
from torch import Tensor


class _Wrapper:
    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert kv_layout == "NHD"
        assert workspace.dtype is torch.uint8
        assert not workspace.any(), "workspaces begin as zeros"

    def _planned(
        self, lists: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, ...], asked: dict
    ) -> None:
        starts, pages, last = lists
        for numbers in lists:
            assert numbers.dtype is torch.int32
        assert starts.device.type == last.device.type == "cpu", "the host plans"
        assert bool((last >= 1).all())
        assert bool((last <= sizes[3]).all())
        self._take_lists(starts, pages, last)
        self._heads, self._kv_heads, self._dim, self._page = sizes
        self._asked = asked

    def _take_lists(self, starts: Tensor, pages: Tensor, last: Tensor) -> None:
        self._starts, self._paged_kv_indices_buf, self._last = starts, pages, last

    def _attended(self, q: Tensor, cache: Tensor, rows_of: list[int], out: Tensor) -> Tensor:
        assert q.dtype is self._asked["q_data_type"]
        assert cache.dtype is self._asked["kv_data_type"]
        assert cache.shape[1:] == (2, self._page, self._kv_heads, self._dim)
        assert q.shape == out.shape == (rows_of[-1], self._heads, self._dim)
        group = self._heads // self._kv_heads
        for i in range(len(self._last)):
            pages = self._paged_kv_indices_buf[self._starts[i] : self._starts[i + 1]].long()
            length = (len(pages) - 1) * self._page + int(self._last[i])
            both = cache[pages].transpose(0, 1).flatten(1, 2)[:, :length].float()
            keys, values = both.repeat_interleave(group, 2)
            rows = slice(rows_of[i], rows_of[i + 1])
            scores = torch.einsum("rhd,khd->hrk", q[rows].float(), keys) * self._asked["sm_scale"]
            count = rows.stop - rows.start
            at = torch.arange(length - count, length)[:, None]
            seen = torch.arange(length)[None, :]
            hidden = seen > at
            if self._asked["window_left"] >= 0:
                hidden |= seen < at - self._asked["window_left"]
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[rows] = torch.einsum("hrk,khd->rhd", weights, values).to(out.dtype)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_tensor_cores, "whatever the group"
        self._fixed = None
        if use_cuda_graph:
            assert paged_kv_indptr_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            self._fixed = (paged_kv_indptr_buffer, paged_kv_last_page_len_buffer)
            self._paged_kv_indices_buf = paged_kv_indices_buffer

    def reset_workspace_buffer(self, float_workspace: Tensor, int_workspace: Tensor) -> None:
        assert float_workspace.dtype is int_workspace.dtype is torch.uint8

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, *sizes: int, **asked: object
    ) -> None:
        self._planned((indptr, indices, last_page_len), sizes, asked)

    def _take_lists(self, starts: Tensor, pages: Tensor, last: Tensor) -> None:
        if self._fixed is None:
            super()._take_lists(starts, pages, last)
            return
        if len(last) != len(self._fixed[1]):
            raise ValueError("The batch size should be fixed in cudagraph mode")
        self._starts, self._last = self._fixed
        self._starts.copy_(starts)
        self._last.copy_(last)
        self._paged_kv_indices_buf[: len(pages)].copy_(pages)

    def run(self, q: Tensor, paged_kv_cache: Tensor, *, out: Tensor) -> Tensor:
        return self._attended(q, paged_kv_cache, list(range(len(self._last) + 1)), out)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        *sizes: int,
        causal: bool = False,
        **asked: object,
    ) -> None:
        assert causal
        assert qo_indptr.dtype is torch.int32
        self._rows_of = qo_indptr.tolist()
        self._planned((paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len), sizes, asked)

    def run(self, q: Tensor, paged_kv_cache: Tensor, *, out: Tensor) -> Tensor:
        return self._attended(q, paged_kv_cache, self._rows_of, out)
