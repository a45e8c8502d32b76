"""Rows to e4m3, as device functions that quantize.py and other kernels call.

    quantize_row           one scale for the row
    quantize_group_rows    one scale for each 128 elements of the row
    quantize_groups        the same of a tile that is in registers

    scale = max(amax, 1e-12) / 448        amax over the finite values; 1 if none of them is not 0
    x_q   = e4m3(clamp(x * (1 / scale), -448, 448))

The first two take pointers to the first element of one row, of its quantised copy and of its
scales, all three dense. One definition, so that a fused quantisation is equal to the operator's in
every bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "GROUP",
    "finite_magnitude",
    "quantize_group_rows",
    "quantize_groups",
    "quantize_row",
    "row_scale",
    "saturated",
]

GROUP = 128


@triton.jit
def finite_magnitude(x):
    magnitude = tl.abs(x)
    # False for inf and NaN alike, and no NaN ever reaches tl.maximum.
    return tl.where(magnitude < float("inf"), magnitude, 0.0)


@triton.jit
def row_scale(amax):
    return tl.where(amax > 0.0, tl.div_rn(tl.maximum(amax, 1e-12), 448.0), 1.0)


@triton.jit
def saturated(y):
    # Comparisons instead of min and max: they leave a NaN alone.
    y = tl.where(y > 448.0, 448.0, y)
    return tl.where(y < -448.0, -448.0, y).to(tl.float8e4nv)


@triton.jit
def quantize_row(x_ptr, x_q_ptr, x_scale_ptr, K, BLOCK_K: tl.constexpr):
    """Quantise the K elements at `x_ptr`; they are read twice, the second time from a cache."""
    peaks = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for k0 in tl.range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        peaks = tl.maximum(peaks, finite_magnitude(x))
    scale = row_scale(tl.max(peaks, axis=0))
    tl.store(x_scale_ptr, scale)
    inverse = tl.div_rn(1.0, scale)

    for k0 in tl.range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        y = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32) * inverse
        tl.store(x_q_ptr + offs_k, saturated(y), mask=mask_k)


@triton.jit
def quantize_group_rows(x_ptr, x_q_ptr, x_scale_ptr, K, BLOCK_K: tl.constexpr):
    """Quantise the K elements at `x_ptr`, a last group with fewer than 128 of them included.

    BLOCK_K elements, of one or more whole groups, are in registers at a time and read once.
    """
    GROUPS: tl.constexpr = BLOCK_K // 128
    for k0 in tl.range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        x = tl.reshape(x, (GROUPS, 128))
        scale = row_scale(tl.max(finite_magnitude(x), axis=1))  # (GROUPS,)
        offs_g = k0 // 128 + tl.arange(0, GROUPS)
        tl.store(x_scale_ptr + offs_g, scale, mask=offs_g * 128 < K)
        y = saturated(x * tl.div_rn(1.0, scale)[:, None])
        tl.store(x_q_ptr + offs_k, tl.reshape(y, (BLOCK_K,)), mask=mask_k)


@triton.jit
def quantize_groups(x):
    """Return x (BLOCK_M, N) fp32 in e4m3 and the scale of each row (BLOCK_M,)."""
    scale = row_scale(tl.max(finite_magnitude(x), axis=1))
    return saturated(x * tl.div_rn(1.0, scale)[:, None]), scale
