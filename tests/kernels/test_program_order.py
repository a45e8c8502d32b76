"""Programs of a launch run in any order: every operator, bitwise, in order, reversed and shuffled.

A GPU promises no order of thread blocks. The interpreter runs them one after the other, so a
result that leans on an earlier program shows only when the order changes.
"""

from __future__ import annotations

import pytest
import torch
from support.decode import SPLITS
from support.poison import poisoned_empty
from support.sanitizer import sanitize

from llama4_triton.kernels.attention_decode import AttentionDecodeConfig, attention_decode
from llama4_triton.kernels.attention_decode_schedule import decode_schedule
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.expert_weights import Experts
from llama4_triton.kernels.fp8_matmul import fp8_matmul
from llama4_triton.kernels.merge_attention import merge_attention
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm
from llama4_triton.kernels.rope import RopeTable, rope_inv_freq
from llama4_triton.kernels.rope_and_cache import Temperature, rope_and_cache

pytestmark = pytest.mark.interpreter_only

BF16 = torch.bfloat16


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def _kv():
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 6, 16, 2, 32, generator=generator).to(BF16)
    return PagedKV(k_cache=k, v_cache=v, block_table=_int32(4, 0, 2, 5, 1, 3).view(2, 3))


def _add_rms_norm():
    x, residual = torch.randn(2, 5, 300)
    return add_rms_norm(x, residual, torch.randn(300), 1e-5)


def _fp8_matmul():
    x_q, x_scale = quantize_rowwise(torch.randn(35, 64))
    w_q, w_scale = quantize_rowwise(torch.randn(140, 64))
    return x_q, x_scale, fp8_matmul(x_q, x_scale, w_q, w_scale)


def _moe(T, top_k=2, shared=True):
    """Widths that give several programs along every axis."""
    H, F, E = (80, 72, 5) if T <= 64 else (33, 17, 5)
    x, residual = torch.randn(2, T, H).to(BF16)
    experts = Experts.from_hf(torch.randn(E, H, 2 * F).to(BF16), torch.randn(E, F, H).to(BF16))
    one = Experts.dense(*(torch.randn(n, k).to(BF16) for n, k in ((F, H), (F, H), (H, F))))
    w_router = torch.randn(E, H).to(BF16)
    options = dict(w_router=w_router, residual=residual, shared=one if shared else None)
    return moe(x, experts, top_k=top_k, **options)


def _moe_few():
    return _moe(2, top_k=1)


def _moe_some():
    return _moe(37)


def _moe_some_without_shared():
    return _moe(9, top_k=1, shared=False)


def _moe_many():
    return _moe(600, top_k=1)


def _written(kv):
    """q, k, v of five tokens, their pages, positions and slots, of which one is skipped."""
    q, k, v = (torch.randn(5, heads, 32).to(BF16) for heads in (4, 2, 2))
    return q, k, v, kv, _int32(3, 9, 10, 0, 40), torch.tensor([7, -1, 30, 31, 0])


def _rope_and_cache():
    kv = _kv()
    table = RopeTable.for_chunk(rope_inv_freq(10_000.0, 32), 8)
    q = rope_and_cache(
        *_written(kv),
        rope=table,
        qk_norm_eps=1e-5,
        temperature=Temperature(attn_scale=0.1, floor_scale=8.0),
    )
    return q, kv.k_cache, kv.v_cache


def _rope_and_cache_e4m3():
    k, v = (torch.zeros(6, 16, 2, 32).to(torch.float8_e4m3fn) for _ in range(2))
    kv = PagedKV(k_cache=k, v_cache=v.view(6, 2, 32, 16), block_table=_int32(0)[None],
                 k_scale=torch.zeros(6, 16, 2), v_scale=torch.zeros(6, 16, 2),
                 layout="transposed_v")  # fmt: skip
    q = rope_and_cache(
        *_written(kv),
        rope=None,
        qk_norm_eps=1e-5,
        temperature=None,
        quantize_q=True,
    )
    return *q, kv.k_cache, kv.v_cache, kv.k_scale, kv.v_scale


def _attention_prefill():
    return attention_prefill(
        torch.randn(20, 4, 32).to(BF16), _kv(), _int32(0, 13, 20), _int32(30, 7), chunk_size=16
    )


def _attention_decode():
    """Five items, of which three and two are merged."""
    lens, kv = _int32(45, 17), _kv()
    schedule = decode_schedule(
        lens, chunk_size=0, capacity=48, num_kv_heads=2, page_size=16, split_tokens=16,
        config=SPLITS,
    )  # fmt: skip
    config = AttentionDecodeConfig(BLOCK_N=16, num_warps=4, num_stages=1)
    q = torch.randn(2, 4, 32).to(BF16)
    out, lse = attention_decode(q, kv, lens, schedule=schedule, config=config)
    return out, lse, schedule.items[:5], schedule.spans


def _merge_attention():
    return merge_attention(torch.randn(3, 5, 2, 40), torch.randn(3, 5, 2))


OPERATORS = [
    _add_rms_norm, _fp8_matmul, _moe_few, _moe_some, _moe_some_without_shared, _moe_many,
    _rope_and_cache, _rope_and_cache_e4m3, _attention_prefill, _attention_decode,
    _merge_attention,
]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__.removeprefix("_"))
def test_the_order_of_programs_does_not_matter(operator):
    results = []
    for order in ("forward", "reversed", "random"):
        torch.manual_seed(0)
        with poisoned_empty(), sanitize(order=order, seed=5):
            result = operator()
        results.append(result if isinstance(result, tuple) else (result,))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            same = a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
            assert torch.equal(*same)
            assert not a.float().isnan().any()
