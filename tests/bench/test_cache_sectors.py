"""Sectors of 32 bytes that an appended token costs in each layout and dtype: docs/attention.md."""

from __future__ import annotations

import pytest
import torch

from llama4_triton.bench.traffic import measure
from llama4_triton.kernels.paged_kv import E4M3, PagedKV
from llama4_triton.kernels.rope_and_cache import rope_and_cache

pytestmark = pytest.mark.interpreter_only
BF16, D, PAGE = torch.bfloat16, 128, 64

# (dtype, layout, scales): sectors of K and V, of one KV head, for one token and per token of a
# run that fills a page.
SECTORS = {
    (BF16, "nhd", None): (8 + 8, 8 + 8),
    (BF16, "transposed_v", None): (8 + 128, 8 + 8),
    (E4M3, "nhd", "tensor"): (4 + 4, 4 + 4),
    (E4M3, "nhd", "token"): (4 + 4 + 2, 4 + 4 + 2 * 4 / 32),
    (E4M3, "transposed_v", "tensor"): (4 + 128, 4 + 4),
    (E4M3, "transposed_v", "token"): (4 + 128 + 2, 4 + 4 + 2 * 4 / 32),
}


@pytest.mark.parametrize("dtype, layout, scales", SECTORS)
def test_sectors_of_an_appended_token(dtype, layout, scales):
    def written(T):
        q, k, v = (torch.zeros(T, 1, D, dtype=BF16) for _ in "qkv")
        shape = (2, PAGE, 1, D)
        kv = PagedKV(
            k_cache=torch.zeros(shape).to(dtype),
            v_cache=torch.zeros((2, 1, D, PAGE) if layout == "transposed_v" else shape).to(dtype),
            block_table=torch.zeros(1, 2, dtype=torch.int32),
            k_scale=_scale(scales),
            v_scale=_scale(scales),
            layout=layout,
        )
        slots = torch.arange(T) + PAGE
        traffic = measure(
            lambda: rope_and_cache(
                q, k, v, kv, slots.int(), slots, rope=None, qk_norm_eps=None, temperature=None
            )
        )
        of_q = T * D * 2
        return (traffic.unique["output"] - of_q) / 32 / T

    def _scale(kind):
        return {
            None: None,
            "tensor": torch.ones(1),
            "token": torch.ones(2, PAGE, 1),
        }[kind]

    assert (written(1), written(PAGE)) == SECTORS[dtype, layout, scales]
