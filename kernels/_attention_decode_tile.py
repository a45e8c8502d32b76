"""One tile of keys of decode attention, with the keys on the tensor cores' first operand.

    S^T = K . Q^T   (keys, rows)        P^T = exp2(S^T * factor - m)        O^T += V^T . P^T   (D, rows)

A decode step has few rows and many keys. Keys, then elements of V^T, are what fills the 64 rows of
a wgmma; the rows of q are its other side, which may be 16 wide. K, V^T and P^T are read from shared
memory; accumulators are small.

A row's maximum m is common to all its keys. Its sum l is kept per key of a tile and added up at the
end, which saves a reduction across warps in every tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_tile"]

P_SCALE = tl.constexpr(8.0)  # log2; probabilities of e4m3 are multiplied by 256, most of 448


@triton.jit
def _pages(
    table_ptr, n0, live, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """(page, slot) int64 of the tokens n0, n0 + 1, ...; entries of the table are read if live."""
    offs_n = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:
        # n0 is a multiple of BLOCK_N: the tile lies in one page, found with one scalar load.
        page = tl.load(table_ptr + n0 // PAGE_SIZE).to(tl.int64)
        return page + tl.zeros((BLOCK_N,), dtype=tl.int64), (n0 % PAGE_SIZE + offs_n).to(tl.int64)
    t = n0 + offs_n
    if MASKED:
        page = tl.load(table_ptr + t // PAGE_SIZE, mask=live, other=0)
    else:
        page = tl.load(table_ptr + t // PAGE_SIZE)
    slot = t % PAGE_SIZE
    if BLOCK_N % PAGE_SIZE == 0:  # so that 16 bytes are moved at a time
        page = tl.max_constancy(page, PAGE_SIZE)
        slot = tl.max_contiguous(tl.multiple_of(slot, PAGE_SIZE), PAGE_SIZE)
    return page.to(tl.int64), slot.to(tl.int64)


@triton.jit
def add_tile(
    q_t, factor, position, start, acc, l, m,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
    n0, lo, hi,
    strides_k, strides_v, strides_scale,
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, TRANSPOSED_V: tl.constexpr,
    TOKEN_SCALES: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the keys n0 .. n0 + BLOCK_N - 1 to (acc, l, m); return them.

    q_t (BLOCK_D, BLOCK_R); acc likewise, fp32; l (BLOCK_N, BLOCK_R); factor, position, start and m
    (BLOCK_R,). strides_k (page, slot), strides_v (page, slot or element), strides_scale (page,
    slot). Not MASKED: every key of the tile is in [lo, hi), otherwise only those are loaded.
    """
    BLOCK_D: tl.constexpr = q_t.shape[0]
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    t = n0 + offs_n
    live = (t >= lo) & (t < hi)
    page, slot = _pages(table_ptr, n0, live, PAGE_SIZE, BLOCK_N, MASKED)
    mask = (live | (not MASKED))[:, None] & (offs_d < D)[None, :]

    stride_page, stride_slot = strides_k
    k_ptrs = k_ptr + (page * stride_page + slot * stride_slot)[:, None] + offs_d[None, :]
    if MASKED or D != BLOCK_D:
        k = tl.load(k_ptrs, mask=mask, other=0.0)
    else:
        k = tl.load(k_ptrs)
    if k.dtype != q_t.dtype:
        k = k.to(q_t.dtype)
    s_t = tl.dot(k, q_t, input_precision="ieee")  # (BLOCK_N, BLOCK_R)

    stride_page, stride_other = strides_v
    if TRANSPOSED_V:
        v_ptrs = v_ptr + (page * stride_page + slot)[None, :] + offs_d[:, None] * stride_other
        if MASKED or D != BLOCK_D:
            v_t = tl.load(v_ptrs, mask=tl.trans(mask), other=0.0)
        else:
            v_t = tl.load(v_ptrs)
    else:
        v_ptrs = v_ptr + (page * stride_page + slot * stride_other)[:, None] + offs_d[None, :]
        if MASKED or D != BLOCK_D:
            v = tl.load(v_ptrs, mask=mask, other=0.0)
        else:
            v = tl.load(v_ptrs)
        v_t = tl.trans(v)

    s_t = s_t * factor[None, :]
    weight = tl.full((BLOCK_N,), 1.0, dtype=tl.float32)
    if TOKEN_SCALES:
        stride_page, stride_slot = strides_scale
        offs_scale = page * stride_page + slot * stride_slot
        s_t = s_t * tl.load(k_scale_ptr + offs_scale, mask=live, other=1.0)[:, None]
        weight = tl.load(v_scale_ptr + offs_scale, mask=live, other=1.0)
    visible = (t[:, None] <= position[None, :]) & (t[:, None] >= start[None, :])
    s_t = tl.where(visible, s_t, -float("inf"))
    if TOKEN_SCALES:  # a token's weight is p * v_scale: what is rounded to e4m3, and so what is maximal
        s_t = s_t + tl.log2(weight)[:, None]

    m_new = tl.maximum(m, tl.max(s_t, axis=0))
    m_sub = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key so far: -inf - -inf is NaN
    quantized: tl.constexpr = v_t.dtype == tl.float8e4nv and q_t.dtype == tl.float8e4nv
    alpha = tl.exp2(m - m_sub)
    if quantized:
        p_t = tl.exp2(s_t - (m_sub - P_SCALE)[None, :])
        l = l * alpha[None, :] + (p_t / weight[:, None] if TOKEN_SCALES else p_t)
        # Two levels: the tensor cores' fp8 sums keep 14 bits, so they hold one tile only.
        acc = acc * alpha[None, :] + tl.dot(v_t, p_t.to(v_t.dtype))
    else:
        p_t = tl.exp2(s_t - m_sub[None, :])
        l = l * alpha[None, :] + (p_t / weight[:, None] if TOKEN_SCALES else p_t)
        acc = acc * alpha[None, :]
        if v_t.dtype != q_t.dtype:
            acc += tl.dot(v_t.to(q_t.dtype), p_t.to(q_t.dtype), input_precision="ieee")
        else:
            acc = tl.dot(v_t, p_t.to(v_t.dtype), acc, input_precision="ieee")
    return acc, l, m_new
