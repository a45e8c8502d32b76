"""Quantisation to FP8 e4m3: one fp32 scale per row, or per 128 elements of a row. It multiplies.

    scale[m] = max(amax[m], 1e-12) / 448          amax over the finite values of row m
    x_q[m, k] = e4m3(clamp(x[m, k] * (1 / scale[m]), -448, 448))
    x[m, k] ~ x_q[m, k] * scale[m]                by group: scale[m, k / 128], amax of those 128

Layout: x is (M, K) with any row stride and dense rows; x_q (M, K) and scale (M,) or (M, K / 128)
are contiguous.
Tiling: by row, one program per row, which is read twice in blocks of BLOCK_K, the second time from
L1 or L2, so any K fits and nothing is spilled. By group, one program per BLOCK_K elements of a row.
Special rows and groups: one without a finite non-zero value has scale 1; NaN stays NaN; an infinity
becomes the largest finite value, +-448.
Source: 448 is the largest e4m3fn value. Both divisions are rounded to nearest, so that every
executor and the reference agree in every bit; the clamp is explicit, because what a cast does
beyond 448 differs between implementations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_architecture, check_tensor, require
from ._launch import launch
from ._library import define
from ._names import named, nbytes
from ._quantize_rows import GROUP, quantize_groups, quantize_row
from ._remembered import remembered
from ._sizes import flat, tiles

__all__ = ["QuantizeConfig", "default_config", "quantize_groupwise", "quantize_rowwise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig:
    BLOCK_K: int
    num_warps: int


def default_config(K: int) -> QuantizeConfig:
    """8 elements per thread: one 16-byte load of a 16-bit type, one 8-byte store."""
    block = min(2048, max(128, triton.next_power_of_2(K)))
    return QuantizeConfig(BLOCK_K=block, num_warps=max(1, block // 256))


_default_tiles = tiles(default_config)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    x = args["x_ptr"]
    return nbytes(x, args["x_q_ptr"], args["x_scale_ptr"]), 5 * x.numel()


@triton.jit(**named("quantize_rowwise", "x_ptr", _cost))
def _quantize_rowwise_kernel(
    x_ptr, x_q_ptr, x_scale_ptr,
    K,
    stride_x_m, stride_x_q_m,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (M,): program m quantises row m."""
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * stride_x_m
    x_q_ptr += m * stride_x_q_m
    quantize_row(x_ptr, x_q_ptr, x_scale_ptr + m, K, BLOCK_K)


@triton.jit(**named("quantize_groupwise", "x_ptr", _cost))
def _quantize_groupwise_kernel(
    x_ptr, x_q_ptr, x_scale_ptr,
    K,
    stride_x_m, stride_x_q_m,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (M, cdiv(K, BLOCK_K)): program (m, b) quantises the groups of block b of row m."""
    m = tl.program_id(0).to(tl.int64)
    offs_g = tl.program_id(1) * (BLOCK_K // 128) + tl.arange(0, BLOCK_K // 128)
    mask_g = offs_g < K // 128
    offs_k = offs_g[:, None] * 128 + tl.arange(0, 128)[None, :]

    x = tl.load(x_ptr + m * stride_x_m + offs_k, mask=mask_g[:, None], other=0.0)
    x_q, scale = quantize_groups(x.to(tl.float32))

    tl.store(x_q_ptr + m * stride_x_q_m + offs_k, x_q, mask=mask_g[:, None])
    # Not by a stride, whose divisibility by 16 would make one more binary of many sizes.
    tl.store(x_scale_ptr + m * (K // 128) + offs_g, scale, mask=mask_g)


def quantize_rowwise(
    x: torch.Tensor, *, config: QuantizeConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of `x` to e4m3 with its own scale.

    Args:
        x: (M, K) fp32, fp16 or bf16, dense rows.
        config: tile configuration; None takes `default_config(K)`.
    Returns:
        x_q (M, K) float8_e4m3fn and x_scale (M,) fp32, with x ~ x_q * x_scale[:, None].
    Raises:
        ValueError: shape or strides.   TypeError: dtype.
        UnsupportedArchitectureError: a GPU before sm_89, which has no e4m3.
    Numerics: see the module; equal to the reference in every bit (of a NaN, its payload apart).
    Cost: 5*M*K flops; bytes = M*K*(itemsize + 1) + 4*M.
    Source: see the module; reference: kernels/reference.py:quantize_rowwise.
    """
    _check("quantize_rowwise", x)
    return _quantize_rowwise(x, config and flat(config))


def quantize_groupwise(
    x: torch.Tensor, *, config: QuantizeConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each 128 elements of each row of `x` to e4m3 with their own scale.

    Args:
        x: (M, K) fp32, fp16 or bf16, dense rows, K a multiple of 128.
        config: tile configuration, BLOCK_K a multiple of 128; None takes a block of up to 1024.
    Returns:
        x_q (M, K) float8_e4m3fn and x_scale (M, K / 128) fp32.
    Raises:
        ValueError: shape, strides or config.   TypeError: dtype.
        UnsupportedArchitectureError: a GPU before sm_89, which has no e4m3.
    Numerics: see the module; equal to the reference in every bit (of a NaN, its payload apart).
    Cost: 5*M*K flops; bytes = M*K*(itemsize + 1) + 4*M*K/128.
    Source: activations of DeepSeek-V3's FP8 GEMMs; reference:
        kernels/reference.py:quantize_groupwise.
    """
    _check("quantize_groupwise", x, GROUP)
    if config is not None:
        must = f"config.BLOCK_K must be a multiple of {GROUP}"
        require(config.BLOCK_K % GROUP == 0, "quantize_groupwise", must, config.BLOCK_K)
    return _quantize_groupwise(x, config and flat(config))


@remembered
def _check(op: str, x: torch.Tensor, multiple: int = 1) -> None:
    check_tensor(op, "x", x, ("M", "K"), FLOATS)
    must = f"x must have a last dimension that is a multiple of {multiple}"
    require(x.shape[1] % multiple == 0, op, must, tuple(x.shape))
    check_architecture(op, x, torch.float8_e4m3fn)


def _quantize_rowwise_impl(
    x: torch.Tensor, config: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    M, K = x.shape
    BLOCK_K, num_warps = config or _default_tiles(K)
    x_q, x_scale = _quantize_rowwise_fake(x, config)
    if K == 0:
        return x_q, x_scale.fill_(1.0)
    launch(
        _quantize_rowwise_kernel, (M,),
        x, x_q, x_scale,
        K,
        x.stride(0), x_q.stride(0),
        BLOCK_K=BLOCK_K, num_warps=num_warps,
    )  # fmt: skip
    return x_q, x_scale


def _quantize_rowwise_fake(
    x: torch.Tensor, config: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    x_q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return x_q, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


_quantize_rowwise = define(
    "quantize_rowwise(Tensor x, int[]? config) -> (Tensor, Tensor)",
    _quantize_rowwise_impl,
    _quantize_rowwise_fake,
)


def _quantize_groupwise_impl(
    x: torch.Tensor, config: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    M, K = x.shape
    BLOCK_K, num_warps = config or _default_tiles(min(K, 1024))
    x_q, x_scale = _quantize_groupwise_fake(x, config)
    launch(
        _quantize_groupwise_kernel, (M, -(-K // BLOCK_K)),
        x, x_q, x_scale,
        K,
        x.stride(0), x_q.stride(0),
        BLOCK_K=BLOCK_K, num_warps=num_warps,
    )  # fmt: skip
    return x_q, x_scale


def _quantize_groupwise_fake(
    x: torch.Tensor, config: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    M, K = x.shape
    x_q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return x_q, torch.empty((M, K // GROUP), dtype=torch.float32, device=x.device)


_quantize_groupwise = define(
    "quantize_groupwise(Tensor x, int[]? config) -> (Tensor, Tensor)",
    _quantize_groupwise_impl,
    _quantize_groupwise_fake,
)
