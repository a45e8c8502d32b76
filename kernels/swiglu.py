"""SwiGLU of a dense MLP: the activation between its two matrix products.

    z[t, f] = dt(dt(silu(gate[t, f])) * up[t, f])        silu(g) = g / (1 + exp(-g))

Layout: gate and up (T, F) with any row stride and dense rows, so both halves of one fused
projection can be given as views; z (T, F) contiguous.
Tiling: one program per row and BLOCK_F columns.
Source: torch.nn.functional.silu(gate) * up, rounding point for rounding point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_architecture, check_devices, check_tensor
from ._launch import launch
from ._library import define
from ._names import named, nbytes
from ._remembered import remembered
from ._sizes import flat, tiles

__all__ = ["SwigluConfig", "default_config", "swiglu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SwigluConfig:
    BLOCK_F: int
    num_warps: int


def default_config(F: int) -> SwigluConfig:
    """8 elements per thread: one 16-byte access of a 16-bit type."""
    block = min(1024, max(128, triton.next_power_of_2(F)))
    return SwigluConfig(BLOCK_F=block, num_warps=max(1, block // 256))


_default_tiles = tiles(default_config)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    z = args["z_ptr"]
    return 3 * nbytes(z), 5 * z.numel()


@triton.jit(**named("swiglu", "gate_ptr", _cost))
def _swiglu_kernel(
    gate_ptr, up_ptr, z_ptr,
    F,
    stride_gate_t, stride_up_t, stride_z_t,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Grid (T * cdiv(F, BLOCK_F),): BLOCK_F columns of one row each."""
    num_f = tl.cdiv(F, BLOCK_F)
    t = (tl.program_id(0) // num_f).to(tl.int64)
    offs_f = tl.program_id(0) % num_f * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs_f < F

    gate = tl.load(gate_ptr + t * stride_gate_t + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + t * stride_up_t + offs_f, mask=mask, other=0.0)

    silu = (gate * tl.sigmoid(gate)).to(up.dtype)
    z = (silu.to(tl.float32) * up.to(tl.float32)).to(up.dtype)
    tl.store(z_ptr + t * stride_z_t + offs_f, z, mask=mask)


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, *, config: SwigluConfig | None = None
) -> torch.Tensor:
    """Return silu(gate) * up.

    Args:
        gate, up: (T, F) fp32, fp16 or bf16, the same dtype, dense rows.
        config: tile configuration; None takes `default_config(F)`.
    Returns:
        (T, F) in gate.dtype.
    Raises:
        ValueError: shapes, strides or devices.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: fp32 inside; two roundings, of silu(gate) and of the product. Deterministic.
    Cost: 5*T*F flops; bytes = 3*T*F*itemsize.
    Source: see the module; reference: kernels/reference.py:swiglu.
    """
    _check("swiglu", gate, up)
    return _swiglu(gate, up, config and flat(config))


@remembered
def _check(op: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    check_tensor(op, "gate", gate, ("T", "F"), FLOATS)
    check_tensor(op, "up", up, tuple(gate.shape), (gate.dtype,))
    check_devices(op, gate=gate, up=up)
    check_architecture(op, gate)


def _swiglu_impl(gate: torch.Tensor, up: torch.Tensor, config: list[int] | None) -> torch.Tensor:
    T, F = gate.shape
    BLOCK_F, num_warps = config or _default_tiles(F)
    z = torch.empty((T, F), dtype=gate.dtype, device=gate.device)
    launch(
        _swiglu_kernel, (T * -(-F // BLOCK_F),),
        gate, up, z,
        F,
        gate.stride(0), up.stride(0), z.stride(0),
        BLOCK_F=BLOCK_F, num_warps=num_warps,
    )  # fmt: skip
    return z


_swiglu = define(
    "swiglu(Tensor gate, Tensor up, int[]? config) -> Tensor",
    _swiglu_impl,
    lambda gate, up, config: gate.new_empty(gate.shape),
)
