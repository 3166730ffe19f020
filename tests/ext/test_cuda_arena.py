"""Attention over pages at the far end of a large arena, whose elements no 32-bit number counts."""

import numpy as np
import pytest
import torch

from ext.ops import Attention, Cache, Geometry, Place
from ext.reference import TorchOps

pytest.importorskip("triton", reason="needs triton")

from ext.select import select_ops

pytestmark = pytest.mark.gpu
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
ARENA_BYTES = 5 << 30
NEAR = 200


@pytest.mark.parametrize("attention", ["triton", "flashinfer"])
@pytest.mark.parametrize(
    ("new", "contexts"), [([1, 1, 1], [700, 16, 300]), ([1, 40, 1], [90, 500, 17])]
)
def test_pages_beyond_two_billion_elements_are_found(
    attention: str, new: list[int], contexts: list[int]
) -> None:
    if attention == "flashinfer":
        pytest.importorskip("flashinfer")
    torch.manual_seed(0)
    ops = select_ops("cuda:0", "native", 0, "auto", attention)  # type: ignore[arg-type]
    arena = torch.empty(ARENA_BYTES, dtype=torch.uint8, device="cuda").view(torch.bfloat16)
    far = arena.view(-1, 2, PAGE, KV_HEADS, DIM)
    assert far.numel() > 1 << 31
    near = torch.randn(NEAR, 2, PAGE, KV_HEADS, DIM, device="cuda").bfloat16()
    far[-NEAR:] = near
    columns = -(-max(contexts) // PAGE)
    ids = np.random.default_rng(0).permutation(NEAR)[: len(new) * columns]
    tables = ids.reshape(len(new), 1, columns).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    q = torch.randn(sum(new), HEADS * DIM, device="cuda")
    k, v = torch.randn(2, sum(new), KV_HEADS * DIM, device="cuda")
    how = Attention(DIM**-0.5)
    found = []
    for which, data, first in (
        (TorchOps("cuda"), near.float(), 0),
        (ops, far, len(far) - NEAR),
    ):
        place = Geometry(starts, np.array(contexts, np.int32), tables + np.int32(first))
        plan = which.plan(place)
        found.append(which.attend(q, k, v, how, Place(Cache(data, PAGE), 0, plan)).float())
    assert (found[1] - found[0]).norm() <= 2e-2 * found[0].norm()
