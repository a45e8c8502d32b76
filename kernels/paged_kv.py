"""The paged KV cache as the operators see it.

Layout "nhd": one page is (page_size, Hkv, D), the caches are (num_pages, page_size, Hkv, D).
Token t of sequence b lies in page block_table[b, t // page_size] at slot t % page_size. The table
is indexed by the absolute logical page of the sequence, so a local layer that has freed the pages
of earlier chunks keeps its later entries where they are; entries outside the live range are never
read and may hold anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._check import FLOATS, check_devices, check_index, check_tensor, require

__all__ = ["PagedKV", "check_paged_kv"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedKV:
    """Views of one layer's cache; nothing is owned or copied.

    Args:
        k_cache, v_cache: (num_pages, page_size, Hkv, D), same dtype and strides, dense in D.
        block_table: (B, max_pages) int32 page ids.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor

    @property
    def num_pages(self) -> int:
        return self.k_cache.shape[0]

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that a row of the block table can address."""
        return self.block_table.shape[1] * self.page_size


def check_paged_kv(
    op: str, kv: PagedKV, head_dim: int, dtype: torch.dtype, num_seqs: int | None = None
) -> None:
    """Check the caches against `head_dim` and `dtype`, and the table against `num_seqs`.

    Raises:
        TypeError: not a PagedKV, or dtypes.   ValueError: shapes, strides or devices.
    """
    require(isinstance(kv, PagedKV), op, "kv must be a PagedKV", type(kv).__name__, TypeError)
    shape = ("num_pages", "page_size", "Hkv", head_dim)
    check_tensor(op, "kv.k_cache", kv.k_cache, shape, FLOATS)
    check_tensor(op, "kv.v_cache", kv.v_cache, tuple(kv.k_cache.shape), FLOATS)
    for name, cache in (("k", kv.k_cache), ("v", kv.v_cache)):
        must = f"kv.{name}_cache must have the dtype of q, {dtype}"
        require(cache.dtype == dtype, op, must, cache.dtype, TypeError)
    require(
        kv.page_size >= 1 and kv.num_kv_heads >= 1,
        op,
        "kv.k_cache must have at least one slot per page and one head",
        tuple(kv.k_cache.shape),
    )
    require(
        kv.k_cache.stride() == kv.v_cache.stride(),
        op,
        f"kv.v_cache must have the strides of kv.k_cache, {kv.k_cache.stride()}",
        kv.v_cache.stride(),
    )
    check_index(op, "kv.block_table", kv.block_table, (num_seqs, "max_pages"))
    check_devices(op, k_cache=kv.k_cache, v_cache=kv.v_cache, block_table=kv.block_table)
