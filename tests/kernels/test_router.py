"""router: partial logits against float64, slices, the fused quantisation, batches, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama4_triton.kernels import reference
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.router import RouterConfig, default_config, default_split, router
from llama4_triton.kernels.routing import route

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAN, INF = math.nan, math.inf
# Several tiles of each kind on few tokens.
SMALL = RouterConfig(BLOCK_T=16, BLOCK_E=64, BLOCK_K=64, num_warps=4, num_stages=2)
# (T, E, H, split_k, dtype)
CASES = [
    *((T, 16, 640, 5, BF16) for T in (0, 1, 2, 15, 16, 17, 63, 64, 65)),
    *((T, 128, 384, 3, BF16) for T in (1, 17, 127)),
    *((5, E, 640, 2, BF16) for E in (1, 2, 160, 512)),
    (300, 16, 256, None, BF16),
    (513, 16, 256, None, BF16),
    (33, 100, 250, 4, BF16),  # neither is a multiple of 16
    (17, 16, 640, 5, F16),
    (17, 16, 640, 20, F32),
    (3, 16, 0, 4, BF16),
]


def assert_close(partials, x, w_router, slice_k):
    """Each element within 2^-24 of the sum of |products| for each of at most K additions."""
    exact = reference.router(x.double(), w_router.double(), slice_k)
    magnitude = reference.router(x.double().abs(), w_router.double().abs(), slice_k)
    assert partials.shape == exact.shape and partials.dtype == F32
    error = (partials.double() - exact).abs()
    assert bool((error <= min(slice_k, max(1, x.shape[1])) * 2.0**-24 * magnitude).all())


def _operands(T, E, H, dtype, device):
    return torch.randn(T, H, device=device).to(dtype), torch.randn(E, H, device=device).to(dtype)


@pytest.mark.parametrize(
    "T, E, H, split_k, dtype",
    CASES,
    ids=[f"T{T}-E{E}-H{H}-s{s}-{str(d)[6:]}" for T, E, H, s, d in CASES],
)
def test_equals_reference(device, T, E, H, split_k, dtype):
    x, w_router = _operands(T, E, H, dtype, device)
    output = router(x, w_router, split_k=split_k)
    assert output.x_q is None and output.x_scale is None
    splits = len(output.partials)
    assert splits <= (split_k or default_split(T, E))
    aligned = H % 16 == 0
    block_k = default_config(T, E, H, itemsize=dtype.itemsize, aligned=aligned).BLOCK_K
    blocks = max(1, -(-H // block_k))
    slice_k = -(-blocks // (split_k or default_split(T, E))) * block_k
    assert splits == max(1, -(-H // slice_k))
    assert_close(output.partials, x, w_router, slice_k)


def test_positive_operands_stay_within_the_bound(device):
    x, w_router = (torch.rand(n, 5120, device=device).to(BF16) for n in (3, 16))
    assert_close(router(x, w_router).partials, x, w_router, 640)
    assert_close(router(x, w_router, split_k=1).partials, x, w_router, 5120)


def test_slices_are_parts_of_h(device):
    x = torch.zeros(2, 320, dtype=BF16, device=device)
    x[0, 127], x[0, 128], x[1, 319] = 1.0, 2.0, 3.0
    w_router = torch.ones(4, 320, dtype=BF16, device=device)
    partials = router(x, w_router, split_k=40, config=SMALL).partials
    assert partials[:, :, 0].T.tolist() == [[0.0, 1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 3.0]]
    partials = router(x, w_router, split_k=2, config=SMALL).partials  # slices of 3 and 2 blocks
    assert partials[:, :, 0].T.tolist() == [[3.0, 0.0], [0.0, 3.0]]


def test_strided_operands(device):
    wide_x, wide_w = _operands(20, 40, 512, BF16, device)
    x, w_router = wide_x[1:19:2, 16:336], wide_w[3:, 32:352]
    output = router(x, w_router, split_k=2, quantize="row", config=SMALL)
    assert_close(output.partials, x, w_router, 192)
    assert_quantized(output, x, "row")


def assert_quantized(output, x, quantize):
    """Equal to the operator on the same rows, or groups as rows, in every bit."""
    rows = x if quantize == "row" else x.reshape(-1, 128)
    x_q, x_scale = quantize_rowwise(rows.contiguous())
    expected_q, expected_scale = reference.quantize_rowwise(rows)
    assert output.x_q.dtype == torch.float8_e4m3fn and output.x_q.shape == x.shape
    T, H = x.shape
    assert output.x_scale.shape == ((T,) if quantize == "row" else (T, H // 128))
    number = ~expected_q.float().isnan().view(x.shape)
    for q, scale in ((x_q, x_scale), (expected_q, expected_scale)):
        q = q.view(torch.uint8).view(x.shape)
        assert torch.equal(output.x_q.view(torch.uint8)[number], q[number])
        assert torch.equal(output.x_scale.flatten(), scale)
    assert torch.equal(output.x_q.float().isnan(), ~number)


@pytest.mark.parametrize("quantize", ["row", "group"])
@pytest.mark.parametrize("T, E, H", [(0, 16, 256), (1, 16, 2176), (17, 16, 128)])
def test_quantize(device, quantize, T, E, H):
    x, w_router = _operands(T, E, H, BF16, device)
    x = x * torch.exp(3 * torch.randn(T, 1, device=device)).to(BF16)
    output = router(x, w_router, split_k=2, quantize=quantize)
    assert_quantized(output, x, quantize)
    plain = router(x, w_router, split_k=2)
    assert torch.equal(output.partials, plain.partials)


@pytest.mark.parametrize("quantize", ["row", "group"])
def test_quantize_special_rows(device, quantize):
    x, w_router = _operands(9, 4, 384, F32, device)
    x[0] = 0.0
    x[1] = NAN
    x[2, 5] = NAN
    x[3, 300], x[3, 1] = INF, -INF
    x[4] = INF
    x[5] *= 1e-20
    x[6, :128] = 0.0
    x[7] *= 1e30
    output = router(x, w_router, quantize=quantize, config=SMALL)
    assert_quantized(output, x, quantize)
    # A NaN or infinity is its own token's.
    finite = [0, 5, 6, 7, 8]
    clean = router(x[finite], w_router, config=SMALL).partials
    assert torch.equal(output.partials[:, finite], clean)
    assert bool(output.partials[:, 1].isnan().all())


def test_a_token_is_multiplied_alone_as_in_the_batch(device):
    x, w_router = _operands(37, 16, 640, BF16, device)
    expected = router(x, w_router, split_k=5, config=SMALL).partials
    for t in (0, 15, 16, 36):
        alone = router(x[t : t + 1], w_router, split_k=5, config=SMALL).partials
        assert torch.equal(alone, expected[:, t : t + 1]), t
    order = torch.randperm(37)
    assert torch.equal(
        router(x[order], w_router, split_k=5, config=SMALL).partials, expected[:, order]
    )
    x[[0, 20]] = NAN
    rest = [t for t in range(37) if t not in (0, 20)]
    again = router(x, w_router, split_k=5, config=SMALL).partials
    assert torch.equal(again[:, rest], expected[:, rest])


def test_repeats_are_bitwise_equal(device):
    x, w_router = _operands(17, 16, 640, BF16, device)
    first = router(x, w_router, quantize="row")
    for _ in range(9):
        again = router(x, w_router, quantize="row")
        assert torch.equal(again.partials, first.partials)
        assert torch.equal(again.x_q.view(torch.uint8), first.x_q.view(torch.uint8))
        assert torch.equal(again.x_scale, first.x_scale)


def test_routes_like_the_product(device):
    """With `route`, the choice is that of the logits rounded to bf16, as a matmul returns them."""
    x, w_router = _operands(40, 16, 640, BF16, device)
    exact = x.double() @ w_router.double().T
    routing = route(router(x, w_router, split_k=5).partials, 1, logits_dtype=BF16)
    top2 = exact.topk(2).values
    clear = top2[:, 0] - top2[:, 1] > 2**-6 * top2[:, 0].abs()
    assert int(clear.sum()) > 30
    ids = exact.argmax(1).int()
    assert torch.equal(routing.expert_ids[clear, 0], ids[clear])


@settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    T=st.integers(0, 20),
    E=st.sampled_from([16, 80]),
    H=st.sampled_from([128, 256, 384]),
    split_k=st.integers(1, 7),
    quantize=st.sampled_from([None, "row", "group"]),
    seed=st.integers(0, 2**16),
)
def test_property(device, T, E, H, split_k, quantize, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator).to(BF16).to(device)
    w_router = torch.randn(E, H, generator=generator).to(BF16).to(device)
    output = router(x, w_router, split_k=split_k, quantize=quantize, config=SMALL)
    slice_k = -(-(H // 64) // split_k) * 64
    assert_close(output.partials, x, w_router, slice_k)
    if quantize:
        assert_quantized(output, x, quantize)


def test_partial_sums_stay_small():
    for E in (16, 128, 512):
        for T in (1, 2, 16, 64, 65, 128, 512):
            splits = default_split(T, E)
            assert splits == 1 or splits * T * E <= 2**16
        assert default_split(1, E) == 8 and default_split(513, E) == 1


BAD_INPUTS = {
    "rank": (lambda x, w: router(x[0], w), ValueError, r"router: x must have shape \(T, H\)"),
    "double": (lambda x, w: router(x.double(), w.double()), TypeError, "x must be"),
    "two types": (lambda x, w: router(x, w.float()), TypeError, "w_router must be torch.bfloat16"),
    "H": (lambda x, w: router(x, w[:, 1:]), ValueError, r"w_router must have shape \(E, 100\)"),
    "column-major": (lambda x, w: router(x.T.contiguous().T, w), ValueError, "contiguous in its"),
    "no experts": (lambda x, w: router(x, w[:0]), ValueError, "1 to 512 rows, got 0"),
    "513 experts": (lambda x, w: router(x, w[:1].expand(513, 100)), ValueError, "got 513"),
    "split_k": (lambda x, w: router(x, w, split_k=0), ValueError, "split_k must .*, got 0"),
    "quantize": (lambda x, w: router(x, w, quantize="col"), ValueError, "quantize must .*'col'"),
    "ragged groups": (
        lambda x, w: router(x, w, quantize="group"), ValueError, "H divisible by 128 .* got 100"
    ),
    "two devices": (lambda x, w: router(x, w.to("meta")), ValueError, "on one device"),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name):
    call, error, match = BAD_INPUTS[name]
    with pytest.raises(error, match=match):
        call(torch.ones(3, 100, dtype=BF16), torch.ones(4, 100, dtype=BF16))


@pytest.mark.interpreter_only
@pytest.mark.parametrize("order", ["reversed", "random"])
def test_program_order_does_not_matter(device, order):
    from support.sanitizer import sanitize

    x, w_router = _operands(20, 70, 192, BF16, device)
    with sanitize(order, seed=3):
        output = router(x, w_router, split_k=3, quantize="row", config=SMALL)
    assert_close(output.partials, x, w_router, 64)
    assert_quantized(output, x, "row")
