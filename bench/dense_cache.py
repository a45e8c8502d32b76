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
    lives = [
        reference.cached(kv, b, first, end, kv.k_cache.dtype)
        for b, (first, end) in enumerate(zip(oldest, seq_lens, strict=True))
    ]
    k, v = (_rows(parts, S).contiguous().transpose(1, 2) for parts in zip(*lives, strict=True))
    origin = torch.tensor(oldest, dtype=torch.int32, device=k.device)
    return PagedKV(k_cache=k, v_cache=v, block_table=(SPARE - origin)[:, None], layout=DENSE)


def _rows(parts: Sequence[torch.Tensor], S: int) -> torch.Tensor:
    """(B, Hkv, S, D) of each sequence's tokens (n, Hkv, D), from slot SPARE on."""
    ends = ((0, 0, 0, 0, SPARE, S - SPARE - len(part)) for part in parts)
    padded = [
        torch.nn.functional.pad(part, end, value=torch.nan)
        for part, end in zip(parts, ends, strict=True)
    ]
    return torch.stack(padded).transpose(1, 2)
