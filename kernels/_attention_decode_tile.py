"""One tile of keys of decode attention, with the keys on the tensor cores' first operand.

    S^T = K . Q^T   (keys, rows)     P^T = exp2(S^T * factor - m)     O^T += V^T . P^T   (D, rows)

A decode step has few rows and many keys. Keys, then elements of V^T, are what fills the 64 rows of
a wgmma; the rows of q are its other side, which may be 16 wide. K, V^T and P^T are read from shared
memory; accumulators are small. From 64 rows on (without SWAP) they fill a wgmma themselves, and the
products are S = Q . K^T and O += P . V, where a row's statistics take fewer registers.

A row's maximum m is common to all its keys. Its sum l is kept per key of a tile and added up at the
end, which saves a reduction across warps in every tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import natural

__all__ = ["add_tile", "log_sum_exp"]

P_SCALE = tl.constexpr(8.0)  # log2; probabilities of e4m3 are multiplied by 256, most of 448


@triton.jit
def _pages(
    table_ptr, n0, live, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """(page, first, slot) int64 of the tokens n0, n0 + 1, ...: they lie at slots first + slot.

    page is one for all where a tile lies in one page. Entries of the table are read if live.
    """
    offs_n = tl.arange(0, BLOCK_N)
    if PAGE_SIZE == 0:  # dense: pointers are those of the sequence's token 0
        page = n0 * 0
        first = n0
        slot = offs_n
    elif PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(table_ptr + n0 // PAGE_SIZE)
        first = tl.multiple_of(n0 % PAGE_SIZE, BLOCK_N)
        slot = offs_n
    else:
        t = n0 + offs_n
        if MASKED:
            page = tl.load(table_ptr + t // PAGE_SIZE, mask=live, other=0)
        else:
            page = tl.load(table_ptr + t // PAGE_SIZE)
        first = n0 * 0
        slot = t % PAGE_SIZE
        if BLOCK_N % PAGE_SIZE == 0:  # so that 16 bytes are moved at a time
            page = tl.max_constancy(page, PAGE_SIZE)
            slot = tl.max_contiguous(tl.multiple_of(slot, PAGE_SIZE), PAGE_SIZE)
    return page.to(tl.int64), first.to(tl.int64), slot.to(tl.int64)


@triton.jit
def _per_row(x, SWAP: tl.constexpr):
    """x (BLOCK_R,) beside scores or accumulators."""
    return x[None, :] if SWAP else x[:, None]


@triton.jit
def _per_key(x, SWAP: tl.constexpr):
    """x (BLOCK_N,) beside scores."""
    return x[:, None] if SWAP else x[None, :]


@triton.jit
def add_tile(
    q, factor, position, start, acc, l, m,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
    n0, lo, hi,
    strides_k, strides_v, strides_scale,
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, TOKEN_SCALES: tl.constexpr, MASKED: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the keys n0 .. n0 + BLOCK_N - 1 to (acc, l, m); return them.

    q (BLOCK_R, BLOCK_D); factor, position, start and m (BLOCK_R,); acc fp32 (BLOCK_R, BLOCK_D) and
    l (BLOCK_R,), with SWAP (BLOCK_D, BLOCK_R) and (BLOCK_N, BLOCK_R). strides_k (page, slot),
    strides_v (page, slot, element), strides_scale (page, slot). Not MASKED: every key of the tile
    is in [lo, hi), otherwise only those are loaded.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    t = n0 + offs_n
    live = (t >= lo) & (t < hi)
    page, first, slot = _pages(table_ptr, n0, live, PAGE_SIZE, BLOCK_N, MASKED)
    mask = (live | (not MASKED))[:, None] & (offs_d < D)[None, :]

    stride_page, stride_slot = strides_k
    k_ptr += page * stride_page + first * stride_slot
    k_ptrs = (k_ptr + slot * stride_slot)[:, None] + offs_d[None, :]
    stride_page, stride_slot, stride_d = strides_v
    v_ptr += page * stride_page + first * stride_slot
    v_ptrs = (v_ptr + slot * stride_slot)[None, :] + (offs_d.to(tl.int64) * stride_d)[:, None]
    if MASKED or D != BLOCK_D:
        k = tl.load(k_ptrs, mask=mask, other=0.0)  # (BLOCK_N, BLOCK_D)
        v_t = tl.load(v_ptrs, mask=tl.trans(mask), other=0.0)  # (BLOCK_D, BLOCK_N)
    else:
        k = tl.load(k_ptrs)
        v_t = tl.load(v_ptrs)
    # The tensor cores' fp8 sums keep 14 bits: they hold one tile, the fp32 accumulator all.
    TWO_LEVELS: tl.constexpr = k.dtype == tl.float8e4nv
    k = k.to(q.dtype)
    v_t = v_t.to(q.dtype)

    if SWAP:
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_N, BLOCK_R)
    else:
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_R, BLOCK_N)
    s = s * _per_row(factor, SWAP)
    weight = tl.full((BLOCK_N,), 1.0, dtype=tl.float32)
    if TOKEN_SCALES:
        stride_page, stride_slot = strides_scale
        offs_scale = page * stride_page + (first + slot) * stride_slot
        k_scale = tl.load(k_scale_ptr + offs_scale, mask=live, other=1.0)
        weight = tl.load(v_scale_ptr + offs_scale, mask=live, other=1.0)
        # What is rounded to e4m3 is p * v_scale, so that is what the maximum is of.
        s = s * _per_key(k_scale, SWAP) + _per_key(tl.log2(weight), SWAP)
    t = _per_key(t, SWAP)
    visible = (t <= _per_row(position, SWAP)) & (t >= _per_row(start, SWAP))
    s = tl.where(visible, s, -float("inf"))

    m_new = tl.maximum(m, tl.max(s, axis=0 if SWAP else 1))
    m_sub = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key so far: -inf - -inf is NaN
    alpha = tl.exp2(m - m_sub)
    if q.dtype == tl.float8e4nv:
        m_sub -= P_SCALE
    p = tl.exp2(s - _per_row(m_sub, SWAP))
    parts = p / _per_key(weight, SWAP) if TOKEN_SCALES else p
    if SWAP:
        l = l * alpha[None, :] + parts
    else:
        l = l * alpha + tl.sum(parts, axis=1)
    acc = acc * _per_row(alpha, SWAP)
    p = p.to(q.dtype)
    if SWAP and TWO_LEVELS:
        acc += tl.dot(v_t, p, input_precision="ieee")
    elif SWAP:
        acc = tl.dot(v_t, p, acc, input_precision="ieee")
    elif TWO_LEVELS:
        acc += tl.dot(p, tl.trans(v_t), input_precision="ieee")
    else:
        acc = tl.dot(p, tl.trans(v_t), acc, input_precision="ieee")
    return acc, l, m_new


@triton.jit
def log_sum_exp(m, l, E4M3_MMA: tl.constexpr):
    """Of rows with the maximum m and the sum l > 0, in powers of two; natural."""
    return natural(m + tl.log2(l) - (P_SCALE if E4M3_MMA else 0.0))
