"""Row-wise quantisation to FP8 e4m3: one fp32 scale per row, which multiplies.

    scale[m] = max(amax[m], 1e-12) / 448          amax over the finite values of row m
    x_q[m, k] = e4m3(clamp(x[m, k] * (1 / scale[m]), -448, 448))
    x[m, k] ~ x_q[m, k] * scale[m]

Layout: x is (M, K) with any row stride and dense rows; x_q (M, K) and scale (M,) are contiguous.
Tiling: one program per row; the row is read twice in blocks of BLOCK_K, the second time from L1
or L2, so any K fits and nothing is spilled.
Special rows: a row without a finite non-zero value has scale 1; NaN stays NaN; an infinity becomes
the largest finite value, +-448.
Source: 448 is the largest e4m3fn value. Both divisions are rounded to nearest, so that every
executor and the reference agree in every bit; the clamp is explicit, because what a cast does
beyond 448 differs between implementations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_architecture, check_tensor
from ._launch import launch
from ._library import define
from ._names import named, nbytes

__all__ = ["QuantizeConfig", "default_config", "quantize_rowwise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig:
    BLOCK_K: int
    num_warps: int


def default_config(K: int) -> QuantizeConfig:
    """8 elements per thread: one 16-byte load of a 16-bit type, one 8-byte store."""
    block = min(2048, max(128, triton.next_power_of_2(K)))
    return QuantizeConfig(BLOCK_K=block, num_warps=max(1, block // 256))


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

    peaks = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for k0 in tl.range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        magnitude = tl.abs(x)
        # False for inf and NaN alike, and no NaN ever reaches tl.maximum.
        peaks = tl.maximum(peaks, tl.where(magnitude < float("inf"), magnitude, 0.0))
    amax = tl.max(peaks, axis=0)

    scale = tl.where(amax > 0.0, tl.div_rn(tl.maximum(amax, 1e-12), 448.0), 1.0)
    tl.store(x_scale_ptr + m, scale)
    inverse = tl.div_rn(1.0, scale)

    for k0 in tl.range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        y = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32) * inverse
        # Comparisons instead of min and max: they leave a NaN alone.
        y = tl.where(y > 448.0, 448.0, y)
        y = tl.where(y < -448.0, -448.0, y)
        tl.store(x_q_ptr + offs_k, y.to(tl.float8e4nv), mask=mask_k)


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
    op = "quantize_rowwise"
    check_tensor(op, "x", x, ("M", "K"), FLOATS)
    check_architecture(op, x, torch.float8_e4m3fn)
    return _quantize_rowwise(x, list(astuple(config or default_config(x.shape[1]))))


def _quantize_rowwise_impl(x: torch.Tensor, config: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    BLOCK_K, num_warps = config
    M, K = x.shape
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


def _quantize_rowwise_fake(x: torch.Tensor, config: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    x_q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return x_q, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


_quantize_rowwise = define(
    "quantize_rowwise(Tensor x, int[] config) -> (Tensor, Tensor)",
    _quantize_rowwise_impl,
    _quantize_rowwise_fake,
)
