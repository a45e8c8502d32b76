"""GEMM 2 of the experts: w_down @ z, put back into token order, plus the residual.

    out[t] = dt(sum over k of w_down[e(t, k)] @ z[row of slot (t, k)] + residual[t])

Dropped slots add 0. Layout: z (R, F) contiguous, rows in expert order; down (E, H, F), see
expert_weights.py; residual (T, H) with any row stride and dense rows; out (T, H) contiguous.
Tiling: tiles as in grouped_gemm.py. With top_k == 1 each token has one row, which is stored where
it belongs, with the residual, in one rounding. Otherwise the rows go as fp32 to the workspace, in
the place of their slot, and a second kernel sums the top_k of each token in order: no atomics, and
the same bits in every run.
A shared expert's part can be the residual; or it is summed first in the same accumulator, as if
the two were one expert of twice the width (concatenated along K), which stores nothing in between.
Source: llama-models llama4/moe.py (routed experts are added to the shared expert's output).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import is_aligned
from ._expert_operands import (
    Rows,
    Weights,
    flattened,
    multiplied_dtype,
    tile_constants,
    unflattened,
)
from ._expert_tile import product
from ._grouped_gemm_check import check_combine, combine_workspace_numel
from ._launch import device_properties, empty_workspace, launch
from ._library import define
from ._names import named, nbytes
from ._sizes import flat, power_of_2
from .expert_weights import Experts
from .grouped_gemm import grouped_tile, num_row_tiles
from .grouped_gemm_config import GroupedGemmConfig, default_tiles
from .routing import Routing

__all__ = [
    "combine_workspace_numel",
    "grouped_down",
    "grouped_gemm_combine",
    "launch_down",
    "launch_shared_down",
    "launch_sum",
    "shared_down",
]


@triton.jit
def _store_out(acc, residual_ptr, stride_residual_t, out_ptr, out_rows, mask_m, n0, N):
    """Store dt(acc.T + residual) (BLOCK_M, BLOCK_N) in `out_rows` of out (.., N)."""
    offs_n = n0 + tl.arange(0, acc.shape[0])
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    y = acc.T
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + out_rows[:, None] * stride_residual_t + offs_n[None, :]
        y += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + out_rows[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def shared_down(
    pid,
    z, w, residual_ptr, out_ptr,
    T, N, K, stride_residual_t,
    FORMAT: tl.constexpr, Z_FORMAT: tl.constexpr, FAST_ACCUM: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program `pid` of the shared expert's GEMM 2: BLOCK_M tokens, BLOCK_N columns of out."""
    num_n = tl.cdiv(N, BLOCK_N)
    offs_m = pid // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = pid % num_n * BLOCK_N
    tokens = tl.minimum(offs_m, T - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    acc = product(
        acc, w, tl.cast(0, tl.int64), n0, N, z, tokens, 0, K, K,
        FORMAT, Z_FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_K,
    )  # fmt: skip
    _store_out(
        acc, residual_ptr, stride_residual_t, out_ptr, offs_m.to(tl.int64), offs_m < T, n0, N
    )


@triton.jit
def grouped_down(
    pid,
    z, w, tables, residual_ptr, out_ptr, shared_z, shared_w,
    E, splits, N, K, stride_residual_t,
    FORMAT: tl.constexpr, Z_FORMAT: tl.constexpr, FAST_ACCUM: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program `pid`, cdiv(N, BLOCK_N) of them per row tile: row r of it to out[row_slot[r]].

    N = H and K = F; with `shared_w` the shared expert's part comes first, for top_k = 1.
    """
    row_slot_ptr, tiles_ptr = tables
    num_n = tl.cdiv(N, BLOCK_N)
    expert, row, row_end, pid_n = grouped_tile(tiles_ptr, pid, splits, num_n, BLOCK_M, GROUP_M)
    if row >= row_end:
        return

    # Rows beyond the end repeat the last one: unmasked loads, and rows of a product do not mix.
    offs_m = row + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, row_end - 1)
    slots = tl.load(row_slot_ptr + rows).to(tl.int64)
    n0 = pid_n * BLOCK_N
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if shared_w.ptr is not None:
        acc = product(
            acc, shared_w, tl.cast(0, tl.int64), n0, N, shared_z, slots, 0, K, K,
            FORMAT, Z_FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_K,
        )  # fmt: skip
    # Dropped rows are tiles of expert E, for which there are no weights: nothing is summed.
    acc = product(
        acc, w, tl.minimum(expert, E - 1).to(tl.int64), n0, N, z, rows.to(tl.int64),
        0, tl.where(expert < E, K, 0), K,
        FORMAT, Z_FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_K,
    )  # fmt: skip
    _store_out(acc, residual_ptr, stride_residual_t, out_ptr, slots, offs_m < row_end, n0, N)


def _scatter_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    z, w, E, N, K = (args[name] for name in ("z", "w", "E", "N", "K"))
    R = z.ptr.shape[0]
    weights = min(E, R) * N * K * w.ptr.element_size()
    moved = nbytes(z.ptr, args["residual_ptr"], args["out_ptr"], *args["tables"])
    return moved + weights, 2 * R * N * K


@triton.jit(
    do_not_specialize=["E", "splits"],
    **named("grouped_gemm_scatter", "z", _scatter_cost),
)
def _grouped_gemm_scatter_kernel(
    z, w, tables, residual_ptr, out_ptr, shared_z, shared_w,
    E, splits, N, K, stride_residual_t,
    FORMAT: tl.constexpr, Z_FORMAT: tl.constexpr, FAST_ACCUM: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles * cdiv(N, BLOCK_N),): one tile of out, or of the workspace."""
    grouped_down(
        tl.program_id(0), z, w, tables, residual_ptr, out_ptr, shared_z, shared_w,
        E, splits, N, K, stride_residual_t,
        FORMAT, Z_FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )  # fmt: skip


def _shared_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    z, w, out = args["z"].ptr, args["w"].ptr, args["out_ptr"]
    return nbytes(z, w, args["residual_ptr"], out), 2 * out.numel() * args["K"]


def _sum_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    partial = args["partial_ptr"]
    return nbytes(partial, args["residual_ptr"], args["out_ptr"]), partial.numel()


@triton.jit(**named("sum_slots", "out_ptr", _sum_cost))
def _sum_slots_kernel(
    partial_ptr, residual_ptr, out_ptr,
    N,
    stride_residual_t,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (T,): program t sums the TOP_K rows of token t, in order, and the residual."""
    t = tl.program_id(0).to(tl.int64)
    partial_ptr += t * TOP_K * N
    out_ptr += t * N
    if residual_ptr is not None:
        residual_ptr += t * stride_residual_t

    for n0 in tl.range(0, N, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for k in tl.static_range(TOP_K):
            acc += tl.load(partial_ptr + tl.cast(N, tl.int64) * k + offs_n, mask=mask_n, other=0.0)
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask_n)


def grouped_gemm_combine(
    z: torch.Tensor,
    experts: Experts,
    routing: Routing,
    *,
    z_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    fast_accum: bool = False,
    config: GroupedGemmConfig | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the second half of each row's expert and sum the rows of each token.

        out[t] = dt(sum over k of w_down[e(t, k)] @ z[row of slot (t, k)] + residual[t])

    Args:
        z: (R, F) fp32, fp16 or bf16, contiguous, from `grouped_gemm_swiglu` with this routing;
            or float8_e4m3fn with `z_scale` (R, F / 128) fp32. 16-bit z that meets e4m3 experts is
            quantised so on its way, on GPUs that have e4m3.
        experts: in one format; plain ones in z.dtype.
        routing: of the T tokens to the E experts.
        out_dtype: None: z.dtype, or bf16 where that is e4m3.
        residual: (T, H) in out_dtype, dense rows; the shared expert's output.
        fast_accum: as in `grouped_gemm_swiglu`; scales of z per 128 of F promote anyhow.
        config: tile configuration; None takes grouped_gemm_config.py's.
        workspace: `combine_workspace_numel(T, top_k, H)` fp32 elements; None allocates them.
    Returns:
        (T, H) in out_dtype. Dropped slots add 0.
    Raises:
        ValueError: shapes, strides, devices, config or workspace.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80, e4m3 z before sm_89.
    Numerics: fp32 accumulators; the top_k rows are added in order of k, then the residual; one
        rounding. Deterministic.
    Cost: 2*R*H*F flops; bytes = R*F*itemsize + E_active*H*F*(bytes of a weight) + 2*T*H*itemsize,
        and 8*R*H if top_k > 1.
    Source: see the module; reference: kernels/reference.py:moe_layer.
    """
    op = "grouped_gemm_combine"
    z_format, out_dtype, numel = check_combine(
        op, z, experts, routing, z_scale, out_dtype, residual, config
    )
    return _grouped_gemm_combine(
        z, z_scale, *flattened(experts), routing.row_slot, routing.tiles,
        routing.expert_ids.shape[1],
        routing.block_m, z_format, fast_accum, residual,
        empty_workspace(op, numel, workspace, z.device), out_dtype, config and flat(config),
    )  # fmt: skip


def launch_down(
    z: Rows,
    experts: Experts,
    out: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    block_m: int,
    constants: dict[str, Any],
    config: Sequence[int],
    *,
    residual: torch.Tensor | None = None,
    shared: Experts | None = None,
    shared_z: Rows | None = None,
) -> None:
    """Launch GEMM 2 to rows row_slot[r] of `out`, with the shared expert's part if there is one."""
    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages = config
    E, N, K = experts.down.shape
    decoded = constants["Z_FORMAT"] == "plain"
    splits, num_m = num_row_tiles(tables[1], block_m, config)
    launch(
        _grouped_gemm_scatter_kernel, (num_m * triton.cdiv(N, BLOCK_N),),
        z, Weights.of(experts.down, decoded=decoded), tables, residual, out,
        shared_z, Weights.of(shared.down if shared else None, decoded=decoded),
        E, splits, N, K, 0 if residual is None else residual.stride(0),
        **constants,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=GROUP_M,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"], **named("shared_down", "z", _shared_cost))
def _shared_down_kernel(
    z, w, residual_ptr, out_ptr,
    T, N, K, stride_residual_t,
    FORMAT: tl.constexpr, Z_FORMAT: tl.constexpr, FAST_ACCUM: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(T, BLOCK_M) * cdiv(N, BLOCK_N),): the shared expert's GEMM 2 by itself."""
    shared_down(
        tl.program_id(0), z, w, residual_ptr, out_ptr, T, N, K, stride_residual_t,
        FORMAT, Z_FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


def launch_shared_down(
    z: Rows,
    shared: Experts,
    out: torch.Tensor,
    constants: dict[str, Any],
    config: Sequence[int],
    residual: torch.Tensor | None,
) -> None:
    """Launch the shared expert's GEMM 2 by itself: out = w_down @ z + residual."""
    BLOCK_M, BLOCK_N, BLOCK_K, _, num_warps, num_stages = config
    _, N, K = shared.down.shape
    T = len(out)
    launch(
        _shared_down_kernel, (triton.cdiv(T, BLOCK_M) * triton.cdiv(N, BLOCK_N),),
        z, Weights.of(shared.down, decoded=constants["Z_FORMAT"] == "plain"), residual, out,
        T, N, K, 0 if residual is None else residual.stride(0),
        **constants,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def launch_sum(
    workspace: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor, top_k: int
) -> None:
    """Launch the sum of the top_k rows of each token in `workspace`, and the residual."""
    T, N = out.shape
    block_n = min(1024, max(128, power_of_2(N)))
    launch(
        _sum_slots_kernel, (T,),
        workspace, residual, out,
        N,
        0 if residual is None else residual.stride(0),
        TOP_K=top_k, BLOCK_N=block_n, num_warps=max(1, block_n // 256),
    )  # fmt: skip


def _grouped_gemm_combine_impl(
    z: torch.Tensor, z_scale: torch.Tensor | None,
    weights: list[torch.Tensor], scales: list[torch.Tensor],
    row_slot: torch.Tensor, tiles: torch.Tensor, top_k: int, block_m: int,
    z_format: str, fast_accum: bool, residual: torch.Tensor | None, workspace: torch.Tensor,
    out_dtype: torch.dtype, config: Sequence[int] | None,
) -> torch.Tensor:  # fmt: skip
    experts = unflattened(weights, scales)
    _, N, K = experts.down.shape
    properties = device_properties(z.device)
    config = config or default_tiles(
        "down", block_m, multiplied_dtype(experts, z.dtype, properties), experts.format, properties,
        fast_accum=fast_accum, aligned=is_aligned((N, K), experts.down.weight),
    )  # fmt: skip
    out = z.new_empty((len(row_slot) // top_k, N), dtype=out_dtype)
    constants = tile_constants([experts], N, K, fast_accum, config) | dict(Z_FORMAT=z_format)
    direct = top_k == 1
    launch_down(
        Rows.of(z, z_scale), experts, out if direct else workspace, (row_slot, tiles), block_m,
        constants, config, residual=residual if direct else None,
    )  # fmt: skip
    if not direct:
        launch_sum(workspace, residual, out, top_k)
    return out


def _grouped_gemm_combine_fake(
    z, z_scale, weights, scales, row_slot, tiles, top_k, block_m,
    z_format, fast_accum, residual, workspace, out_dtype, config,
):  # fmt: skip
    return z.new_empty((row_slot.shape[0] // top_k, weights[2].shape[1]), dtype=out_dtype)


_grouped_gemm_combine = define(
    "grouped_gemm_combine(Tensor z, Tensor? z_scale, Tensor[] weights, Tensor[] scales,"
    " Tensor row_slot, Tensor tiles, int top_k, SymInt block_m, str z_format, bool fast_accum,"
    " Tensor? residual, Tensor(a!) workspace, ScalarType out_dtype, int[]? config) -> Tensor",
    _grouped_gemm_combine_impl,
    _grouped_gemm_combine_fake,
)
