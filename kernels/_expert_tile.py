"""One tile of an expert's matrix product, weights first, in every weight format.

    acc[n, m] += sum over k_begin <= k < k_end of w[n, k] * x[m, k]      (BLOCK_N, BLOCK_M), fp32

The weights are the first operand, so their rows fill the 64 rows that Hopper's tensor cores want
and few tokens cost little: BLOCK_M may be 16. Weights that are not what the tensor cores multiply
are decoded in registers, from where wgmma takes its first operand.

    FORMAT          w                                          scales of w, fp32 but for int4
    "plain"         the type of x                              none
    "e4m3_channel"  e4m3; bytes (uint8) where x has 16 bits    (N,), after the sum
    "e4m3_block"    the same                                   (N / 128, K / 128)
    "int4_group"    uint8, two per byte                        (N, K / 128), of any float type
    X_FORMAT        x, or z
    "plain"         16 or 32 bits
    "row"           e4m3, with a scale per row, after the sum
    "group"         e4m3, with a scale per row and 128 of k
    "quantise"      16 bits; made e4m3 with such scales on its way

int4: byte j of group g of a row holds w[128 g + j] + 8 in its low half, w[128 g + 64 + j] + 8 in
its high half, for j < 64: the halves are two products with different columns of x, and nothing has
to be interleaved. e4m3 products are summed in the tensor cores over 128 of k at most, and then
added to acc: Hopper's keep about 14 bits (fp8_matmul.py); FAST_ACCUM leaves all of k to them.
Source: weights first ("swap A and B") as in Marlin and FasterTransformer's small-batch GEMMs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._quantize_rows import quantize_groups

__all__ = ["gate_and_up", "product", "step", "store_z", "weight_pointers"]

GROUP: tl.constexpr = tl.constexpr(128)  # of k, that share a scale


@triton.jit
def weight_rows(n0, N, PAIRED: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_N,) int64: rows n0 and following; PAIRED: half as many, of gate and then of up.

    Beyond N they begin again: whole tiles are loaded, and nobody stores what those give.
    """
    offs_n = tl.arange(0, BLOCK_N)
    rows = (n0 + (offs_n % (BLOCK_N // 2) if PAIRED else offs_n)) % N
    if EVEN_N:  # N is a multiple of 16, and so rows are runs of 16, which the % hides
        rows = tl.max_contiguous(tl.multiple_of(rows, 16), 16)
    return rows.to(tl.int64)


@triton.jit
def _starts(ptr, up_ptr, EVEN_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_N,) or scalar: where the matrix of each row begins."""
    starts = ptr
    if up_ptr is not None:
        # A distance, because Triton 3.9 loses what it knows of two addresses in a tl.where.
        itemsize: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        distance = up_ptr.to(tl.int64) - ptr.to(tl.int64)
        if itemsize > 1:  # a division by 1 would be folded, and what is said of it be lost
            distance //= itemsize
        if EVEN_N:
            distance = tl.multiple_of(distance, 16 // itemsize)
        starts = ptr + tl.arange(0, BLOCK_N) // (BLOCK_N // 2) * distance
    return starts


@triton.jit
def _decoded(raw, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Bytes of weights as `dtype`, bf16, fp16 or fp32, exactly."""
    if FORMAT == "int4_group":  # the low half of each byte, less 8
        if dtype == tl.bfloat16:  # 128 + q: the halves are the mantissa's last bits
            biased = ((raw & 15).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
            w = biased - 136.0
        elif dtype == tl.float16:  # 1024 + q
            biased = ((raw & 15).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
            w = biased - 1032.0
        else:
            w = (raw & 15).to(tl.float32) - 8.0
    else:  # e4m3: exponent and mantissa in place, then the difference of the exponents' biases
        bits = raw.to(tl.uint16)
        if dtype == tl.float16:
            wide = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            w = wide.to(tl.float16, bitcast=True) * 256.0
        else:
            wide = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
            w = wide.to(tl.bfloat16, bitcast=True) * 2.0**120
        w = tl.where((bits & 0x7F) == 0x7F, float("nan"), w)
    return w.to(dtype)


@triton.jit
def weight_pointers(
    w, expert, n0, N, k_begin,
    FORMAT: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return pointers to a tile of weights, and to the first scale of each of its rows.

    (BLOCK_N, BLOCK_K) from row n0 and column k_begin on, half as wide for int4. EVEN_N: N is a
    multiple of 16.
    """
    in_byte: tl.constexpr = 2 if FORMAT == "int4_group" else 1
    rows = weight_rows(n0, N, w.up_ptr is not None, EVEN_N, BLOCK_N)
    starts = _starts(w.ptr, w.up_ptr, EVEN_N, BLOCK_N) + (expert * w.stride_e + rows * w.stride_n)
    offs_k = (k_begin // in_byte + tl.arange(0, BLOCK_K // in_byte)).to(tl.int64) * w.stride_k
    scale_ptrs = starts  # unused, but a value
    if FORMAT != "plain":
        scale_rows = rows // GROUP if FORMAT == "e4m3_block" else rows
        scale_ptrs = _starts(w.scale_ptr, w.up_scale_ptr, False, BLOCK_N) + (
            expert * w.scale_stride_e + scale_rows * w.scale_stride_n
        )
    return starts[:, None] + offs_k[None, :], scale_ptrs


@triton.jit
def step(
    acc, w_tile, w_scale, x_tile, x_high, x_scale,
    FORMAT: tl.constexpr, X_SCALED: tl.constexpr, FAST_ACCUM: tl.constexpr,
):  # fmt: skip
    """Return acc + w_tile @ x_tile.T for one BLOCK_K, times the scales of this step.

    w_scale counts for blocks, groups and bytes, x_scale with X_SCALED, x_high for int4 alone: the
    columns of the high halves, where x_tile has those of the low ones.
    """
    W_SCALED: tl.constexpr = (FORMAT == "e4m3_block") or (w_tile.dtype == tl.uint8)
    if FORMAT == "int4_group":
        w_high = _decoded(w_tile >> 4, x_tile.dtype, FORMAT)
        w_tile = _decoded(w_tile, x_tile.dtype, FORMAT)
        partial = tl.dot(w_tile, x_tile.T, input_precision="ieee")
        partial = tl.dot(w_high, x_high.T, partial, input_precision="ieee")
        acc += partial * w_scale[:, None]
    else:
        decoded = w_tile
        if w_tile.dtype == tl.uint8:
            decoded = _decoded(w_tile, x_tile.dtype, FORMAT)
        if W_SCALED and X_SCALED:
            acc += tl.dot(decoded, x_tile.T) * (w_scale[:, None] * x_scale[None, :])
        elif W_SCALED:
            acc += tl.dot(decoded, x_tile.T, input_precision="ieee") * w_scale[:, None]
        elif X_SCALED:
            acc += tl.dot(decoded, x_tile.T) * x_scale[None, :]
        elif x_tile.dtype == tl.float8e4nv and not FAST_ACCUM:
            acc += tl.dot(decoded, x_tile.T)
        else:
            acc = tl.dot(decoded, x_tile.T, acc, input_precision="ieee")
    return acc


@triton.jit
def product(
    acc,
    w, expert, n0, N,
    x, x_rows,
    k_begin, k_end, K,
    FORMAT: tl.constexpr, X_FORMAT: tl.constexpr, FAST_ACCUM: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc (BLOCK_N, BLOCK_M) + w[expert, n0:, k_begin:k_end] @ x[x_rows, k_begin:k_end].T.

    Scales that belong to the sum over k multiply what is added; k_begin is a multiple of BLOCK_K.
    EVEN_N: N is a multiple of 16. EVEN_K: K is one of BLOCK_K.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    in_byte: tl.constexpr = 2 if FORMAT == "int4_group" else 1
    offs_k = tl.arange(0, BLOCK_K // in_byte)
    w_ptrs, w_scale_ptrs = weight_pointers(
        w, expert, n0, N, k_begin, FORMAT, EVEN_N, BLOCK_N, BLOCK_K
    )
    x_ptrs = (x.ptr + x_rows * x.stride)[:, None] + (k_begin + offs_k)[None, :]
    if X_FORMAT == "row" or X_FORMAT == "group":
        x_scale_ptrs = x.scale_ptr + x_rows * x.scale_stride
    # Of decoded bytes the scale multiplies each step's sum: in Triton 3.7.1 a product that went on
    # in acc would have the registers of its first operand overwritten before it is done.
    by_step: tl.constexpr = w.ptr.dtype.element_ty == tl.uint8
    SCALED_AFTER: tl.constexpr = X_FORMAT == "row" or (FORMAT == "e4m3_channel" and not by_step)
    X_SCALED: tl.constexpr = X_FORMAT == "group" or X_FORMAT == "quantise"
    channel_scale = 1.0
    if by_step and FORMAT == "e4m3_channel":
        channel_scale = tl.load(w_scale_ptrs)
    before = acc
    if SCALED_AFTER:
        acc = tl.zeros_like(acc)

    for k0 in tl.range(k_begin, k_end, BLOCK_K):
        if EVEN_K:
            w_tile = tl.load(w_ptrs)
            x_tile = tl.load(x_ptrs)
        else:
            mask_k = offs_k[None, :] < K - k0
            w_tile = tl.load(w_ptrs, mask=mask_k, other=0.0)
            x_tile = tl.load(x_ptrs, mask=mask_k, other=0.0)
        x_high, w_scale, x_scale = x_tile, channel_scale, 1.0
        if FORMAT == "int4_group":
            x_high = tl.load(x_ptrs + BLOCK_K // 2)
        if FORMAT == "int4_group" or FORMAT == "e4m3_block":
            w_scale = tl.load(w_scale_ptrs + k0 // GROUP * w.scale_stride_k).to(tl.float32)
        if X_FORMAT == "group":
            x_scale = tl.load(x_scale_ptrs + k0 // GROUP * x.scale_stride_k)
        if X_FORMAT == "quantise":
            x_tile, x_scale = quantize_groups(x_tile.to(tl.float32))
        acc = step(acc, w_tile, w_scale, x_tile, x_high, x_scale, FORMAT, X_SCALED, FAST_ACCUM)
        w_ptrs += tl.cast(BLOCK_K // in_byte, tl.int64) * w.stride_k
        x_ptrs += BLOCK_K

    if X_FORMAT == "row":
        acc *= tl.load(x_scale_ptrs)[None, :]
    if FORMAT == "e4m3_channel" and not by_step:
        acc *= tl.load(w_scale_ptrs)[:, None]
    if SCALED_AFTER:
        acc += before
    return acc


@triton.jit
def gate_and_up(acc):
    """Return the gate and the up half of acc (BLOCK_N, BLOCK_M), (BLOCK_N // 2, BLOCK_M) each."""
    return acc.reshape(2, acc.shape[0] // 2, acc.shape[1]).permute(1, 2, 0).split()


@triton.jit
def store_z(gate, up, z, z_rows, mask_m, n0, N, DTYPE: tl.constexpr):
    """Store dt(silu(gate) * up), made e4m3 with a scale per 128 columns if z is that."""
    HALF: tl.constexpr = gate.shape[0]
    values = (gate * tl.sigmoid(gate) * up).to(DTYPE).T  # (BLOCK_M, HALF)
    offs_n = n0 + tl.arange(0, HALF)
    if z.scale_ptr is not None:
        tl.static_assert(HALF == GROUP, "a row of the tile has one scale")
        values, scale = quantize_groups(values.to(tl.float32))
        scale_ptrs = z.scale_ptr + z_rows * z.scale_stride + n0 // GROUP * z.scale_stride_k
        tl.store(scale_ptrs, scale, mask=mask_m)
    z_ptrs = z.ptr + (z_rows * z.stride)[:, None] + offs_n[None, :]
    tl.store(z_ptrs, values, mask=mask_m[:, None] & (offs_n < N)[None, :])
