"""The V cache from one page layout to the other; K is the same in both.

    "transposed_v"   out[p, h, d, s] = v_cache[p, s, h, d]
    "nhd"            out[p, s, h, d] = v_cache[p, h, d, s]        all pages p, or those listed

Layout: see paged_kv.py; pages and heads at any stride. Values are moved as integers of their size.
Tiling: a program takes BLOCK_S slots and BLOCK_D elements of one page and head, reads them along
the dimension that is dense in v_cache and writes them along the one that is dense in out.
Source: this project; torch.Tensor.permute and a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_devices, check_index, check_tensor, check_writable, require
from ._launch import launch
from ._library import define
from ._names import named, nbytes
from ._remembered import remembered
from ._sizes import flat, tiles
from .paged_kv import E4M3, LAYOUTS, Layout

__all__ = ["ConvertLayoutConfig", "convert_layout", "default_config"]

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertLayoutConfig:
    BLOCK_S: int
    BLOCK_D: int
    num_warps: int


def default_config(page_size: int, D: int, itemsize: int) -> ConvertLayoutConfig:
    """Two sectors in a row of the tile either way, and 32 bytes of it in a thread."""
    block_s = min(64, triton.next_power_of_2(page_size))
    block_d = min(64, triton.next_power_of_2(D))
    warps = min(8, max(1, block_s * block_d * itemsize // 1024))
    return ConvertLayoutConfig(BLOCK_S=block_s, BLOCK_D=block_d, num_warps=warps)


_default_tiles = tiles(default_config)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    x, pages = args["x_ptr"], args["pages_ptr"]
    page = nbytes(x) // max(1, len(x))
    return 2 * page * len(x if pages is None else pages) + nbytes(pages), 0


@triton.jit(do_not_specialize=["num_pages"], **named("convert_layout", "x_ptr", _cost))
def _convert_layout_kernel(
    x_ptr, out_ptr, pages_ptr,
    num_pages,
    strides_x, strides_out,
    PAGE_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (pages, Hkv, tiles of a page): strides of a page, a slot, a head and an element."""
    stride_x_page, stride_x_slot, stride_x_h, stride_x_d = strides_x
    stride_out_page, stride_out_slot, stride_out_h, stride_out_d = strides_out
    page = tl.program_id(0).to(tl.int64)
    if pages_ptr is not None:
        page = tl.load(pages_ptr + page).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    tiles_d: tl.constexpr = triton.cdiv(D, BLOCK_D)
    pid_s, pid_d = tl.program_id(2) // tiles_d, tl.program_id(2) % tiles_d
    offs_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_s < PAGE_SIZE)[:, None] & (offs_d < D)[None, :]
    mask = mask & (page >= 0) & (page < num_pages)

    x_ptr += page * stride_x_page + h * stride_x_h
    x = tl.load(
        x_ptr + (offs_s * stride_x_slot)[:, None] + (offs_d * stride_x_d)[None, :],
        mask=mask,
        other=0,
    )
    out_ptr += page * stride_out_page + h * stride_out_h
    offs_out = (offs_s * stride_out_slot)[:, None] + (offs_d * stride_out_d)[None, :]
    tl.store(out_ptr + offs_out, x, mask=mask)


def convert_layout(
    v_cache: torch.Tensor,
    *,
    layout: Layout,
    out: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    config: ConvertLayoutConfig | None = None,
) -> torch.Tensor:
    """Return the pages of a V cache in `layout`, from the other one.

    Args:
        v_cache: (num_pages, page_size, Hkv, D) where `layout` is "transposed_v", and
            (num_pages, Hkv, D, page_size) where it is "nhd"; fp32, fp16, bf16 or e4m3, dense in
            its last dimension.
        layout: that of the result.
        out: where to write, of v_cache's dtype and the other shape; may not overlap v_cache. None
            makes one.
        pages: (N,) int32, each once: page p of v_cache goes to page p of out, and the rest of out
            stays as it is; an id outside [0, num_pages) is skipped. None: all pages. Needs `out`.
        config: tile configuration; None takes `default_config(page_size, D, itemsize)`.
    Returns:
        out.
    Raises:
        ValueError: layout, shapes, strides or devices.   TypeError: dtypes.
    Numerics: a copy of bits. Deterministic.
    Cost: no flops; bytes = 2 * pages * page_size * Hkv * D * itemsize.
    Source: see the module; reference: kernels/reference.py:convert_layout.
    """
    shape = _check("convert_layout", v_cache, layout, out, pages)
    if out is None:
        out = torch.empty(shape, dtype=v_cache.dtype, device=v_cache.device)
    transpose = layout == "transposed_v"
    _convert_layout(v_cache, out, pages, transpose, config and flat(config))
    return out


@remembered
def _check(
    op: str,
    v_cache: torch.Tensor,
    layout: Layout,
    out: torch.Tensor | None,
    pages: torch.Tensor | None,
) -> tuple[int, ...]:
    """Return the shape of the result."""
    must = f"layout must be one of {', '.join(LAYOUTS)}"
    require(layout in LAYOUTS, op, must, repr(layout))
    transpose = layout == "transposed_v"
    names = ("page_size", "Hkv", "D") if transpose else ("Hkv", "D", "page_size")
    check_tensor(op, "v_cache", v_cache, ("num_pages", *names), (*FLOATS, E4M3))
    page_size = v_cache.shape[1 if transpose else 3]
    require(page_size >= 1, op, "v_cache must have a slot per page", tuple(v_cache.shape))
    must = "out must be given with pages, whose rest it keeps"
    require(pages is None or out is not None, op, must, None)
    order = (0, 2, 3, 1) if transpose else (0, 3, 1, 2)
    shape = tuple(v_cache.shape[i] for i in order)
    if out is not None:
        check_tensor(op, "out", out, shape, (v_cache.dtype,))
        check_writable(op, "out", out)
    if pages is not None:
        check_index(op, "pages", pages, ("N",))
    check_devices(op, v_cache=v_cache, out=out, pages=pages)
    return shape


def _convert_layout_impl(
    v_cache: torch.Tensor,
    out: torch.Tensor,
    pages: torch.Tensor | None,
    transpose: bool,
    config: list[int] | None,
) -> None:
    x, y = (t.view(INTEGERS[t.element_size()]) for t in (v_cache, out))
    strides = [t.stride() for t in (x, y)]
    transposed = 1 if transpose else 0  # its strides by page, slot, head and element
    page, head, element, slot = strides[transposed]
    strides[transposed] = (page, slot, head, element)
    num_pages, page_size, Hkv, D = (x if transpose else y).shape
    BLOCK_S, BLOCK_D, num_warps = config or _default_tiles(page_size, D, x.element_size())
    blocks = -(-page_size // BLOCK_S) * -(-D // BLOCK_D)
    launch(
        _convert_layout_kernel, (num_pages if pages is None else len(pages), Hkv, blocks),
        x, y, pages,
        num_pages,
        *strides,
        PAGE_SIZE=page_size, D=D, BLOCK_S=BLOCK_S, BLOCK_D=BLOCK_D, num_warps=num_warps,
    )  # fmt: skip


_convert_layout = define(
    "convert_layout(Tensor v_cache, Tensor(a!) out, Tensor? pages, bool transpose, int[]? config)"
    " -> ()",
    _convert_layout_impl,
    lambda *args: None,
)
