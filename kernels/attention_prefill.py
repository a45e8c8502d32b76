"""Attention of packed new tokens over the paged KV cache, global or in chunks.

    out[i] = softmax(sm_scale * temp(p) * q[i] . k[t]) . v[t]         over visible t
    t visible to the query at p:  t <= p  and  (no chunks  or  t // chunk_size == p // chunk_size)
    temp(p) = 1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1), or 1

Row i of sequence b stands at p = seq_lens[b] - q_len[b] + i, so cached prefixes and prefill in
pieces need nothing special. The keys of the new tokens are read from the cache as well.
Layout: q (T, Hq, D), sequences packed one after the other (cu_seqlens_q); paged_kv.py.
Tiling: a program takes one q head of one tile of attention_schedule.py, whose rows lie in one
chunk, and walks the key tiles from the chunk's start to its last row, nothing else. Only those
that the tile's own positions fall into are masked. The heads of a tile run together, so that the
heads of a group find K and V in L2; expensive tiles run first.
Source: FlashAttention-2 (arXiv 2307.08691) for the loop, FlashAttention-3 (arXiv 2407.08608) for
e4m3. Scale, temperature and scales of q are one factor per row of the scores, since a q changed in
registers serialises Hopper's tensor-core instructions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._attention import LOG2_E, visible_keys
from ._attention_prefill_check import check_prefill, check_prefill_values
from ._check import is_aligned
from ._debug import is_checked
from ._launch import device_properties, launch
from ._library import define
from ._names import named, nbytes
from ._prefill_loop import attend_tiles, finish_rows
from ._sizes import flat, power_of_2
from .attention_prefill_config import AttentionPrefillConfig, default_config, default_tiles
from .attention_schedule import PrefillSchedule, prefill_schedule
from .paged_kv import DENSE, PagedKV
from .rope import Temperature

__all__ = ["AttentionPrefillConfig", "attention_prefill", "default_config"]

E4M3 = torch.float8_e4m3fn


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    q, out, lse = args["q_ptr"], args["out_ptr"], args["lse_ptr"]
    keys, moved = visible_keys(args)
    return nbytes(q, out, lse) + moved, 4 * q.numel() * keys


@triton.jit(
    do_not_specialize=["Hq", "strides_scale", "stride_table_b", "scale", "chunk_size"],
    **named("attention_prefill", "q_ptr", _cost),
)
def _attention_prefill_kernel(
    q_ptr, k_ptr, v_ptr, scale_ptrs, block_table_ptr, tiles_ptr, out_ptr, lse_ptr,
    Hq,
    strides_q, strides_k, strides_v, strides_scale, stride_table_b,
    scale, temperature, chunk_size,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, BY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (capacity * Hq,): program = (row tile, q head).

    scale_ptrs: of q, (T, Hq), of k and of v, or None. strides_q: token, head; strides_k: page,
    slot, head; strides_v: page, head, element of transposed pages, or None where v lies as k does;
    strides_scale: page, slot, head. temperature: (attn_scale, floor_scale) or None.
    """
    q_scale_ptr, k_scale_ptr, v_scale_ptr = scale_ptrs
    h = tl.program_id(0) % Hq
    entry_ptr = tiles_ptr + (tl.program_id(0) // Hq).to(tl.int64) * 4
    seq = tl.load(entry_ptr)
    if seq < 0:
        return
    row = tl.load(entry_ptr + 1)
    end = tl.load(entry_ptr + 2)
    p_first = tl.load(entry_ptr + 3)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < end - row
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    offs_t = row.to(tl.int64) + offs_m
    q_ptrs = q_ptr + h.to(tl.int64) * strides_q[1] + offs_t[:, None] * strides_q[0]
    q = tl.load(q_ptrs + offs_d[None, :], mask=mask, other=0.0)  # (BLOCK_M, BLOCK_D)

    # The factor of a row's scores, in powers of 2.
    position = p_first + offs_m
    r = tl.full((BLOCK_M,), scale, dtype=tl.float32)
    if temperature is not None:
        attn_scale, floor_scale = temperature
        # Exact steps: p + 1 < 2^24, so the rounded quotient never reaches the next integer.
        steps = tl.floor(tl.div_rn(tl.maximum(position + 1, 0).to(tl.float32), floor_scale))
        r *= 1.0 + attn_scale * tl.log(steps + 1.0)
    if q_scale_ptr is not None:
        r *= tl.load(q_scale_ptr + offs_t * Hq + h, mask=mask_m, other=0.0)
    kv_h = (h // GROUP).to(tl.int64)
    if k_scale_ptr is not None:
        offs_scale = kv_h * strides_scale[2]
        if not BY_TOKEN:
            r *= tl.load(k_scale_ptr + offs_scale)
        scale_ptrs = (k_scale_ptr + offs_scale, v_scale_ptr + offs_scale)

    # Keys [lo, hi) are visible to some row, those before full_last to every row of the tile.
    chunk = tl.where(chunk_size > 0, chunk_size, 2147483647)
    p = tl.maximum(p_first, 0)
    lo = p // chunk * chunk
    hi = p_first + end - row
    first = lo // BLOCK_N * BLOCK_N
    full_last = (p + 1) // BLOCK_N * BLOCK_N
    if lo != first:  # masked on the left: rare
        full_last = first

    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)
    m = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    k_ptr += kv_h * strides_k[2]
    v_ptr += kv_h * (strides_k[2] if strides_v is None else strides_v[1])
    table_ptr = block_table_ptr + seq.to(tl.int64) * stride_table_b
    if PAGE_SIZE == 0:
        offs_row = seq.to(tl.int64) * strides_k[0] + tl.load(table_ptr).to(tl.int64) * strides_k[1]
        k_ptr += offs_row
        v_ptr += offs_row
    acc, l, m = attend_tiles(
        q, acc, l, m, r, k_ptr, v_ptr, scale_ptrs, table_ptr,
        first, full_last, lo, hi, position,
        strides_k, strides_v, strides_scale, D, PAGE_SIZE, BY_TOKEN, False, BLOCK_N,
    )  # fmt: skip
    acc, l, m = attend_tiles(
        q, acc, l, m, r, k_ptr, v_ptr, scale_ptrs, table_ptr,
        full_last, hi, lo, hi, position,
        strides_k, strides_v, strides_scale, D, PAGE_SIZE, BY_TOKEN, True, BLOCK_N,
    )  # fmt: skip

    out, lse = finish_rows(acc, l, m, q.dtype == tl.float8e4nv)
    if k_scale_ptr is not None and not BY_TOKEN:
        out *= tl.load(scale_ptrs[1])
    out_ptrs = out_ptr + (offs_t * Hq + h)[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + offs_t * Hq + h, lse, mask=mask_m)


def attention_prefill(
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    chunk_size: int = 0,
    sm_scale: float | None = None,
    temperature: Temperature | None = None,
    q_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    schedule: PrefillSchedule | None = None,
    checked: bool = False,
    config: AttentionPrefillConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the new tokens of B sequences to their cached keys.

    Args:
        q: (T, Hq, D) fp32, fp16 or bf16, or e4m3 with q_scale; D even, any token and head stride.
        kv: caches that already hold the new tokens, and one block-table row per sequence. Entries
            outside the live range, from the first new token's chunk to the last token, are unread.
            In q's dtype, or in pages of e4m3; every layout.
        cu_seqlens_q: (B + 1,) int32, cu[0] == 0, cu[B] == T: new tokens of b are cu[b]..cu[b+1]-1.
        seq_lens: (B,) int32, cached plus new tokens.
        chunk_size: 0 for a global layer.
        sm_scale: factor of q . k; None: D ** -0.5.
        temperature: of global layers; None: there is none, or q has it already.
        q_scale: (T, Hq) fp32 contiguous, with q ~= q * q_scale[..., None].
        out_dtype: fp32, fp16 or bf16; None: q.dtype, bf16 where that is e4m3.
        schedule: `prefill_schedule` of the same lengths and chunk_size; None makes one.
        checked: read lengths and live page ids back (one synchronisation) and raise on bad ones.
        config: tile configuration; None takes `default_config(T, B, D, dtype, ...)`.
    Returns:
        out (T, Hq, D) in out_dtype; lse (T, Hq) fp32, natural log-sum-exp of the scaled scores.
    Raises:
        ValueError: shapes, strides, devices, head counts, chunk_size, sm_scale, temperature,
            a schedule for other tiles.
        TypeError: dtypes.   IndexError: checked, lengths or page ids out of range.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80, e4m3 before sm_89.
    Numerics: fp32 scores, softmax and accumulators; probabilities rounded to q.dtype before the
        second product, which e4m3 sums by key tile and adds in fp32 (_prefill_loop.py). Key tiles
        in ascending order: a row's bits depend on its own sequence and the config only. No visible
        key: out 0, lse -inf.
        A NaN or inf in v reaches the other rows of its sequence that share its key tile (0 * NaN).
    Cost: 4 * D * Hq flops per visible pair; bytes = 2*T*Hq*D*itemsize + K/V once per row tile.
        One launch, and one more without a schedule. A q of 16 bits over an e4m3 cache converts
        every key tile in registers, which is slower than either alone.
    Source: see the module; reference: kernels/reference.py:attention_prefill.
    """
    op = "attention_prefill"
    block_m = check_prefill(
        op, q, kv, cu_seqlens_q, seq_lens, chunk_size, sm_scale, temperature, q_scale, out_dtype,
        schedule, config,
    )  # fmt: skip
    T, _, D = q.shape
    if is_checked(checked, q):
        check_prefill_values(kv, cu_seqlens_q.tolist(), seq_lens.tolist(), T, chunk_size)
    if schedule is None:
        schedule = prefill_schedule(
            cu_seqlens_q, seq_lens, T, chunk_size=chunk_size, block_m=block_m
        )
    return _attention_prefill(
        q, q_scale, kv.k_cache, kv.v_cache, kv.k_scale, kv.v_scale, kv.block_table, kv.layout,
        cu_seqlens_q, seq_lens, schedule.tiles, chunk_size,
        D**-0.5 if sm_scale is None else sm_scale,
        None if temperature is None else [temperature.attn_scale, temperature.floor_scale],
        out_dtype or (torch.bfloat16 if q.dtype == E4M3 else q.dtype),
        block_m, config and flat(config),
    )  # fmt: skip


def _attention_prefill_impl(
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    block_table: torch.Tensor,
    layout: Any,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    tiles: torch.Tensor,
    chunk_size: int,
    sm_scale: float,
    temperature: Sequence[float] | None,
    out_dtype: torch.dtype,
    block_m: int,
    config: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, Hq, D = q.shape
    kv = PagedKV(
        k_cache=k_cache, v_cache=v_cache, block_table=block_table,
        k_scale=k_scale, v_scale=v_scale, layout=layout,
    )  # fmt: skip
    by_token = kv.scale_kind == "token"
    BLOCK_M, BLOCK_N, num_warps, num_stages = config or default_tiles(
        T, seq_lens.shape[0], D, q.dtype, device_properties(q.device),
        aligned=is_aligned((), q, k_cache, v_cache), kv_dtype=k_cache.dtype,
        by_token=by_token, transposed_v=layout == "transposed_v", dense=layout == DENSE,
        block_m=block_m,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty((T, Hq), dtype=torch.float32, device=q.device)
    page, _, head, element = kv.v_strides()
    launch(
        _attention_prefill_kernel, (tiles.shape[0] * Hq,),
        q, k_cache, v_cache, (q_scale, k_scale, v_scale), block_table, tiles, out, lse,
        Hq,
        q.stride()[:2], k_cache.stride()[:3],
        (page, head, element) if layout == "transposed_v" else None,
        kv.scale_strides(), block_table.stride(0),
        sm_scale * LOG2_E.value, temperature and tuple(temperature), chunk_size,
        GROUP=Hq // kv.num_kv_heads, D=D, PAGE_SIZE=kv.page_constant,
        BY_TOKEN=by_token,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        BLOCK_D=max(32 if q.dtype == E4M3 else 16, power_of_2(D)),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse


def _fake(q: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out_dtype = args[13]
    return q.new_empty(q.shape, dtype=out_dtype), q.new_empty(q.shape[:2], dtype=torch.float32)


_attention_prefill = define(
    "attention_prefill(Tensor q, Tensor? q_scale, Tensor k_cache, Tensor v_cache, Tensor? k_scale,"
    " Tensor? v_scale, Tensor block_table, str layout, Tensor cu_seqlens_q, Tensor seq_lens,"
    " Tensor tiles, int chunk_size, float sm_scale, float[]? temperature, ScalarType out_dtype,"
    " SymInt block_m, int[]? config) -> (Tensor, Tensor)",
    _attention_prefill_impl,
    _fake,
)
