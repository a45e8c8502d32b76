"""rms_norm_quantize: the norm's operators and quantize_rowwise in every bit; errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama4_triton.kernels import reference
from llama4_triton.kernels._check import UnsupportedArchitectureError
from llama4_triton.kernels._launch import DeviceProperties, assume_device
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.rms_norm import RmsNormConfig, add_rms_norm, rms_norm
from llama4_triton.kernels.rms_norm_quantize import rms_norm_quantize

CASES = [(1, 1), (3, 64), (5, 257), (2, 5120), (0, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = RmsNormConfig(BLOCK_H=128, num_warps=1)


def _name(value):
    return str(value).removeprefix("torch.")


def _inputs(T, H, dtype, device):
    x = torch.randn(T, H, device=device).mul_(3).to(dtype)
    residual = torch.randn(T, H, device=device).to(dtype)
    weight = torch.randn(H, device=device).to(dtype)
    return x, residual, weight


def _assert_bits(got, want):
    """Equal bits, a NaN's apart."""
    assert got.dtype == want.dtype and got.shape == want.shape
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    nan = want.float().isnan()
    assert torch.equal(got.float().isnan(), nan)
    assert torch.equal(got.view(integer)[~nan], want.view(integer)[~nan])


def _assert_same_as_apart(x, residual, weight, eps, config):
    y, h, y_q, y_scale = rms_norm_quantize(x, weight, eps, residual=residual, config=config)
    if residual is None:
        assert h is None
        want_y = rms_norm(x, weight, eps, config=config)
    else:
        want_y, want_h = add_rms_norm(x, residual, weight, eps, config=config)
        _assert_bits(h, want_h)
    _assert_bits(y, want_y)
    want_q, want_scale = reference.quantize_rowwise(want_y)
    _assert_bits(y_q, want_q)
    _assert_bits(y_scale, want_scale)
    return y, y_q, y_scale


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("T, H", CASES, ids=[f"T{T}-H{H}" for T, H in CASES])
def test_equals_the_two_operators(device, T, H, dtype):
    x, residual, weight = _inputs(T, H, dtype, device)
    y, y_q, y_scale = _assert_same_as_apart(x, None, weight, 1e-5, None)
    got_q, got_scale = quantize_rowwise(y)
    _assert_bits(got_q, y_q)
    _assert_bits(got_scale, y_scale)
    _assert_same_as_apart(x, residual, weight, 1e-5, None)


@pytest.mark.filterwarnings("ignore:divide by zero")  # the interpreter's rsqrt(0)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_special_rows(device, dtype):
    """Rows of zeros, NaN and infinities, and weights that make them: each to itself."""
    x, residual, weight = _inputs(8, 96, dtype, device)
    clean = rms_norm_quantize(x, weight, 1e-5, config=SMALL)
    x[1], x[2, 5], x[3, 0], x[4, 95] = 0.0, math.nan, math.inf, -math.inf
    y, h, y_q, y_scale = rms_norm_quantize(x, weight, 1e-5, config=SMALL)
    assert h is None and y_scale[1] == 1.0 and not y_q[1].float().any()
    assert y_scale[2] == 1.0 and y_q[2].float().isnan().all()
    for got, want in zip((y, y_q, y_scale), (clean[0], *clean[2:]), strict=True):
        _assert_bits(got[[0, 5, 6, 7]], want[[0, 5, 6, 7]])
    _assert_same_as_apart(x, None, weight, 1e-5, SMALL)
    _assert_same_as_apart(x, None, weight, 0.0, SMALL)  # 0 * inf: a row of NaN
    weight[3], weight[4] = math.inf, math.nan
    _, y_q, _ = _assert_same_as_apart(x, residual, weight, 1e-5, SMALL)
    assert y_q[0, 3].float().abs() == 448.0 and y_q[0, 4].float().isnan()


def test_row_strides_and_offsets(device):
    wide = torch.randn(6, 400, device=device).bfloat16()
    weight = torch.randn(137, device=device).bfloat16()
    _assert_same_as_apart(wide[::2, 3:140], wide[1::2, 190:327], weight, 1e-5, SMALL)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    T=st.sampled_from([0, 1, 2, 7]),
    H=st.sampled_from([1, 2, 127, 128, 129, 311]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 1.0, 100.0]),
    with_residual=st.booleans(),
)
def test_property_equals_the_two_operators(device, T, H, dtype, scale, with_residual):
    x, residual, weight = _inputs(T, H, dtype, device)
    x, weight = (x.float() * scale).to(dtype), (weight.float() * scale).to(dtype)
    _assert_same_as_apart(x, residual if with_residual else None, weight, 1e-5, SMALL)


def test_ten_repeats_are_bitwise_equal(device):
    x, residual, weight = _inputs(3, 257, torch.bfloat16, device)
    first = rms_norm_quantize(x, weight, 1e-5, residual=residual)
    for _ in range(9):
        for got, want in zip(
            rms_norm_quantize(x, weight, 1e-5, residual=residual), first, strict=True
        ):
            _assert_bits(got, want)


def test_no_host_sync(device):
    from support.no_sync import no_host_sync

    x, residual, weight = _inputs(2, 64, torch.float32, device)
    with no_host_sync():
        rms_norm_quantize(x, weight, 1e-5)
        rms_norm_quantize(x, weight, 1e-5, residual=residual)


X, W = torch.zeros(2, 8), torch.zeros(8)
BAD = {
    "list": ([1.0], W, None, 0.0, TypeError, "rms_norm_quantize: x must be a torch.Tensor"),
    "rank": (X[0], W, None, 0.0, ValueError, r"rms_norm_quantize: x must have shape \(T, H\)"),
    "weight": (X, W[:7], None, 0.0, ValueError, r"rms_norm_quantize: weight must have shape \(8\)"),
    "eps": (X, W, None, -1.0, ValueError, "rms_norm_quantize: eps must be finite and >= 0"),
    "residual": (X, W, X[:1], 0.0, ValueError,
                 r"add_rms_norm_quantize: residual must have shape \(2, 8\), got \(1, 8\)"),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    x, weight, residual, eps, error, match = BAD[name]
    with pytest.raises(error, match=match):
        rms_norm_quantize(x, weight, eps, residual=residual)


def test_gpus_without_e4m3_are_refused(device):
    old = DeviceProperties(sm_count=108, capability=(8, 0), shared_bytes=166_912, bandwidth=0.0)
    x, residual, weight = _inputs(2, 16, torch.float16, device)
    for r in (None, residual):
        with assume_device(old), pytest.raises(UnsupportedArchitectureError, match="float8_e4m3fn"):
            rms_norm_quantize(x, weight, 1e-5, residual=r)
