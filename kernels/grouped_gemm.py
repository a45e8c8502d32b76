"""GEMM 1 of the experts: gather, x @ w_gate_up, score, SwiGLU.

    g[r], u[r] = s * (x[t] @ w_gate[e]), s * (x[t] @ w_up[e])     r: row in expert order
    z[r]       = dt(g[r] * sigmoid(g[r]) * u[r])

with t the token, e the expert and s the routing weight of row r. The weight scales the expert's
input: (s * x) @ w = s * (x @ w), so it multiplies the fp32 accumulators, before the SwiGLU, which
is not linear. Rows of dropped slots are 0.
Layout: x (T, H) with any row stride and dense rows; w_gate_up logically (E, H, 2F), gate columns
first, with any strides of which one of the last two is 1, so that both checkpoint layouts are
views; z (R, F) contiguous.
Tiling: one program per tile of at most BLOCK_M rows of one expert and BLOCK_N columns of gate and
of up: two dots share the rows of x, which are gathered by pointer. The grid has room for the most
tiles there can be; the programs of unused ones end at once.
Source: llama-models llama4/moe.py; the fp32 score as in vLLM's fused_moe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
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
from ._launch import SM_90, DeviceProperties, device_properties, launch
from ._library import define
from ._names import named, nbytes
from .routing import Routing, check_routing

__all__ = [
    "Experts",
    "GroupedGemmConfig",
    "check_config",
    "check_experts",
    "default_config",
    "grouped_gemm_swiglu",
    "grouped_grid",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The weights of E experts, as strided views of a checkpoint's tensors."""

    w_gate_up: torch.Tensor  # (E, H, 2F): columns 0 to F - 1 are gate, F to 2F - 1 are up
    w_down: torch.Tensor  # (E, F, H)

    @classmethod
    def from_hf(cls, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> Experts:
        """From transformers' gate_up_proj (E, H, 2F) and down_proj (E, F, H)."""
        return cls(w_gate_up=gate_up_proj, w_down=down_proj)

    @classmethod
    def from_vllm(cls, w13: torch.Tensor, w2: torch.Tensor) -> Experts:
        """From vLLM's w13 (E, 2F, H) and w2 (E, H, F)."""
        for name, w in (("w13", w13), ("w2", w2)):
            require(w.ndim == 3, "Experts.from_vllm", f"{name} must be 3-D", tuple(w.shape))
        return cls(w_gate_up=w13.transpose(1, 2), w_down=w2.transpose(1, 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedGemmConfig:
    BLOCK_M: int  # at most routing.block_m: a tile of rows is then done by several programs
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int  # row tiles that share a column of weight tiles in L2
    num_warps: int
    num_stages: int


def default_config(
    block_m: int,
    dtype: torch.dtype,
    properties: DeviceProperties = SM_90,
    *,
    aligned: bool = True,
) -> GroupedGemmConfig:
    """wgmma from 64 rows on; below, narrow tiles of weights to fill the SMs.

    Where the tensor cores read registers, tiles half as wide: more would spill; as they would
    where operands are not aligned and each element takes a register of its own on its way.
    """
    if dtype == torch.float32 or not properties.has_mma:  # what the registers hold
        return _config(16, 32, 32, 8, 4, 2)
    if not aligned:
        return _config(min(block_m, 64), 64, 32, 8, 4, 2)
    if block_m == 16:
        return _config(16, 64, 128, 8, 4, 3)
    if block_m == 32:
        return _config(32, 64, 64, 8, 4, 4)
    if not properties.has_wide_mma:
        return _config(block_m, 64, 64, 8, block_m // 16, 4)
    if block_m == 64:
        return _config(64, 128, 64, 8, 4, 4)
    return _config(128, 128, 64, 8, 8, 4)


def _config(m: int, n: int, k: int, group: int, warps: int, stages: int) -> GroupedGemmConfig:
    return GroupedGemmConfig(
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=group, num_warps=warps, num_stages=stages
    )


@triton.jit
def grouped_tile(
    tiles_ptr,
    splits, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Return expert, first row, end row and column tile of this program; no rows: no work.

    Each tile of the table is split into `splits` row tiles of BLOCK_M. Programs go down GROUP_M
    row tiles before they go to the next column of weight tiles.
    """
    pid = tl.program_id(0)
    num_n = tl.cdiv(N, BLOCK_N)
    num_m = tl.num_programs(0) // num_n
    first_m = pid // (GROUP_M * num_n) * GROUP_M
    group_m = tl.minimum(num_m - first_m, GROUP_M)
    in_group = pid % (GROUP_M * num_n)
    pid_m = first_m + in_group % group_m
    tile = pid_m // splits
    expert = tl.load(tiles_ptr + tile * 3)
    row = tl.load(tiles_ptr + tile * 3 + 1) + pid_m % splits * BLOCK_M
    row_end = tl.load(tiles_ptr + tile * 3 + 2)
    return expert, row, row_end, in_group // group_m


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    x, z, E, N, K = (args[name] for name in ("x_ptr", "z_ptr", "E", "N", "K"))
    R = z.shape[0]
    weights = 2 * min(E, R) * N * K * x.element_size()
    tables = nbytes(args["expert_weights_ptr"], args["row_slot_ptr"], args["tiles_ptr"])
    return nbytes(x, z) + weights + tables, 4 * R * N * K


@triton.jit(
    do_not_specialize=["E", "top_k", "splits"], **named("grouped_gemm_swiglu", "x_ptr", _cost)
)
def _grouped_gemm_swiglu_kernel(
    x_ptr, w_ptr, expert_weights_ptr, row_slot_ptr, tiles_ptr, z_ptr,
    E, top_k, splits, N, K,
    stride_x_t, stride_w_e, stride_w_k, stride_w_n,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * splits * cdiv(N, BLOCK_N),): one (BLOCK_M, BLOCK_N) tile of z each.

    N = F and K = H. EVEN_K: K is a multiple of BLOCK_K, so the loop needs no mask on K.
    """
    expert, row, row_end, pid_n = grouped_tile(tiles_ptr, splits, N, BLOCK_M, BLOCK_N, GROUP_M)
    if row >= row_end:
        return

    # Rows beyond the end repeat the last one: unmasked loads, and rows of a product do not mix.
    offs_m = row + tl.arange(0, BLOCK_M)
    slots = tl.load(row_slot_ptr + tl.minimum(offs_m, row_end - 1))
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    x_ptrs = x_ptr + (slots // top_k).to(tl.int64)[:, None] * stride_x_t + offs_k[None, :]
    w_ptr += expert.to(tl.int64) * stride_w_e
    w_offs = offs_k.to(tl.int64)[:, None] * stride_w_k + offs_n.to(tl.int64)[None, :] * stride_w_n
    gate_ptrs = w_ptr + w_offs
    up_ptrs = gate_ptrs + tl.cast(N, tl.int64) * stride_w_n

    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Dropped rows are tiles of expert E, for which there are no weights: nothing is summed.
    for k0 in tl.range(0, tl.where(expert < E, K, 0), BLOCK_K):
        offs_w = tl.cast(k0, tl.int64) * stride_w_k
        if EVEN_K:
            x = tl.load(x_ptrs + k0)
            w_gate = tl.load(gate_ptrs + offs_w, mask=mask_n[None, :], other=0.0)
            w_up = tl.load(up_ptrs + offs_w, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k0
            mask_w = mask_k[:, None] & mask_n[None, :]
            x = tl.load(x_ptrs + k0, mask=mask_k[None, :], other=0.0)
            w_gate = tl.load(gate_ptrs + offs_w, mask=mask_w, other=0.0)
            w_up = tl.load(up_ptrs + offs_w, mask=mask_w, other=0.0)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")

    score = tl.load(expert_weights_ptr + slots)[:, None]
    gate *= score
    z = gate * tl.sigmoid(gate) * (up * score)

    z_ptrs = z_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_m < row_end)[:, None] & mask_n[None, :]
    tl.store(z_ptrs, z.to(z_ptr.dtype.element_ty), mask=mask)


def grouped_gemm_swiglu(
    x: torch.Tensor,
    experts: Experts,
    routing: Routing,
    *,
    config: GroupedGemmConfig | None = None,
) -> torch.Tensor:
    """Apply the first half of each row's expert to its weighted token.

        z[r] = dt(silu(s * x[t] @ w_gate[e]) * (s * x[t] @ w_up[e]))

    Args:
        x: (T, H) fp32, fp16 or bf16, dense rows.
        experts: weights in x.dtype.
        routing: of the T tokens to the E experts.
        config: tile configuration; None takes `default_config(routing.block_m, x.dtype, ...)`.
    Returns:
        (R, F) in x.dtype, rows in expert order; rows of dropped slots are 0.
    Raises:
        ValueError: shapes, strides, devices or config.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: fp32 accumulators, score and SwiGLU, one rounding. A row depends on its own token
        only. Deterministic.
    Cost: 4*R*H*F flops; bytes = (R*H + E_active*2*H*F + R*F)*itemsize.
    Source: see the module; reference: kernels/reference.py:grouped_gemm_swiglu.
    """
    op = "grouped_gemm_swiglu"
    check_tensor(op, "x", x, ("T", "H"), FLOATS)
    check_experts(op, experts, x.shape[1], x.dtype)
    check_routing(op, routing, x.shape[0], len(experts.w_gate_up))
    check_devices(op, x=x, w_gate_up=experts.w_gate_up, routing=routing.row_slot)
    check_architecture(op, x)
    if config is None:
        aligned = is_aligned(experts.w_down.shape[1:], x, experts.w_gate_up)
        properties = device_properties(x.device)
        config = default_config(routing.block_m, x.dtype, properties, aligned=aligned)
    check_config(op, config, routing.block_m)
    return _grouped_gemm_swiglu(
        x, experts.w_gate_up, routing.expert_weights, routing.row_slot, routing.tiles,
        routing.block_m, list(astuple(config)),
    )  # fmt: skip


def check_experts(op: str, experts: Experts, H: int, dtype: torch.dtype) -> None:
    """Check that `experts` map (.., H) to (.., H) in `dtype`."""
    require(isinstance(experts, Experts), op, "experts must be Experts", type(experts), TypeError)
    w_gate_up, w_down = experts.w_gate_up, experts.w_down
    for name, w, shape in (
        ("w_gate_up", w_gate_up, ("E", H, "2F")),
        ("w_down", w_down, ("E", "F", H)),
    ):
        check_tensor(op, name, w, shape, (dtype,), unit_last_stride=False)
        dense = any(w.stride(d) == 1 or w.shape[d] <= 1 for d in (1, 2)) or w.numel() == 0
        must = f"{name} must have stride 1 in one of its last two dimensions"
        require(dense, op, must, f"strides {w.stride()}")
    E, F = w_down.shape[:2]
    must = f"w_gate_up must have shape (E, H, 2F) = ({E}, {H}, {2 * F}) to match w_down"
    require(tuple(w_gate_up.shape) == (E, H, 2 * F), op, must, tuple(w_gate_up.shape))


def check_config(op: str, config: GroupedGemmConfig, block_m: int) -> None:
    """Check that tiles of BLOCK_M rows fill those of the routing."""
    must = f"config.BLOCK_M must divide routing.block_m = {block_m}"
    require(block_m % config.BLOCK_M == 0, op, must, config.BLOCK_M)


def grouped_grid(tiles: torch.Tensor, N: int, block_m: int, config: list[int]) -> tuple[int]:
    """One program per tile of BLOCK_M rows and BLOCK_N columns."""
    BLOCK_M, BLOCK_N, *_ = config
    return (tiles.shape[0] * (block_m // BLOCK_M) * triton.cdiv(N, BLOCK_N),)


def _grouped_gemm_swiglu_impl(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    expert_weights: torch.Tensor,
    row_slot: torch.Tensor,
    tiles: torch.Tensor,
    block_m: int,
    config: list[int],
) -> torch.Tensor:
    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages = config
    E, K, two_n = w_gate_up.shape
    N = two_n // 2
    z = torch.empty((row_slot.shape[0], N), dtype=x.dtype, device=x.device)
    launch(
        _grouped_gemm_swiglu_kernel, grouped_grid(tiles, N, block_m, config),
        x, w_gate_up, expert_weights, row_slot, tiles, z,
        E, expert_weights.shape[1], block_m // BLOCK_M, N, K,
        x.stride(0), *w_gate_up.stride(),
        EVEN_K=K % BLOCK_K == 0,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=GROUP_M,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return z


_grouped_gemm_swiglu = define(
    "grouped_gemm_swiglu(Tensor x, Tensor w_gate_up, Tensor expert_weights, Tensor row_slot,"
    " Tensor tiles, int block_m, int[] config) -> Tensor",
    _grouped_gemm_swiglu_impl,
    lambda x, w_gate_up, expert_weights, row_slot, tiles, block_m, config: x.new_empty(
        (row_slot.shape[0], w_gate_up.shape[2] // 2)
    ),
)
