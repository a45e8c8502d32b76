"""quantize_rowwise and _groupwise: equal to the reference in every bit, specials, errors."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.no_sync import no_host_sync

from llama4_triton.kernels import reference
from llama4_triton.kernels._check import UnsupportedArchitectureError
from llama4_triton.kernels._launch import DeviceProperties, assume_device, launch
from llama4_triton.kernels._quantize_rows import quantize_groups
from llama4_triton.kernels.quantize import (
    QuantizeConfig,
    quantize_groupwise,
    quantize_rowwise,
)

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (M, K): tile edges, ragged, several blocks of K, empty
CASES = [(1, 1), (3, 16), (5, 127), (2, 128), (4, 129), (2, 5120), (0, 64), (3, 0)]
SMALL = QuantizeConfig(BLOCK_K=128, num_warps=1)


def _id(value):
    return str(value).removeprefix("torch.")


def assert_same(got, want):
    """Equal bits; a NaN may have either of e4m3's two codes."""
    (got_q, got_scale), (want_q, want_scale) = got, want
    assert got_q.dtype == want_q.dtype == E4M3 and got_q.shape == want_q.shape
    assert got_scale.dtype == torch.float32 and torch.equal(got_scale, want_scale)
    nan = want_q.float().isnan()
    assert torch.equal(got_q.float().isnan(), nan)
    assert torch.equal(got_q.view(torch.uint8)[~nan], want_q.view(torch.uint8)[~nan])


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("M, K", CASES, ids=[f"M{M}-K{K}" for M, K in CASES])
def test_equals_reference(device, M, K, dtype):
    x = (torch.randn(M, K, device=device) * 3).to(dtype)
    assert_same(quantize_rowwise(x), reference.quantize_rowwise(x))


INF, NAN = math.inf, math.nan
# name: (row, the scale it must get or None for amax / 448, values it must decode to or None)
SPECIAL_ROWS = {
    "zero": ([0.0, -0.0, 0.0], 1.0, [0.0, 0.0, 0.0]),
    "denormal": ([1e-40, -1e-41, 0.0], 1e-12 / 448, [0.0, 0.0, 0.0]),
    "smallest scale": ([1e-12, 0.0, -1e-12], 1e-12 / 448, [448.0, 0.0, -448.0]),
    "largest": ([3e38, -3e38, 1.0], 3e38 / 448, [448.0, -448.0, 0.0]),
    "inf": ([INF, 2.0, -1.0], 2.0 / 448, [448.0, 448.0, -224.0]),
    "minus inf": ([-INF, 2.0, -1.0], 2.0 / 448, [-448.0, 448.0, -224.0]),
    "only inf": ([INF, -INF, 0.0], 1.0, [448.0, -448.0, 0.0]),
    "NaN": ([NAN, 2.0, -1.0], 2.0 / 448, [NAN, 448.0, -224.0]),
    "only NaN": ([NAN, NAN, NAN], 1.0, [NAN, NAN, NAN]),
    "NaN and inf": ([NAN, INF, 0.0], 1.0, [NAN, 448.0, 0.0]),
    "ties to even": ([448.0, 17.0, 19.0], 1.0, [448.0, 16.0, 20.0]),
    "carry": ([448.0, 1.96875, 0.0], 1.0, [448.0, 2.0, 0.0]),
    "e4m3 denormals": ([448.0, 2**-9, 2**-10], 1.0, [448.0, 2**-9, 0.0]),
}


def test_special_rows(device):
    """All special rows in one matrix: none of them changes its neighbours."""
    rows = torch.tensor([row for row, _, _ in SPECIAL_ROWS.values()], device=device)
    x_q, x_scale = quantize_rowwise(rows, config=SMALL)
    assert_same((x_q, x_scale), reference.quantize_rowwise(rows))
    for m, (name, (_, scale, values)) in enumerate(SPECIAL_ROWS.items()):
        want = torch.tensor(values, device=device)
        assert x_scale[m].item() == pytest.approx(scale, rel=1e-6), name
        torch.testing.assert_close(
            x_q[m].float(), want, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_id)
def test_special_rows_in_half_precision(device, dtype):
    rows = torch.tensor(
        [[0.0, 0.0, 0.0], [INF, 2.0, 1.0], [NAN, 2.0, 1.0], [65504.0, -1.0, 0.5], [NAN, INF, 0.0]],
        device=device,
    ).to(dtype)
    assert_same(quantize_rowwise(rows, config=SMALL), reference.quantize_rowwise(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_every_finite_code_survives(device, dtype):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(E4M3)
    codes = codes[codes.float().isfinite()]  # 254; the largest is 448, so the scale is 1
    x_q, x_scale = quantize_rowwise(codes.to(dtype)[None], config=SMALL)
    assert x_scale.item() == 1.0
    assert torch.equal(x_q.view(torch.uint8)[0], codes.view(torch.uint8))


def test_error_of_quantisation(device):
    x = torch.randn(64, 1024, device=device)
    x_q, x_scale = quantize_rowwise(x)
    y, x = x_q.double() * x_scale.double()[:, None], x.double()
    assert (y - x).norm() / x.norm() <= 4.2e-2
    assert 1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()) <= 1e-3


def test_strided_rows(device):
    wide = torch.randn(6, 300, device=device).bfloat16()
    views = {"columns": wide[:, 7:136], "rows": wide[::2, :128], "expanded": wide[:1].expand(4, -1)}
    for name, x in views.items():
        got = quantize_rowwise(x, config=SMALL)
        assert_same(got, reference.quantize_rowwise(x))
        assert got[0].is_contiguous(), name


def test_offsets_beyond_int32(device, request):
    """Row 2 starts at element 2^31; the memory between the rows is never touched."""
    if "races" in request.node.name:
        pytest.skip("the race check keeps a shadow of every byte between the rows")
    stride, K = 2**30, 48
    storage = torch.UntypedStorage(2 * (2 * stride + K), device=device)
    x = torch.empty(0, dtype=torch.bfloat16, device=device).set_(storage, 0, (3, K), (stride, 1))
    x[:] = torch.randn(3, K)
    assert_same(quantize_rowwise(x, config=SMALL), reference.quantize_rowwise(x))


def test_ten_repeats_are_bitwise_equal(device):
    x = torch.randn(5, 257, device=device).bfloat16()
    first = quantize_rowwise(x)
    for _ in range(10):
        assert_same(quantize_rowwise(x), first)


def test_no_host_sync(device):
    x = torch.randn(5, 257, device=device).bfloat16()
    with no_host_sync():
        quantize_rowwise(x, config=SMALL)


@settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `device` may serve all examples
)
@given(
    M=st.integers(0, 7),
    K=st.sampled_from([0, 1, 15, 16, 17, 127, 128, 129, 300]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-12, 4),
    hole=st.sampled_from([None, 0.0, INF, -INF, NAN]),
    seed=st.integers(0, 2**16),
)
def test_property_equals_reference(device, M, K, dtype, exponent, hole, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(M, K, generator=generator) * 10.0**exponent).to(dtype)
    if hole is not None:
        x[torch.rand(M, K, generator=generator) < 0.2] = hole
    x = x.to(device)
    assert_same(quantize_rowwise(x, config=SMALL), reference.quantize_rowwise(x))


BAD_INPUTS = {
    "not a tensor": (lambda: [[1.0]], TypeError, r"x must be a torch\.Tensor, got list"),
    "dtype": (lambda: torch.zeros(2, 3, dtype=torch.int8), TypeError, r"got torch\.int8"),
    "fp64": (lambda: torch.zeros(2, 3).double(), TypeError, r"got torch\.float64"),
    "rank": (lambda: torch.zeros(3), ValueError, r"shape \(M, K\), got \(3,\)"),
    "columns": (lambda: torch.zeros(4, 3).T, ValueError, r"contiguous in its last dimension"),
    "grad": (lambda: torch.zeros(2, 3, requires_grad=True), NotImplementedError, "inference only"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(device, name):
    make, error, match = BAD_INPUTS[name]
    x = make()
    with pytest.raises(error, match=f"^quantize_rowwise: .*{match}"):
        quantize_rowwise(x.to(device) if isinstance(x, torch.Tensor) else x)


def test_gpus_without_e4m3_are_refused(device):
    old = DeviceProperties(sm_count=108, capability=(8, 0), shared_bytes=166_912, bandwidth=0.0)
    message = r"sm_89 or newer .* got sm_80 .*bfloat16"
    with assume_device(old), pytest.raises(UnsupportedArchitectureError, match=message):
        quantize_rowwise(torch.zeros(2, 16, device=device))


SAMPLES = [(1, 1), (2, 16), (3, 17), (0, 8), (2, 0), (4, 200)]


@pytest.mark.parametrize("M, K", SAMPLES, ids=[f"M{M}-K{K}" for M, K in SAMPLES])
def test_opcheck(device, M, K):
    x = torch.randn(M, K, device=device)
    torch.library.opcheck(torch.ops.llama4_triton.quantize_rowwise.default, (x, [128, 1]))


# (M, K): one group, several programs of a row with a part of a block at the end, empty
GROUPED = [(1, 128), (5, 384), (3, 1280), (2, 5120), (0, 256), (3, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("M, K", GROUPED, ids=[f"M{M}-K{K}" for M, K in GROUPED])
def test_groups_equal_reference(device, M, K, dtype):
    x = (torch.randn(M, K, device=device) * 3).to(dtype)
    x_q, x_scale = quantize_groupwise(x)
    assert x_scale.shape == (M, K // 128)
    assert_same((x_q, x_scale), reference.quantize_groupwise(x))


def test_each_group_has_the_scale_of_a_row(device):
    """Special values, one kind per group: none of them changes its neighbours."""
    x = torch.zeros(len(SPECIAL_ROWS), 128, device=device)
    for group, (row, _, _) in zip(x, SPECIAL_ROWS.values(), strict=True):
        group[60:63] = torch.tensor(row)
    got_q, got_scale = quantize_groupwise(x.reshape(1, -1), config=SMALL)
    want_q, want_scale = quantize_rowwise(x, config=SMALL)
    assert_same((got_q.reshape(x.shape), got_scale.reshape(-1)), (want_q, want_scale))
    wide = QuantizeConfig(BLOCK_K=512, num_warps=2)
    assert_same(quantize_groupwise(x.reshape(1, -1), config=wide), (got_q, got_scale))


def test_groups_of_strided_rows(device):
    wide = torch.randn(6, 700, device=device).bfloat16()
    for x in (wide[:, 7:519], wide[::2, :256], wide[:1, :128].expand(4, -1)):
        got = quantize_groupwise(x)
        assert_same(got, reference.quantize_groupwise(x))
        assert got[0].is_contiguous() and got[1].is_contiguous()


@settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    M=st.integers(0, 7),
    groups=st.integers(0, 11),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-12, 4),
    hole=st.sampled_from([None, 0.0, INF, -INF, NAN]),
    seed=st.integers(0, 2**16),
)
def test_property_groups_equal_reference(device, M, groups, dtype, exponent, hole, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(M, 128 * groups, generator=generator) * 10.0**exponent).to(dtype)
    if hole is not None:
        x[torch.rand(x.shape, generator=generator) < 0.2] = hole
    x = x.to(device)
    config = QuantizeConfig(BLOCK_K=512, num_warps=2)
    assert_same(quantize_groupwise(x, config=config), reference.quantize_groupwise(x))


@triton.jit
def _tile_kernel(x_ptr, x_q_ptr, x_scale_ptr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    offs = rows[:, None] * 128 + tl.arange(0, 128)[None, :]
    x_q, scale = quantize_groups(tl.load(x_ptr + offs))
    tl.store(x_q_ptr + offs, x_q)
    tl.store(x_scale_ptr + rows, scale)


def test_a_tile_in_registers_is_quantised_alike(device):
    x = torch.zeros(16, 128, device=device)
    for row, (values, _, _) in zip(x, SPECIAL_ROWS.values(), strict=False):
        row[:3] = torch.tensor(values)
    x[len(SPECIAL_ROWS) :] = torch.randn(16 - len(SPECIAL_ROWS), 128)
    x_q = torch.empty(16, 128, dtype=E4M3, device=device)
    x_scale = torch.empty(16, dtype=torch.float32, device=device)
    launch(_tile_kernel, (1,), x, x_q, x_scale, ROWS=16, num_warps=4)
    assert_same((x_q, x_scale), reference.quantize_rowwise(x))


BAD_GROUPS = {
    "dtype": (lambda: torch.zeros(2, 128, dtype=torch.int8), TypeError, r"got torch\.int8"),
    "rank": (lambda: torch.zeros(128), ValueError, r"shape \(M, K\), got \(128,\)"),
    "K": (
        lambda: torch.zeros(2, 130),
        ValueError,
        r"x must have a last dimension that is a multiple of 128, got \(2, 130\)",
    ),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_bad_inputs_of_groups(device, name):
    make, error, match = BAD_GROUPS[name]
    with pytest.raises(error, match=f"^quantize_groupwise: .*{match}"):
        quantize_groupwise(make().to(device))


def test_bad_config_and_old_gpu_of_groups(device):
    x = torch.zeros(2, 256, device=device)
    with pytest.raises(ValueError, match=r"config.BLOCK_K must be a multiple of 128, got 64"):
        quantize_groupwise(x, config=QuantizeConfig(BLOCK_K=64, num_warps=1))
    old = DeviceProperties(sm_count=108, capability=(8, 0), shared_bytes=166_912, bandwidth=0.0)
    with assume_device(old), pytest.raises(UnsupportedArchitectureError, match="sm_89 or newer"):
        quantize_groupwise(x)


def test_groups_need_no_host_sync(device):
    x = torch.randn(5, 256, device=device).bfloat16()
    with no_host_sync():
        quantize_groupwise(x, config=SMALL)


@pytest.mark.parametrize("M, K", [(1, 128), (3, 384), (0, 128), (2, 0)], ids=str)
def test_opcheck_of_groups(device, M, K):
    x = torch.randn(M, K, device=device)
    torch.library.opcheck(torch.ops.llama4_triton.quantize_groupwise.default, (x, [128, 1]))
