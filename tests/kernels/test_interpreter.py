"""The interpreter shim computes as sm_90 does: every code upward, every rounding downward."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from llama4_triton.kernels import interpreter

pytestmark = pytest.mark.interpreter_only

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NARROW = {torch.bfloat16: 16, torch.float16: 16, E4M3: 8, E5M2: 8}
TL = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    E4M3: tl.float8e4nv,
    E5M2: tl.float8e5,
    torch.int64: tl.int64,
    torch.int32: tl.int32,
    torch.uint32: tl.uint32,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
inf, nan = float("inf"), float("nan")


def name(value):
    return str(value).removeprefix("torch.")


def all_codes(dtype):
    width = NARROW[dtype]
    storage = torch.int16 if width == 16 else torch.uint8
    low = -(2**15) if width == 16 else 0
    return torch.arange(low, low + 2**width).to(storage).view(dtype)


def assert_same(actual, expected):
    """Equal bits, except that any NaN equals any other."""
    assert actual.dtype == expected.dtype
    if not actual.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        return
    one, other = actual.double(), expected.double()
    equal = (one == other) & (one.signbit() == other.signbit()) | one.isnan() & other.isnan()
    wrong = (~equal).nonzero().flatten()
    assert wrong.numel() == 0, (
        f"{wrong.numel()} mismatches, first at {wrong[0]}: "
        f"{one.flatten()[wrong[0]]} != {other.flatten()[wrong[0]]}"
    )


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N, TO: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    tl.store(y_ptr + offs, x.to(TO), mask=offs < N)


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    block = min(triton.next_power_of_2(x.numel()), 2**20)
    _cast_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), TL[dtype], block)
    return y


def saturated(x, dtype):
    """PyTorch's cast of the values clamped to dtype's range: PTX's .satfinite; NaN stays."""
    if NARROW[dtype] == 8:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


# Casts.


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("dtype", list(NARROW), ids=name)
def test_every_code_upward(dtype, to):
    codes = all_codes(dtype)
    assert_same(cast(codes, to), codes.to(to))


@pytest.mark.parametrize("dtype", list(NARROW), ids=name)
def test_float32_downward(dtype):
    """1e6 values, every midpoint of two neighbours and one ulp either side, and specials."""
    codes = all_codes(dtype).float()
    finite = codes[codes.isfinite() & (codes >= 0)].sort().values.unique().double()
    midpoints = ((finite[1:] + finite[:-1]) / 2).float()
    assert (midpoints.double() * 2 == finite[1:] + finite[:-1]).all()  # exact in float32
    near = [midpoints, torch.nextafter(midpoints, torch.tensor(inf))]
    near.append(torch.nextafter(midpoints, torch.tensor(-inf)))
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (500_000,), generator=generator).int()
    top = finite[-1].item()
    edge = [top, top * (1 + 2.0**-12), top * 1.01, top * 1.5, top * 4, 3.4e38, inf, nan, 0.0]
    tiny = [finite[1].item() * f for f in (0.49, 0.5, 0.51, 1.5)] + [1e-45, 1.2e-38]
    x = torch.cat(
        [
            *near,
            bits.view(torch.float32),
            torch.randn(600_000, generator=generator),
            torch.tensor(edge + tiny),
            finite.float(),
        ]
    )
    x = torch.cat([x, -x])
    assert_same(cast(x, dtype), saturated(x, dtype))


@pytest.mark.parametrize("to", [E4M3, E5M2], ids=name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_every_16_bit_code_to_fp8(dtype, to):
    codes = all_codes(dtype)
    assert_same(cast(codes, to), saturated(codes.float(), to))


def test_e5m2_saturates_where_torch_overflows():
    """The one deliberate difference from PyTorch: cvt.rn.satfinite.e5m2x2 has no infinity."""
    x = torch.tensor([57344.0, 61439.0, 61440.0, 1e6, inf, -inf])
    ours, theirs = cast(x, E5M2).float(), x.to(E5M2).float()
    assert ours.tolist() == [57344.0] * 5 + [-57344.0]
    assert theirs.tolist() == [57344.0, 57344.0, inf, inf, inf, -inf]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name)
def test_int_to_bfloat16_rounds_once(dtype):
    """2**24 + 2**16 + 1 lies above a midpoint of bf16; through float32 it would tie downwards."""
    random = torch.randint(-(2**31), 2**31 - 1, (20_000,)).tolist()
    edges = [0, 1, -1, 255, 256, 257, 258, 2**24 + 2**16 + 1, -(2**24) - 2**16 - 1, 2**31 - 1]
    if dtype == torch.int64:
        edges += [2**62 + 2**54 + 1, 2**62 + 2**54, -(2**62) - 2**54 - 1, 2**63 - 1]
    x = torch.tensor(random + edges, dtype=dtype)
    actual = cast(x, torch.bfloat16)
    codes = actual.view(torch.int16)
    for value, got, code in zip(x.tolist(), actual.double().tolist(), codes.tolist(), strict=True):
        ulp = 2 ** max(abs(value).bit_length() - 8, 0)
        error = abs(value - int(got))
        assert 2 * error < ulp or 2 * error == ulp and code % 2 == 0, (value, got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name)
def test_float_to_int_saturates(dtype):
    x = torch.tensor([nan, inf, -inf, 1e30, -1e30, 2.9, -2.9, -0.0, 200.0, 300.0]).to(dtype)
    big = 2**31 - 1 if dtype != torch.float16 else 2**31 - 1
    expected = [0, big, -(2**31), big, -(2**31), 2, -2, 0, 200, 300]
    assert cast(x, torch.int32).tolist() == expected
    assert cast(x, torch.uint32).tolist()[:4] == [0, 2**32 - 1, 0, 2**32 - 1]
    assert cast(x, torch.int8).tolist()[5:] == [2, -2, 0, -56, 44]  # by way of int16


@triton.jit
def _round_down_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 4)
    y = tl.load(x_ptr + offs).to(tl.bfloat16, fp_downcast_rounding="rtz")
    tl.store(y_ptr + offs, y)


@triton.jit
def _add_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 4)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, (x + x).to(tl.float32))


def test_what_sm90_lacks_is_refused():
    x, y = torch.ones(4), torch.ones(4).bfloat16()
    with pytest.raises(Exception, match="casts round to nearest even only"):
        _round_down_kernel[(1,)](x, y)
    with pytest.raises(Exception, match="no cast from fp8e4nv to fp8e5"):
        cast(x.to(E4M3), E5M2)
    with pytest.raises(Exception, match="no cast from fp64 to fp8e5"):
        cast(x.double(), E5M2)
    with pytest.raises(Exception, match="no arithmetic in fp8e4nv"):
        _add_kernel[(1,)](x.to(E4M3), x)


# Arithmetic.


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, bool_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)
    tl.store(out_ptr + BLOCK + offs, x - y)
    tl.store(out_ptr + 2 * BLOCK + offs, x * y)
    tl.store(out_ptr + 3 * BLOCK + offs, (x / y).to(x.dtype))
    tl.store(out_ptr + 4 * BLOCK + offs, tl.maximum(x, y).to(x.dtype))
    tl.store(out_ptr + 5 * BLOCK + offs, tl.minimum(x, y).to(x.dtype))
    m = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + 6 * BLOCK + offs, m.to(x.dtype))
    tl.store(out_ptr + 7 * BLOCK + offs, 0.0 - x)
    tl.store(out_ptr + 8 * BLOCK + offs, tl.abs(x))
    tl.store(out_ptr + 9 * BLOCK + offs, tl.where(x > y, x, y))
    tl.store(out_ptr + 10 * BLOCK + offs, tl.fma(x, y, x))
    tl.store(out_ptr + 11 * BLOCK + offs, tl.clamp(x, -1.0, 2.0).to(x.dtype))
    tl.store(bool_ptr + offs, x > y)
    tl.store(bool_ptr + BLOCK + offs, x >= y)
    tl.store(bool_ptr + 2 * BLOCK + offs, x == y)
    tl.store(bool_ptr + 3 * BLOCK + offs, x != y)
    tl.store(bool_ptr + 4 * BLOCK + offs, x < 0)
    tl.store(bool_ptr + 5 * BLOCK + offs, (x <= y).to(tl.float32) > 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name)
def test_arithmetic_and_comparisons(dtype):
    size = 2**15
    x, y = (torch.randn(size) * torch.randn(size).exp() for _ in range(2))
    special = [0.0, -1.5, inf, -inf, nan, 1.0, 3e-41, 65504.0, 3.3e38]
    x[:81], y[:81] = torch.cartesian_prod(torch.tensor(special), torch.tensor(special)).T
    x, y = x.to(dtype), y.to(dtype)
    x[100:1000] = y[100:1000]
    out, bools = torch.empty(12, size, dtype=dtype), torch.empty(6, size, dtype=torch.bool)
    _binary_kernel[(1,)](x, y, out, bools, size)
    x64, y64 = x.double(), y.double()
    expected = [x + y, x - y, x * y, (x.float() / y.float()).to(dtype)]
    expected += [torch.fmax(x, y), torch.fmin(x, y), torch.maximum(x, y), 0.0 - x, x.abs()]
    expected += [torch.where(x > y, x, y)]
    for row, want in enumerate(expected):
        assert_same(out[row] + 0.0, want + 0.0)  # the sign of a zero is not promised
    if dtype != torch.float32:  # a float64 sum is as good as exact here, but for rare ties
        fused = (x64 * y64 + x64).to(torch.float32).to(dtype)
        equal = (out[10] == fused) | fused.isnan() & out[10].isnan()
        assert equal.float().mean() > 0.9999
    assert_same(out[11], torch.where(x.isnan(), torch.tensor(-1.0).to(dtype), x.clamp(-1.0, 2.0)))
    compared = [x > y, x >= y, x == y, x != y, x < 0, x <= y]
    for row, want in enumerate(compared):
        assert torch.equal(bools[row], want), row


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr):
    offs = tl.arange(0, 4)
    x, y, z = tl.load(x_ptr + offs), tl.load(y_ptr + offs), tl.load(z_ptr + offs)
    tl.store(out_ptr + offs, tl.fma(x, y, z))


@pytest.mark.parametrize(
    ("dtype", "half", "tiny"),
    [(torch.float32, 2.0**-12, 2.0**-80), (torch.bfloat16, 2.0**-4, 2.0**-90)],
    ids=["float32", "bfloat16"],
)
def test_fma_rounds_once(dtype, half, tiny):
    """(1 + h)**2 lies midway between two floats; z breaks the tie below float64's last bit."""
    x = torch.full((4,), 1 + half).to(dtype)
    z = torch.tensor([0.0, tiny, -tiny, tiny]).to(dtype)
    out = torch.empty(4, dtype=dtype)
    _fma_kernel[(1,)](x, x, z, out)
    down, up = 1 + 2 * half, 1 + 2 * half + 2 * half * half
    tie = down if (round(down / (2 * half * half)) % 2 == 0) else up
    assert out.tolist() == [tie, up, down, up]


@triton.jit
def _constants_kernel(x_ptr, out_ptr, scale, flag, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    half = tl.full((BLOCK,), 0.3, tl.bfloat16)
    x = tl.load(x_ptr + offs, mask=offs < BLOCK - 1, other=-2.0)
    tl.store(out_ptr + offs, half)
    tl.store(out_ptr + BLOCK + offs, x)
    tl.store(out_ptr + 2 * BLOCK + offs, x * 0.3)
    tl.store(out_ptr + 3 * BLOCK + offs, tl.where(flag, x + scale, x))
    row = tl.broadcast_to(x[None, :], (2, BLOCK))
    tl.store(out_ptr + 4 * BLOCK + offs, tl.sum(row.to(tl.float32), axis=0).to(tl.bfloat16))
    third = scale * 1.1  # a float argument is fp32, so this is an fp32 product
    tl.store(out_ptr + 5 * BLOCK + offs, ((third - 0.11) * 1e9).to(tl.bfloat16))


def test_constants_broadcasts_and_scalar_arguments():
    x = torch.randn(16).bfloat16()
    out = torch.empty(6, 16, dtype=torch.bfloat16)
    _constants_kernel[(1,)](x, out, 0.1, True, 16)
    x[15] = -2.0
    assert_same(out[0], torch.full((16,), 0.3).bfloat16())
    assert_same(out[1], x)
    assert_same(out[2], x * torch.tensor(0.3).bfloat16())
    assert_same(out[3], x + torch.tensor(0.1).bfloat16())
    assert_same(out[4], (2 * x.float()).bfloat16())
    third = np.float32(0.1) * np.float32(1.1) - np.float32(0.11)
    assert out[5, 0].item() == pytest.approx(float(third) * 1e9, rel=2**-7, abs=0)


# Reductions and scans.


@triton.jit
def _combine_max(a, b):
    return tl.maximum(a, b).to(a.dtype)


@triton.jit
def _combine_wrongly(a, b):
    return tl.maximum(a, b).to(tl.float32)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, index_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(out_ptr + m, tl.max(x, axis=1).to(x.dtype))
    tl.store(out_ptr + M + m, tl.min(x, axis=1).to(x.dtype))
    tl.store(out_ptr + 2 * M + m, tl.reshape(tl.sum(x, axis=1, keep_dims=True), (M,)))
    tl.store(out_ptr + 3 * M + m, tl.sum(tl.trans(x), axis=0))
    tl.store(out_ptr + 4 * M + m, tl.reduce(x, 1, _combine_max).to(x.dtype))
    tl.store(out_ptr + 5 * M, tl.max(x).to(x.dtype))
    tl.store(out_ptr + 5 * M + 1, tl.sum(x))
    tl.store(index_ptr + m, tl.argmax(x, axis=1))
    tl.store(index_ptr + M + m, tl.argmin(x, axis=1))
    tl.store(index_ptr + 2 * M + m, tl.argmax(x, axis=1, tie_break_left=False))
    value, index = tl.max(x, axis=1, return_indices=True)
    tl.store(index_ptr + 3 * M + m, tl.where(value == tl.max(x, axis=1), index, -index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name)
def test_reductions(dtype):
    M, N = 8, 16
    x = torch.randn(M, N).to(dtype)
    x[0, 3] = x[1, 0] = x[1, 15] = nan
    x[2] = nan
    x[3, 4] = x[3, 9] = 9.0  # a tie
    x[4, 4] = x[4, 9] = -9.0
    x[5] = -inf
    x[5, 0] = nan
    out = torch.zeros(6, M, dtype=dtype)
    index = torch.empty(4, M, dtype=torch.int32)
    _reduce_kernel[(1,)](x, out, index, M, N)
    low, high = (x.masked_fill(x.isnan(), value) for value in (-inf, inf))
    largest, smallest = low.amax(1), high.amin(1)
    largest[2] = smallest[2] = nan
    assert_same(out[0], largest)
    assert_same(out[1], smallest)
    assert_same(out[4], largest)
    assert out[5, 0] == low.max() and out[5, 1].isnan()
    has_nan = x.isnan().any(1)
    for row in (2, 3):
        assert torch.equal(out[row].isnan(), has_nan)
        error = (out[row].double() - x.double().sum(1))[~has_nan].abs()
        bound = N * torch.finfo(dtype).eps * x.double().abs().sum(1)[~has_nan]
        assert (error <= bound).all()
    for row, want in zip(index, [low.argmax(1), high.argmin(1), low.argmax(1)], strict=False):
        want[5] = 1  # -inf is a value, NaN is none
        want[2] = 0
        assert torch.equal(row.long(), want)
    assert index[3, 3] == 4 and index[0, 4] != 4 and index[1, 4] == 4


@triton.jit
def _sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


def test_bfloat16_sum_rounds_every_addition():
    """256 ones and a tree: exact. 1 + 255 * 2**-9: no tree of bf16 additions gives fp32's sum."""
    out = torch.empty(1, dtype=torch.bfloat16)
    _sum_kernel[(1,)](torch.ones(256).bfloat16(), out, 256)
    assert out.item() == 256.0
    x = torch.full((4,), 2.0**-8).bfloat16()
    x[0] = 1.0
    _sum_kernel[(1,)](x, out, 4)  # (1 + 2**-8) ties to 1; 1 + 2**-7
    assert out.item() == 1.0078125 != x.float().sum().item()


@triton.jit
def _pick(value1, index1, value2, index2):
    take = value1 > value2
    return tl.where(take, value1, value2), tl.where(take, index1, index2)


@triton.jit
def _scan_kernel(x_ptr, out_ptr, running_ptr, index_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.cumsum(x, 0))
    tl.store(out_ptr + BLOCK + offs, tl.cumsum(x, 0, reverse=True))
    tl.store(running_ptr + offs, tl.associative_scan(x, 0, _combine_max).to(x.dtype))
    _, index = tl.reduce((x, offs * 3), 0, _pick)
    tl.store(index_ptr, index)


@triton.jit
def _wrong_reduce_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.reduce(tl.load(x_ptr + tl.arange(0, BLOCK)), 0, _combine_wrongly))


def test_scans_and_custom_reductions_of_bfloat16():
    x = torch.randn(32).bfloat16()
    out = torch.empty(2, 32)
    running, index = torch.empty(32, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int32)
    _scan_kernel[(1,)](x, out, running, index, 32)
    # Triton 3.9 sums in bf16; earlier ones promote it to fp32.
    reverse = x.double().flip(0).cumsum(0).flip(0)
    bound = 2**-4 * x.double().abs().sum() if triton.__version__ >= "3.9" else 1e-5
    for row, want in zip(out, [x.double().cumsum(0), reverse], strict=True):
        assert (row - want).abs().max() <= bound
    assert_same(running, x.cummax(0).values)
    assert index.item() == 3 * x.argmax().item()
    with pytest.raises(Exception, match="a combination of bf16 gave fp32"):
        _wrong_reduce_kernel[(1,)](x, out, 32)


# Dots.


@triton.jit
def _dot_kernel(
    a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    acc = tl.full((M, N), 1.0, tl.float32)
    c = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


def dot(a, b, precision="ieee"):
    c = torch.empty(a.shape[0], b.shape[1])
    _dot_kernel[(1,)](a, b, c, a.shape[0], *b.T.shape, precision)
    return c


DOTS = [(d, d) for d in (torch.bfloat16, torch.float16, torch.float32, E4M3, E5M2)]
DOTS.append((E4M3, E5M2))


@pytest.mark.parametrize(("left", "right"), DOTS, ids=lambda d: name(d))
def test_dot(left, right):
    a, b = torch.randn(16, 64), torch.randn(64, 32)
    a[3, 5] = nan
    a[4, 0] = inf
    a, b = a.to(left), b.to(right)
    c = dot(a, b)
    exact = 1.0 + a.double() @ b.double()
    finite = exact.isfinite()
    assert torch.equal(c.isnan(), exact.isnan()) and torch.equal(c.isinf(), exact.isinf())
    assert c[3].isnan().all()
    magnitude = 1.0 + a.double().abs() @ b.double().abs()
    assert ((c - exact).abs()[finite] <= 64 * 2.0**-24 * magnitude[finite]).all()


def test_tf32_drops_13_bits():
    a, b = torch.randn(16, 64), torch.randn(64, 16)
    cut = [(v.view(torch.int32) & -(2**13)).view(torch.float32).double() for v in (a, b)]
    c, ieee = dot(a, b, "tf32"), dot(a, b)
    assert (c - (1 + cut[0] @ cut[1])).abs().max() < 1e-5
    exact = 1 + a.double() @ b.double()
    assert (ieee - exact).abs().max() < 1e-5 and (c - exact).abs().max() > 1e-4
    with pytest.raises(Exception, match="TF32x3"):
        dot(a, b, "tf32x3")


def test_dot_needs_the_depth_the_gpu_needs():
    with pytest.raises(Exception, match="K >= 16"):
        dot(torch.ones(16, 4).bfloat16(), torch.ones(4, 16).bfloat16())


@triton.jit
def _fp8_gemm_kernel(
    a_ptr, b_ptr, c_ptr, K, N: tl.constexpr, PROMOTION: tl.constexpr, BLOCK_K: tl.constexpr
):
    n, k = tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((N, N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + n[:, None] * K + k0 + k[None, :])
        b = tl.load(b_ptr + (k0 + k)[:, None] + n[None, :] * K)
        if PROMOTION == "never":
            acc = tl.dot(a, b, acc)
        elif PROMOTION == "128":
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=128)
        elif PROMOTION == "32":
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=32)
        else:
            acc += tl.dot(a, b)
    tl.store(c_ptr + n[:, None] * N + n[None, :], acc)


@pytest.mark.parametrize(
    ("positive", "promotion", "reported"),
    [
        (True, "never", 8.7e-2),
        (True, "128", 5.8e-4),
        (True, "outside", 5.8e-4),
        (False, "never", 1.5e-3),
        (False, "128", 1.25e-4),
    ],
    ids=["positive-never", "positive-128", "positive-outside", "signed-never", "signed-128"],
)
def test_hopper_accumulator(positive, promotion, reported):
    K, N = 5120, 16
    x = torch.randn(2, N, K)
    x = x.abs() if positive else x
    a, b = (x / x.abs().amax(-1, keepdim=True) * 448).to(E4M3)
    c = torch.empty(N, N)
    exact = a.double() @ b.double().T

    def error():
        block_k = 128 if promotion == "outside" else 512
        _fp8_gemm_kernel[(1,)](a, b, c, K, N, promotion, block_k)
        return ((c - exact).norm() / exact.norm()).item()

    with interpreter.emulate_hopper_fp8_accumulator():
        assert error() == pytest.approx(reported, rel=0.15)
    assert error() < 1e-6  # the emulation ends with its context


def test_hopper_accumulator_options():
    K, N = 256, 16
    a, b = torch.rand(2, N, K).to(E4M3)
    a[3, 5] = nan
    c = torch.empty(N, N)
    with interpreter.emulate_hopper_fp8_accumulator():
        _fp8_gemm_kernel[(1,)](a, b, c, K, N, "32", 256)
    exact = a.double() @ b.double().T
    assert c[3].isnan().all() and torch.equal(c.isnan(), exact.isnan())
    assert ((c - exact).nan_to_num().norm() / exact.nan_to_num().norm()) < 5e-4
    interpreter.install(fp8_accumulator_bits=8)
    try:
        _fp8_gemm_kernel[(1,)](a, b, c, K, N, "never", 128)
        assert ((c - exact).nan_to_num().norm() / exact.nan_to_num().norm()) > 1e-2
    finally:
        interpreter.install()
    with pytest.raises(ValueError, match=r"fp8_accumulator_bits must be in \[2, 18\], got 1"):
        interpreter.install(fp8_accumulator_bits=1)


# Checks that the GPU leaves out.


@triton.jit
def _multiply_kernel(x_ptr, out_ptr, stride):
    x = tl.load(x_ptr)
    tl.store(out_ptr, x * stride)


@triton.jit
def _int1_kernel(out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    odd, low = offs % 2 == 1, offs < 2
    tl.store(out_ptr + offs, odd - low)
    tl.store(out_ptr + BLOCK + offs, odd + low)
    tl.store(out_ptr + 2 * BLOCK + offs, odd * low)


@triton.jit
def _assert_kernel(x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=-1)
    tl.device_assert(x >= 0, "ids must not be negative", mask=offs < N)


def test_int32_overflow_is_found():
    x, out = torch.tensor([65536], dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    _multiply_kernel[(1,)](x, out, 32767)
    assert out.item() == 65536 * 32767
    with pytest.raises(Exception, match="int32 overflow detected for operation mul"):
        _multiply_kernel[(1,)](x, out, 32768)
    _multiply_kernel[(1,)](x.long(), torch.empty(1, dtype=torch.int64), 32768)


def test_int1_wraps_and_is_no_overflow():
    out = torch.empty(3, 4, dtype=torch.bool)
    _int1_kernel[(1,)](out, 4)
    odd, low = torch.tensor([False, True, False, True]), torch.tensor([True, True, False, False])
    assert torch.equal(out, torch.stack([odd ^ low, odd ^ low, odd & low]))


def test_device_assert_fires():
    x = torch.tensor([1, 2, 3, -4], dtype=torch.int32)
    _assert_kernel[(1,)](x, 3, 4)
    with pytest.raises(Exception, match="ids must not be negative"):
        _assert_kernel[(1,)](x, 4, 4)


def test_no_builder_method_escaped_notice():
    """Each create_* method of this Triton's builder is replaced, goes through what is, or moves
    bits; a new one must be looked at before the version that brings it is supported."""
    builder = type(triton.runtime.interpreter.interpreter_builder)
    moves = """addptr advance assert_ assume atomic_cas atomic_load atomic_poll atomic_rmw
        atomic_store barrier bitcast broadcast cat descriptor_gather descriptor_load
        descriptor_scatter descriptor_store expand_dims extern_elementwise fabs gather
        get_num_programs get_program_id histogram idiv inline_asm int_to_ptr join load
        make_block_ptr make_range make_tensor_descriptor masked_load masked_store print ptr_to_int
        reshape select splat split store tensor_pointer_load tensor_pointer_store trans umulhi
        unsplat ashr erf rsqrt""".split()  # erf and rsqrt: tl takes only fp32 and fp64
    unknown = []
    for method, function in vars(builder).items():
        op = method.removeprefix("create_")
        if op == method or op in moves or function in vars(interpreter._Builder).values():
            continue
        called = set(function.__code__.co_names)
        if not called & {"cast_impl", "binary_op", "unary_op", "create_idiv"}:
            unknown.append(op)
    assert not unknown


# Installation, in processes of its own.


def run(tmp_path, code):
    """Run `code` from a file, as jit needs, where nobody asked for the interpreter."""
    file = tmp_path / "program.py"
    file.write_text(code)
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, env=environ, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_canary_an_unshimmed_interpreter_gives_garbage_and_is_refused(tmp_path):
    """If Triton repairs its interpreter, the first line fails: then look whether to go on."""
    lines = run(
        tmp_path,
        """
import os
import torch, triton, triton.language as tl
from llama4_triton.kernels import _launch, interpreter
triton.knobs.runtime.interpret = True

@triton.jit
def stock_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    x = tl.load(x_ptr + tile)
    tl.store(y_ptr + tile, tl.dot(x, x))

x, y = torch.eye(16).bfloat16(), torch.empty(16, 16)
stock_kernel[(1,)](x, y, 16)
print("stock", torch.allclose(y, torch.eye(16)))
try:
    _launch.launch(stock_kernel, (1,), x, y, 16)
except ValueError as error:
    print(error)

# Installed after Triton was imported for compilation: the standard library is decorated anew.
assert not interpreter.is_installed()
interpreter.install()
interpreter.install()
assert interpreter.is_installed() and os.environ["TRITON_INTERPRET"] == "1"

@triton.jit
def kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    x = tl.load(x_ptr + tile)
    row = tl.sum(x.to(tl.float32), axis=0)[None, :] * x.to(tl.float32).max(1)[:, None]
    tl.store(y_ptr + tile, tl.dot(x, x) + row)

_launch.launch(kernel, (1,), x, y, 16)
print("shimmed", torch.equal(y, torch.eye(16) + 1))
""",
    )
    assert lines[0] == "stock False"
    assert lines[1].startswith("stock_kernel: ") and "interpreter.install()" in lines[1]
    assert lines[2] == "shimmed True"


def test_install_refuses_what_it_cannot_serve(tmp_path):
    lines = run(
        tmp_path,
        """
import os, sys, types
from llama4_triton.kernels import interpreter
assert "triton" not in sys.modules and not interpreter.is_installed()
import triton

def refused():
    try:
        interpreter.install()
    except RuntimeError as error:
        print(error)

before = triton.__version__
for triton.__version__ in ("3.5.1", "3.10.0", "4.0.0+git"):
    refused()
triton.__version__ = before
compiled = sys.modules["llama4_triton.kernels.compiled"] = types.ModuleType("compiled")
compiled.kernel = triton.language.cdiv
refused()
assert "TRITON_INTERPRET" not in os.environ and not interpreter.is_installed()
""",
    )
    text = "interpreter: Triton must be at least 3.6 and below 3.10 (others are untested), got "
    assert lines[:3] == [text + version for version in ("3.5.1", "3.10.0", "4.0.0+git")]
    assert lines[3].startswith(
        "interpreter: install() must run before llama4_triton.kernels.compiled is imported"
    )
