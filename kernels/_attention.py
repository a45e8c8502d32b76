"""What prefill and decode attention share: the loop over key tiles, and the argument checks.

One row of scores, for a query at position p that sees the keys start <= t <= p:

    s[t] = q . k[t];   m = max(s) * scale;   l = sum(exp2(s * scale - m))
    out = sum(exp2(s * scale - m) * v[t]) / l;   lse = ln2 * (m + log2(l))

with scale = sm_scale * log2(e).

m, l and out are built tile by tile (online softmax), always in ascending order of t and in fp32.
A row that has seen no key yet has m = -inf and l = 0, and such a tile leaves it exactly so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_architecture, check_tensor, require
from .paged_kv import PagedKV, check_paged_kv

__all__ = ["LN_2", "LOG2_E", "attend", "check_attention", "check_values", "finish", "visible_keys"]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _kv_offsets(
    table_ptr, n0, lo, hi, stride_kv_page, stride_kv_slot,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N,) int64 offsets of the tokens n0, n0 + 1, ... in a cache; only [lo, hi) is live."""
    offs_n = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:
        # n0 is a multiple of BLOCK_N: the tile lies in one page, found with one scalar load.
        page = tl.load(table_ptr + n0 // PAGE_SIZE).to(tl.int64)
        slot = n0 % PAGE_SIZE + offs_n
    else:
        t = n0 + offs_n
        live = (t >= lo) & (t < hi)
        page = tl.load(table_ptr + t // PAGE_SIZE, mask=live, other=0).to(tl.int64)
        slot = t % PAGE_SIZE
    return page * stride_kv_page + slot.to(tl.int64) * stride_kv_slot


@triton.jit
def _load_tile(ptrs, live, D: tl.constexpr, MASKED: tl.constexpr):
    """A (BLOCK_N, BLOCK_D) tile; rows that are not live are zeros, looked at only if MASKED."""
    if D == ptrs.shape[1] and not MASKED:
        return tl.load(ptrs)
    mask = (tl.arange(0, ptrs.shape[1]) < D)[None, :]
    if MASKED:
        mask = mask & live[:, None]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def attend(
    q, acc, l, m,
    k_ptr, v_ptr, table_ptr,
    first, last, lo, hi, position, start,
    stride_kv_page, stride_kv_slot, scale,
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the key tiles at first, first + BLOCK_N, ... < last to (acc, l, m); return them.

    q (BLOCK_M, BLOCK_D); acc likewise, fp32; l, m, position, start (BLOCK_M,). Keys outside
    [lo, hi) are not loaded. Not MASKED: every key of these tiles is visible to every row.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    for n0 in tl.range(first, last, BLOCK_N):
        offs_kv = _kv_offsets(
            table_ptr, n0, lo, hi, stride_kv_page, stride_kv_slot, PAGE_SIZE, BLOCK_N
        )[:, None] + offs_d[None, :]  # fmt: skip
        t = n0 + offs_n
        live = (t >= lo) & (t < hi)
        k = _load_tile(k_ptr + offs_kv, live, D, MASKED)  # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if MASKED:
            visible = (t[None, :] <= position[:, None]) & (t[None, :] >= start[:, None])
            s = tl.where(visible, s, -float("inf"))

        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        m_sub = m_new
        if MASKED:  # -inf - -inf is NaN; a row without a key yet subtracts 0 instead
            m_sub = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(s * scale - m_sub[:, None])
        alpha = tl.exp2(m - m_sub)
        l = l * alpha + tl.sum(p, axis=1)
        acc = acc * alpha[:, None]
        v = _load_tile(v_ptr + offs_kv, live, D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = m_new
    return acc, l, m


@triton.jit
def finish(acc, l, m):
    """Return (out, lse) of the rows; (0, -inf) for a row that saw no key."""
    l_safe = tl.where(l == 0.0, 1.0, l)
    return acc / l_safe[:, None], (m + tl.log2(l_safe)) * LN_2


def visible_keys(args: Mapping[str, Any]) -> tuple[int, int]:
    """Upper bounds from a launch's arguments: keys that one query sees, bytes of K and V in all."""
    k, table, queries = args["k_ptr"], args["block_table_ptr"], args["q_ptr"].shape[0]
    num_pages, page_size, Hkv, D = k.shape
    capacity = table.shape[1] * page_size
    keys = min(capacity, args["chunk_size"] or capacity)
    cached = min(table.shape[0] * capacity, num_pages * page_size, queries * keys)
    return keys, 2 * cached * Hkv * D * k.element_size()


def check_attention(
    op: str,
    q: torch.Tensor,
    rows: int | str,
    kv: PagedKV,
    num_seqs: int,
    chunk_size: int,
    sm_scale: float | None,
    *,
    q_dtypes: tuple[torch.dtype, ...] = FLOATS,
    layouts: tuple[str, ...] = ("nhd",),
    quantized: bool = False,
) -> None:
    """Raise ValueError, TypeError or UnsupportedArchitectureError without reading a value.

    `rows` is the first dimension that q must have, or its name where it is free. The operator takes
    q in q_dtypes, caches in layouts, and e4m3 ones if `quantized`.
    """
    check_tensor(op, "q", q, (rows, "Hq", "D"), q_dtypes)
    _, Hq, D = q.shape
    require(2 <= D <= 256 and D % 2 == 0, op, "q must have an even head_dim in 2..256", D)
    check_paged_kv(op, kv, D, q.dtype, num_seqs, allowed=layouts, quantized=quantized)
    must = f"q must have a multiple of Hkv == {kv.num_kv_heads} heads"
    require(Hq > 0 and Hq % kv.num_kv_heads == 0, op, must, Hq)
    require(chunk_size >= 0, op, "chunk_size must be >= 0 (0: no chunks)", chunk_size)
    valid = sm_scale is None or 0.0 < sm_scale < float("inf")
    require(valid, op, "sm_scale must be finite and > 0", sm_scale)
    check_architecture(op, q)
    check_architecture(op, kv.k_cache)


def check_values(
    op: str, kv: PagedKV, q_lens: list[int], seq_lens: list[int], chunk_size: int
) -> None:
    """Raise IndexError where lengths or live page ids leave the cache; reads the block table."""
    table = kv.block_table.tolist()
    for b, (q_len, seq_len) in enumerate(zip(q_lens, seq_lens, strict=True)):
        must = f"seq_lens[{b}] must be in {q_len}..{kv.capacity} (new tokens, cache capacity)"
        require(q_len <= seq_len <= kv.capacity, op, must, seq_len, IndexError)
        if q_len == 0 or seq_len == 0:
            continue
        oldest = seq_len - q_len  # position of the first new row; its chunk is still live
        oldest = oldest // chunk_size * chunk_size if chunk_size else 0
        for i in range(oldest // kv.page_size, (seq_len - 1) // kv.page_size + 1):
            must = f"kv.block_table[{b}, {i}] must be in 0..{kv.num_pages - 1}"
            require(0 <= table[b][i] < kv.num_pages, op, must, table[b][i], IndexError)
