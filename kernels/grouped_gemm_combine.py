"""GEMM 2 of the experts: z @ w_down, put back into token order, plus the residual.

    out[t] = dt(sum over k of z[row of slot (t, k)] @ w_down[e(t, k)] + residual[t])

Dropped slots add 0. Layout: z (R, F) contiguous, rows in expert order; w_down logically (E, F, H)
with any strides of which one of the last two is 1; residual (T, H) with any row stride and dense
rows; out (T, H) contiguous.
Tiling: tiles as in grouped_gemm.py. With top_k == 1 each token has one row, which is stored where
it belongs, with the residual, in one rounding. Otherwise the rows go as fp32 to the workspace, in
the place of their slot, and a second kernel sums the top_k of each token in order: no atomics, and
the same bits in every run.
Source: llama-models llama4/moe.py (routed experts are added to the shared expert's output).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import (
    FLOATS,
    check_architecture,
    check_devices,
    check_tensor,
    is_aligned,
    require,
)
from ._launch import SM_90, DeviceProperties, device_properties, empty_workspace, launch
from ._library import define
from ._names import named, nbytes
from .grouped_gemm import (
    Experts,
    GroupedGemmConfig,
    check_config,
    check_experts,
    grouped_grid,
    grouped_tile,
)
from .routing import Routing, check_routing

__all__ = ["combine_workspace_numel", "default_config", "grouped_gemm_combine"]


def default_config(
    block_m: int,
    dtype: torch.dtype,
    properties: DeviceProperties = SM_90,
    *,
    aligned: bool = True,
) -> GroupedGemmConfig:
    """As GEMM 1, with one accumulator twice as wide in place of two."""
    if dtype == torch.float32 or not properties.has_mma:
        return _config(16, 64, 32, 8, 4, 2)
    if not aligned:
        return _config(min(block_m, 64), 64, 32, 8, 4, 2)
    if block_m == 16:
        return _config(16, 64, 128, 8, 4, 4)
    if block_m == 32:
        return _config(32, 64, 128, 8, 4, 4)
    if block_m == 64:
        return _config(64, 128, 64, 8, 4, 4)
    if not properties.has_wide_mma:
        return _config(128, 128, 64, 8, 8, 4)
    return _config(128, 256, 64, 8, 8, 3)


def _config(m: int, n: int, k: int, group: int, warps: int, stages: int) -> GroupedGemmConfig:
    return GroupedGemmConfig(
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=group, num_warps=warps, num_stages=stages
    )


def combine_workspace_numel(T: int, top_k: int, H: int) -> int:
    """fp32 elements of the workspace of `grouped_gemm_combine`: a row per slot if top_k > 1."""
    return T * top_k * H if top_k > 1 else 0


def _scatter_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    z, E, N, K = (args[name] for name in ("z_ptr", "E", "N", "K"))
    R = z.shape[0]
    weights = min(E, R) * N * K * z.element_size()
    tables = nbytes(args["row_slot_ptr"], args["tiles_ptr"])
    moved = nbytes(z, args["residual_ptr"], args["out_ptr"])
    return moved + weights + tables, 2 * R * N * K


@triton.jit(
    do_not_specialize=["E", "splits"], **named("grouped_gemm_scatter", "z_ptr", _scatter_cost)
)
def _grouped_gemm_scatter_kernel(
    z_ptr, w_ptr, row_slot_ptr, tiles_ptr, residual_ptr, out_ptr,
    E, splits, N, K,
    stride_w_e, stride_w_k, stride_w_n, stride_residual_t,
    HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Grid as in GEMM 1: one (BLOCK_M, BLOCK_N) tile each, row r to out[row_slot[r]].

    N = H and K = F; out is (T, N), or the (R, N) workspace. EVEN_K: K is a multiple of BLOCK_K.
    """
    expert, row, row_end, pid_n = grouped_tile(tiles_ptr, splits, N, BLOCK_M, BLOCK_N, GROUP_M)
    if row >= row_end:
        return

    # Rows beyond the end repeat the last one: unmasked loads, and rows of a product do not mix.
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    rows = tl.minimum(offs_m, row_end - 1)
    slots = tl.load(row_slot_ptr + rows).to(tl.int64)
    z_ptrs = z_ptr + rows.to(tl.int64)[:, None] * K + offs_k[None, :]
    w_ptr += expert.to(tl.int64) * stride_w_e
    w_offs = offs_k.to(tl.int64)[:, None] * stride_w_k + offs_n.to(tl.int64)[None, :] * stride_w_n
    w_ptrs = w_ptr + w_offs

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Dropped rows are tiles of expert E, for which there are no weights: nothing is summed.
    for k0 in tl.range(0, tl.where(expert < E, K, 0), BLOCK_K):
        offs_w = tl.cast(k0, tl.int64) * stride_w_k
        if EVEN_K:
            z = tl.load(z_ptrs + k0)
            w = tl.load(w_ptrs + offs_w, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k0
            z = tl.load(z_ptrs + k0, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs + offs_w, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(z, w, acc, input_precision="ieee")

    mask = (offs_m < row_end)[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + slots[:, None] * stride_residual_t + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)

    out_ptrs = out_ptr + slots[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _sum_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    partial = args["partial_ptr"]
    return nbytes(partial, args["residual_ptr"], args["out_ptr"]), partial.numel()


@triton.jit(**named("sum_slots", "out_ptr", _sum_cost))
def _sum_slots_kernel(
    partial_ptr, residual_ptr, out_ptr,
    N,
    stride_residual_t,
    HAS_RESIDUAL: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (T,): program t sums the TOP_K rows of token t, in order, and the residual."""
    t = tl.program_id(0).to(tl.int64)
    partial_ptr += t * TOP_K * N
    out_ptr += t * N
    if HAS_RESIDUAL:
        residual_ptr += t * stride_residual_t

    for n0 in tl.range(0, N, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for k in tl.static_range(TOP_K):
            acc += tl.load(partial_ptr + tl.cast(N, tl.int64) * k + offs_n, mask=mask_n, other=0.0)
        if HAS_RESIDUAL:
            acc += tl.load(residual_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask_n)


def grouped_gemm_combine(
    z: torch.Tensor,
    experts: Experts,
    routing: Routing,
    *,
    residual: torch.Tensor | None = None,
    config: GroupedGemmConfig | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the second half of each row's expert and sum the rows of each token.

        out[t] = dt(sum over k of z[row of slot (t, k)] @ w_down[e(t, k)] + residual[t])

    Args:
        z: (R, F) fp32, fp16 or bf16, contiguous, from `grouped_gemm_swiglu` with this routing.
        experts: weights in z.dtype.
        routing: of the T tokens to the E experts.
        residual: (T, H) in z.dtype, dense rows; the shared expert's output.
        config: tile configuration; None takes `default_config(routing.block_m, z.dtype, ...)`.
        workspace: `combine_workspace_numel(T, top_k, H)` fp32 elements; None allocates them.
    Returns:
        (T, H) in z.dtype. Dropped slots add 0.
    Raises:
        ValueError: shapes, strides, devices, config or workspace.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: fp32 accumulators; the top_k rows are added in order of k, then the residual; one
        rounding. Deterministic.
    Cost: 2*R*H*F flops; bytes = (R*F + E_active*H*F + 2*T*H)*itemsize, and 8*R*H if top_k > 1.
    Source: see the module; reference: kernels/reference.py:grouped_gemm_combine.
    """
    op = "grouped_gemm_combine"
    T, H = routing.expert_ids.shape[0], experts.w_down.shape[-1]
    check_tensor(op, "z", z, (T * routing.top_k, "F"), FLOATS)
    require(z.is_contiguous(), op, "z must be contiguous", f"strides {z.stride()}")
    check_experts(op, experts, H, z.dtype)
    E, F, _ = experts.w_down.shape
    require(z.shape[1] == F, op, f"z must have F = {F} columns", z.shape[1])
    check_routing(op, routing, T, E)
    if residual is not None:
        check_tensor(op, "residual", residual, (T, H), (z.dtype,))
    check_devices(op, z=z, w_down=experts.w_down, routing=routing.row_slot, residual=residual)
    check_architecture(op, z)
    if config is None:
        aligned = is_aligned((H, F), experts.w_down)
        properties = device_properties(z.device)
        config = default_config(routing.block_m, z.dtype, properties, aligned=aligned)
    check_config(op, config, routing.block_m)
    numel = combine_workspace_numel(T, routing.top_k, H)
    return _grouped_gemm_combine(
        z, experts.w_down, routing.row_slot, routing.tiles, routing.top_k, routing.block_m,
        residual, empty_workspace(op, numel, workspace, z.device), list(astuple(config)),
    )  # fmt: skip


def _grouped_gemm_combine_impl(
    z: torch.Tensor,
    w_down: torch.Tensor,
    row_slot: torch.Tensor,
    tiles: torch.Tensor,
    top_k: int,
    block_m: int,
    residual: torch.Tensor | None,
    workspace: torch.Tensor,
    config: list[int],
) -> torch.Tensor:
    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages = config
    E, K, N = w_down.shape
    T = row_slot.shape[0] // top_k
    out = torch.empty((T, N), dtype=z.dtype, device=z.device)
    stride_residual_t = 0 if residual is None else residual.stride(0)
    direct = top_k == 1
    launch(
        _grouped_gemm_scatter_kernel, grouped_grid(tiles, N, block_m, config),
        z, w_down, row_slot, tiles, residual if direct else None, out if direct else workspace,
        E, block_m // BLOCK_M, N, K,
        *w_down.stride(), stride_residual_t if direct else 0,
        HAS_RESIDUAL=direct and residual is not None, EVEN_K=K % BLOCK_K == 0,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=GROUP_M,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if not direct:
        block_n = min(1024, max(128, triton.next_power_of_2(N)))
        launch(
            _sum_slots_kernel, (T,),
            workspace, residual, out,
            N,
            stride_residual_t,
            HAS_RESIDUAL=residual is not None, TOP_K=top_k, BLOCK_N=block_n,
            num_warps=max(1, block_n // 256),
        )  # fmt: skip
    return out


_grouped_gemm_combine = define(
    "grouped_gemm_combine(Tensor z, Tensor w_down, Tensor row_slot, Tensor tiles, int top_k,"
    " int block_m, Tensor? residual, Tensor(a!) workspace, int[] config) -> Tensor",
    _grouped_gemm_combine_impl,
    lambda z, w_down, row_slot, tiles, top_k, block_m, residual, workspace, config: z.new_empty(
        (row_slot.shape[0] // top_k, w_down.shape[2])
    ),
)
