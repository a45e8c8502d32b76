"""Attention of one new token per sequence over the paged KV cache, the keys split over programs.

    out[b] = softmax(sm_scale * q[b] . k[t]) . v[t]      over visible t <= p = seq_lens[b] - 1
    lse = ln(sum_s exp(lse_s));  out = sum_s exp(lse_s - lse) * out_s      merges the splits s

Layout: q (B, Hq, D); paged_kv.py. The token's own key is already in the cache.
Tiling: a program takes the q heads of one KV head (padded to 16 rows) and one split of the live
keys, which it finds from seq_lens on the device. The number of splits follows from what the host
knows: the cache's capacity, the SMs, B and Hkv. With one split the result is final; otherwise
each split writes fp32 (out, lse), (0, -inf) if it is empty, and a second kernel merges them in
ascending order. Splits below 512 tokens are not worth their partial results: 4 % of the traffic.
Source: FlashDecoding (Dao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._attention import LN_2, LOG2_E, attend, check_attention, check_values, finish, visible_keys
from ._check import check_devices, check_index, require
from ._debug import is_checked
from ._launch import SM_90, DeviceProperties, device_properties, empty_workspace, launch
from ._library import define
from ._names import named, nbytes
from .paged_kv import PagedKV

__all__ = [
    "AttentionDecodeConfig",
    "attention_decode",
    "decode_num_splits",
    "decode_workspace_numel",
    "default_config",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionDecodeConfig:
    BLOCK_N: int
    MIN_SPLIT: int  # tokens; no split is shorter
    programs_per_sm: int  # wanted, over all splits
    num_warps: int
    num_stages: int


def default_config(
    D: int, dtype: torch.dtype, properties: DeviceProperties = SM_90
) -> AttentionDecodeConfig:
    """32 KiB of keys and values per stage keep the memory busy.

    Without tensor cores, which fp32 never uses, the tiles live in registers.

    Five stages keep two tiles in flight: the page id is loaded ahead of the tile, which takes
    every second stage.
    """
    scalar = dtype == torch.float32 or not properties.has_mma
    return AttentionDecodeConfig(
        BLOCK_N=(32 if scalar else 64) // (2 if D > 128 else 1),
        MIN_SPLIT=512,
        programs_per_sm=2,
        num_warps=4,
        num_stages=1 if scalar else 5,
    )


def decode_num_splits(
    B: int,
    Hkv: int,
    capacity: int,
    chunk_size: int,
    sm_count: int,
    config: AttentionDecodeConfig,
) -> int:
    """Splits of every (sequence, KV head); `capacity` is the tokens of a block-table row."""
    longest = min(capacity, chunk_size) if chunk_size else capacity
    wanted = triton.cdiv(config.programs_per_sm * sm_count, max(B * Hkv, 1))
    return max(1, min(wanted, triton.cdiv(longest, config.MIN_SPLIT)))


def decode_workspace_numel(B: int, Hq: int, D: int, num_splits: int) -> int:
    """fp32 elements that `attention_decode` needs as `workspace`."""
    return B * Hq * num_splits * (D + 1) if num_splits > 1 else 0


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    q, out, lse = args["q_ptr"], args["out_ptr"], args["lse_ptr"]
    keys, moved = visible_keys(args)
    return nbytes(q, out, lse) + moved, 4 * q.numel() * keys


@triton.jit(
    do_not_specialize=["Hq", "chunk_size", "scale", "stride_table_b"],
    **named("attention_decode", "q_ptr", _cost),
)
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, block_table_ptr, seq_lens_ptr, out_ptr, lse_ptr,
    Hq,
    stride_q_b, stride_q_h, stride_kv_page, stride_kv_slot, stride_kv_h, stride_table_b,
    scale, chunk_size,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, MIN_SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (B, Hkv, splits): rows are the GROUP q heads of KV head h; one position for all.

    out (B, Hq, splits, D) in the dtype of its pointer, lse (B, Hq, splits).
    """
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    seq_len = tl.load(seq_lens_ptr + b)

    offs_g = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    mask_g = offs_g < GROUP
    mask = mask_g[:, None] & (offs_d < D)[None, :]
    head = h * GROUP + offs_g
    q_ptrs = q_ptr + b * stride_q_b + head[:, None] * stride_q_h + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)  # (BLOCK_G, BLOCK_D)

    # The split's keys: [lo, hi), its tiles begin at multiples of BLOCK_N.
    chunk = tl.where(chunk_size > 0, chunk_size, 2147483647)
    lo = tl.maximum(seq_len - 1, 0) // chunk * chunk
    first = lo // BLOCK_N * BLOCK_N
    length = tl.maximum(tl.cdiv(seq_len - first, num_splits), MIN_SPLIT)
    length = tl.cdiv(length, BLOCK_N) * BLOCK_N
    first += split * length
    hi = tl.minimum(first + length, seq_len)
    position = tl.zeros((BLOCK_G,), dtype=tl.int32) + (seq_len - 1)
    start = tl.zeros((BLOCK_G,), dtype=tl.int32) + lo

    acc = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    l = tl.zeros((BLOCK_G,), dtype=tl.float32)
    m = tl.full((BLOCK_G,), -float("inf"), dtype=tl.float32)
    k_ptr += h * stride_kv_h
    v_ptr += h * stride_kv_h
    acc, l, m = attend(
        q, acc, l, m, k_ptr, v_ptr, block_table_ptr + b * stride_table_b,
        first, hi, lo, hi, position, start,
        stride_kv_page, stride_kv_slot, scale, D, PAGE_SIZE, True, BLOCK_N,
    )  # fmt: skip

    out, lse = finish(acc, l, m)
    row = (b * Hq + head) * num_splits + split
    out_ptrs = out_ptr + row[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, lse, mask=mask_g)


def _merge_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    partial = args["part_out_ptr"]
    tensors = partial, args["part_lse_ptr"], args["out_ptr"], args["lse_ptr"]
    return nbytes(*tensors), 2 * partial.numel()


@triton.jit(do_not_specialize=["num_splits"], **named("attention_merge", "out_ptr", _merge_cost))
def _attention_merge_kernel(
    part_out_ptr, part_lse_ptr, out_ptr, lse_ptr,
    num_splits,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hq,): merge the splits of one row, BLOCK_S at a time, in ascending order."""
    row = tl.program_id(0).to(tl.int64)
    part_lse_ptr += row * num_splits
    part_out_ptr += row * num_splits * D

    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D

    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    l = tl.sum(tl.zeros((BLOCK_S,), dtype=tl.float32), axis=0)
    m = l - float("inf")
    for s0 in tl.range(0, num_splits, BLOCK_S):
        s = s0 + offs_s
        mask_s = s < num_splits
        mask = mask_s[:, None] & mask_d[None, :]
        lse = tl.load(part_lse_ptr + s, mask=mask_s, other=-float("inf")) * LOG2_E
        out = tl.load(part_out_ptr + s[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, tl.max(lse, axis=0))
        m_sub = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key so far: -inf - -inf is NaN
        weight = tl.exp2(lse - m_sub)
        alpha = tl.exp2(m - m_sub)
        l = l * alpha + tl.sum(weight, axis=0)
        acc = acc * alpha + tl.sum(out * weight[:, None], axis=0)
        m = m_new

    l_safe = tl.where(l == 0.0, 1.0, l)
    out = (acc / l_safe).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * D + offs_d, out, mask=mask_d)
    tl.store(lse_ptr + row, (m + tl.log2(l_safe)) * LN_2)


def attention_decode(
    q: torch.Tensor,
    kv: PagedKV,
    seq_lens: torch.Tensor,
    *,
    chunk_size: int = 0,
    sm_scale: float | None = None,
    checked: bool = False,
    config: AttentionDecodeConfig | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one new token per sequence to its cached keys.

    Args:
        q: (B, Hq, D) fp32, fp16 or bf16; D even, any batch and head stride, temperature applied.
        kv: caches that already hold the new token, and B block-table rows. Entries outside the
            live range, from the token's chunk to the token, are unread.
        seq_lens: (B,) int32 with the new token; 0 for a row that is not in use.
        chunk_size: 0 for a global layer.
        sm_scale: factor of q . k; None: D ** -0.5.
        checked: read lengths and live page ids back (one synchronisation) and raise on bad ones.
        config: tile configuration; None takes `default_config(D, dtype, ...)`.
        workspace: fp32, `decode_workspace_numel(B, Hq, D, decode_num_splits(...))` elements;
            None allocates.
    Returns:
        out (B, Hq, D) in q.dtype; lse (B, Hq) fp32, natural log-sum-exp of the scaled scores.
    Raises:
        ValueError: shapes, strides, devices, head counts, chunk_size, sm_scale, workspace.
        TypeError: dtypes.   IndexError: checked, lengths or page ids out of range.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: fp32 scores, softmax and accumulators; probabilities rounded to q.dtype before the
        second product; partial results fp32, merged in fixed order. No key: out 0, lse -inf.
        A NaN or inf in q, k or v stays within its own sequence.
    Cost: 4 * D * Hq flops per visible key; bytes = 2 * Hkv * D * itemsize per visible key.
    Source: see the module; reference: kernels/reference.py:attention_decode.
    """
    op = "attention_decode"
    check_index(op, "seq_lens", seq_lens, ("B",))
    B = seq_lens.shape[0]
    check_attention(op, q, B, kv, B, chunk_size, sm_scale)
    check_devices(op, q=q, k_cache=kv.k_cache, seq_lens=seq_lens)
    _, Hq, D = q.shape
    if is_checked(checked, q):
        lengths = seq_lens.tolist()
        check_values(op, kv, [int(n != 0) for n in lengths], lengths, chunk_size)
    properties = device_properties(q.device)
    config = config or default_config(D, q.dtype, properties)
    require(config.MIN_SPLIT >= 1, op, "config.MIN_SPLIT must be >= 1", config.MIN_SPLIT)
    splits = decode_num_splits(
        B, kv.num_kv_heads, kv.capacity, chunk_size, properties.sm_count, config
    )
    numel = decode_workspace_numel(B, Hq, D, splits)
    workspace = empty_workspace(op, numel, workspace, q.device)
    return _attention_decode(
        q,
        kv.k_cache,
        kv.v_cache,
        kv.block_table,
        seq_lens,
        workspace,
        chunk_size,
        D**-0.5 if sm_scale is None else sm_scale,
        splits,
        list(astuple(config)),
    )


def _attention_decode_impl(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    workspace: torch.Tensor,
    chunk_size: int,
    sm_scale: float,
    num_splits: int,
    config: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    BLOCK_N, MIN_SPLIT, _, num_warps, num_stages = config
    B, Hq, D = q.shape
    Hkv = k_cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, Hq), dtype=torch.float32, device=q.device)
    part_out, part_lse = out, lse
    if num_splits > 1:
        part_out, part_lse = workspace.split([B * Hq * num_splits * D, B * Hq * num_splits])
    BLOCK_D = max(16, triton.next_power_of_2(D))
    launch(
        _attention_decode_kernel, (B, Hkv, num_splits),
        q, k_cache, v_cache, block_table, seq_lens, part_out, part_lse,
        Hq,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], block_table.stride(0),
        sm_scale * LOG2_E.value, chunk_size,
        GROUP=Hq // Hkv, D=D, PAGE_SIZE=k_cache.shape[1], MIN_SPLIT=MIN_SPLIT,
        BLOCK_G=max(16, triton.next_power_of_2(Hq // Hkv)), BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if num_splits > 1:
        launch(
            _attention_merge_kernel, (B * Hq,),
            part_out, part_lse, out, lse,
            num_splits,
            D=D, BLOCK_S=16, BLOCK_D=BLOCK_D, num_warps=4,
        )  # fmt: skip
    return out, lse


_attention_decode = define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,"
    " Tensor seq_lens, Tensor(a!) workspace, int chunk_size, float sm_scale, int num_splits,"
    " int[] config) -> (Tensor, Tensor)",
    _attention_decode_impl,
    lambda q, *args: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)),
)
