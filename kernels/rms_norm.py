"""RMSNorm with the model's two roundings, and the same with the residual added first.

    h = dt(x + residual)                                 (only with residual)
    n = dt(h * rsqrt(mean(h^2) + eps))                   mean over H, in fp32
    y = dt(n * weight)

Layout: x, residual, y, h are (T, H) with any row stride and dense rows; weight is (H,).
Tiling: one program per row; the row is read twice in blocks of BLOCK_H, the second time from L1
or L2, so any H fits and nothing is spilled.
Source: Llama 4's RMSNorm rounds the normalised value before the weight multiply
(transformers Llama4TextRMSNorm, llama-models RMSNorm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_architecture, check_devices, check_tensor, require
from ._launch import launch
from ._library import define
from ._names import named, nbytes
from ._remembered import remembered
from ._sizes import flat, tiles

__all__ = [
    "RmsNormConfig",
    "add_rms_norm",
    "check_rms_norm",
    "default_config",
    "default_tiles",
    "inverse_rms",
    "normalized",
    "rms_norm",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RmsNormConfig:
    BLOCK_H: int
    num_warps: int


def default_config(H: int) -> RmsNormConfig:
    """8 elements per thread: one 16-byte access of a 16-bit type."""
    block = min(2048, max(128, triton.next_power_of_2(H)))
    return RmsNormConfig(BLOCK_H=block, num_warps=max(1, block // 256))


default_tiles = tiles(default_config)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    tensors = [args[f"{name}_ptr"] for name in ("x", "residual", "weight", "h", "y")]
    return nbytes(*tensors), (5 if args["HAS_RESIDUAL"] else 4) * args["x_ptr"].numel()


@triton.jit
def inverse_rms(
    x_ptr, residual_ptr, h_ptr,
    H, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return rsqrt(mean(h^2) + eps) of the row at `x_ptr`; HAS_RESIDUAL stores h on the way."""
    squares = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for h0 in tl.range(0, H, BLOCK_H):
        offs_h = h0 + tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        h = tl.load(x_ptr + offs_h, mask=mask_h, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + offs_h, mask=mask_h, other=0.0)
            h = (h.to(tl.float32) + residual.to(tl.float32)).to(h.dtype)
            tl.store(h_ptr + offs_h, h, mask=mask_h)
        h32 = h.to(tl.float32)
        squares += h32 * h32
    return tl.rsqrt(tl.sum(squares, axis=0) / H + eps)


@triton.jit
def normalized(
    x_ptr, residual_ptr, weight_ptr,
    rstd, offs_h, H,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Return y of one row at the columns `offs_h`."""
    mask_h = offs_h < H
    h = tl.load(x_ptr + offs_h, mask=mask_h, other=0.0)
    if HAS_RESIDUAL:
        # Added again instead of reading h back: a program's own stores need no barrier then.
        residual = tl.load(residual_ptr + offs_h, mask=mask_h, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(h.dtype)
    weight = tl.load(weight_ptr + offs_h, mask=mask_h, other=0.0)
    n = (h.to(tl.float32) * rstd).to(h.dtype)
    return (n.to(tl.float32) * weight.to(tl.float32)).to(h.dtype)


@triton.jit(do_not_specialize=["eps"], **named("rms_norm", "x_ptr", _cost))
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, h_ptr, y_ptr,
    H,
    stride_x_t, stride_residual_t, stride_h_t, stride_y_t,
    eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid (T,): program t normalises row t. HAS_RESIDUAL adds residual first and stores h."""
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * stride_x_t
    y_ptr += t * stride_y_t
    if HAS_RESIDUAL:
        residual_ptr += t * stride_residual_t
        h_ptr += t * stride_h_t

    rstd = inverse_rms(x_ptr, residual_ptr, h_ptr, H, eps, HAS_RESIDUAL, BLOCK_H)
    for h0 in tl.range(0, H, BLOCK_H):
        offs_h = h0 + tl.arange(0, BLOCK_H)
        y = normalized(x_ptr, residual_ptr, weight_ptr, rstd, offs_h, H, HAS_RESIDUAL)
        tl.store(y_ptr + offs_h, y, mask=offs_h < H)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, config: RmsNormConfig | None = None
) -> torch.Tensor:
    """Normalise each row of `x` by its root mean square and scale it by `weight`.

    Args:
        x: (T, H) fp32, fp16 or bf16, dense rows.
        weight: (H,) in x.dtype.
        eps: added to the mean square; finite and >= 0.
        config: tile configuration; None takes `default_config(H)`.
    Returns:
        (T, H) in x.dtype.
    Raises:
        ValueError: shapes, strides, devices or eps.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: sum of squares in fp32; two roundings, of the normalised value and of the product.
        A row of NaN or inf affects itself only.
    Cost: 4*T*H flops; bytes = 2*T*H*itemsize + H*itemsize.
    Source: see the module; reference: kernels/reference.py:rms_norm.
    """
    check_rms_norm("rms_norm", x, weight, None, eps)
    return _rms_norm(x, weight, eps, config and flat(config))


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    config: RmsNormConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rms_norm(h), h) with h = x + residual, rounded once to x.dtype.

    Arguments, errors and numerics are those of `rms_norm`; residual: (T, H) in x.dtype.
    Cost: 5*T*H flops; bytes = 4*T*H*itemsize + H*itemsize.
    """
    check_rms_norm("add_rms_norm", x, weight, residual, eps)
    return _add_rms_norm(x, residual, weight, eps, config and flat(config))


@remembered
def check_rms_norm(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    quantized: bool = False,
) -> None:
    """Check the arguments of `op`, a norm; whether its result is `quantized` as well."""
    check_tensor(op, "x", x, ("T", "H"), FLOATS)
    T, H = x.shape
    require(H > 0, op, "x must have at least one column", tuple(x.shape))
    check_tensor(op, "weight", weight, (H,), (x.dtype,))
    if residual is not None:
        check_tensor(op, "residual", residual, (T, H), (x.dtype,))
    check_devices(op, x=x, weight=weight, residual=residual)
    check_architecture(op, x)
    if quantized:
        check_architecture(op, x, torch.float8_e4m3fn)
    require(0.0 <= eps < float("inf"), op, "eps must be finite and >= 0", eps)


def _launch_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    h: torch.Tensor | None,
    y: torch.Tensor,
    eps: float,
    config: list[int] | None,
) -> None:
    T, H = x.shape
    BLOCK_H, num_warps = config or default_tiles(H)
    launch(
        _rms_norm_kernel, (T,),
        x, residual, weight, h, y,
        H,
        x.stride(0), 0 if residual is None else residual.stride(0), 0 if h is None else h.stride(0),
        y.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None, BLOCK_H=BLOCK_H, num_warps=num_warps,
    )  # fmt: skip


def _rms_norm_impl(
    x: torch.Tensor, weight: torch.Tensor, eps: float, config: list[int] | None
) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, None, weight, None, y, eps, config)
    return y


def _add_rms_norm_impl(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    config: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, residual, weight, h, y, eps, config)
    return y, h


_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, int[]? config) -> Tensor",
    _rms_norm_impl,
    lambda x, weight, eps, config: x.new_empty(x.shape),
)
_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, int[]? config)"
    " -> (Tensor, Tensor)",
    _add_rms_norm_impl,
    lambda x, residual, weight, eps, config: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
