"""Routing: the top-k experts of each token, and where each (token, choice) goes in expert order.

    expert_ids[t], logit[t] = top_k(logits[t])     NaN counts as -inf, ties to the lowest expert
    expert_weights[t]       = sigmoid(logit[t])    in fp32, of the chosen logits only
    row_slot                = the slots s = t * top_k + k, sorted by (expert_ids[t, k], s)

Layout: logits (T, E), expert_ids and expert_weights (T, top_k), with any row stride and dense
rows. A row of NaN gives experts 0 to top_k - 1 with weight 0. An id outside [0, E), which only a
caller of `sort_by_expert` can give, is dropped: weight 0, and sorted last as group E.
Tiling: BLOCK_T tokens per program with all their logits in registers; the sort is that of
counting_sort.py. BLOCK_T * E is at most 8192, beyond which the block spills.
Source: llama-models llama4/moe.py (top-k of the raw logits, sigmoid of the chosen ones, neither
softmax nor renormalisation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_architecture, check_devices, check_index, check_tensor, require
from ._debug import is_checked
from ._launch import launch
from ._library import define
from ._names import named, nbytes
from .counting_sort import BLOCK_ELEMENTS, block_of_slots, count_scan_scatter, tile_capacity

__all__ = [
    "Routing",
    "RoutingConfig",
    "check_routing",
    "default_block_m",
    "default_config",
    "route",
    "sort_by_expert",
]

MAX_EXPERTS = 512
MAX_TOP_K = 8
MAX_SLOTS = 2**30  # slots and rows are int32, and so is the last one plus a block


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Where each of the R = T * top_k slots s = t * top_k + k goes; all tensors on one device."""

    expert_ids: torch.Tensor  # (T, top_k) int32
    expert_weights: torch.Tensor  # (T, top_k) fp32, contiguous; 0 where the id is dropped
    expert_offsets: torch.Tensor  # (E + 1,) int32; expert e: rows offsets[e] to offsets[e + 1]
    row_slot: torch.Tensor  # (R,) int32; row r of the expert order is slot row_slot[r]
    tiles: torch.Tensor  # (capacity, 3) int32: expert (E: dropped), row, end row; unused: -1, 0, 0
    tile_count: torch.Tensor  # (1,) int32; how many tiles are used, the first ones
    block_m: int  # a tile has at most this many rows
    num_experts: int
    top_k: int

    @property
    def tile_expert(self) -> torch.Tensor:
        """(capacity,) int32 view."""
        return self.tiles[:, 0]

    @property
    def tile_row(self) -> torch.Tensor:
        """(capacity,) int32 view: the first row of each tile."""
        return self.tiles[:, 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingConfig:
    BLOCK_T: int  # tokens per program of the top-k kernel
    BLOCK_R: int  # slots per step of the sort
    max_programs: int  # of the sort; with more slots each program takes several steps
    num_warps: int


def default_config(num_experts: int) -> RoutingConfig:
    """The largest blocks; one program scans the counts, so there are at most 256 of them."""
    return RoutingConfig(
        BLOCK_T=min(256, BLOCK_ELEMENTS // _padded(num_experts)),
        BLOCK_R=block_of_slots(num_experts),
        max_programs=256,
        num_warps=4,
    )


def default_block_m(rows: int, num_experts: int) -> int:
    """The smallest tile that holds the rows of one expert when the load is even."""
    return min(128, max(16, triton.next_power_of_2(triton.cdiv(rows, num_experts))))


def _padded(num_experts: int) -> int:
    return max(16, triton.next_power_of_2(num_experts))


@triton.jit
def _ordered(bits):
    """Map the bits of an fp32 to an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    tensors = args["logits_ptr"], args["expert_ids_ptr"], args["expert_weights_ptr"]
    return nbytes(*tensors), 0  # comparisons


@triton.jit(do_not_specialize=["T", "top_k"], **named("top_k", "logits_ptr", _cost))
def _top_k_kernel(
    logits_ptr, expert_ids_ptr, expert_weights_ptr,
    T, E, top_k,
    stride_logits_t,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(T, BLOCK_T),): program p chooses the experts of BLOCK_T tokens."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask_e = offs_e < E

    logits_ptrs = logits_ptr + offs_t.to(tl.int64)[:, None] * stride_logits_t + offs_e[None, :]
    logits = tl.load(logits_ptrs, mask=mask_t[:, None] & mask_e[None, :], other=float("-inf"))
    logits = logits.to(tl.float32)  # (BLOCK_T, BLOCK_E)
    logits = tl.where(logits == logits, logits, float("-inf"))
    logits = tl.where(logits == 0.0, 0.0, logits)  # -0.0 and 0.0 are a tie

    # Integers leave a value below -inf's: a chosen or padding expert is never chosen again.
    NEVER: tl.constexpr = -(2**31)
    keys = tl.where(mask_e[None, :], _ordered(logits.to(tl.int32, bitcast=True)), NEVER)
    for k in tl.range(0, top_k):
        best = tl.max(keys, axis=1)  # (BLOCK_T,)
        ids = tl.min(tl.where(keys == best[:, None], offs_e[None, :], BLOCK_E), axis=1)
        keys = tl.where(offs_e[None, :] == ids[:, None], NEVER, keys)
        logit = _ordered(best).to(tl.float32, bitcast=True)
        tl.store(expert_ids_ptr + offs_t * top_k + k, ids, mask=mask_t)
        tl.store(expert_weights_ptr + offs_t * top_k + k, tl.sigmoid(logit), mask=mask_t)


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    block_m: int | None = None,
    config: RoutingConfig | None = None,
) -> Routing:
    """Choose `top_k` experts for each token and sort the choices into expert order.

    Args:
        logits: (T, E) fp32, fp16 or bf16, dense rows; 1 <= E <= 512.
        top_k: 1 to min(8, E).
        block_m: rows per tile of the grouped GEMMs; None takes `default_block_m(T * top_k, E)`.
        config: tile configuration; None takes `default_config(E)`.
    Raises:
        ValueError: shapes, strides, top_k, block_m.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: exact choice on the given logits; sigmoid in fp32. Deterministic, and a token's
        choice depends on its own logits only.
    Cost: T*E*top_k comparisons; bytes = T*E*itemsize + about 20*T*top_k.
    Source: see the module; reference: kernels/reference.py:route.
    """
    op = "route"
    check_tensor(op, "logits", logits, ("T", "E"), FLOATS)
    check_architecture(op, logits)
    T, E = logits.shape
    block_m = _check_sizes(op, T, E, top_k, block_m)
    return _routing(_route(logits, top_k, block_m, _flat(config, E)), block_m, E, top_k)


def sort_by_expert(
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    num_experts: int,
    *,
    block_m: int | None = None,
    checked: bool = False,
    config: RoutingConfig | None = None,
) -> Routing:
    """Sort a routing made elsewhere into expert order.

    Args:
        expert_ids: (T, top_k) int32, dense rows; ids outside [0, E) are dropped.
        expert_weights: (T, top_k) fp32, dense rows.
        num_experts: E, 1 to 512.
        checked: read the ids and refuse those outside [-1, E); waits for the device.
        block_m, config: as in `route`.
    Raises:
        ValueError: shapes, strides, num_experts, top_k, block_m.   TypeError: dtypes.
        IndexError: an id is outside [-1, E), with `checked` only.
    Numerics: exact and deterministic.
    Cost: bytes = about 20*T*top_k.
    Source: see the module; reference: kernels/reference.py:sort_by_expert.
    """
    op = "sort_by_expert"
    check_index(op, "expert_ids", expert_ids, ("T", "top_k"))
    T, top_k = expert_ids.shape
    check_tensor(op, "expert_weights", expert_weights, (T, top_k), (torch.float32,))
    check_devices(op, expert_ids=expert_ids, expert_weights=expert_weights)
    block_m = _check_sizes(op, T, num_experts, top_k, block_m)
    if is_checked(checked, expert_ids):
        bad = int(((expert_ids < -1) | (expert_ids >= num_experts)).sum())
        must = f"expert_ids must be -1 (not routed) or in [0, {num_experts})"
        require(bad == 0, op, must, f"{bad} others", IndexError)
    flat = _flat(config, num_experts)
    tensors = _sort_by_expert(expert_ids, expert_weights, num_experts, block_m, flat)
    return _routing((expert_ids, *tensors), block_m, num_experts, top_k)


def check_routing(op: str, routing: Routing, T: int, num_experts: int) -> None:
    """Check that `routing` is one of `T` tokens to `num_experts` experts."""
    E, top_k = routing.num_experts, routing.top_k
    require(E == num_experts, op, f"routing must be to {num_experts} experts", E)
    check_tensor(op, "expert_weights", routing.expert_weights, (T, top_k), (torch.float32,))
    check_index(op, "expert_offsets", routing.expert_offsets, (E + 1,))
    check_index(op, "row_slot", routing.row_slot, (T * top_k,))
    check_index(op, "tiles", routing.tiles, (tile_capacity(T * top_k, E, routing.block_m), 3))
    for name in ("expert_weights", "tiles"):
        tensor = getattr(routing, name)
        got = f"strides {tensor.stride()}"
        require(tensor.is_contiguous(), op, f"routing.{name} must be contiguous", got)


def _check_sizes(op: str, T: int, E: int, top_k: int, block_m: int | None) -> int:
    require(1 <= E <= MAX_EXPERTS, op, f"num_experts must be in [1, {MAX_EXPERTS}]", E)
    limit = min(MAX_TOP_K, E)
    require(1 <= top_k <= limit, op, f"top_k must be in [1, {limit}] for {E} experts", top_k)
    require(T * top_k <= MAX_SLOTS, op, f"T * top_k must be at most {MAX_SLOTS}", T * top_k)
    if block_m is None:
        return default_block_m(T * top_k, E)
    valid = 16 <= block_m <= 128 and block_m & (block_m - 1) == 0
    require(valid, op, "block_m must be 16, 32, 64 or 128", block_m)
    return block_m


def _routing(tensors: tuple[torch.Tensor, ...], block_m: int, E: int, top_k: int) -> Routing:
    expert_ids, expert_weights, expert_offsets, row_slot, tiles, tile_count = tensors
    return Routing(
        expert_ids=expert_ids, expert_weights=expert_weights, expert_offsets=expert_offsets,
        row_slot=row_slot, tiles=tiles, tile_count=tile_count,
        block_m=block_m, num_experts=E, top_k=top_k,
    )  # fmt: skip


def _flat(config: RoutingConfig | None, num_experts: int) -> list[int]:
    return list(astuple(config or default_config(num_experts)))


def _route_impl(
    logits: torch.Tensor, top_k: int, block_m: int, config: list[int]
) -> tuple[torch.Tensor, ...]:
    BLOCK_T, BLOCK_R, max_programs, num_warps = config
    T, E = logits.shape
    expert_ids = torch.empty((T, top_k), dtype=torch.int32, device=logits.device)
    expert_weights = torch.empty((T, top_k), dtype=torch.float32, device=logits.device)
    launch(
        _top_k_kernel, (triton.cdiv(T, BLOCK_T),),
        logits, expert_ids, expert_weights,
        T, E, top_k,
        logits.stride(0),
        BLOCK_T=BLOCK_T, BLOCK_E=_padded(E), num_warps=num_warps,
    )  # fmt: skip
    _, *order = count_scan_scatter(
        expert_ids, None, E, block_m,
        BLOCK_R=BLOCK_R, max_programs=max_programs, num_warps=num_warps,
    )  # fmt: skip
    return expert_ids, expert_weights, *order


def _sort_by_expert_impl(
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    num_experts: int,
    block_m: int,
    config: list[int],
) -> tuple[torch.Tensor, ...]:
    _, BLOCK_R, max_programs, num_warps = config
    return count_scan_scatter(
        expert_ids, expert_weights, num_experts, block_m,
        BLOCK_R=BLOCK_R, max_programs=max_programs, num_warps=num_warps,
    )  # fmt: skip


def _fake_order(
    like: torch.Tensor, T: int, num_experts: int, top_k: int, block_m: int
) -> tuple[torch.Tensor, ...]:
    R, E = T * top_k, num_experts
    weights = like.new_empty((T, top_k), dtype=torch.float32)
    shapes = [(E + 1,), (R,), (tile_capacity(R, E, block_m), 3), (1,)]
    return weights, *(like.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _route_fake(logits, top_k, block_m, config):
    T, E = logits.shape
    expert_ids = logits.new_empty((T, top_k), dtype=torch.int32)
    return expert_ids, *_fake_order(logits, T, E, top_k, block_m)


def _sort_by_expert_fake(expert_ids, expert_weights, num_experts, block_m, config):
    T, top_k = expert_ids.shape
    return _fake_order(expert_ids, T, num_experts, top_k, block_m)


_route = define(
    "route(Tensor logits, int top_k, int block_m, int[] config)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _route_impl,
    _route_fake,
)
_sort_by_expert = define(
    "sort_by_expert(Tensor expert_ids, Tensor expert_weights, int num_experts, int block_m,"
    " int[] config) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sort_by_expert_impl,
    _sort_by_expert_fake,
)
