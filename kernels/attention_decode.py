"""Attention of the newest tokens of each sequence over the paged KV cache, 1 to 8 per sequence.

    out[r] = softmax(sm_scale * temperature(p) * q[r] . k[t]) . v[t]
                                over chunk start of p <= t <= p = seq_lens[b] - q_len[b] + i
    lse = ln(sum_s exp(lse_s));  out = sum_s exp(lse_s - lse) * out_s      merges the splits s

Layout: q (T, Hq, D); paged_kv.py. The tokens' own keys are already in the cache.
Tiling: attention_decode_schedule.py lists which keys of which sequence a program takes; its rows
are all new tokens and q heads of one KV head, so a group reads its keys once. Local and global
layers differ in the schedule and the mask only. A sequence's only split is written as the result;
others write fp32 (out, lse), (0, -inf) if they saw no key, and a second kernel merges them in
ascending order. It copies nothing, a program of it whose sequence has one split ends at once.
_attention_decode_tile.py has the tile; docs/attention.md what machine code each layout gets.
Source: FlashDecoding (Dao et al. 2023); swap-AB as in fp8_matmul.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._attention import LOG2_E, visible_keys
from ._attention_decode_check import check_decode, check_decode_values, check_scheduled_decode
from ._attention_decode_tile import add_tile, log_sum_exp
from ._debug import is_checked
from ._launch import device_properties, empty_workspace, launch
from ._library import define
from ._merge_partials import merge_splits
from ._names import named, nbytes
from ._sizes import flat, power_of_2
from .attention_decode_config import (
    AttentionDecodeConfig,
    decode_workspace_numel,
    default_config,
    default_tiles,
)
from .attention_decode_schedule import DecodeSchedule, decode_schedule
from .paged_kv import DENSE, Layout, PagedKV
from .rope import Temperature

__all__ = [
    "AttentionDecodeConfig",
    "attention_decode",
    "decode_workspace_numel",
    "default_config",
]


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    q, out, lse = args["q_ptr"], args["out_ptr"], args["lse_ptr"]
    keys, moved = visible_keys(args)
    return nbytes(q, out, lse) + moved, 4 * q.numel() * keys


@triton.jit(
    do_not_specialize=["Hkv", "max_q_len", "chunk_size", "scale", "stride_table_b"],
    **named("attention_decode", "q_ptr", _cost),
)
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, scales, block_table_ptr, seq_lens_ptr, cu_seqlens_ptr, schedule,
    out_ptr, lse_ptr, partials,
    Hkv, max_q_len,
    strides_q, strides_k, strides_v, strides_scale, stride_table_b,
    scale, chunk_size, temperature,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, TRANSPOSED_V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (items * Hkv,): program = (item of the schedule, KV head h).

    Rows are (new token, q head of the group). scales (k, v) of e4m3 caches and strides_scale
    (page, slot, head), of which page is None for scales of a head; temperature (attn_scale,
    floor_scale); None where there are none. partials (out, lse): (items, Hkv, rows, D), fp32.
    """
    item = tl.program_id(0) // Hkv
    h = (tl.program_id(0) % Hkv).to(tl.int64)
    items_ptr, count_ptr = schedule
    if item >= tl.load(count_ptr):
        return
    seq = tl.load(items_ptr + 4 * item)
    begin = tl.load(items_ptr + 4 * item + 1)
    end = tl.load(items_ptr + 4 * item + 2)
    slot = tl.load(items_ptr + 4 * item + 3).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    row0 = seq
    q_len = 1
    if cu_seqlens_ptr is not None:
        row0 = tl.load(cu_seqlens_ptr + seq)
        q_len = tl.load(cu_seqlens_ptr + seq + 1) - row0

    offs_r = tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < q_len * GROUP
    mask = mask_r[:, None] & (offs_d < D)[None, :]
    token = (row0 + offs_r // GROUP).to(tl.int64)
    head = h * GROUP + offs_r % GROUP
    stride_q_t, stride_q_h = strides_q
    q_ptrs = q_ptr + (token * stride_q_t + head * stride_q_h)[:, None] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)  # (BLOCK_R, BLOCK_D)

    chunk = tl.where(chunk_size > 0, chunk_size, 2147483647)
    position = seq_len - q_len + offs_r // GROUP
    start = tl.maximum(position, 0) // chunk * chunk
    lo = tl.maximum(seq_len - q_len, 0) // chunk * chunk
    factor = tl.full((BLOCK_R,), 1.0, dtype=tl.float32) * scale
    if temperature is not None:
        attn_scale, floor_scale = temperature
        # Exact steps: p + 1 < 2^24, so the rounded quotient never reaches the next integer.
        steps = tl.floor(tl.div_rn((tl.maximum(position, 0) + 1).to(tl.float32), floor_scale))
        factor *= 1.0 + attn_scale * tl.log(steps + 1.0)

    QUANTIZED: tl.constexpr = k_ptr.dtype.element_ty == tl.float8e4nv
    TOKEN_SCALES: tl.constexpr = QUANTIZED and strides_scale[0] is not None
    k_scale_ptr = None
    v_scale_ptr = None
    strides_token = (0, 0)
    if QUANTIZED:
        k_scale_ptr = scales[0] + h * strides_scale[2]
        v_scale_ptr = scales[1] + h * strides_scale[2]
        if TOKEN_SCALES:
            strides_token = (strides_scale[0], strides_scale[1])
        else:
            factor *= tl.load(k_scale_ptr)
        if TRANSPOSED_V and q.dtype != tl.float32:
            q = q.to(tl.float32)
            q_scale = tl.div_rn(tl.maximum(tl.max(tl.abs(q), axis=1), 1e-12), 448.0)
            q = (q * tl.div_rn(1.0, q_scale)[:, None]).to(tl.float8e4nv)
            factor *= q_scale
    E4M3_MMA: tl.constexpr = q.dtype == tl.float8e4nv

    SWAP: tl.constexpr = BLOCK_R < 64 and q_ptr.dtype.element_ty != tl.float32
    if SWAP:
        acc = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
        l = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
        l = tl.zeros((BLOCK_R,), dtype=tl.float32)
    m = tl.full((BLOCK_R,), -float("inf"), dtype=tl.float32)
    k_ptr += h * strides_k[2]
    v_ptr += h * strides_v[2]
    table_ptr = block_table_ptr + seq.to(tl.int64) * stride_table_b
    if PAGE_SIZE == 0:
        offs_row = seq.to(tl.int64) * strides_k[0] + tl.load(table_ptr).to(tl.int64) * strides_k[1]
        k_ptr += offs_row
        v_ptr += offs_row
    first = tl.maximum(begin, lo // BLOCK_N * BLOCK_N)
    # A column of V^T is masked element by element, which copies one byte or two at a time: only
    # the tile that the sequence ends in is.
    full = end // BLOCK_N * BLOCK_N if TRANSPOSED_V else end
    strides_k = (strides_k[0], strides_k[1])
    strides_v = (strides_v[0], strides_v[1], strides_v[3])
    for n0 in tl.range(first, full, BLOCK_N):
        acc, l, m = add_tile(
            q, factor, position, start, acc, l, m,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, n0, lo, end,
            strides_k, strides_v, strides_token,
            D, PAGE_SIZE, TOKEN_SCALES, not TRANSPOSED_V, SWAP, BLOCK_N,
        )  # fmt: skip
    if TRANSPOSED_V:
        if full < end:
            acc, l, m = add_tile(
                q, factor, position, start, acc, l, m,
                k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, full, lo, end,
                strides_k, strides_v, strides_token,
                D, PAGE_SIZE, TOKEN_SCALES, True, SWAP, BLOCK_N,
            )  # fmt: skip

    if SWAP:
        acc = tl.trans(acc)
        l = tl.sum(l, axis=0)
    l_safe = tl.where(l == 0.0, 1.0, l)
    lse = log_sum_exp(m, l_safe, E4M3_MMA)
    out = acc / l_safe[:, None]  # (BLOCK_R, BLOCK_D)
    if QUANTIZED and not TOKEN_SCALES:
        out *= tl.load(v_scale_ptr)
    row = token * Hkv * GROUP + head
    is_final = slot < 0
    out_ptrs = out_ptr + row[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask & is_final)
    tl.store(lse_ptr + row, lse, mask=mask_r & is_final)
    if partials is not None:
        part = (slot * Hkv + h) * max_q_len * GROUP + offs_r
        part_ptrs = partials[0] + part[:, None] * D + offs_d[None, :]
        tl.store(part_ptrs, out, mask=mask & (not is_final))
        tl.store(partials[1] + part, lse, mask=mask_r & (not is_final))


def attention_decode(
    q: torch.Tensor,
    kv: PagedKV,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    max_q_len: int = 1,
    chunk_size: int = 0,
    sm_scale: float | None = None,
    temperature: Temperature | None = None,
    out_dtype: torch.dtype | None = None,
    schedule: DecodeSchedule | None = None,
    checked: bool = False,
    config: AttentionDecodeConfig | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the 1 to 8 newest tokens of each sequence to its cached keys.

    Args:
        q: (T, Hq, D) fp32, fp16 or bf16; D even, any token and head stride; T = B without
            cu_seqlens_q.
        kv: caches that already hold the new tokens, and B block-table rows. Entries outside the
            live range, from the first new token's chunk to the last, are unread. Layout
            "transposed_v" takes chunks of a multiple of 128 tokens.
        seq_lens: (B,) int32 with the new tokens; 0 for a row that is not in use.
        cu_seqlens_q: (B + 1,) int32, new tokens of b are rows cu[b] .. cu[b + 1] - 1; None: one
            each. Rows from cu[B] on are not written.
        max_q_len: most new tokens of a sequence, 1 to 8.
        chunk_size: 0 for a global layer.
        sm_scale: factor of q . k; None: D ** -0.5.
        temperature: of the row's position, in fp32; None: none, or q has it already.
        out_dtype: fp32, fp16 or bf16; None: that of q.
        schedule: `decode_schedule` of these lengths, shared by all layers of a kind; None makes
            one, which is another launch.
        checked: read lengths and live page ids back (one synchronisation) and raise on bad ones.
        config: tile configuration; None takes `default_config(D, dtype, cache dtype, ...)`.
        workspace: fp32, `decode_workspace_numel(Hq, D, schedule)` elements; None allocates.
    Returns:
        out (T, Hq, D); lse (T, Hq) fp32, natural log-sum-exp of the scaled scores.
    Raises:
        ValueError: shapes, strides, devices, head counts, sizes, schedule, workspace.
        TypeError: dtypes.   IndexError: checked, lengths or page ids out of range.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80, e4m3 before sm_89.
    Numerics: fp32 scores, softmax and accumulators; probabilities rounded to q.dtype before the
        second product; partial results fp32, merged in ascending order. e4m3 caches in layout
        "nhd" are multiplied as numbers of q.dtype, which holds them exactly. In "transposed_v",
        unless q is fp32, the tensor cores multiply e4m3: q is rounded to it under a scale per
        row, amax / 448, and the probabilities (with scales of tokens: times v_scale) under 2**8;
        each tile's product is added to the fp32 accumulator. No key: out 0, lse -inf.
        A NaN or inf in q stays within its row, in k or v within its sequence.
    Cost: 4 * D * Hq flops per visible key and row; bytes = 2 * Hkv * D * itemsize per visible key,
        once for all rows; with several splits 8 * Hq * (D + 1) per row and split.
    Source: see the module; reference: kernels/reference.py:attention_decode.
    """
    op = "attention_decode"
    options = cu_seqlens_q, max_q_len, chunk_size, sm_scale, temperature, out_dtype
    if schedule is None:
        check_decode(op, q, kv, seq_lens, *options)
    else:
        numel = check_scheduled_decode(op, q, kv, seq_lens, *options, schedule, config)
    T, _, D = q.shape
    if is_checked(checked, q):
        check_decode_values(kv, seq_lens, cu_seqlens_q, max_q_len, chunk_size, T)
    if schedule is None:
        schedule = decode_schedule(
            seq_lens, chunk_size=chunk_size, capacity=kv.capacity, num_kv_heads=kv.num_kv_heads,
            page_size=kv.page_constant or 1, cu_seqlens_q=cu_seqlens_q, max_q_len=max_q_len,
        )  # fmt: skip
        numel = check_scheduled_decode(op, q, kv, seq_lens, *options, schedule, config)
    workspace = empty_workspace(op, numel, workspace, q.device)
    return _attention_decode(
        q, kv.k_cache, kv.v_cache, kv.k_scale, kv.v_scale, kv.block_table, seq_lens, cu_seqlens_q,
        schedule.items, schedule.spans, schedule.count, workspace, kv.layout, max_q_len,
        chunk_size, D**-0.5 if sm_scale is None else sm_scale,
        [temperature.attn_scale, temperature.floor_scale] if temperature else [],
        out_dtype or q.dtype, config and flat(config),
    )  # fmt: skip


def _attention_decode_impl(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    items: torch.Tensor,
    spans: torch.Tensor,
    count: torch.Tensor,
    workspace: torch.Tensor,
    layout: Layout,
    max_q_len: int,
    chunk_size: int,
    sm_scale: float,
    temperature: list[float],
    out_dtype: torch.dtype,
    config: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    kv = PagedKV(
        k_cache=k_cache, v_cache=v_cache, block_table=block_table, k_scale=k_scale,
        v_scale=v_scale, layout=layout,
    )  # fmt: skip
    out, lse = _outputs(q, out_dtype)
    T, Hq, D = q.shape
    Hkv, PAGE_SIZE = kv.num_kv_heads, kv.page_constant
    of_head = max_q_len * Hq // Hkv  # rows that share a KV head
    BLOCK_N, num_warps, num_stages = config or default_tiles(
        D, q.dtype, k_cache.dtype, of_head, device_properties(q.device), dense=layout == DENSE
    )
    room, B = items.shape[0], seq_lens.shape[0]
    partials = None
    if workspace.numel():
        rows = room * max_q_len * Hq
        part_out, part_lse = workspace.split([rows * D, rows])
        partials = part_out, part_lse
    scales, strides_scale = None, None
    if k_scale is not None:
        scales = k_scale, v_scale
        page, slot, head = kv.scale_strides()
        strides_scale = (page, slot, head) if kv.scale_kind == "token" else (None, None, head)
    launch(
        _attention_decode_kernel, (room * Hkv,),
        q, k_cache, v_cache, scales,
        block_table, seq_lens, cu_seqlens_q, (items, count), out, lse, partials,
        Hkv, max_q_len,
        q.stride()[:2], k_cache.stride()[:3], kv.v_strides(),
        strides_scale, block_table.stride(0),
        sm_scale * LOG2_E.value, chunk_size, tuple(temperature) or None,
        GROUP=Hq // Hkv, D=D, PAGE_SIZE=PAGE_SIZE, TRANSPOSED_V=layout == "transposed_v",
        BLOCK_R=max(16, power_of_2(of_head)), BLOCK_N=BLOCK_N,
        BLOCK_D=max(16 if scales is None else 32, power_of_2(D)),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if partials is not None:
        merge_splits(*partials, spans, cu_seqlens_q, out, lse, B, Hkv, max_q_len)
    return out, lse


def _outputs(q: torch.Tensor, out_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=out_dtype, device=q.device), lse


_attention_decode = define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale,"
    " Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens_q, Tensor items, Tensor spans,"
    " Tensor count, Tensor(a!) workspace, str layout, int max_q_len, int chunk_size,"
    " float sm_scale, float[] temperature, ScalarType out_dtype, int[]? config)"
    " -> (Tensor, Tensor)",
    _attention_decode_impl,
    lambda q, *args: _outputs(q, args[-2]),
)
