"""fp8_matmul: values, accumulation, odd shapes, alignment, strides, scales, errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.no_sync import no_host_sync

from llama4_triton.bench.accuracy import assert_close
from llama4_triton.kernels import reference
from llama4_triton.kernels._check import UnsupportedArchitectureError
from llama4_triton.kernels._launch import SM_90, DeviceProperties, assume_device
from llama4_triton.kernels.fp8_matmul import (
    Fp8MatmulConfig,
    default_config,
    fp8_matmul,
    slow_path_reason,
)
from llama4_triton.kernels.quantize import quantize_rowwise

E4M3 = torch.float8_e4m3fn
SMALL = Fp8MatmulConfig(
    BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, GROUP_M=2, SWAP_AB=True, num_warps=4, num_stages=2
)
# (M, N, K): one element, ragged in everything, decode and prefill tiles, several tiles, empty
CASES = [
    (1, 1, 1),
    (3, 5, 7),
    (70, 65, 129),
    (1, 80, 144),
    (17, 72, 256),
    (64, 128, 640),
    (65, 130, 272),
    (270, 272, 384),
    (0, 64, 128),
    (5, 0, 128),
    (5, 16, 0),
]


def operands(device, M, N, K, *, positive=False, pad=0, offset=0):
    """Random quantised operands, each row of its own magnitude, in NaN; pad, offset: of a row."""

    def one(rows):
        x = torch.randn(rows, K) * 2.0 ** torch.empty(rows, 1).uniform_(-1, 1)
        q, scale = reference.quantize_rowwise(x.abs() if positive else x)
        wide = torch.full((rows, offset + K + pad), math.nan).to(E4M3)
        wide.view(torch.uint8)[:, offset : offset + K] = q.view(torch.uint8)
        return wide.to(device)[:, offset : offset + K], scale.to(device)

    return *one(M), *one(N)


def exact(x_q, x_scale, w_q, w_scale):
    return reference.fp8_matmul(x_q, x_scale, w_q, w_scale, out_dtype=torch.float64)


def relative_error(y, want):
    return float((y.double() - want).norm() / want.norm())


def assert_product(y, given, *, cuda_bound=2.6e-3):
    """One rounding of the exact product; a GPU's own fp8 accumulator gets `cuda_bound` instead."""
    want = exact(*given)
    if y.is_cuda:
        assert y.isfinite().all() and (want.norm() == 0 or relative_error(y, want) <= cuda_bound)
        return
    x_q, x_scale, w_q, w_scale = given
    magnitude = exact(x_q.float().abs(), x_scale, w_q.float().abs(), w_scale)
    assert_close(y, want, k=x_q.shape[1], magnitude=magnitude)


@pytest.mark.parametrize("M, N, K", CASES, ids=[f"M{M}-N{N}-K{K}" for M, N, K in CASES])
def test_matches_reference(device, M, N, K):
    given = operands(device, M, N, K)
    y = fp8_matmul(*given)
    assert y.shape == (M, N) and y.dtype == torch.bfloat16 and y.is_contiguous()
    assert_product(y, given)


@pytest.mark.parametrize("fast_accum", [False, True], ids=["promoted", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_output_dtypes(device, dtype, fast_accum):
    given = operands(device, 17, 80, 272)
    y = fp8_matmul(*given, out_dtype=dtype, fast_accum=fast_accum)
    assert y.dtype == dtype
    assert_product(y, given)


def test_fast_accum_takes_a_wider_tile(device):
    given = operands(device, 70, 272, 272)
    assert default_config(70, 272, fast_accum=True).BLOCK_N == 256
    assert_product(fp8_matmul(*given, fast_accum=True), given)


@pytest.mark.parametrize("fast_accum", [False, True], ids=["promoted", "fast"])
def test_operands_of_one_sign_add_up(device, fast_accum):
    """The sum that grows with K is where a short accumulator loses bits: 9 % in the fast mode."""
    given = operands(device, 2, 80, 5120, positive=True)
    y = fp8_matmul(*given, fast_accum=fast_accum)
    assert_product(y, given, cuda_bound=0.2 if fast_accum else 2.6e-3)


@pytest.mark.interpreter_only
def test_promotion_survives_hoppers_accumulator(device):
    """In a model of Hopper's 14-bit accumulator, promotion keeps the error small; without, not."""
    from llama4_triton.kernels.interpreter import emulate_hopper_fp8_accumulator

    given = operands(device, 1, 16, 5120, positive=True)
    want = exact(*given)
    config = dataclasses.replace(SMALL, BLOCK_N=16, BLOCK_K=128)

    def product(**options):
        with emulate_hopper_fp8_accumulator():
            return fp8_matmul(*given, out_dtype=torch.float32, config=config, **options)

    bound = 2.6e-3
    assert relative_error(product(), want) <= 1e-3 < bound
    assert relative_error(product(fast_accum=True), want) > 20 * bound


def test_quantised_product_approximates_the_unquantised(device):
    x, w = torch.randn(33, 512, device=device), torch.randn(80, 512, device=device)
    y = fp8_matmul(*quantize_rowwise(x), *quantize_rowwise(w), out_dtype=torch.float32, strict=True)
    # 4.2e-2 for each operand, independent of each other
    assert relative_error(y, x.double() @ w.double().T) <= 6e-2


# Operands whose rows are apart, or start anywhere. name: (K, pad, offset, part of the reason)
LAYOUTS = {
    "aligned": (160, 0, 0, None),
    "padded rows": (144, 16, 32, None),
    "odd row stride": (160, 5, 0, r"x_q must have a row stride divisible by 16, got 165"),
    "odd start": (160, 15, 1, r"x_q must have a storage offset divisible by 16, got 1"),
    "odd K": (161, 15, 0, r"K must be divisible by 16, got 161"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(device, name):
    """Padding holds NaN: a missing mask would show."""
    K, pad, offset, reason = LAYOUTS[name]
    given = operands(device, 18, 40, K, pad=pad, offset=offset)
    assert_product(fp8_matmul(*given, config=SMALL), given)
    if reason is None:
        assert slow_path_reason(given[0], given[2]) is None
        fp8_matmul(*given, strict=True, config=SMALL)
    else:
        with pytest.raises(ValueError, match=rf"^fp8_matmul: {reason} \(strict=True refuses"):
            fp8_matmul(*given, strict=True)


def test_slow_path_of_either_operand_is_reported(device):
    x_q, _, w_q, _ = operands(device, 3, 5, 32)
    odd = operands(device, 5, 3, 32, pad=1)[0]
    assert slow_path_reason(x_q, w_q) is None
    assert slow_path_reason(x_q, odd).startswith("w_q must have a row stride")
    assert slow_path_reason(odd, w_q).startswith("x_q must have a row stride")
    assert default_config(3, 5, fast_accum=False, aligned=False).num_stages == 2


@pytest.mark.parametrize(
    "capability, shared_bytes", [((8, 9), 101_376), ((9, 0), 232_448)], ids=["sm_89", "sm_90"]
)
def test_default_configurations_fit(capability, shared_bytes):
    gpu = dataclasses.replace(SM_90, capability=capability, shared_bytes=shared_bytes)
    for M in (1, 16, 17, 64, 65, 4096):
        for fast_accum in (False, True):
            c = default_config(M, 5120, fast_accum=fast_accum, properties=gpu)
            assert c.num_stages >= 2
            assert c.num_stages * (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K <= shared_bytes


def test_expanded_rows(device):
    x_q, x_scale, w_q, w_scale = operands(device, 1, 40, 160)
    x_q = x_q.expand(18, -1)
    x_scale = torch.rand(18, device=device) + 0.5
    given = x_q, x_scale, w_q, w_scale
    assert_product(fp8_matmul(*given, config=SMALL), given)


def test_nan_and_inf_stay_in_their_row_or_column(device):
    x_q, x_scale, w_q, w_scale = operands(device, 18, 40, 160)
    clean = fp8_matmul(x_q, x_scale, w_q, w_scale, config=SMALL)
    x_q.view(torch.uint8)[3, 7] = 0x7F
    w_scale[5] = math.inf
    y = fp8_matmul(x_q, x_scale, w_q, w_scale, config=SMALL)
    assert y[3].isnan().all()
    others = [m for m in range(18) if m != 3]
    assert not y[others, 5].isfinite().any()
    columns = [n for n in range(40) if n != 5]
    assert torch.equal(y[others][:, columns], clean[others][:, columns])


def test_rows_do_not_depend_on_their_batch(device):
    x_q, x_scale, w_q, w_scale = operands(device, 18, 40, 160)
    whole = fp8_matmul(x_q, x_scale, w_q, w_scale, config=SMALL)
    for m in (0, 7, 17):
        row = fp8_matmul(x_q[m : m + 1], x_scale[m : m + 1], w_q, w_scale, config=SMALL)
        assert torch.equal(row[0], whole[m])


def test_offsets_beyond_int32(device, request):
    """Row 2 of each operand starts at element 2^31; between the rows no memory is touched."""
    if "races" in request.node.name:
        pytest.skip("the race check keeps a shadow of every byte between the rows")
    stride, K = 2**30, 64
    x_q, x_scale, w_q, w_scale = operands(device, 3, 3, K)

    def far(q):
        storage = torch.UntypedStorage(2 * stride + K, device=device)
        out = torch.empty(0, dtype=E4M3, device=device).set_(storage, 0, (3, K), (stride, 1))
        out.copy_(q)
        return out

    y = fp8_matmul(far(x_q), x_scale, far(w_q), w_scale, config=SMALL)
    assert_product(y, (x_q, x_scale, w_q, w_scale))


def test_ten_repeats_are_bitwise_equal(device):
    given = operands(device, 18, 40, 160)
    first = fp8_matmul(*given, config=SMALL)
    for _ in range(10):
        assert torch.equal(fp8_matmul(*given, config=SMALL), first)


def test_no_host_sync(device):
    given = operands(device, 18, 40, 160)
    with no_host_sync():
        fp8_matmul(*given, config=SMALL)
        with pytest.raises(AssertionError, match="synchronises"):
            fp8_matmul(*given, config=SMALL, checked=True)


def test_tile_order_covers_every_tile_once(device):
    """Groups of row tiles, the last group smaller; swapped and unswapped tiles agree."""
    given = operands(device, 33, 130, 32)
    tiles = [
        dataclasses.replace(SMALL, BLOCK_K=32, GROUP_M=group, SWAP_AB=swap, BLOCK_M=16)
        for group, swap in [(1, True), (2, True), (8, False)]
    ]
    for config in tiles:
        assert_product(fp8_matmul(*given, config=config), given)


@settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `device` may serve all examples
)
@given(
    M=st.sampled_from([0, 1, 2, 15, 16, 17, 33]),
    N=st.sampled_from([16, 17, 40, 64, 65, 144]),
    K=st.sampled_from([0, 16, 48, 127, 129, 144, 272]),
    pad=st.sampled_from([0, 16, 3]),
    positive=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_property_matches_reference(device, M, N, K, pad, positive, seed):
    torch.manual_seed(seed)
    given = operands(device, M, N, K, positive=positive, pad=pad)
    assert_product(fp8_matmul(*given, config=SMALL), given)


def _replaced(index, value):
    def make(device):
        arguments = list(operands(device, 3, 5, 32))
        arguments[index] = value(arguments[index])
        return arguments, {}

    return make


def _with(**options):
    return lambda device: (operands(device, 3, 5, 32), options)


LARGE_K = dataclasses.replace(SMALL, BLOCK_K=256)
BAD_INPUTS = {
    "not a tensor": (_replaced(0, lambda x: 1.0), TypeError, r"x_q must be a torch\.Tensor"),
    "x_q dtype": (_replaced(0, lambda x: x.bfloat16()), TypeError, r"x_q must be .*e4m3fn, got"),
    "w_q dtype": (_replaced(2, lambda x: x.to(torch.float8_e5m2)), TypeError, r"w_q .*e5m2"),
    "x_q rank": (_replaced(0, lambda x: x[0]), ValueError, r"x_q .*\(M, K\), got \(32,\)"),
    "inner dim": (_replaced(2, lambda x: x[:, :16]), ValueError, r"w_q .*\(N, 32\), got \(5, 16\)"),
    "x_q columns": (_replaced(0, lambda x: x[:, ::2]), ValueError, r"x_q must be contiguous in"),
    "w_q columns": (
        _replaced(2, lambda x: x.expand(5, 32)[:, :1].expand(5, 32)),
        ValueError,
        "w_q",
    ),
    "x_scale dtype": (
        _replaced(1, lambda s: s.bfloat16()),
        TypeError,
        r"x_scale must be .*float32",
    ),
    "w_scale dtype": (_replaced(3, lambda s: s.half()), TypeError, r"w_scale must be .*float32"),
    "x_scale shape": (_replaced(1, lambda s: s[:2]), ValueError, r"x_scale .*\(3\), got \(2,\)"),
    "w_scale shape": (_replaced(3, lambda s: s[:, None]), ValueError, r"w_scale .*got \(5, 1\)"),
    "out_dtype": (_with(out_dtype=torch.int8), TypeError, r"out_dtype must be .*got torch\.int8"),
    "promotion": (_with(config=LARGE_K), ValueError, r"config\.BLOCK_K must be at most 128 .*256"),
    "devices": (_replaced(3, lambda s: s.to("meta")), ValueError, r"on one device, got .*meta"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(device, name):
    make, error, match = BAD_INPUTS[name]
    arguments, options = make(device)
    with pytest.raises(error, match=f"^fp8_matmul: .*{match}"):
        fp8_matmul(*arguments, **options)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index, name", [(1, "x_scale"), (3, "w_scale")])
def test_checked_mode_reads_the_scales(device, index, name, value):
    given = operands(device, 3, 5, 32)
    fp8_matmul(*given, checked=True, config=SMALL)
    given[index][2] = value
    with pytest.raises(ValueError, match=rf"^fp8_matmul: {name} must be positive .* in row 2"):
        fp8_matmul(*given, checked=True)
    fp8_matmul(*given, config=SMALL)  # unchecked: garbage in, garbage out, nothing read on the host


def test_gpus_without_e4m3_are_refused(device):
    old = DeviceProperties(sm_count=108, capability=(8, 6), shared_bytes=101_376, bandwidth=0.0)
    message = r"sm_89 or newer .* got sm_86 .*bfloat16"
    with assume_device(old), pytest.raises(UnsupportedArchitectureError, match=message):
        fp8_matmul(*operands(device, 3, 5, 32))


SAMPLES = [(1, 1, 16), (3, 5, 32), (0, 4, 16), (2, 0, 16), (2, 3, 0), (17, 16, 48)]


@pytest.mark.parametrize("M, N, K", SAMPLES, ids=[f"M{M}-N{N}-K{K}" for M, N, K in SAMPLES])
def test_opcheck(device, M, N, K):
    arguments = (*operands(device, M, N, K), torch.bfloat16, False, [16, 64, 64, 2, 1, 4, 2])
    before = [argument.clone() for argument in arguments[:4]]
    # test_schema, which looks for inputs written to, cannot compare fp8 tensors: compared below.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.llama4_triton.fp8_matmul.default
    torch.library.opcheck(op, arguments, test_utils=checks)
    for argument, copy in zip(arguments[:4], before, strict=True):
        assert torch.equal(argument.view(torch.uint8), copy.view(torch.uint8))
