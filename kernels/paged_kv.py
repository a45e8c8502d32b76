"""The KV cache as the operators see it: in pages, or a row per sequence.

Two page layouts, by name, and one without pages, which attention reads and nothing here writes:

    "nhd"            k and v (num_pages, page_size, Hkv, D): what engines have
    "transposed_v"   k likewise, v (num_pages, Hkv, D, page_size): a page of one head is V^T, whose
                     rows are what fp8 tensor cores of sm_90 read without a transposition
    "dense"          k and v (B, S, Hkv, D), any strides but the last: what transformers has

Token t of sequence b lies in page block_table[b, t // page_size] at slot t % page_size. The table
is indexed by the absolute logical page of the sequence, so a local layer that has freed the pages
of earlier chunks keeps its later entries where they are; entries outside the live range are never
read and may hold anything.

In "dense", token t of sequence b lies in row b at slot block_table[b, 0] + t. The table's one
number is the left padding; less what a sliding cache has dropped, so it may be negative: tokens
that are gone are never read. S may change at every step without another compilation.

e4m3 caches hold k_q and v_q with k ~= k_q * k_scale and v ~= v_q * v_scale. A scale is of the whole
tensor, of a KV head, or of a token and KV head; the last lies in pages as the tokens do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ._check import FLOATS, check_devices, check_index, check_tensor, require

__all__ = ["DENSE", "LAYOUTS", "PagedKV", "check_paged_kv"]

E4M3 = torch.float8_e4m3fn
Layout = Literal["nhd", "transposed_v", "dense"]
LAYOUTS: tuple[Layout, ...] = ("nhd", "transposed_v")  # of pages
DENSE: Layout = "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedKV:
    """Views of one layer's cache; nothing is owned or copied.

    Args:
        k_cache, v_cache: as the layout says, same dtype, dense in their last dimension.
        block_table: (B, max_pages) int32 page ids; "dense": (B, 1), the slot of token 0.
        k_scale, v_scale: of e4m3 caches, fp32: (1,), (Hkv,) or (num_pages, page_size, Hkv).
        layout: "nhd", "transposed_v" or "dense".
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    layout: Layout = "nhd"

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

    @property
    def page_constant(self) -> int:
        """PAGE_SIZE of the kernels, which is compiled into them; 0 where there are no pages."""
        return 0 if self.layout == DENSE else self.page_size

    @property
    def is_quantized(self) -> bool:
        return self.k_cache.dtype == E4M3

    @property
    def scale_kind(self) -> str:
        """ "none", "head" (or tensor: the same number for all) or "token"."""
        if self.k_scale is None:
            return "none"
        return "token" if self.k_scale.ndim == 3 else "head"

    def v_strides(self) -> tuple[int, int, int, int]:
        """Strides of v by page, slot, head and element, whatever the layout."""
        if self.layout == "transposed_v":
            page, head, element, slot = self.v_cache.stride()
        else:
            page, slot, head, element = self.v_cache.stride()
        return page, slot, head, element

    def scale_strides(self) -> tuple[int, int, int]:
        """Strides of both scales by page, slot and head; 0 where one number serves all."""
        if self.k_scale is None:
            return 0, 0, 0
        if self.k_scale.ndim == 3:
            page, slot, head = self.k_scale.stride()
            return page, slot, head
        return 0, 0, 0 if len(self.k_scale) == 1 else self.k_scale.stride(0)


def check_paged_kv(
    op: str,
    kv: PagedKV,
    head_dim: int,
    dtype: torch.dtype,
    num_seqs: int | None = None,
    *,
    allowed: tuple[str, ...] = ("nhd",),
    quantized: bool = False,
) -> None:
    """Check the caches against `head_dim` and `dtype`, and the table against `num_seqs`.

    `allowed`: layouts that the operator takes; `quantized`: whether it takes e4m3 caches too.

    Raises:
        TypeError: not a PagedKV, or dtypes.   ValueError: layout, shapes, strides or devices.
    """
    require(isinstance(kv, PagedKV), op, "kv must be a PagedKV", type(kv).__name__, TypeError)
    must = f"kv.layout must be one of {', '.join(allowed)}"
    require(kv.layout in allowed, op, must, repr(kv.layout))
    dense = kv.layout == DENSE
    quantized = quantized and not dense
    dtypes = (*FLOATS, E4M3) if quantized else FLOATS
    shape = ("num_pages", "page_size", "Hkv", head_dim)
    check_tensor(op, "kv.k_cache", kv.k_cache, shape, dtypes)
    num_pages, page_size, Hkv, D = kv.k_cache.shape
    v_shape = (num_pages, Hkv, D, page_size) if kv.layout == "transposed_v" else kv.k_cache.shape
    check_tensor(op, "kv.v_cache", kv.v_cache, tuple(v_shape), dtypes)
    for name, cache in (("k", kv.k_cache), ("v", kv.v_cache)):
        either = " or e4m3" if quantized else ""
        must = f"kv.{name}_cache must have the dtype of q, {dtype}{either}"
        same = cache.dtype == dtype or (quantized and cache.dtype == E4M3)
        require(same, op, must, cache.dtype, TypeError)
    require(
        kv.k_cache.dtype == kv.v_cache.dtype,
        op,
        f"kv.v_cache must have the dtype of kv.k_cache, {kv.k_cache.dtype}",
        kv.v_cache.dtype,
        TypeError,
    )
    require(
        page_size >= 1 and Hkv >= 1,
        op,
        "kv.k_cache must have at least one slot per page and one head",
        tuple(kv.k_cache.shape),
    )
    if kv.layout != "transposed_v":
        require(
            kv.k_cache.stride() == kv.v_cache.stride(),
            op,
            f"kv.v_cache must have the strides of kv.k_cache, {kv.k_cache.stride()}",
            kv.v_cache.stride(),
        )
    _check_scales(op, kv)
    table = (num_pages, 1) if dense else (num_seqs, "max_pages")
    check_index(op, "kv.block_table", kv.block_table, table)
    if dense and num_seqs not in (None, num_pages):  # a message would make a symbol a number
        must = f"kv.k_cache must have a row for each of {num_seqs} sequences"
        require(False, op, must, num_pages)
    check_devices(
        op, k_cache=kv.k_cache, v_cache=kv.v_cache, block_table=kv.block_table,
        k_scale=kv.k_scale, v_scale=kv.v_scale,
    )  # fmt: skip


def _check_scales(op: str, kv: PagedKV) -> None:
    k_scale, v_scale = kv.k_scale, kv.v_scale
    scales = dict(k_scale=k_scale, v_scale=v_scale)
    for name, scale in scales.items():
        must = f"kv.{name} must be given for e4m3 caches, and for no others"
        require((scale is not None) == kv.is_quantized, op, must, scale if scale is None else "one")
    if k_scale is None or v_scale is None:
        return
    by_token = (kv.num_pages, kv.page_size, kv.num_kv_heads)
    shapes = ((1,), (kv.num_kv_heads,), by_token)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        must = f"kv.{name} must be fp32 of shape (1,), ({kv.num_kv_heads},) or {by_token}"
        right = isinstance(scale, torch.Tensor) and scale.dtype == torch.float32
        require(right, op, must, getattr(scale, "dtype", scale), TypeError)
        require(tuple(scale.shape) in shapes, op, must, tuple(scale.shape))
    must = f"kv.v_scale must have the shape and strides of kv.k_scale, {tuple(k_scale.shape)}"
    same = (k_scale.shape, k_scale.stride()) == (v_scale.shape, v_scale.stride())
    require(same, op, must, tuple(v_scale.shape))
