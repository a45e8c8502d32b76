"""Sorting a routing made elsewhere, on the device; the twin of _route_program.py.

localise_slots                 one block of slots: local ids and weights stored, experts counted
sort_program                   all slots in this one program, up to the table of tiles
_sort_kernel, _count_kernel    what routing.py launches for few slots and for many
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._names import named, nbytes
from ._route_program import load_num_valid
from .counting_sort import order_slots

__all__ = ["localise_slots", "sort_program"]


@triton.jit
def localise_slots(
    ids_in_ptr, weights_in_ptr, expert_ids_ptr, expert_weights_ptr,
    r0, end, num_valid, top_k, first, count,
    stride_ids_t, stride_weights_t,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Store ids less `first` and weights of slots r0 and following; return (BLOCK_G,) counts.

    -1 and 0 for what is dropped: an id outside [first, first + count), a token from num_valid on.
    """
    slots = r0 + tl.arange(0, BLOCK_R)
    mask = slots < end
    tokens = slots // top_k
    offs_t = tokens.to(tl.int64)
    ids_ptrs = ids_in_ptr + offs_t * stride_ids_t + slots % top_k
    ids = tl.load(ids_ptrs, mask=mask & (tokens < num_valid), other=-1)
    kept = mask & (tokens < num_valid) & (ids >= first) & (ids < first + count)
    ids = tl.where(kept, ids - first, -1)
    weights_ptrs = weights_in_ptr + offs_t * stride_weights_t + slots % top_k
    weights = tl.load(weights_ptrs, mask=kept, other=0.0)
    tl.store(expert_ids_ptr + slots, ids, mask=mask)
    tl.store(expert_weights_ptr + slots, weights, mask=mask)
    return tl.sum((ids[:, None] == tl.arange(0, BLOCK_G)[None, :]).to(tl.int32), axis=0)


@triton.jit
def sort_program(
    ids_in_ptr, weights_in_ptr, num_valid_ptr,
    expert_ids_ptr, expert_weights_ptr, expert_offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
    T, top_k, first, count, capacity, block_m,
    stride_ids_t, stride_weights_t,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Sort T * top_k slots: all that a `Routing` holds, from ids and weights."""
    num_valid = load_num_valid(num_valid_ptr, T)
    R = T * top_k
    counts = tl.zeros((BLOCK_G,), dtype=tl.int32)
    for r0 in tl.range(0, R, BLOCK_R):
        counts += localise_slots(
            ids_in_ptr, weights_in_ptr, expert_ids_ptr, expert_weights_ptr,
            r0, R, num_valid, top_k, first, count,
            stride_ids_t, stride_weights_t, BLOCK_R, BLOCK_G,
        )  # fmt: skip
    order_slots(
        expert_ids_ptr, expert_offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
        counts, tl.arange(0, BLOCK_G), R, count, capacity, block_m, BLOCK_R, BLOCK_G,
    )  # fmt: skip


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    """Every table once; comparisons and integers."""
    return nbytes(*(arg for arg in args.values() if isinstance(arg, torch.Tensor))), 0


@triton.jit(
    do_not_specialize=[
        "T", "top_k", "first", "count", "capacity", "block_m", "stride_ids_t", "stride_weights_t",
    ],
    **named("sort", "ids_in_ptr", _cost),
)  # fmt: skip
def _sort_kernel(
    ids_in_ptr, weights_in_ptr, num_valid_ptr,
    expert_ids_ptr, expert_weights_ptr, expert_offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
    T, top_k, first, count, capacity, block_m,
    stride_ids_t, stride_weights_t,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Grid (1,): everything, for few slots."""
    sort_program(
        ids_in_ptr, weights_in_ptr, num_valid_ptr, expert_ids_ptr, expert_weights_ptr,
        expert_offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
        T, top_k, first, count, capacity, block_m,
        stride_ids_t, stride_weights_t, BLOCK_R, BLOCK_G,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "T", "top_k", "first", "count", "rows_per_program", "stride_ids_t", "stride_weights_t",
    ],
    **named("count", "ids_in_ptr", _cost),
)  # fmt: skip
def _count_kernel(
    ids_in_ptr, weights_in_ptr, num_valid_ptr, expert_ids_ptr, expert_weights_ptr, counts_ptr,
    T, top_k, first, count, rows_per_program,
    stride_ids_t, stride_weights_t,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Grid (P,): program p counts the groups of slots p * rows_per_program and following."""
    pid = tl.program_id(0)
    begin = pid * rows_per_program
    end = tl.minimum(begin + rows_per_program, T * top_k)
    num_valid = load_num_valid(num_valid_ptr, T)

    counts = tl.zeros((BLOCK_G,), dtype=tl.int32)
    for r0 in tl.range(begin, end, BLOCK_R):
        counts += localise_slots(
            ids_in_ptr, weights_in_ptr, expert_ids_ptr, expert_weights_ptr,
            r0, end, num_valid, top_k, first, count,
            stride_ids_t, stride_weights_t, BLOCK_R, BLOCK_G,
        )  # fmt: skip

    offs_g = tl.arange(0, BLOCK_G)
    tl.store(counts_ptr + pid * BLOCK_G + offs_g, counts, mask=offs_g < count)
