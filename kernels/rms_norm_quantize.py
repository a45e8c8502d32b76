"""RMSNorm that quantises its result as well: one launch instead of two.

    y, h as in rms_norm.py; y_q, y_scale = quantize_rowwise(y)

Layout: x, residual, y, h, y_q are (T, H) with dense rows; weight is (H,), y_scale (T,).
Tiling: one program per row, which goes over it three times in blocks of BLOCK_H: for the mean
square, for y and its largest value, for y_q. The first reads DRAM, the others L1 or L2; y is
computed again instead of read back, as a program's own stores need no barrier then.
Source: kernels/rms_norm.py and kernels/quantize.py, to both of which this is equal in every bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._library import define
from ._names import named, nbytes
from ._quantize_rows import finite_magnitude, row_scale, saturated
from ._sizes import flat
from .rms_norm import RmsNormConfig, check_rms_norm, default_tiles, inverse_rms, normalized

__all__ = ["rms_norm_quantize"]


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    names = ("x", "residual", "weight", "h", "y", "y_q", "y_scale")
    moved = nbytes(*(args[f"{name}_ptr"] for name in names))
    return moved, (10 if args["HAS_RESIDUAL"] else 9) * args["x_ptr"].numel()


@triton.jit(do_not_specialize=["eps"], **named("rms_norm_quantize", "x_ptr", _cost))
def _rms_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, h_ptr, y_ptr, y_q_ptr, y_scale_ptr,
    H,
    stride_x_t, stride_residual_t, stride_h_t, stride_y_t, stride_y_q_t,
    eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid (T,): program t does row t. HAS_RESIDUAL adds residual first and stores h."""
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * stride_x_t
    y_ptr += t * stride_y_t
    y_q_ptr += t * stride_y_q_t
    if HAS_RESIDUAL:
        residual_ptr += t * stride_residual_t
        h_ptr += t * stride_h_t

    rstd = inverse_rms(x_ptr, residual_ptr, h_ptr, H, eps, HAS_RESIDUAL, BLOCK_H)
    peaks = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for h0 in tl.range(0, H, BLOCK_H):
        offs_h = h0 + tl.arange(0, BLOCK_H)
        y = normalized(x_ptr, residual_ptr, weight_ptr, rstd, offs_h, H, HAS_RESIDUAL)
        tl.store(y_ptr + offs_h, y, mask=offs_h < H)
        # Columns beyond H are 0, or NaN where rstd is not finite, and neither is ever a peak.
        peaks = tl.maximum(peaks, finite_magnitude(y.to(tl.float32)))

    scale = row_scale(tl.max(peaks, axis=0))
    tl.store(y_scale_ptr + t, scale)
    inverse = tl.div_rn(1.0, scale)
    for h0 in tl.range(0, H, BLOCK_H):
        offs_h = h0 + tl.arange(0, BLOCK_H)
        y = normalized(x_ptr, residual_ptr, weight_ptr, rstd, offs_h, H, HAS_RESIDUAL)
        tl.store(y_q_ptr + offs_h, saturated(y.to(tl.float32) * inverse), mask=offs_h < H)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    config: RmsNormConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Normalise each row of `x`, or of x + residual, and quantise the result by row.

    Args:
        x, weight, eps: as in `rms_norm`.
        residual: (T, H) in x.dtype, added first as in `add_rms_norm`.
        config: tile configuration; None takes `default_config(H)`.
    Returns:
        y (T, H) in x.dtype; h = x + residual likewise, None without residual; y_q (T, H)
        float8_e4m3fn and y_scale (T,) fp32, with y ~ y_q * y_scale[:, None].
    Raises:
        ValueError: shapes, strides, devices or eps.   TypeError: dtypes.
        UnsupportedArchitectureError: a GPU before sm_89, which has no e4m3.
    Numerics: y and h are those of `rms_norm` and `add_rms_norm`, y_q and y_scale those of
        `quantize_rowwise(y)`, in every bit. A row of NaN or inf affects itself only.
    Cost: 9*T*H flops, 10 with residual; bytes = T*H*(2*itemsize + 1) + 4*T + H*itemsize, with
        residual T*H*(4*itemsize + 1) + ...
    Source: see the module; reference: kernels/reference.py:rms_norm and quantize_rowwise.
    """
    op = "rms_norm_quantize" if residual is None else "add_rms_norm_quantize"
    check_rms_norm(op, x, weight, residual, eps, True)
    given = config and flat(config)
    if residual is None:
        y, y_q, y_scale = _rms_norm_quantize(x, weight, eps, given)
        return y, None, y_q, y_scale
    results: tuple[torch.Tensor, ...] = _add_rms_norm_quantize(x, residual, weight, eps, given)
    y, h, y_q, y_scale = results
    return y, h, y_q, y_scale


def _empty_quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return x_q, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def _rms_norm_quantize_impl(
    x: torch.Tensor, weight: torch.Tensor, eps: float, config: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, y_q, y_scale = _rms_norm_quantize_fake(x, weight, eps, config)
    _launch_rms_norm_quantize(x, None, weight, None, y, y_q, y_scale, eps, config)
    return y, y_q, y_scale


def _rms_norm_quantize_fake(
    x: torch.Tensor, weight: torch.Tensor, eps: float, config: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *_empty_quantized(x)


def _add_rms_norm_quantize_impl(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    config: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, h, y_q, y_scale = _add_rms_norm_quantize_fake(x, residual, weight, eps, config)
    _launch_rms_norm_quantize(x, residual, weight, h, y, y_q, y_scale, eps, config)
    return y, h, y_q, y_scale


def _add_rms_norm_quantize_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    config: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, h = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return y, h, *_empty_quantized(x)


def _launch_rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    h: torch.Tensor | None,
    y: torch.Tensor,
    y_q: torch.Tensor,
    y_scale: torch.Tensor,
    eps: float,
    config: list[int] | None,
) -> None:
    T, H = x.shape
    BLOCK_H, num_warps = config or default_tiles(H)
    launch(
        _rms_norm_quantize_kernel, (T,),
        x, residual, weight, h, y, y_q, y_scale,
        H,
        x.stride(0), 0 if residual is None else residual.stride(0), 0 if h is None else h.stride(0),
        y.stride(0), y_q.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None, BLOCK_H=BLOCK_H, num_warps=num_warps,
    )  # fmt: skip


_rms_norm_quantize = define(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, int[]? config)"
    " -> (Tensor, Tensor, Tensor)",
    _rms_norm_quantize_impl,
    _rms_norm_quantize_fake,
)
_add_rms_norm_quantize = define(
    "add_rms_norm_quantize(Tensor x, Tensor residual, Tensor weight, float eps, int[]? config)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _add_rms_norm_quantize_impl,
    _add_rms_norm_quantize_fake,
)
