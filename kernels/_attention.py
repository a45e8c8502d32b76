"""What prefill and decode attention share: constants, bounds of their cost, argument checks.

Scores are kept in powers of two: exp(x) = exp2(x * log2(e)), and a row's log-sum-exp is
ln(2) * (m + log2(l)) for the maximum m and the sum l of its exp2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_architecture, check_tensor, require
from .paged_kv import DENSE, PagedKV, check_paged_kv

__all__ = ["LOG2_E", "check_attention", "check_values", "natural", "visible_keys"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def natural(x):
    """ln(2**x). Written out: Triton compares a module's constants at every launch."""
    return x * 0.6931471805599453


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
        if kv.layout == DENSE:
            _check_row(op, kv, b, table[b][0], q_len, seq_len, chunk_size)
            continue
        must = f"seq_lens[{b}] must be in {q_len}..{kv.capacity} (new tokens, cache capacity)"
        require(q_len <= seq_len <= kv.capacity, op, must, seq_len, IndexError)
        if q_len == 0 or seq_len == 0:
            continue
        oldest = seq_len - q_len  # position of the first new row; its chunk is still live
        oldest = oldest // chunk_size * chunk_size if chunk_size else 0
        for i in range(oldest // kv.page_size, (seq_len - 1) // kv.page_size + 1):
            must = f"kv.block_table[{b}, {i}] must be in 0..{kv.num_pages - 1}"
            require(0 <= table[b][i] < kv.num_pages, op, must, table[b][i], IndexError)


def _check_row(
    op: str, kv: PagedKV, b: int, origin: int, q_len: int, seq_len: int, chunk_size: int
) -> None:
    """The same of a dense row; its new tokens may begin with padding, at negative positions."""
    require(seq_len >= 0, op, f"seq_lens[{b}] must be >= 0", seq_len, IndexError)
    if q_len == 0 or seq_len == 0:
        return
    oldest = max(seq_len - q_len, 0)
    first = origin + (oldest // chunk_size * chunk_size if chunk_size else 0)
    must = f"live slots of row {b} of kv must be in 0..{kv.page_size}"
    live = first, origin + seq_len
    require(first >= 0 and live[1] <= kv.page_size, op, must, live, IndexError)
