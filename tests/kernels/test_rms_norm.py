"""rms_norm and add_rms_norm: values, odd shapes, strides, dtypes, errors, registration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama4_triton.kernels import reference
from llama4_triton.kernels.rms_norm import RmsNormConfig, add_rms_norm, default_config, rms_norm

CASES = [(1, 1), (3, 64), (5, 257), (2, 5120), (0, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IDS = [f"T{T}-H{H}" for T, H in CASES]

# Between the fp32 mean and the result lie two roundings to dt. A difference in the last place of
# the mean can move the first by one unit of dt, which the second carries on: 2 units relative.
TWO_UNITS = {torch.float32: 2**-22, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _inputs(T, H, dtype, device):
    x = torch.randn(T, H, device=device).mul_(3).to(dtype)
    residual = torch.randn(T, H, device=device).to(dtype)
    weight = torch.randn(H, device=device).to(dtype)
    return x, residual, weight


def _check(got, want, dtype):
    # The mean of H squares in fp32, in any order, is right to H * 2^-24.
    bound = TWO_UNITS[dtype] + (want.shape[-1] * 2**-24 if dtype == torch.float32 else 0)
    torch.testing.assert_close(got, want, rtol=bound, atol=1e-7)
    if want.numel() > 64 and dtype != torch.float32:
        assert float((got == want).float().mean()) > 0.98  # the moved ones are rare


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("T, H", CASES, ids=IDS)
def test_matches_reference(device, T, H, dtype):
    x, residual, weight = _inputs(T, H, dtype, device)
    _check(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    y, h = add_rms_norm(x, residual, weight, 1e-5)
    want_y, want_h = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(h, want_h)
    _check(y, want_y, dtype)


def test_both_roundings_are_there(device):
    """A value where one rounding gives another bf16 than two."""
    x = torch.full((1, 4), 1.0, dtype=torch.bfloat16, device=device)
    x[0, 0] = 1.5
    weight = torch.full((4,), 1.3, dtype=torch.bfloat16, device=device)
    n = x.double() * x.double().square().mean().rsqrt()
    once = (n * weight.double()).to(torch.bfloat16)
    twice = (n.to(torch.bfloat16).double() * weight.double()).to(torch.bfloat16)
    assert not torch.equal(once, twice)
    assert torch.equal(rms_norm(x, weight, 0.0), twice)


def test_row_strides_and_offsets(device):
    wide = torch.randn(6, 200, device=device)
    x, residual, weight = wide[::2, 3:80], wide[1::2, 90:167], torch.randn(77, device=device)
    y, h = add_rms_norm(x, residual, weight, 1e-5)
    want_y, want_h = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(h, want_h)
    _check(y, want_y, torch.float32)


def test_a_bad_row_affects_itself_only(device):
    x = torch.randn(4, 96, device=device)
    weight = torch.ones(96, device=device)
    clean = rms_norm(x, weight, 1e-5)
    x[1, 5], x[2, 0] = float("nan"), float("inf")
    got = rms_norm(x, weight, 1e-5)
    assert torch.equal(got[[0, 3]], clean[[0, 3]])
    assert got[1].isnan().all()
    assert got[2, 0].isnan() and not got[2, 1:].any()


def test_zero_row_stays_zero(device):
    y = rms_norm(torch.zeros(2, 33, device=device), torch.ones(33, device=device), 1e-5)
    assert not y.any()


def test_config_does_not_change_more_than_the_order_of_the_sum(device):
    x, _, weight = _inputs(3, 500, torch.float32, device)
    small = rms_norm(x, weight, 1e-5, config=RmsNormConfig(BLOCK_H=128, num_warps=1))
    _check(small, reference.rms_norm(x, weight, 1e-5), torch.float32)


def test_ten_repeats_are_bitwise_equal(device):
    x, residual, weight = _inputs(3, 257, torch.bfloat16, device)
    first = add_rms_norm(x, residual, weight, 1e-5)
    for _ in range(9):
        again = add_rms_norm(x, residual, weight, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


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
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_property_matches_reference(device, T, H, dtype, scale):
    x, residual, weight = _inputs(T, H, dtype, device)
    x = (x.float() * scale).to(dtype)
    y, h = add_rms_norm(x, residual, weight, 1e-5)
    want_y, want_h = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(h, want_h)
    _check(y, want_y, dtype)


def test_no_host_sync(device):
    from support.no_sync import no_host_sync

    x, residual, weight = _inputs(2, 64, torch.float32, device)
    with no_host_sync():
        rms_norm(x, weight, 1e-5)
        add_rms_norm(x, residual, weight, 1e-5)


@pytest.mark.no_kernels
@pytest.mark.parametrize("H", [1, 100, 128, 2048, 5120, 100_000])
def test_default_config_is_launchable(H):
    config = default_config(H)
    assert config.BLOCK_H & (config.BLOCK_H - 1) == 0
    assert config.num_warps in (1, 2, 4, 8)


X, W = torch.zeros(2, 8), torch.zeros(8)


@pytest.mark.no_kernels
@pytest.mark.parametrize(
    "x, weight, eps, error, match",
    [
        ([1.0], W, 0.0, TypeError, "rms_norm: x must be a torch.Tensor, got list"),
        (X.double(), W, 0.0, TypeError, "x must be torch.float32 or .*, got torch.float64"),
        (X[0], W, 0.0, ValueError, r"rms_norm: x must have shape \(T, H\), got \(8,\)"),
        (X.t(), W[:2], 0.0, ValueError, "rms_norm: x must be contiguous in its last dimension"),
        (X[:, :0], W[:0], 0.0, ValueError, "rms_norm: x must have at least one column"),
        (X, W[:7], 0.0, ValueError, r"rms_norm: weight must have shape \(8\), got \(7,\)"),
        (X, W.half(), 0.0, TypeError, "rms_norm: weight must be torch.float32, got torch.float16"),
        (X, W, -1e-5, ValueError, "rms_norm: eps must be finite and >= 0, got -1e-05"),
        (X, W, float("nan"), ValueError, "rms_norm: eps must be finite and >= 0, got nan"),
        (X, W.to("meta"), 0.0, ValueError, "rms_norm: all tensors must be on one device, got"),
        (X.clone().requires_grad_(), W, 0.0, NotImplementedError, "must not require grad.*infer"),
    ],
    ids=[
        "list", "float64", "rank", "column-major", "no-columns", "weight-shape", "weight-dtype",
        "eps-negative", "eps-nan", "devices", "grad",
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_launch(x, weight, eps, error, match):
    with pytest.raises(error, match=match):
        rms_norm(x, weight, eps)


@pytest.mark.no_kernels
def test_bad_residual_is_refused():
    with pytest.raises(ValueError, match=r"add_rms_norm: residual must have shape \(2, 8\)"):
        add_rms_norm(X, torch.zeros(3, 8), W, 0.0)


@pytest.mark.no_kernels
def test_a_second_copy_of_the_operators_gets_one_clear_line():
    from llama4_triton.kernels._library import define

    with pytest.raises(RuntimeError, match="llama4_triton::rms_norm is already registered"):
        define("rms_norm(Tensor x) -> Tensor", lambda x: x, lambda x: x)
