"""Stable counting sort of token slots into expert order, and the tile table of the grouped GEMMs.

    group[s]    = expert_ids[s], or G where that is -1       G experts are sorted, -1 is dropped
    offsets[g]  = number of slots s with group[s] < g
    row_slot[offsets[g] + i] = the i-th slot of group g, in ascending order
    tiles       = (g, offsets[g], offsets[g + 1], i) for the i-th block_m rows of every group:
                  groups with more rows first, equal ones by number, the dropped group last

Layout: expert_ids (R,) with R = T * top_k slots, contiguous, numbers from 0 to G - 1 or -1.
Tiling: few slots are sorted by one program (`order_slots`). Else P programs have counted the
groups of rows_per_program slots each, one program scans the counts into the first row of each
(program, group) and writes the tile table, and P programs move their slots to base plus rank.
Integers only and no atomics, so the order is that of a sequential sort. A (BLOCK_R, BLOCK_G) block
has at most 8192 elements: a larger one-hot matrix spills. Nothing waits for the device: the table
has room for the most tiles that R slots can need.
Source: long groups first is the longest-processing-time rule: what is left for the end is short.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._names import named, nbytes
from ._sizes import power_of_2, smallest

__all__ = [
    "block_of_slots",
    "empty_order",
    "is_small",
    "order_slots",
    "padded_groups",
    "scan_and_scatter",
    "tile_capacity",
]

BLOCK_ELEMENTS = 8192
SCAN_ELEMENTS = 4096  # the scan holds several such blocks at a time, in
SCAN_WARPS = 4  # one program of this size
# What one program sorts sooner than three launches follow each other: about 16 blocks.
SMALL_SLOTS = 1024
SMALL_ELEMENTS = 2**16


def tile_capacity(rows: int, num_experts: int, block_m: int) -> int:
    """The most tiles that `rows` can need: full ones, and a ragged one per non-empty group."""
    return rows // block_m + smallest(num_experts + 1, rows)


def padded_groups(num_experts: int) -> int:
    """The experts, up to a power of two."""
    return max(16, power_of_2(num_experts))


def block_of_slots(num_experts: int) -> int:
    """The largest BLOCK_R."""
    return min(256, BLOCK_ELEMENTS // padded_groups(num_experts))


def is_small(slots: int, num_experts: int) -> bool:
    """Whether one program should sort them."""
    return slots <= SMALL_SLOTS and slots * padded_groups(num_experts) <= SMALL_ELEMENTS


@triton.jit
def write_tiles(
    expert_offsets_ptr, tiles_ptr, tile_count_ptr,
    counts, offs_g,
    R, G, capacity, block_m,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Write the table of tiles from the offsets, which must be in memory, and the same as counts.

    counts (BLOCK_G,): slots of groups offs_g, 0 where offs_g is not in [0, G).
    """
    BLOCK_C: tl.constexpr = BLOCK_G if BLOCK_G < 64 else 4096 // BLOCK_G
    BLOCK_I: tl.constexpr = 1024 // BLOCK_C
    tiles = tl.cdiv(counts, block_m)
    of_experts = tl.sum(tiles, axis=0)
    routed = tl.sum(counts, axis=0)
    tl.store(tile_count_ptr, of_experts + tl.cdiv(R - routed, block_m))

    for g0 in tl.range(0, G, BLOCK_C):
        g = g0 + tl.arange(0, BLOCK_C)
        row = tl.load(expert_offsets_ptr + g, mask=g < G, other=0)
        end = tl.load(expert_offsets_ptr + g + 1, mask=g < G, other=0)
        longer = counts[None, :] > (end - row)[:, None]
        equal = counts[None, :] == (end - row)[:, None]
        before = longer | (equal & (offs_g[None, :] < g[:, None]))  # (BLOCK_C, BLOCK_G)
        first_tile = tl.sum(tl.where(before, tiles[None, :], 0), axis=1)
        most = tl.max(tl.cdiv(end - row, block_m), axis=0)
        for i0 in tl.range(0, most, BLOCK_I):
            i = (i0 + tl.arange(0, BLOCK_I))[None, :]
            mask = row[:, None] + i * block_m < end[:, None]
            ptrs = tiles_ptr + (first_tile[:, None] + i) * 4
            tl.store(ptrs, g[:, None] + i * 0, mask=mask)
            tl.store(ptrs + 1, row[:, None] + i * 0, mask=mask)
            tl.store(ptrs + 2, end[:, None] + i * 0, mask=mask)
            tl.store(ptrs + 3, i + g[:, None] * 0, mask=mask)

    for i0 in tl.range(0, capacity - of_experts, 256):  # the dropped slots, and what is unused
        i = i0 + tl.arange(0, 256)
        is_used = routed + i * block_m < R
        mask = i < capacity - of_experts
        ptrs = tiles_ptr + (of_experts + i) * 4
        tl.store(ptrs, tl.where(is_used, G, -1), mask=mask)
        tl.store(ptrs + 1, tl.where(is_used, routed, 0), mask=mask)
        tl.store(ptrs + 2, tl.where(is_used, R, 0), mask=mask)
        tl.store(ptrs + 3, tl.where(is_used, i, 0), mask=mask)


@triton.jit
def _one_hot(expert_ids_ptr, slots, mask, offs_g):
    """Return the one-hot groups (BLOCK_R, BLOCK_G) of slots, and which of the slots are dropped."""
    ids = tl.load(expert_ids_ptr + slots, mask=mask, other=-1)
    # offs_g may have a -1 of its own, an expert of another range.
    is_group = (ids[:, None] == offs_g[None, :]) & (ids >= 0)[:, None]
    return is_group.to(tl.int32), (mask & (ids < 0)).to(tl.int32)


@triton.jit
def place_slots(
    expert_ids_ptr, row_slot_ptr, base, dropped_row, offs_g, begin, end,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Put slots begin to end - 1 into rows base (BLOCK_G,) and following, dropped_row likewise."""
    for r0 in tl.range(begin, end, BLOCK_R):
        slots = r0 + tl.arange(0, BLOCK_R)
        mask = slots < end
        one_hot, dropped = _one_hot(expert_ids_ptr, slots, mask, offs_g)
        rank = tl.cumsum(one_hot, axis=0) - one_hot
        rows = tl.sum(one_hot * (base[None, :] + rank), axis=1)
        dropped_rows = dropped_row + tl.cumsum(dropped, axis=0) - dropped
        rows = tl.where(dropped == 1, dropped_rows, rows)
        tl.store(row_slot_ptr + rows, slots, mask=mask)
        base += tl.sum(one_hot, axis=0)
        dropped_row += tl.sum(dropped, axis=0)


@triton.jit
def store_offsets(expert_offsets_ptr, counts, offs_g, G):
    """Store the exclusive sums of counts, 0 outside of [0, G); return them and the whole sum."""
    group_row = tl.cumsum(counts, axis=0) - counts
    routed = tl.sum(counts, axis=0)
    tl.store(expert_offsets_ptr + offs_g, group_row, mask=(offs_g >= 0) & (offs_g < G))
    tl.store(expert_offsets_ptr + G, routed)
    return group_row, routed


@triton.jit
def order_slots(
    expert_ids_ptr, expert_offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
    counts, offs_g,
    R, G, capacity, block_m,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Sort R slots in this one program, which has stored their ids and counted groups offs_g."""
    counts = tl.where((offs_g >= 0) & (offs_g < G), counts, 0)
    group_row, routed = store_offsets(expert_offsets_ptr, counts, offs_g, G)
    tl.debug_barrier()  # ids and offsets are read back, by other threads than stored them
    write_tiles(
        expert_offsets_ptr, tiles_ptr, tile_count_ptr,
        counts, offs_g, R, G, capacity, block_m, BLOCK_G,
    )  # fmt: skip
    place_slots(expert_ids_ptr, row_slot_ptr, group_row, routed, offs_g, 0, R, BLOCK_R)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    """Both kernels: every table once; integers only."""
    return nbytes(*(arg for arg in args.values() if isinstance(arg, torch.Tensor))), 0


@triton.jit(
    do_not_specialize=["P", "R", "G", "capacity", "block_m"], **named("scan", "counts_ptr", _cost)
)
def _scan_kernel(
    counts_ptr, bases_ptr, expert_offsets_ptr, tiles_ptr, tile_count_ptr,
    P, R, G, capacity, block_m,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Grid (1,): the first row of each (program, group), and the table of tiles.

    counts and bases are (P, BLOCK_G), of which the first G columns are used; they are two buffers,
    because a store could overtake another thread's load of the same element.
    """
    offs_g = tl.arange(0, BLOCK_G)
    offs_p = tl.arange(0, BLOCK_P)
    mask_g = (offs_g < G)[None, :]

    counts = tl.zeros((BLOCK_G,), dtype=tl.int32)
    for p0 in tl.range(0, P, BLOCK_P):
        offs = (p0 + offs_p)[:, None] * BLOCK_G + offs_g[None, :]
        mask = (p0 + offs_p < P)[:, None] & mask_g
        counts += tl.sum(tl.load(counts_ptr + offs, mask=mask, other=0), axis=0)
    base, _ = store_offsets(expert_offsets_ptr, counts, offs_g, G)

    for p0 in tl.range(0, P, BLOCK_P):
        offs = (p0 + offs_p)[:, None] * BLOCK_G + offs_g[None, :]
        mask = (p0 + offs_p < P)[:, None] & mask_g
        of_program = tl.load(counts_ptr + offs, mask=mask, other=0)
        before = tl.cumsum(of_program, axis=0) - of_program
        tl.store(bases_ptr + offs, base[None, :] + before, mask=mask)
        base += tl.sum(of_program, axis=0)

    tl.debug_barrier()  # the offsets are read back, by other threads than stored them
    write_tiles(
        expert_offsets_ptr, tiles_ptr, tile_count_ptr,
        counts, offs_g, R, G, capacity, block_m, BLOCK_G,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["R", "G", "rows_per_program"], **named("scatter", "expert_ids_ptr", _cost)
)
def _scatter_kernel(
    expert_ids_ptr, bases_ptr, expert_offsets_ptr, row_slot_ptr,
    R, G, rows_per_program,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Grid (P,): program p puts its slots, those that it has counted, into their rows."""
    pid = tl.program_id(0)
    begin = pid * rows_per_program
    offs_g = tl.arange(0, BLOCK_G)
    mask_g = offs_g < G

    base = tl.load(bases_ptr + pid * BLOCK_G + offs_g, mask=mask_g, other=0)
    group_row = tl.load(expert_offsets_ptr + offs_g, mask=mask_g, other=0)
    # Of the slots before this program's, those in no group are dropped.
    dropped_row = tl.load(expert_offsets_ptr + G) + begin - tl.sum(base - group_row, axis=0)
    end = tl.minimum(begin + rows_per_program, R)
    place_slots(expert_ids_ptr, row_slot_ptr, base, dropped_row, offs_g, begin, end, BLOCK_R)


def empty_order(
    slots: int, num_experts: int, block_m: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return expert_offsets (E + 1,), row_slot (R,), tiles (capacity, 4) and tile_count (1,)."""
    capacity = tile_capacity(slots, num_experts, block_m)
    shapes: list[tuple[int, ...]] = [(num_experts + 1,), (slots,), (capacity, 4), (1,)]
    offsets, row_slot, tiles, tile_count = (
        torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes
    )
    return offsets, row_slot, tiles, tile_count


def scan_and_scatter(
    expert_ids: torch.Tensor,
    counts: torch.Tensor,
    order: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    num_experts: int,
    block_m: int,
    rows_per_program: int,
    *,
    BLOCK_R: int,
    num_warps: int,
) -> None:
    """Sort the slots of `expert_ids`, of which `counts` (P, BLOCK_G) were counted, into `order`."""
    offsets, row_slot, tiles, tile_count = order
    R, G = expert_ids.numel(), num_experts
    programs, block_g = counts.shape
    bases = torch.empty_like(counts)
    launch(
        _scan_kernel, (1,),
        counts, bases, offsets, tiles, tile_count,
        programs, R, G, len(tiles), block_m,
        BLOCK_P=SCAN_ELEMENTS // block_g, BLOCK_G=block_g, num_warps=SCAN_WARPS,
    )  # fmt: skip
    launch(
        _scatter_kernel, (programs,),
        expert_ids, bases, offsets, row_slot,
        R, G, rows_per_program,
        BLOCK_R=BLOCK_R, BLOCK_G=block_g, num_warps=num_warps,
    )  # fmt: skip
