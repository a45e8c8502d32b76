"""The shared expert beside the routed ones, in launches that leave it room.

    _route_and_up_kernel   program 0 routes all tokens; the others: z_s = swiglu(shared gate, up)
    _up_and_down_kernel    GEMM 1 of the routed experts; first: out = shared down @ z_s + residual

With up to a few hundred tokens routing is one program, which waits for memory most of the time.
Meanwhile the rest of the GPU reads the shared expert's weights, which every token needs whatever
its routing. GEMM 2 of the routed experts then adds to `out`. Nothing is computed twice, each
weight is read once, and no partial sums are kept.
Tiling: the shared expert's tiles are of consecutive tokens, so they are padded once, not once per
expert. The functions are those of _route_program.py, _sort_program.py and the grouped GEMMs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._expert_operands import Rows, Weights
from ._launch import launch
from ._moe_operands import Given, Logits
from ._names import named, nbytes
from ._route_program import route_program
from ._sort_program import sort_program
from .expert_weights import Experts
from .grouped_gemm import grouped_up, num_row_tiles, shared_up
from .grouped_gemm_combine import shared_down
from .grouped_gemm_config import GroupedGemmConfig

__all__ = ["launch_route_and_up", "launch_sort_and_up", "launch_up_and_down"]


def _up_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    x, w, z = args["x"].ptr, args["w"], args["z"].ptr
    return nbytes(x, w.ptr, w.up_ptr, z, *args["order"]), 4 * x.shape[0] * args["N"] * args["K"]


@triton.jit(
    do_not_specialize=["T", "S", "first", "count", "capacity", "block_m"],
    **named("route_and_up", "x", _up_cost),
)
def _route_and_up_kernel(
    logits_ptr, num_valid_ptr, order, x, w, z,
    T, E, S, first, count, capacity, block_m, N, K,
    stride_s, stride_t,
    IS_SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, ROUND_TO: tl.constexpr,
    ROUND_SCORE: tl.constexpr, TOP_K: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    FORMAT: tl.constexpr, X_FORMAT: tl.constexpr, DTYPE: tl.constexpr, FAST_ACCUM: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (1 + cdiv(T, BLOCK_M) * cdiv(N, BLOCK_N // 2),)."""
    pid = tl.program_id(0)
    if pid > 0:
        shared_up(
            pid - 1, x, w, z, T, N, K,
            FORMAT, X_FORMAT, DTYPE, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        return
    ids_ptr, weights_ptr, offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr = order
    route_program(
        logits_ptr, num_valid_ptr,
        ids_ptr, weights_ptr, offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
        T, E, S, first, count, capacity, block_m,
        stride_s, stride_t,
        IS_SOFTMAX, RENORMALIZE, ROUND_TO, ROUND_SCORE, TOP_K, UNROLL, BLOCK_T, BLOCK_E, BLOCK_R,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "T", "top_k", "first", "count", "capacity", "block_m", "stride_ids_t", "stride_weights_t",
    ],
    **named("sort_and_up", "x", _up_cost),
)  # fmt: skip
def _sort_and_up_kernel(
    ids_in_ptr, weights_in_ptr, num_valid_ptr, order, x, w, z,
    T, top_k, first, count, capacity, block_m, N, K,
    stride_ids_t, stride_weights_t,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
    FORMAT: tl.constexpr, X_FORMAT: tl.constexpr, DTYPE: tl.constexpr, FAST_ACCUM: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid as above, for a routing made elsewhere."""
    pid = tl.program_id(0)
    if pid > 0:
        shared_up(
            pid - 1, x, w, z, T, N, K,
            FORMAT, X_FORMAT, DTYPE, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        return
    ids_ptr, weights_ptr, offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr = order
    sort_program(
        ids_in_ptr, weights_in_ptr, num_valid_ptr,
        ids_ptr, weights_ptr, offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
        T, top_k, first, count, capacity, block_m,
        stride_ids_t, stride_weights_t, BLOCK_R, BLOCK_G,
    )  # fmt: skip


def _up_and_down_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    x, w, z, E, N, K = (args[name] for name in ("x", "w", "z", "E", "N", "K"))
    R, T = z.ptr.shape[0], args["out_ptr"].shape[0]
    weights = 2 * min(E, R) * N * K * w.ptr.element_size()
    moved = nbytes(x.ptr, z.ptr, args["shared_z"].ptr, args["shared_w"].ptr, args["out_ptr"])
    return moved + weights, (4 * R + 2 * T) * N * K


@triton.jit(
    do_not_specialize=["E", "top_k", "splits", "T", "shared_programs"],
    **named("up_and_down", "x", _up_and_down_cost),
)
def _up_and_down_kernel(
    x, w, z, tables, shared_z, shared_w, residual_ptr, out_ptr,
    E, top_k, splits, N, K, T, shared_programs, stride_residual_t,
    FORMAT: tl.constexpr, X_FORMAT: tl.constexpr, Z_FORMAT: tl.constexpr, DTYPE: tl.constexpr,
    ON_INPUT: tl.constexpr, FAST_ACCUM: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N_DOWN: tl.constexpr, EVEN_K_DOWN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M_DOWN: tl.constexpr, BLOCK_N_DOWN: tl.constexpr, BLOCK_K_DOWN: tl.constexpr,
):  # fmt: skip
    """Grid (shared_programs + row tiles * cdiv(N, BLOCK_N // 2),); N = F and K = H of GEMM 1."""
    pid = tl.program_id(0)
    if pid < shared_programs:
        shared_down(
            pid, shared_z, shared_w, residual_ptr, out_ptr, T, K, N, stride_residual_t,
            FORMAT, Z_FORMAT, FAST_ACCUM, EVEN_N_DOWN, EVEN_K_DOWN,
            BLOCK_M_DOWN, BLOCK_N_DOWN, BLOCK_K_DOWN,
        )  # fmt: skip
        return
    grouped_up(
        pid - shared_programs, x, w, z, tables, E, top_k, splits, N, K,
        FORMAT, X_FORMAT, DTYPE, ON_INPUT, FAST_ACCUM, EVEN_N, EVEN_K,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )  # fmt: skip


def _shared_grid(T: int, N: int, config: GroupedGemmConfig) -> tuple[int]:
    return (1 + triton.cdiv(T, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N // 2),)


def launch_route_and_up(
    choice: Logits,
    block_m: int,
    order: tuple[torch.Tensor, ...],
    x: Rows,
    shared: Experts,
    z: Rows,
    route_options: dict[str, Any],
    constants: dict[str, Any],
    config: GroupedGemmConfig,
) -> None:
    """Route into `order`, and the shared expert's GEMM 1 into z.

    order: ids, weights, offsets, row_slot, tiles, tile_count of a Routing; route_options: the
    constexprs of `route_program`.
    """
    logits = choice.logits
    T, E = logits.shape[-2:]
    _, N, K = shared.gate.shape
    S, stride_s = choice.slices
    launch(
        _route_and_up_kernel, _shared_grid(T, N, config),
        logits, choice.num_valid, order, x, _gate_and_up(shared, x), z,
        T, E, S, choice.first, choice.count, len(order[4]), block_m, N, K,
        stride_s, logits.stride(-2),
        **route_options, **constants, **_tile(config),
    )  # fmt: skip


def launch_sort_and_up(
    choice: Given,
    block_m: int,
    order: tuple[torch.Tensor, ...],
    x: Rows,
    shared: Experts,
    z: Rows,
    sort_options: dict[str, Any],
    constants: dict[str, Any],
    config: GroupedGemmConfig,
) -> None:
    """The same for a routing made elsewhere; sort_options: the constexprs of `sort_program`."""
    ids, weights = choice.topk_ids, choice.topk_weights
    T, top_k = ids.shape
    _, N, K = shared.gate.shape
    launch(
        _sort_and_up_kernel, _shared_grid(T, N, config),
        ids, weights, choice.num_valid, order, x, _gate_and_up(shared, x), z,
        T, top_k, choice.first, choice.count, len(order[4]), block_m, N, K,
        ids.stride(0), weights.stride(0),
        **sort_options, **constants, **_tile(config),
    )  # fmt: skip


def launch_up_and_down(
    x: Rows,
    experts: Experts,
    z: Rows,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block_m: int,
    shared_z: Rows,
    shared: Experts,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    constants: dict[str, Any],
    up: GroupedGemmConfig,
    down: GroupedGemmConfig,
) -> None:
    """GEMM 1 of `experts`, and out = the shared expert's GEMM 2 + residual."""
    E, N, K = experts.gate.shape
    T = len(out)
    splits, num_m = num_row_tiles(tables[2], block_m, [up.BLOCK_M])
    shared_programs = triton.cdiv(T, down.BLOCK_M) * triton.cdiv(K, down.BLOCK_N)
    launch(
        _up_and_down_kernel, (shared_programs + num_m * triton.cdiv(N, up.BLOCK_N // 2),),
        x, _gate_and_up(experts, x), z, tables,
        shared_z, Weights.of(shared.down, decoded=x.scale_ptr is None), residual, out,
        E, tables[0].shape[1], splits, N, K, T, shared_programs,
        0 if residual is None else residual.stride(0),
        **constants,
        EVEN_N_DOWN=K % 16 == 0, EVEN_K_DOWN=N % down.BLOCK_K == 0,
        GROUP_M=up.GROUP_M,
        BLOCK_M_DOWN=down.BLOCK_M, BLOCK_N_DOWN=down.BLOCK_N, BLOCK_K_DOWN=down.BLOCK_K,
        **_tile(up),
    )  # fmt: skip


def _gate_and_up(experts: Experts, x: Rows) -> Weights:
    return Weights.of(experts.gate, experts.up, decoded=x.scale_ptr is None)


def _tile(config: GroupedGemmConfig) -> dict[str, int]:
    return dict(
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
