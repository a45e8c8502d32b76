"""What the experts' GEMMs check of their arguments, before anything is written."""

from __future__ import annotations

import torch

from ._check import check_architecture, check_devices, check_tensor, is_aligned, require
from ._expert_operands import E4M3, TL_DTYPES, multiplied_dtype
from ._launch import device_properties
from ._remembered import remembered
from ._sizes import flat
from .expert_weights import GROUP, Experts, check_experts
from .grouped_gemm_config import GroupedGemmConfig, check_config, default_tiles
from .routing import Routing, check_routing
from .weight_formats import HALVES

__all__ = [
    "check_activations",
    "check_combine",
    "check_swiglu",
    "combine_workspace_numel",
    "up_tiles",
]


def check_activations(
    op: str, x: torch.Tensor, x_scale: torch.Tensor | None, experts: Experts, name: str = "x"
) -> str:
    """Check rows that meet `experts`; return their format, as _expert_tile.py has it."""
    rows, K = x.shape
    if x_scale is None:
        must = f"{name}_scale must be given for {name} in {x.dtype}"
        require(x.dtype != E4M3, op, must, None, TypeError)
        return "plain"
    check_tensor(op, name, x, (rows, K), (E4M3,))
    require(experts.format.startswith("e4m3"), op, f"{name} must not be e4m3", experts.format)
    by_group = experts.format == "e4m3_block" or name == "z"
    shape = (rows, K // GROUP) if by_group else (rows,)
    check_tensor(op, f"{name}_scale", x_scale, shape, (torch.float32,))
    return "group" if by_group else "row"


def combine_workspace_numel(T: int, top_k: int, H: int) -> int:
    """fp32 elements of the workspace of `grouped_gemm_combine`: a row per slot if top_k > 1."""
    return T * top_k * H if top_k > 1 else 0


@remembered
def check_swiglu(
    op: str,
    x: torch.Tensor,
    experts: Experts,
    routing: Routing,
    x_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    quantize_z: bool,
    weight_on: str,
    fast_accum: bool,
    config: GroupedGemmConfig | None,
) -> tuple[str, torch.dtype]:
    """Return the format of x and the type of z."""
    check_tensor(op, "x", x, ("T", "H"), (*TL_DTYPES, E4M3))
    if out_dtype is None:
        out_dtype = torch.bfloat16 if x.dtype == E4M3 else x.dtype
    x_format = check_activations(op, x, x_scale, experts)
    check_experts(op, experts, x.shape[1], out_dtype if x.dtype == E4M3 else x.dtype)
    must = "out_dtype must be x.dtype, or fp16 or bf16 for e4m3 x"
    allowed = HALVES if x.dtype == E4M3 else (x.dtype,)
    require(out_dtype in allowed, op, must, out_dtype, TypeError)
    require(weight_on in ("input", "output"), op, "weight_on must be input or output", weight_on)
    check_routing(op, routing, x.shape[0], experts.num_experts)
    check_devices(op, x=x, experts=experts.gate.weight, routing=routing.row_slot)
    check_architecture(op, x)
    check_config(op, config, routing.block_m)
    if quantize_z:
        chosen = config and flat(config) or up_tiles(x, experts, routing.block_m, fast_accum)
        whole = chosen[1] == 2 * GROUP and experts.width % GROUP == 0
        must = f"config.BLOCK_N must be {2 * GROUP} and F a multiple of {GROUP} to quantise z"
        require(whole, op, must, f"{chosen[1]} and F = {experts.width}")
    return x_format, out_dtype


def up_tiles(x: torch.Tensor, experts: Experts, block_m: int, fast_accum: bool) -> tuple[int, ...]:
    """The default configuration of `grouped_gemm_swiglu` for these operands."""
    _, F, H = experts.gate.shape
    return default_tiles(
        "up",
        block_m,
        x.dtype,
        experts.format,
        device_properties(x.device),
        fast_accum=fast_accum,
        aligned=is_aligned((F, H), x, experts.gate.weight, experts.up.weight),
    )


@remembered
def check_combine(
    op: str,
    z: torch.Tensor,
    experts: Experts,
    routing: Routing,
    z_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None,
    config: GroupedGemmConfig | None,
) -> tuple[str, torch.dtype, int]:
    """Return the format of z, the type of the result and the elements of the workspace."""
    T, top_k = routing.expert_ids.shape
    check_tensor(op, "z", z, (T * top_k, "F"), (*TL_DTYPES, E4M3))
    require(z.is_contiguous(), op, "z must be contiguous", f"strides {z.stride()}")
    if out_dtype is None:
        out_dtype = torch.bfloat16 if z.dtype == E4M3 else z.dtype
    H, F = experts.hidden, experts.width
    z_format = check_activations(op, z, z_scale, experts, "z")
    check_experts(op, experts, H, out_dtype if z.dtype == E4M3 else z.dtype)
    require(z.shape[1] == F, op, f"z must have F = {F} columns", z.shape[1])
    check_routing(op, routing, T, experts.num_experts)
    if residual is not None:
        check_tensor(op, "residual", residual, (T, H), (out_dtype,))
    check_devices(op, z=z, experts=experts.down.weight, routing=routing.row_slot, residual=residual)
    check_architecture(op, z)
    dtype = multiplied_dtype(experts, z.dtype, device_properties(z.device))
    if dtype == E4M3 and z.dtype != E4M3:
        z_format = "quantise"
    check_config(op, config, routing.block_m)
    return z_format, out_dtype, combine_workspace_numel(T, top_k, H)
