"""The merge of partial attention results: of splits of the keys, or of ranks that hold them.

    lse = ln(sum_s exp(lse_s));   out = sum_s exp(lse_s - lse) * out_s

Partials are taken BLOCK_S at a time in ascending order. One that saw no key, (0, -inf), changes
nothing; of nothing but such the merge is (0, -inf) again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._attention import LOG2_E, natural
from ._launch import launch
from ._names import named, nbytes

__all__ = ["BLOCK_C", "BLOCK_S", "merge_columns", "merge_splits"]

PROGRAMS = 4096  # about; more would take longer to start than to run

# A program is one warp that merges 32 columns of a row: lanes lie along the columns first, so the
# sum over partials needs no shared memory, and 64 partials of 128 bytes are in flight.
BLOCK_S = 64
BLOCK_C = 32


@triton.jit
def merge_columns(
    out_ptrs, lse_ptr, mask_c, count, stride_out_s, stride_lse_s, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Return (out (BLOCK_C,), lse) of `count` partials; out_ptrs (BLOCK_C,) point to the first."""
    offs_s = tl.arange(0, BLOCK_S)
    acc = tl.zeros(out_ptrs.shape, dtype=tl.float32)
    l = tl.sum(tl.zeros((BLOCK_S,), dtype=tl.float32), axis=0)
    m = l - float("inf")
    for s0 in tl.range(0, count, BLOCK_S):
        s = (s0 + offs_s).to(tl.int64)
        mask_s = s < count
        lse = tl.load(lse_ptr + s * stride_lse_s, mask=mask_s, other=-float("inf")) * LOG2_E
        out = tl.load(
            out_ptrs[None, :] + s[:, None] * stride_out_s,
            mask=mask_s[:, None] & mask_c[None, :],
            other=0.0,
        ).to(tl.float32)
        m_new = tl.maximum(m, tl.max(lse, axis=0))
        m_sub = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key so far: -inf - -inf is NaN
        weight = tl.exp2(lse - m_sub)
        alpha = tl.exp2(m - m_sub)
        l = l * alpha + tl.sum(weight, axis=0)
        acc = acc * alpha + tl.sum(out * weight[:, None], axis=0)
        m = m_new
    l_safe = tl.where(l == 0.0, 1.0, l)
    return acc / l_safe, natural(m + tl.log2(l_safe))


def _merge_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    partial = args["part_out_ptr"]
    tensors = partial, args["part_lse_ptr"], args["out_ptr"], args["lse_ptr"]
    return nbytes(*tensors), 2 * partial.numel()


@triton.jit(
    do_not_specialize=["Hkv", "max_q_len", "programs"],
    **named("attention_merge", "out_ptr", _merge_cost),
)
def _attention_merge_kernel(
    part_out_ptr, part_lse_ptr, spans_ptr, cu_seqlens_ptr, out_ptr, lse_ptr,
    Hkv, max_q_len, programs,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (B * programs,): those of a sequence share its (row, q head, columns) out."""
    seq = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.load(spans_ptr + 2 * seq).to(tl.int64)
    count = tl.load(spans_ptr + 2 * seq + 1)
    if count < 2:
        return
    row0 = seq
    q_len = 1
    if cu_seqlens_ptr is not None:
        row0 = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
        q_len = (tl.load(cu_seqlens_ptr + seq + 1) - row0).to(tl.int32)

    PARTS: tl.constexpr = triton.cdiv(D, BLOCK_C)
    heads = Hkv * GROUP
    rows = max_q_len * GROUP
    for unit in tl.range(tl.program_id(0) % programs, q_len * heads * PARTS, programs):
        offs_c = unit % PARTS * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < D
        i = unit // PARTS // heads
        head = unit // PARTS % heads
        part = (first * Hkv + head // GROUP) * rows + i * GROUP + head % GROUP
        out, lse = merge_columns(
            part_out_ptr + part * D + offs_c, part_lse_ptr + part, mask_c, count,
            (Hkv * rows).to(tl.int64) * D, Hkv * rows, BLOCK_S,
        )  # fmt: skip
        row = (row0 + i) * heads + head
        tl.store(out_ptr + row * D + offs_c, out.to(out_ptr.dtype.element_ty), mask=mask_c)
        if unit % PARTS == 0:
            tl.store(lse_ptr + row, lse)


def merge_splits(
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    spans: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    B: int,
    Hkv: int,
    max_q_len: int,
) -> None:
    """Write the rows of sequences with several splits into out (T, Hq, D) and lse (T, Hq)."""
    _, Hq, D = out.shape
    units = max_q_len * Hq * -(-D // BLOCK_C)
    programs = max(1, min(units, PROGRAMS // max(B, 1)))
    launch(
        _attention_merge_kernel, (B * programs,),
        part_out, part_lse, spans, cu_seqlens_q, out, lse,
        Hkv, max_q_len, programs,
        GROUP=Hq // Hkv, D=D, BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=1,
    )  # fmt: skip
