"""One small call of every operator at any number of tokens: what the tests of torch.ops share.

    call = op_call("moe", 5, torch.bfloat16, 0)
    call.function(**call.inputs, **call.options)      inputs: tensors, or dataclasses of them

VARIANTS of each turn optional arguments on and off. Values of a call are the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_decode_schedule import decode_schedule
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.attention_schedule import prefill_schedule
from llama4_triton.kernels.convert_layout import convert_layout
from llama4_triton.kernels.expert_weights import Experts, quantize_experts
from llama4_triton.kernels.fp8_matmul import fp8_matmul
from llama4_triton.kernels.gather_rows import gather_rows
from llama4_triton.kernels.grouped_gemm import grouped_gemm_swiglu
from llama4_triton.kernels.grouped_gemm_combine import grouped_gemm_combine
from llama4_triton.kernels.merge_attention import merge_attention
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.quantize import quantize_groupwise, quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.rms_norm_quantize import rms_norm_quantize
from llama4_triton.kernels.rope import RopeTable, Temperature, build_rope_table, rope_inv_freq
from llama4_triton.kernels.rope_and_cache import rope_and_cache
from llama4_triton.kernels.router import router
from llama4_triton.kernels.routing import Routing, default_block_m, route, sort_by_expert
from llama4_triton.kernels.swiglu import swiglu

__all__ = ["VARIANTS", "OpCall", "op_call"]

E4M3 = torch.float8_e4m3fn
H, F, E = 33, 24, 3
HQ, HKV, D, PAGE = 2, 1, 16, 4
VARIANTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OpCall:
    function: Callable[..., Any]
    inputs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.function(**self.inputs, **self.options)


def op_call(op: str, T: int, dtype: torch.dtype = torch.bfloat16, variant: int = 0) -> OpCall:
    """A call of `op` on T tokens; 0 <= variant < VARIANTS."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return globals()[f"_{op}"](T, dtype, variant)


def _randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def _rms_norm(T, dtype, variant):
    inputs = dict(x=_randn(T, H, dtype=dtype), weight=_randn(H, dtype=dtype))
    return OpCall(function=rms_norm, inputs=inputs, options=dict(eps=1e-5))


def _add_rms_norm(T, dtype, variant):
    inputs = _rms_norm(T, dtype, variant).inputs | dict(residual=_randn(T, H, dtype=dtype))
    return OpCall(function=add_rms_norm, inputs=inputs, options=dict(eps=1e-5))


def _rms_norm_quantize(T, dtype, variant):
    inputs = _rms_norm(T, dtype, variant).inputs
    return OpCall(function=rms_norm_quantize, inputs=inputs, options=dict(eps=1e-5))


def _add_rms_norm_quantize(T, dtype, variant):
    inputs = _add_rms_norm(T, dtype, variant).inputs
    return OpCall(function=rms_norm_quantize, inputs=inputs, options=dict(eps=1e-5))


def _gather_rows(T, dtype, variant):
    rows = torch.arange(T).flip(0) % 9 - 1  # -1 and 7 are no rows of x
    rows = rows.to((torch.int64, torch.int32)[variant])
    return OpCall(function=gather_rows, inputs=dict(x=_randn(7, H, dtype=dtype), rows=rows))


def _swiglu(T, dtype, variant):
    both = _randn(T, 2 * F, dtype=dtype)
    gate, up = both[:, :F], both[:, F:]  # a fused projection's halves
    if variant:
        gate, up = gate.contiguous(), up.contiguous()
    return OpCall(function=swiglu, inputs=dict(gate=gate, up=up))


def _quantize_rowwise(T, dtype, variant):
    return OpCall(function=quantize_rowwise, inputs=dict(x=_randn(T, H, dtype=dtype)))


def _quantize_groupwise(T, dtype, variant):
    return OpCall(function=quantize_groupwise, inputs=dict(x=_randn(T, 256, dtype=dtype)))


def _fp8_matmul(T, dtype, variant):
    K = (48, 33)[variant]  # the second one is moved byte by byte
    x_q, x_scale = reference.quantize_rowwise(torch.randn(T, K))
    w_q, w_scale = reference.quantize_rowwise(torch.randn(17, K))
    inputs = dict(x_q=x_q, x_scale=x_scale, w_q=w_q, w_scale=w_scale)
    return OpCall(function=fp8_matmul, inputs=inputs, options=dict(out_dtype=dtype))


def _router(T, dtype, variant):
    width, quantize = ((H, None), (128, "group"))[variant]
    inputs = dict(x=_randn(T, width, dtype=dtype), w_router=_randn(E, width, dtype=dtype))
    return OpCall(function=router, inputs=inputs, options=dict(quantize=quantize))


def _route(T, dtype, variant):
    options = (
        dict(top_k=1),
        dict(top_k=2, scoring="softmax", renormalize=True, expert_range=(1, 2)),
    )[variant]
    inputs = dict(logits=_randn(T, E, dtype=dtype))
    if variant:
        inputs["num_valid_tokens"] = torch.tensor([T - 1], dtype=torch.int32)
    return OpCall(function=route, inputs=inputs, options=options)


def _choice(T, top_k):
    ids = (torch.arange(T * top_k, dtype=torch.int32) * 3 % E).reshape(T, top_k)
    return ids, torch.rand(T, top_k)


def _sort_by_expert(T, dtype, variant):
    ids, weights = _choice(T, 1 + variant)
    options = dict(num_experts=E) | (dict(expert_range=(1, 2)) if variant else {})
    inputs = dict(expert_ids=ids, expert_weights=weights)
    return OpCall(function=sort_by_expert, inputs=inputs, options=options)


def _experts(dtype):
    return Experts.from_hf(_randn(E, H, 2 * F, dtype=dtype), _randn(E, F, H, dtype=dtype))


def _e4m3_experts(dtype):
    weights = _randn(E, 128, 256, dtype=dtype), _randn(E, 128, 128, dtype=dtype)
    return quantize_experts(Experts.from_hf(*weights), "e4m3_channel")


def _routing(T, top_k):
    """What `sort_by_expert` makes, from the reference."""
    ids, weights = _choice(T, top_k)
    block_m = default_block_m(T * top_k, E)
    offsets, row_slot = reference.sort_by_expert(ids, E)
    used = torch.tensor(reference.tile_table(offsets, T * top_k, block_m)).reshape(-1, 4).int()
    tiles = torch.zeros(T * top_k // block_m + min(E + 1, T * top_k), 4, dtype=torch.int32)
    tiles[:, 0] = -1
    tiles[: len(used)] = used
    return Routing(
        expert_ids=ids, expert_weights=weights, expert_offsets=offsets.int(),
        row_slot=row_slot.int(), tiles=tiles,
        tile_count=torch.tensor([len(used)], dtype=torch.int32),
        block_m=block_m, num_experts=E, top_k=top_k,
    )  # fmt: skip


def _grouped_gemm_swiglu(T, dtype, variant):
    inputs = dict(x=_randn(T, H, dtype=dtype), experts=_experts(dtype), routing=_routing(T, 1))
    if variant and dtype != torch.float32:
        x, x_scale = reference.quantize_rowwise(torch.randn(T, 128))
        inputs |= dict(x=x, x_scale=x_scale, experts=_e4m3_experts(dtype))
        return OpCall(function=grouped_gemm_swiglu, inputs=inputs, options=dict(out_dtype=dtype))
    options = dict(weight_on="output") if variant else {}
    return OpCall(function=grouped_gemm_swiglu, inputs=inputs, options=options)


def _grouped_gemm_combine(T, dtype, variant):
    top_k = 1 + variant
    inputs = dict(
        z=_randn(T * top_k, F, dtype=dtype), experts=_experts(dtype), routing=_routing(T, top_k)
    )
    if variant:
        inputs["residual"] = _randn(T, H, dtype=dtype)
    return OpCall(function=grouped_gemm_combine, inputs=inputs)


def _moe(T, dtype, variant):
    x, experts = _randn(T, H, dtype=dtype), _experts(dtype)
    if variant:
        ids, weights = _choice(T, 2)
        inputs = dict(x=x, experts=experts, topk_ids=ids, topk_weights=weights)
        inputs |= dict(residual=_randn(T, H, dtype=dtype))
        return OpCall(function=moe, inputs=inputs, options=dict(top_k=2))
    gate, up = _randn(F, H, dtype=dtype), _randn(F, H, dtype=dtype)
    shared = Experts.dense(gate, up, _randn(H, F, dtype=dtype))
    inputs = dict(x=x, experts=experts, w_router=_randn(E, H, dtype=dtype), shared=shared)
    return OpCall(function=moe, inputs=inputs, options=dict(top_k=1))


def _pages(batch, capacity, dtype, variant=0):
    """A cache whose rows of the block table address `capacity` tokens; e4m3 in the variant.

    Pages are shared where there would be many.
    """
    each = -(-capacity // PAGE)
    pages = min(batch * each, 64)
    k, v = (_randn(pages, PAGE, HKV, D, dtype=dtype) for _ in range(2))
    table = torch.arange(batch * each, dtype=torch.int32).flip(0).reshape(batch, each) % pages
    if not variant:
        return PagedKV(k_cache=k, v_cache=v, block_table=table)
    scales = dict(k_scale=torch.full((1,), 0.5), v_scale=torch.full((1,), 2.0))
    return PagedKV(k_cache=k.to(E4M3), v_cache=v.to(E4M3), block_table=table, **scales)


def _rope_and_cache(T, dtype, variant):
    shapes = dict(q=HQ, k=HKV, v=HKV)
    inputs = {name: _randn(T, heads, D, dtype=dtype) for name, heads in shapes.items()}
    # A cache of one size for any number of tokens; of many, most slots are beyond it or negative.
    inputs |= dict(kv=_pages(2, 16, dtype, variant), slot_mapping=torch.arange(T) - 1)
    inputs |= dict(positions=torch.arange(T, dtype=torch.int32))
    options = dict(rope=None, qk_norm_eps=1e-5, temperature=None)
    if variant:
        table = build_rope_table(rope_inv_freq(1e4, D), torch.arange(8))
        options = dict(
            rope=RopeTable(cos_sin=table, period=8), qk_norm_eps=None,
            temperature=Temperature(attn_scale=0.1, floor_scale=4.0), quantize_q=True,
        )  # fmt: skip
    return OpCall(function=rope_and_cache, inputs=inputs, options=options)


def _convert_layout(T, dtype, variant):
    v = _randn(T, PAGE, HKV, D, dtype=dtype)
    inputs, options = dict(v_cache=v), dict(layout="transposed_v")
    if variant:
        inputs = dict(v_cache=_randn(T, HKV, D, PAGE, dtype=dtype), out=v)
        inputs |= dict(pages=torch.tensor([T - 1], dtype=torch.int32))
        options = dict(layout="nhd")
    return OpCall(function=convert_layout, inputs=inputs, options=options)


def _bounds(T):
    """Of two sequences with T new tokens between them."""
    return torch.tensor([0, T // 3, T], dtype=torch.int32)


def _prefill_schedule(T, dtype, variant):
    cu = _bounds(T)
    # Sizes of tensors are what is dynamic: the number of tokens is that of a tensor.
    inputs = dict(
        tokens=torch.zeros(T, dtype=torch.int8), cu_seqlens_q=cu, seq_lens=cu[1:] - cu[:-1] + 3
    )

    def scheduled(tokens, cu_seqlens_q, seq_lens):
        return prefill_schedule(
            cu_seqlens_q, seq_lens, tokens.shape[0], chunk_size=5 * variant, block_m=16
        )

    return OpCall(function=scheduled, inputs=inputs)


def _attention_prefill(T, dtype, variant):
    cu = _bounds(T)
    seq_lens = cu[1:] - cu[:-1]
    inputs = dict(
        q=_randn(T, HQ, D, dtype=dtype), kv=_pages(2, 1024, dtype, variant),
        cu_seqlens_q=cu, seq_lens=seq_lens,
    )  # fmt: skip
    options = dict(chunk_size=8, temperature=Temperature(attn_scale=0.1, floor_scale=4.0))
    return OpCall(function=attention_prefill, inputs=inputs, options=options if variant else {})


def _decode_schedule(T, dtype, variant):
    options = dict(capacity=2048, num_kv_heads=HKV, page_size=PAGE)
    options |= (dict(chunk_size=0), dict(chunk_size=200, split_tokens=128))[variant]
    seq_lens = (torch.arange(T, dtype=torch.int32) * 97 + 5) % 2048
    return OpCall(function=decode_schedule, inputs=dict(seq_lens=seq_lens), options=options)


def _attention_decode(T, dtype, variant):
    capacity = (16, 1024)[variant]  # the second one may be split
    inputs = dict(
        q=_randn(T, HQ, D, dtype=dtype), kv=_pages(T, capacity, dtype),
        seq_lens=torch.arange(T, dtype=torch.int32) % 16 + 1,
    )  # fmt: skip
    options = dict(chunk_size=8, temperature=Temperature(attn_scale=0.1, floor_scale=4.0))
    return OpCall(function=attention_decode, inputs=inputs, options=options if variant else {})


def _merge_attention(T, dtype, variant):
    ranks = 2 + variant
    inputs = dict(outs=_randn(ranks, T, HQ, D, dtype=dtype), lses=torch.randn(ranks, T, HQ))
    return OpCall(function=merge_attention, inputs=inputs)
