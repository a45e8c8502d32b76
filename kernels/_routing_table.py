"""What routing gives to the grouped GEMMs, how it is configured, and the checks of both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ._check import check_index, check_tensor, require
from ._sizes import above, tiles
from .counting_sort import (
    BLOCK_ELEMENTS,
    block_of_slots,
    is_small,
    padded_groups,
    tile_capacity,
)

__all__ = [
    "Routing",
    "RoutingConfig",
    "check_routing",
    "check_sizes",
    "default_block_m",
    "default_config",
    "default_tiles",
]

MAX_EXPERTS = 512
MAX_TOP_K = 8
MAX_SLOTS = 2**30  # slots and rows are int32, and so is the last one plus a block


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Where each of the R = T * top_k slots s = t * top_k + k goes; all tensors on one device.

    E experts are on this GPU, numbered from 0. expert_offsets[E] rows have one of them, in the
    order of their numbers; the rows after them are dropped.
    """

    expert_ids: torch.Tensor  # (T, top_k) int32, contiguous: from 0 to E - 1; -1: dropped
    expert_weights: torch.Tensor  # (T, top_k) fp32, contiguous; 0 where dropped
    expert_offsets: torch.Tensor  # (E + 1,) int32; expert e: rows offsets[e] to offsets[e + 1]
    row_slot: torch.Tensor  # (R,) int32; row r of the expert order is slot row_slot[r]
    tiles: torch.Tensor  # (capacity, 4) int32: expert (E: dropped), its first row, its end row, and
    # which block_m of these rows; unused: -1, 0, 0, 0. The tiles of an expert follow each other;
    # experts with more rows come first, E last
    tile_count: torch.Tensor  # (1,) int32; how many tiles are used, the first ones
    block_m: int  # a tile has at most this many rows
    num_experts: int
    top_k: int

    @property
    def tile_expert(self) -> torch.Tensor:
        """(capacity,) int32."""
        return self.tiles[:, 0]

    @property
    def tile_row(self) -> torch.Tensor:
        """(capacity,) int32: the first row of each tile."""
        return self.tiles[:, 1] + self.tiles[:, 3] * self.block_m


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingConfig:
    BLOCK_T: int  # tokens per step of the choice
    BLOCK_R: int  # slots per step of the sort
    max_programs: int  # with more tokens or slots each program takes several steps
    num_warps: int
    one_program: bool = False  # one launch of one program, or three launches


def default_config(T: int, num_experts: int, top_k: int = 1) -> RoutingConfig:
    """The largest blocks; one program scans the counts, so there are at most 256 of them."""
    block_t = min(256, BLOCK_ELEMENTS // padded_groups(num_experts))
    block_r = block_of_slots(num_experts)
    if is_small(T * top_k, num_experts):
        # Small blocks leave registers for more slices of partial sums to be read at a time.
        block_t = min(block_t, 16 if T <= 16 else 64 if T <= 64 else 256)
        return RoutingConfig(
            BLOCK_T=block_t, BLOCK_R=block_r, max_programs=1, num_warps=8, one_program=True
        )
    return RoutingConfig(BLOCK_T=block_t, BLOCK_R=block_r, max_programs=256, num_warps=8)


default_tiles = tiles(default_config)


def default_block_m(rows: int, num_experts: int) -> int:
    """The smallest tile that holds the rows of most experts when tokens choose at random.

    Then an expert has a mean of rows / E with a deviation of at most its root: two of those more.
    """

    # mean + 2 * sqrt(mean) <= size up to a mean of (sqrt(size + 1) - 1) ** 2, an irrational number.
    def exceeds(size: int) -> int:
        return above(rows, int(max(1, num_experts) * (math.sqrt(size + 1) - 1) ** 2))

    return 16 + 16 * exceeds(16) + 32 * exceeds(32) + 64 * exceeds(64)


def check_routing(op: str, routing: Routing, T: int, num_experts: int) -> None:
    """Check that `routing` is one of `T` tokens to `num_experts` experts."""
    E, top_k = routing.num_experts, routing.top_k
    require(E == num_experts, op, f"routing must be to {num_experts} experts", E)
    check_tensor(op, "expert_weights", routing.expert_weights, (T, top_k), (torch.float32,))
    check_index(op, "expert_offsets", routing.expert_offsets, (E + 1,))
    check_index(op, "row_slot", routing.row_slot, (T * top_k,))
    check_index(op, "tiles", routing.tiles, (tile_capacity(T * top_k, E, routing.block_m), 4))
    for name in ("expert_weights", "tiles"):
        tensor = getattr(routing, name)
        got = f"strides {tensor.stride()}"
        require(tensor.is_contiguous(), op, f"routing.{name} must be contiguous", got)


def check_sizes(op: str, T: int, E: int, top_k: int, block_m: int | None) -> int:
    require(1 <= E <= MAX_EXPERTS, op, f"num_experts must be in [1, {MAX_EXPERTS}]", E)
    limit = min(MAX_TOP_K, E)
    require(1 <= top_k <= limit, op, f"top_k must be in [1, {limit}] for {E} experts", top_k)
    require(T * top_k <= MAX_SLOTS, op, f"T * top_k must be at most {MAX_SLOTS}", T * top_k)
    if block_m is None:
        return default_block_m(T * top_k, E)
    valid = 16 <= block_m <= 128 and block_m & (block_m - 1) == 0
    require(valid, op, "block_m must be 16, 32, 64 or 128", block_m)
    return block_m
