"""Stable counting sort of token slots into expert order, and the tile table of the grouped GEMMs.

    group[s]    = expert_ids[s // top_k, s % top_k], or E where that is outside [0, E)
    offsets[g]  = number of slots s with group[s] < g
    row_slot[offsets[g] + i] = the i-th slot of group g, in ascending order
    tiles       = (g, first row, end row) for every block_m rows of every group, in order

Layout: expert_ids and expert_weights (T, top_k) with any row stride; R = T * top_k slots.
Tiling: each program counts the groups of its slots, one program scans the counts into the first
row of each (program, group) and writes the tile table, each program then moves its slots to base
plus rank. Integers only and no atomics, so the order is that of a sequential sort. A
(BLOCK_R, BLOCK_G) block has at most 8192 elements: a larger one-hot matrix spills. Nothing waits
for the device: the table has room for the most tiles that R slots can need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._names import named, nbytes

__all__ = ["block_of_slots", "count_scan_scatter", "tile_capacity"]

BLOCK_ELEMENTS = 8192
SCAN_ELEMENTS = 4096  # the scan holds several such blocks at a time, in
SCAN_WARPS = 4  # one program of this size


def tile_capacity(rows: int, num_experts: int, block_m: int) -> int:
    """The most tiles that `rows` can need: full ones, and a ragged one per non-empty group."""
    return rows // block_m + torch.sym_min(num_experts + 1, rows)


def padded_groups(num_experts: int) -> int:
    """The experts and the dropped group, up to a power of two."""
    return max(16, triton.next_power_of_2(num_experts + 1))


def block_of_slots(num_experts: int) -> int:
    """The largest BLOCK_R."""
    return min(256, BLOCK_ELEMENTS // padded_groups(num_experts))


@triton.jit
def _load_groups(ids_ptr, slots, mask, E, top_k, stride_ids_t):
    """Return the group of each slot: its expert, E where that is dropped, -1 where masked."""
    offs_t = (slots // top_k).to(tl.int64)
    ids = tl.load(ids_ptr + offs_t * stride_ids_t + slots % top_k, mask=mask, other=0)
    return tl.where(mask, tl.where((ids >= 0) & (ids < E), ids, E), -1)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    """All three kernels: every table once; integers only."""
    return nbytes(*(arg for arg in args.values() if isinstance(arg, torch.Tensor))), 0


@triton.jit(
    do_not_specialize=["R", "E", "top_k", "rows_per_program", "stride_ids_t", "stride_weights_t"],
    **named("count", "expert_ids_ptr", _cost),
)
def _count_kernel(
    expert_ids_ptr, weights_in_ptr, counts_ptr, expert_weights_ptr,
    R, E, top_k, rows_per_program,
    stride_ids_t, stride_weights_t,
    HAS_WEIGHTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Grid (P,): program p counts the groups of slots p * rows_per_program and following.

    HAS_WEIGHTS also copies the weights, with 0 for those of dropped slots.
    """
    pid = tl.program_id(0)
    begin = pid * rows_per_program
    end = tl.minimum(begin + rows_per_program, R)
    offs_g = tl.arange(0, BLOCK_G)

    counts = tl.zeros((BLOCK_G,), dtype=tl.int32)
    for r0 in tl.range(begin, end, BLOCK_R):
        slots = r0 + tl.arange(0, BLOCK_R)
        mask = slots < end
        groups = _load_groups(expert_ids_ptr, slots, mask, E, top_k, stride_ids_t)
        counts += tl.sum((groups[:, None] == offs_g[None, :]).to(tl.int32), axis=0)
        if HAS_WEIGHTS:
            offs_t = (slots // top_k).to(tl.int64)
            weights_ptrs = weights_in_ptr + offs_t * stride_weights_t + slots % top_k
            weights = tl.load(weights_ptrs, mask=mask & (groups < E), other=0.0)
            tl.store(expert_weights_ptr + slots, weights, mask=mask)

    tl.store(counts_ptr + pid * BLOCK_G + offs_g, counts)


@triton.jit(
    do_not_specialize=["P", "E", "capacity", "block_m"], **named("scan", "counts_ptr", _cost)
)
def _scan_kernel(
    counts_ptr, bases_ptr, expert_offsets_ptr, tiles_ptr, tile_count_ptr,
    P, E, capacity, block_m,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Grid (1,): the first row of each (program, group), and the table of tiles.

    counts and bases are (P, BLOCK_G); they are two buffers, because a store could overtake
    another thread's load of the same element.
    """
    offs_g = tl.arange(0, BLOCK_G)
    offs_p = tl.arange(0, BLOCK_P)

    totals = tl.zeros((BLOCK_G,), dtype=tl.int32)
    for p0 in tl.range(0, P, BLOCK_P):
        offs = (p0 + offs_p)[:, None] * BLOCK_G + offs_g[None, :]
        totals += tl.sum(tl.load(counts_ptr + offs, mask=offs < P * BLOCK_G, other=0), axis=0)
    group_end = tl.cumsum(totals, axis=0)
    group_row = group_end - totals
    tl.store(expert_offsets_ptr + offs_g, group_row, mask=offs_g <= E)

    base = group_row
    for p0 in tl.range(0, P, BLOCK_P):
        offs = (p0 + offs_p)[:, None] * BLOCK_G + offs_g[None, :]
        counts = tl.load(counts_ptr + offs, mask=offs < P * BLOCK_G, other=0)
        before = tl.cumsum(counts, axis=0) - counts
        tl.store(bases_ptr + offs, base[None, :] + before, mask=offs < P * BLOCK_G)
        base += tl.sum(counts, axis=0)

    tiles = (totals + block_m - 1) // block_m
    tile_end = tl.cumsum(tiles, axis=0)
    first_tile = tile_end - tiles
    tl.store(tile_count_ptr, tl.sum(tiles, axis=0))
    for i0 in tl.range(0, capacity, BLOCK_P):
        i = i0 + offs_p
        hit = (first_tile[None, :] <= i[:, None]) & (i[:, None] < tile_end[None, :])
        row = group_row[None, :] + (i[:, None] - first_tile[None, :]) * block_m
        end = tl.minimum(row + block_m, group_end[None, :])
        # At most one group hits; beyond the last tile none does, which leaves -1, 0, 0.
        expert = tl.sum(tl.where(hit, offs_g[None, :] + 1, 0), axis=1) - 1
        mask = i < capacity
        tl.store(tiles_ptr + i * 3, expert, mask=mask)
        tl.store(tiles_ptr + i * 3 + 1, tl.sum(tl.where(hit, row, 0), axis=1), mask=mask)
        tl.store(tiles_ptr + i * 3 + 2, tl.sum(tl.where(hit, end, 0), axis=1), mask=mask)


@triton.jit(
    do_not_specialize=["R", "E", "top_k", "rows_per_program", "stride_ids_t"],
    **named("scatter", "expert_ids_ptr", _cost),
)
def _scatter_kernel(
    expert_ids_ptr, bases_ptr, row_slot_ptr,
    R, E, top_k, rows_per_program,
    stride_ids_t,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Grid (P,): program p puts its slots, those that _count_kernel gave it, into their rows."""
    pid = tl.program_id(0)
    begin = pid * rows_per_program
    end = tl.minimum(begin + rows_per_program, R)
    offs_g = tl.arange(0, BLOCK_G)

    base = tl.load(bases_ptr + pid * BLOCK_G + offs_g)
    for r0 in tl.range(begin, end, BLOCK_R):
        slots = r0 + tl.arange(0, BLOCK_R)
        mask = slots < end
        groups = _load_groups(expert_ids_ptr, slots, mask, E, top_k, stride_ids_t)
        one_hot = (groups[:, None] == offs_g[None, :]).to(tl.int32)  # (BLOCK_R, BLOCK_G)
        rank = tl.cumsum(one_hot, axis=0) - one_hot
        rows = tl.sum(one_hot * (base[None, :] + rank), axis=1)
        tl.store(row_slot_ptr + rows, slots, mask=mask)
        base += tl.sum(one_hot, axis=0)


def count_scan_scatter(
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    num_experts: int,
    block_m: int,
    *,
    BLOCK_R: int,
    max_programs: int,
    num_warps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the slots of (T, top_k) `expert_ids`.

    Returns:
        expert_weights (T, top_k) fp32, a copy of `weights` with 0 for dropped slots (empty without
        `weights`); expert_offsets (E + 1,); row_slot (R,); tiles (capacity, 3); tile_count (1,).
    """
    T, top_k = expert_ids.shape
    R, E = T * top_k, num_experts
    block_g = padded_groups(E)
    steps = triton.cdiv(triton.cdiv(R, BLOCK_R), max_programs)
    rows_per_program = max(1, steps) * BLOCK_R
    programs = triton.cdiv(R, rows_per_program)
    capacity = tile_capacity(R, E, block_m)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expert_ids.device)

    expert_weights = torch.empty(
        (0, top_k) if weights is None else (T, top_k), dtype=torch.float32, device=expert_ids.device
    )
    offsets, row_slot, tiles, tile_count = empty(E + 1), empty(R), empty(capacity, 3), empty(1)
    counts, bases = empty(programs, block_g), empty(programs, block_g)

    launch(
        _count_kernel, (programs,),
        expert_ids, weights, counts, expert_weights,
        R, E, top_k, rows_per_program,
        expert_ids.stride(0), 0 if weights is None else weights.stride(0),
        HAS_WEIGHTS=weights is not None, BLOCK_R=BLOCK_R, BLOCK_G=block_g, num_warps=num_warps,
    )  # fmt: skip
    launch(
        _scan_kernel, (1,),
        counts, bases, offsets, tiles, tile_count,
        programs, E, capacity, block_m,
        BLOCK_P=SCAN_ELEMENTS // block_g, BLOCK_G=block_g, num_warps=SCAN_WARPS,
    )  # fmt: skip
    launch(
        _scatter_kernel, (programs,),
        expert_ids, bases, row_slot,
        R, E, top_k, rows_per_program,
        expert_ids.stride(0),
        BLOCK_R=BLOCK_R, BLOCK_G=block_g, num_warps=num_warps,
    )  # fmt: skip
    return expert_weights, offsets, row_slot, tiles, tile_count
