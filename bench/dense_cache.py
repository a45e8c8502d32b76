"""A paged cache's live tokens in rows without pages, for cases and tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels.paged_kv import DENSE, PagedKV

__all__ = ["dense_cache"]

SPARE = 3  # slots before the oldest live token, as left padding takes


def dense_cache(
    kv: PagedKV, q_lens: Sequence[int], seq_lens: Sequence[int], chunk_size: int
) -> PagedKV:
    """The live keys and values of `kv`, (B, Hkv, S, D) as transformers has them; the rest is NaN.

    Only what the new tokens see is in the rows, so token 0 of a sequence may lie in front of its.
    """
    oldest = [max(n - q, 0) for q, n in zip(q_lens, seq_lens, strict=True)]
    oldest = [p // chunk_size * chunk_size if chunk_size else 0 for p in oldest]
    S = max(n - p for n, p in zip(seq_lens, oldest, strict=True)) + SPARE
    shape = len(seq_lens), kv.num_kv_heads, S, kv.k_cache.shape[3]
    k, v = (kv.k_cache.new_full(shape, torch.nan).transpose(1, 2) for _ in range(2))
    for b, (first, end) in enumerate(zip(oldest, seq_lens, strict=True)):
        live = reference.cached(kv, b, first, end, kv.k_cache.dtype)
        for rows, new in zip((k, v), live, strict=True):
            rows[b, SPARE : SPARE + end - first] = new
    origin = torch.tensor(oldest, dtype=torch.int32, device=k.device)
    return PagedKV(k_cache=k, v_cache=v, block_table=(SPARE - origin)[:, None], layout=DENSE)
