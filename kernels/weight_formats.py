"""One weight matrix per expert in four formats, what makes them and what they stand for.

    plain         W = weight                                fp32, fp16 or bf16
    e4m3_channel  W[e, n, k] = weight[e, n, k] * scale[e, n]        per tensor: strides of 0
    e4m3_block    W[e, n, k] = weight[e, n, k] * scale[e, n / 128, k / 128]
    int4_group    W[e, n, k] = q[e, n, k] * scale[e, n, k / 128]

A scale multiplies, also where a checkpoint calls it weight_scale_inv.
int4: byte j of group g of a row holds q[128g + j] + 8 in its low four bits and q[128g + 64 + j] + 8
in its high ones, q in [-8, 7]: the low halves of 64 bytes in a row are 64 values of k in a row, and
no byte is of two groups.
Layout: plain weights have any strides of which one of the last two is 1, so that both checkpoint
layouts are views; 8-bit tensor cores and packed bytes want stride 1 along K.
Preparing weights (`quantize_*`) is plain PyTorch and happens once, before serving.
Source: e4m3 as in kernels/quantize.py; blocks as in DeepSeek-V3's checkpoints; int4 scales as in
llama-models (int4_mixed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._check import FLOATS, check_tensor, require

__all__ = [
    "GROUP",
    "Projection",
    "check_projection",
    "dequantize",
    "make_projection",
    "pack_int4",
    "quantize_block",
    "quantize_channel",
    "quantize_int4",
    "unpack_int4",
]

GROUP = 128  # rows and columns of a block, and the length of a group
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-12  # keeps the reciprocal of a scale finite
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One weight matrix per expert, (E, N, K) with N output features, and what multiplies it."""

    weight: torch.Tensor  # (E, N, K) floats or e4m3, (E, N, K / 2) uint8 for int4
    scale: torch.Tensor | None = None  # (E, N) | (E, N / 128, K / 128) | int4: (E, N, K / 128)

    @property
    def format(self) -> str:
        """plain, e4m3_channel, e4m3_block or int4_group."""
        if self.weight.dtype == torch.uint8:
            return "int4_group"
        if self.weight.dtype != E4M3:
            return "plain"
        return "e4m3_block" if self.scale is not None and self.scale.ndim == 3 else "e4m3_channel"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K), whatever a byte of `weight` holds."""
        E, N, columns = self.weight.shape
        return E, N, columns * 2 if self.weight.dtype == torch.uint8 else columns

    def expert(self, e: int) -> Projection:
        """That of expert `e` alone, a view."""
        scale = None if self.scale is None else self.scale[e : e + 1]
        return Projection(weight=self.weight[e : e + 1], scale=scale)


def make_projection(
    op: str, name: str, weight: torch.Tensor, scale: torch.Tensor | None
) -> Projection:
    """A Projection whose e4m3 scales are views in one of the two forms; `name` is the weight's."""
    if scale is None or weight.dtype != E4M3:
        return Projection(weight=weight, scale=scale)
    E, N, K = weight.shape
    shape = tuple(scale.shape)
    is_blocks = N % GROUP == 0 and K % GROUP == 0 and shape == (E, N // GROUP, K // GROUP)
    if is_blocks:
        return Projection(weight=weight, scale=scale)
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.ndim == 1:
        scale = scale.unsqueeze(1)
    elif scale.ndim == 3 and shape[2] == 1:
        scale = scale.squeeze(2)
    fits = scale.ndim == 2 and scale.shape[0] in (1, E) and scale.shape[1] in (1, N)
    must = (
        f"the scale of {name} must be one value, ({E},), ({E}, {N}), ({E}, {N}, 1) or blocks of "
        f"{GROUP} x {GROUP}"
    )
    require(fits, op, must, shape)
    return Projection(weight=weight, scale=scale.expand(E, N))


def check_projection(
    op: str,
    name: str,
    projection: Projection,
    shape: tuple[int, int, int],
    x_dtype: torch.dtype,
) -> None:
    """Check one projection of experts for `op` on x in `x_dtype`; see `check_experts`."""
    weight, scale, kind = projection.weight, projection.scale, projection.format
    E, N, K = shape
    if kind == "plain":
        check_tensor(op, f"{name}.weight", weight, shape, (x_dtype,), unit_last_stride=False)
        dense = any(weight.stride(d) == 1 or weight.shape[d] <= 1 for d in (1, 2))
        must = f"{name}.weight must have stride 1 in one of its last two dimensions"
        require(dense or weight.numel() == 0, op, must, f"strides {weight.stride()}")
        must = f"{name}.scale must be None for weights in {weight.dtype}"
        require(scale is None, op, must, type(scale).__name__)
        return
    must = f"x must be float16 or bfloat16 for {kind} weights"
    require(x_dtype in HALVES, op, must, x_dtype, TypeError)
    if kind != "e4m3_channel":
        must = f"{name} must have K, and with blocks N, a multiple of {GROUP}"
        sizes = (N, K) if kind == "e4m3_block" else (K,)
        require(all(size % GROUP == 0 for size in sizes), op, must, f"(E, N, K) = {shape}")
    if scale is None:
        raise TypeError(f"{op}: {name}.scale must be a torch.Tensor, got None")
    if kind == "int4_group":
        check_tensor(op, f"{name}.weight", weight, (E, N, K // 2), (torch.uint8,))
        scale_shape, scale_dtypes = [E, N, K // GROUP], list(FLOATS)
    else:
        check_tensor(op, f"{name}.weight", weight, shape, (E4M3,))
        blocks = kind == "e4m3_block"
        scale_shape = [E, N // GROUP, K // GROUP] if blocks else [E, N]
        scale_dtypes = [torch.float32]
    check_tensor(op, f"{name}.scale", scale, scale_shape, scale_dtypes, unit_last_stride=False)


def quantize_channel(w: torch.Tensor) -> Projection:
    """e4m3 weights of w (E, N, K) with one scale per output channel, as `quantize_rowwise` makes.

    scale = max(amax, 1e-12) / 448 over the finite values of a row, 1 if there is none but 0.
    """
    check_tensor("quantize_channel", "w", w, ("E", "N", "K"), FLOATS, unit_last_stride=False)
    return _quantized(w, lambda x: _e4m3(x, x.shape[-1:]))


def quantize_block(w: torch.Tensor) -> Projection:
    """e4m3 weights of w (E, N, K) with one scale per block of 128 x 128; N and K multiples."""
    op = "quantize_block"
    check_tensor(op, "w", w, ("E", "N", "K"), FLOATS, unit_last_stride=False)
    N, K = w.shape[1:]
    must = f"w must have N and K multiples of {GROUP}"
    require(N % GROUP == 0 and K % GROUP == 0, op, must, tuple(w.shape))
    return _quantized(w, lambda x: _e4m3(x, (GROUP, GROUP)))


def quantize_int4(w: torch.Tensor) -> Projection:
    """int4 weights of w (E, N, K), finite, with one fp32 scale per 128 of K, a multiple.

    scale = max(amax, 1e-12) / 8, 1 for a group of zeros; q = clamp(round(w / scale), -8, 7). Of a
    group's positive maximum 7 / 8 are left, but all sixteen steps are used: for Gaussian weights
    the error is 10.6 % rms where amax / 7, which uses fifteen, has 11.7 %.
    """
    op = "quantize_int4"
    check_tensor(op, "w", w, ("E", "N", "K"), FLOATS, unit_last_stride=False)
    require(w.shape[2] % GROUP == 0, op, f"w must have K a multiple of {GROUP}", tuple(w.shape))
    require(bool(w.isfinite().all()), op, "w must be finite", "NaN or infinite weights")
    return _quantized(w, _int4)


def _quantized(
    w: torch.Tensor, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> Projection:
    """By expert: at full size the fp32 copy of all of them would not fit."""
    if len(w) == 0:
        weight, scale = quantize(w.new_zeros(w.shape[1:], dtype=torch.float32))
        return Projection(
            weight=weight.new_empty(0, *weight.shape), scale=scale.new_empty(0, *scale.shape)
        )
    weights, scales = zip(*(quantize(expert.float()) for expert in w), strict=True)
    return Projection(weight=torch.stack(weights), scale=torch.stack(scales))


def _scale(x: torch.Tensor, dims: tuple[int, ...], largest: float) -> torch.Tensor:
    """Of the finite values of `x`, reduced over `dims`, which stay as 1."""
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    amax = finite.amax(dims, keepdim=True) if x.numel() else finite.sum(dims, keepdim=True)
    return torch.where(amax > 0.0, amax.clamp(min=SMALLEST_AMAX) / largest, 1.0)


def _e4m3(x: torch.Tensor, block: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) with one scale per block (K,) of a row or (rows, columns)."""
    if len(block) == 1:
        scale = _scale(x, (1,), E4M3_MAX)
        y, scale = x * (1.0 / scale), scale.squeeze(1)
    else:
        rows, columns = (size // step for size, step in zip(x.shape, block, strict=True))
        blocks = x.reshape(rows, block[0], columns, block[1])
        scale = _scale(blocks, (1, 3), E4M3_MAX)
        y, scale = (blocks * (1.0 / scale)).reshape(x.shape), scale.reshape(rows, columns)
    return y.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def _int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.unflatten(1, (x.shape[1] // GROUP, GROUP))
    scale = _scale(groups, (2,), 8.0)
    q = (groups / scale).round().clamp(-8, 7).to(torch.int8)
    return pack_int4(q.flatten(1)), scale.squeeze(2)


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Pack int8 q (.., K) in [-8, 7], K a multiple of 128, into uint8 (.., K / 2)."""
    op = "pack_int4"
    check_tensor(op, "q", q, (None,) * max(q.ndim, 1), (torch.int8,), unit_last_stride=False)
    must = f"q must have a last dimension that is a multiple of {GROUP}"
    require(q.shape[-1] % GROUP == 0, op, must, tuple(q.shape))
    nibbles = (q + 8).to(torch.uint8).unflatten(-1, (q.shape[-1] // GROUP, 2, GROUP // 2))
    low, high = nibbles.unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The int8 (.., K) that `pack_int4` packed."""
    op, any_shape = "unpack_int4", (None,) * max(packed.ndim, 1)
    check_tensor(op, "packed", packed, any_shape, (torch.uint8,), unit_last_stride=False)
    must = f"packed must have a last dimension that is a multiple of {GROUP // 2}"
    require(packed.shape[-1] % (GROUP // 2) == 0, op, must, tuple(packed.shape))
    halves = packed.unflatten(-1, (packed.shape[-1] // (GROUP // 2), 1, GROUP // 2))
    return torch.cat((halves & 15, halves >> 4), dim=-2).flatten(-3).to(torch.int8) - 8


def dequantize(projection: Projection, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the weights stand for, (E, N, K): one rounding in fp32, none in float64."""
    weight, scale = projection.weight, projection.scale
    if projection.format == "int4_group":
        weight = unpack_int4(weight)
    wide = weight.to(dtype)
    if scale is None:
        return wide
    scale = scale.to(dtype)
    if projection.format == "e4m3_channel":
        return wide * scale.unsqueeze(2)
    if projection.format == "e4m3_block":
        scale = scale.repeat_interleave(GROUP, dim=1)
    return wide * scale.repeat_interleave(GROUP, dim=2)
