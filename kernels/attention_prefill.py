"""Attention of packed new tokens over the paged KV cache, global or in chunks.

    out[i] = softmax(sm_scale * q[i] . k[t]) . v[t]         over visible t
    t visible to the query at p:  t <= p  and  (no chunks  or  t // chunk_size == p // chunk_size)

Row i of sequence b stands at p = seq_lens[b] - q_len[b] + i, so cached prefixes and prefill in
pieces need nothing special. The keys of the new tokens are read from the cache as well.
Layout: q (T, Hq, D), sequences packed one after the other (cu_seqlens_q); paged_kv.py.
Tiling: a program takes BLOCK_M rows of one q head and walks the key tiles between the chunk start
of its first row and its last row, nothing else; only tiles that a row sees in part are masked.
Which sequence and rows these are is found on the device: the grid depends on T and B alone.
Source: FlashAttention-2 (arXiv 2307.08691) for the loop; the scale is applied to the scores, since
a q changed in registers serialises Hopper's tensor-core instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._attention import LOG2_E, attend, check_attention, check_values, finish, visible_keys
from ._check import check_devices, check_index, is_aligned, require
from ._debug import is_checked
from ._launch import SM_90, DeviceProperties, device_properties, launch
from ._library import define
from ._names import named, nbytes
from .paged_kv import PagedKV

__all__ = ["AttentionPrefillConfig", "attention_prefill", "default_config"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPrefillConfig:
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def default_config(
    T: int,
    B: int,
    D: int,
    dtype: torch.dtype,
    properties: DeviceProperties = SM_90,
    *,
    aligned: bool = True,
) -> AttentionPrefillConfig:
    """Tiles by the mean number of new tokens per sequence, all that the host knows.

    Each is the largest that compiles for sm_90 without spills and, but for 16 rows, to wgmma
    with one wait per iteration (64 x 64 with 4 warps waits after every instruction). Five stages
    keep two tiles in flight: the page id is loaded ahead of the tile, which takes every second.
    Tensor cores that do not read shared memory need registers for q: half the rows. Unaligned keys
    and values take a register per element on their way: 16 rows.
    """
    if dtype == torch.float32 or not properties.has_mma:  # the tiles live in registers
        block_n, num_stages = (32, 1) if D <= 128 else (16, 2)
        return AttentionPrefillConfig(
            BLOCK_M=16, BLOCK_N=block_n, num_warps=4, num_stages=num_stages
        )
    if not aligned:
        return AttentionPrefillConfig(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=2)
    wide = properties.has_wide_mma
    if D > 128 and not wide:
        return AttentionPrefillConfig(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=4)
    if D > 128:
        return AttentionPrefillConfig(BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=5)
    rows = triton.cdiv(T, max(B, 1))
    if rows <= 16:
        return AttentionPrefillConfig(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=5)
    if rows <= 64:
        return AttentionPrefillConfig(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=5)
    return AttentionPrefillConfig(
        BLOCK_M=128 if wide else 64, BLOCK_N=64, num_warps=8, num_stages=5
    )


@triton.jit
def _find_sequence(cu_seqlens_ptr, tile, num_seqs, BLOCK_M: tl.constexpr):
    """The sequence that owns `tile`: b owns tiles cu[b] // BLOCK_M + b up to where b + 1 begins.

    That is at least ceil(q_len / BLOCK_M) tiles each, and T // BLOCK_M + B in all.
    """
    seq = -1
    for b0 in tl.range(0, num_seqs, 128):
        b = b0 + tl.arange(0, 128)
        mask_b = b < num_seqs
        first_tile = tl.load(cu_seqlens_ptr + b, mask=mask_b, other=0) // BLOCK_M + b
        seq += tl.sum((mask_b & (first_tile <= tile)).to(tl.int32), axis=0)
    first_tile = tl.load(cu_seqlens_ptr + seq) // BLOCK_M + seq
    return seq, tile - first_tile


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    q, out, lse = args["q_ptr"], args["out_ptr"], args["lse_ptr"]
    keys, moved = visible_keys(args)
    return nbytes(q, out, lse) + moved, 4 * q.numel() * keys


@triton.jit(
    do_not_specialize=["num_seqs", "Hq", "chunk_size", "scale", "stride_table_b"],
    **named("attention_prefill", "q_ptr", _cost),
)
def _attention_prefill_kernel(
    q_ptr, k_ptr, v_ptr, block_table_ptr, cu_seqlens_ptr, seq_lens_ptr, out_ptr, lse_ptr,
    num_seqs, Hq,
    stride_q_t, stride_q_h, stride_kv_page, stride_kv_slot, stride_kv_h, stride_table_b,
    scale, chunk_size,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid ((T // BLOCK_M + num_seqs) * Hq,): program = (row tile, q head).

    Heads run together, so that the group's K/V tiles are shared in L2; tiles run backwards, the
    most expensive rows of a causal sequence first.
    """
    h = tl.program_id(0) % Hq
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // Hq
    seq, tile = _find_sequence(cu_seqlens_ptr, tile, num_seqs, BLOCK_M)
    row0 = tl.load(cu_seqlens_ptr + seq)
    q_len = tl.load(cu_seqlens_ptr + seq + 1) - row0
    seq_len = tl.load(seq_lens_ptr + seq)
    if tile * BLOCK_M >= q_len:
        return

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < q_len
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    offs_t = row0.to(tl.int64) + offs_m
    offs_kv_h = (h // GROUP).to(tl.int64) * stride_kv_h
    table_ptr = block_table_ptr + seq.to(tl.int64) * stride_table_b
    q_ptr += h.to(tl.int64) * stride_q_h
    q_ptrs = q_ptr + offs_t[:, None] * stride_q_t + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)  # (BLOCK_M, BLOCK_D)

    # Keys [lo, hi) are visible to some row, those before full_last to every row of the tile.
    chunk = tl.where(chunk_size > 0, chunk_size, 2147483647)
    position = seq_len - q_len + offs_m
    start = position // chunk * chunk
    p_first = tl.maximum(seq_len - q_len + tile * BLOCK_M, 0)
    hi = tl.minimum(p_first + BLOCK_M, seq_len)
    lo = p_first // chunk * chunk
    first = lo // BLOCK_N * BLOCK_N
    full_last = (p_first + 1) // BLOCK_N * BLOCK_N
    if (lo != first) | ((hi - 1) // chunk * chunk > lo):  # masked on the left: rare
        full_last = first

    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)
    m = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    k_ptr += offs_kv_h
    v_ptr += offs_kv_h
    acc, l, m = attend(
        q, acc, l, m, k_ptr, v_ptr, table_ptr,
        first, full_last, lo, hi, position, start,
        stride_kv_page, stride_kv_slot, scale, D, PAGE_SIZE, False, BLOCK_N,
    )  # fmt: skip
    acc, l, m = attend(
        q, acc, l, m, k_ptr, v_ptr, table_ptr,
        full_last, hi, lo, hi, position, start,
        stride_kv_page, stride_kv_slot, scale, D, PAGE_SIZE, True, BLOCK_N,
    )  # fmt: skip

    out, lse = finish(acc, l, m)
    out_ptrs = out_ptr + (offs_t * Hq + h)[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, out.to(q.dtype), mask=mask)
    tl.store(lse_ptr + offs_t * Hq + h, lse, mask=mask_m)


def attention_prefill(
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    chunk_size: int = 0,
    sm_scale: float | None = None,
    checked: bool = False,
    config: AttentionPrefillConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the new tokens of B sequences to their cached keys.

    Args:
        q: (T, Hq, D) fp32, fp16 or bf16; D even, any token and head stride, temperature applied.
        kv: caches that already hold the new tokens, and one block-table row per sequence. Entries
            outside the live range, from the first new token's chunk to the last token, are unread.
        cu_seqlens_q: (B + 1,) int32, cu[0] == 0, cu[B] == T: new tokens of b are cu[b]..cu[b+1]-1.
        seq_lens: (B,) int32, cached plus new tokens.
        chunk_size: 0 for a global layer.
        sm_scale: factor of q . k; None: D ** -0.5.
        checked: read lengths and live page ids back (one synchronisation) and raise on bad ones.
        config: tile configuration; None takes `default_config(T, B, D, dtype, ...)`.
    Returns:
        out (T, Hq, D) in q.dtype; lse (T, Hq) fp32, natural log-sum-exp of the scaled scores.
    Raises:
        ValueError: shapes, strides, devices, head counts, chunk_size, sm_scale.
        TypeError: dtypes.   IndexError: checked, lengths or page ids out of range.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: fp32 scores, softmax and accumulators; probabilities rounded to q.dtype before the
        second product. Key tiles in ascending order: a row's bits depend on its own sequence and
        the config only. No visible key: out 0, lse -inf.
        A NaN or inf in v reaches the other rows of its sequence that share its key tile (0 * NaN).
    Cost: 4 * D * Hq flops per visible pair; bytes = 2*T*Hq*D*itemsize + K/V once per row tile.
    Source: see the module; reference: kernels/reference.py:attention_prefill.
    """
    op = "attention_prefill"
    check_index(op, "cu_seqlens_q", cu_seqlens_q, ("B + 1",))
    num_seqs = cu_seqlens_q.shape[0] - 1
    require(num_seqs >= 0, op, "cu_seqlens_q must have at least one element", 0)
    check_index(op, "seq_lens", seq_lens, (num_seqs,))
    check_attention(op, q, "T", kv, num_seqs, chunk_size, sm_scale)
    check_devices(op, q=q, k_cache=kv.k_cache, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens)
    T, _, D = q.shape
    require(T == 0 or num_seqs > 0, op, "q must be empty where there is no sequence", T)
    if is_checked(checked, q):
        _check_lengths(kv, cu_seqlens_q.tolist(), seq_lens.tolist(), T, chunk_size)
    if config is None:
        aligned = is_aligned((), q, kv.k_cache, kv.v_cache)
        properties = device_properties(q.device)
        config = default_config(T, num_seqs, D, q.dtype, properties, aligned=aligned)
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    return _attention_prefill(
        q, kv.k_cache, kv.v_cache, kv.block_table, cu_seqlens_q, seq_lens, chunk_size, sm_scale,
        list(astuple(config)),
    )  # fmt: skip


def _check_lengths(
    kv: PagedKV, bounds: list[int], seq_lens: list[int], T: int, chunk_size: int
) -> None:
    op = "attention_prefill"
    q_lens = [last - first for first, last in zip(bounds, bounds[1:], strict=False)]
    ascending = bounds[0] == 0 and bounds[-1] == T and min(q_lens, default=0) >= 0
    must = f"cu_seqlens_q must ascend from 0 to T == {T}"
    require(ascending, op, must, bounds, IndexError)
    check_values(op, kv, q_lens, seq_lens, chunk_size)


def _attention_prefill_impl(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    chunk_size: int,
    sm_scale: float,
    config: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    BLOCK_M, BLOCK_N, num_warps, num_stages = config
    T, Hq, D = q.shape
    num_seqs = seq_lens.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((T, Hq), dtype=torch.float32, device=q.device)
    tiles = T // BLOCK_M + num_seqs if T else 0
    launch(
        _attention_prefill_kernel, (tiles * Hq,),
        q, k_cache, v_cache, block_table, cu_seqlens_q, seq_lens, out, lse,
        num_seqs, Hq,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], block_table.stride(0),
        sm_scale * LOG2_E.value, chunk_size,
        GROUP=Hq // k_cache.shape[2], D=D, PAGE_SIZE=k_cache.shape[1],
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=max(16, triton.next_power_of_2(D)),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse


_attention_prefill = define(
    "attention_prefill(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,"
    " Tensor cu_seqlens_q, Tensor seq_lens, int chunk_size, float sm_scale, int[] config)"
    " -> (Tensor, Tensor)",
    _attention_prefill_impl,
    lambda q, *args: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)),
)
