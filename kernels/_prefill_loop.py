"""The loop of attention_prefill over key tiles, for 16 and 32 bits and for e4m3.

For a row that stands at position p, with r = sm_scale * log2(e) * temperature * scales of q and k:

    s[t] = q . k[t] (* k_scale[t]);   m = max(r * s);   P[t] = 2^shift * exp2(r * s[t] - m)
    l = sum(P);   acc = sum(P * v[t]);   out = acc / l;   lse = ln2 * (m + log2(l) - shift)

m, l and acc are built tile by tile (online softmax), always in ascending order of t and in fp32.
A row that has seen no key yet has m = -inf and l = 0, and such a tile leaves it exactly so.

e4m3 rounds P to e4m3: shift 8 puts the largest at 256, so what is 2^-17 of it is still there. The
tensor cores of sm_90 keep about 14 bits of such a sum: a tile is summed on its own and added in
fp32. Scales of v by token are folded into P, divided by the tile's largest, which multiplies the
sum. Caches of e4m3 under q of 16 bits are converted tile by tile; their scales are applied alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import natural

__all__ = ["attend_tiles", "finish_rows"]

E4M3_SHIFT = tl.constexpr(8)


@triton.jit
def _near(t, lo, hi):
    """Which tokens t share 16 with one of [lo, hi): constant over 16, as vector loads need it."""
    return (t >= lo // 16 * 16) & (t < tl.cdiv(hi, 16) * 16)


@triton.jit
def _locate(
    table_ptr, n0, lo, hi, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(page, slot) of the tokens n0, n0 + 1, ...: int64 both; page is a scalar where it is one."""
    t = n0 + tl.arange(0, BLOCK_N)
    if PAGE_SIZE == 0:  # dense: pointers are those of the sequence's token 0
        page = n0 * 0
        slot = t
    # Beside a tile of 128 keys the address of one page takes the registers that are left.
    elif PAGE_SIZE % BLOCK_N == 0 and BLOCK_N < 128:  # the tile lies in one page
        slot = t % PAGE_SIZE
        page = tl.load(table_ptr + n0 // PAGE_SIZE)
    elif PAGE_SIZE % 16 == 0:
        slot = t % PAGE_SIZE
        mask = _near(t, lo, hi) if MASKED else None
        page = tl.load(table_ptr + t // PAGE_SIZE, mask=mask, other=0 if MASKED else None)
        page = tl.max_constancy(page, 16)
    else:
        slot = t % PAGE_SIZE
        page = tl.load(table_ptr + t // PAGE_SIZE, mask=(t >= lo) & (t < hi), other=0)
    if PAGE_SIZE % 16 == 0:  # which the compiler does not see through a remainder
        slot = tl.max_contiguous(tl.multiple_of(slot, 16), 16)
    return page.to(tl.int64), slot.to(tl.int64)


@triton.jit
def _load_rows(ptr, offs, live, D: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_N, BLOCK_D) of keys or values at rows offs, zeros where not live, if MASKED."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs[:, None] + offs_d[None, :]
    if MASKED:
        return tl.load(ptrs, mask=live[:, None] & (offs_d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def _load_columns(
    ptr, offs, t, lo, hi, stride_d, D: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The same of transposed values, (BLOCK_D, BLOCK_N).

    16 bytes are loaded at a time, so a mask must be constant over 16 tokens: it takes in slots
    that are not live, which are set to zero afterwards.
    """
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs[None, :] + (offs_d * stride_d)[:, None]
    mask_d = (offs_d < D)[:, None]
    if MASKED:
        v = tl.load(ptrs, mask=mask_d & _near(t, lo, hi)[None, :], other=0.0)
        return tl.where(((t >= lo) & (t < hi))[None, :], v, 0.0)
    elif BLOCK_D == D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask_d, other=0.0)


@triton.jit
def attend_tiles(
    q, acc, l, m, r,
    k_ptr, v_ptr, scale_ptrs, table_ptr,
    first, last, lo, hi, position,
    strides_k, strides_v, strides_scale,
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, BY_TOKEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the key tiles at first, first + BLOCK_N, ... < last to (acc, l, m); return them.

    q (BLOCK_M, BLOCK_D); acc likewise, fp32; l, m, r, position (BLOCK_M,). Pointers are those of
    the KV head. strides_k: page, slot; strides_v: page, element of transposed pages, or None where
    v lies as k does. Keys outside [lo, hi) are not loaded. Not MASKED: every key of these tiles is
    visible to every row.
    """
    E4M3: tl.constexpr = q.dtype == tl.float8e4nv
    SHIFT: tl.constexpr = E4M3_SHIFT if E4M3 else 0
    BLOCK_D: tl.constexpr = q.shape[1]
    offs_n = tl.arange(0, BLOCK_N)
    for n0 in tl.range(first, last, BLOCK_N):
        n0 = tl.multiple_of(n0, BLOCK_N)
        page, slot = _locate(table_ptr, n0, lo, hi, PAGE_SIZE, MASKED, BLOCK_N)
        t = n0 + offs_n
        live = (t >= lo) & (t < hi)
        offs_k = page * strides_k[0] + slot * strides_k[1]
        k = _load_rows(k_ptr, offs_k, live, D, MASKED, BLOCK_D)
        if strides_v is None:
            v = _load_rows(v_ptr, offs_k, live, D, MASKED, BLOCK_D)
        else:
            offs_v = page * strides_v[0] + slot
            v = tl.trans(_load_columns(v_ptr, offs_v, t, lo, hi, strides_v[2], D, MASKED, BLOCK_D))
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if BY_TOKEN:
            offs_s = page * strides_scale[0] + slot * strides_scale[1]
            k_scale = tl.load(scale_ptrs[0] + offs_s, mask=live, other=0.0)
            v_scale = tl.load(scale_ptrs[1] + offs_s, mask=live, other=0.0)
            s *= k_scale[None, :]
        if MASKED:
            visible = (t[None, :] <= position[:, None]) & (t >= lo)[None, :]
            s = tl.where(visible, s, -float("inf"))

        m_new = tl.maximum(m, tl.max(s, axis=1) * r)
        m_sub = m_new
        if MASKED:  # -inf - -inf is NaN; a row without a key yet subtracts 0 instead
            m_sub = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(s * r[:, None] - (m_sub - SHIFT)[:, None])
        alpha = tl.exp2(m - m_sub)
        l = l * alpha + tl.sum(p, axis=1)
        m = m_new

        v = v.to(q.dtype)  # (BLOCK_N, BLOCK_D)
        if BY_TOKEN:
            largest = tl.max(v_scale, axis=0)
            p *= (v_scale / tl.where(largest > 0.0, largest, 1.0))[None, :]
            acc = acc * alpha[:, None] + largest * tl.dot(p.to(q.dtype), v, input_precision="ieee")
        elif E4M3:
            acc = acc * alpha[:, None] + tl.dot(p.to(q.dtype), v)
        else:
            acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, l, m


@triton.jit
def finish_rows(acc, l, m, E4M3: tl.constexpr):
    """Return (out, lse) of the rows; (0, -inf) for a row that saw no key."""
    l_safe = tl.where(l == 0.0, 1.0, l)
    lse = natural(m + tl.log2(l_safe) - (E4M3_SHIFT if E4M3 else 0))
    return acc / l_safe[:, None], lse
