"""The error metric turns red on each fault it is for; poison is seen and does no harm."""

from __future__ import annotations

import pytest
import torch
from support.close import assert_close, assert_close_as, measure
from support.poison import poison, poisoned_empty
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

pytestmark = pytest.mark.no_kernels

SHAPES = [(40, 48, 160), (65, 112, 200), (3, 5, 7), (1, 1, 16), (128, 64, 1024)]
LARGE = SHAPES[:2]
FP16_LIKE = [torch.bfloat16, torch.float16]


def shape_id(shape):
    return "x".join(map(str, shape))


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def gemm(M, N, K, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(M, K, generator=generator).to(dtype)
    b = torch.randn(K, N, generator=generator).to(dtype)
    return a, b, a.float() @ b.float(), a.double() @ b.double()


# The error metric.


@pytest.mark.parametrize("dtype", FP16_LIKE, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_a_correct_gemm_passes(shape, dtype):
    for seed in range(20):
        *_, acc, reference = gemm(*shape, dtype, seed)
        assert_close(acc.to(dtype), reference)


def test_heavy_tailed_results_pass():
    """A few elements carry the norm of SwiGLU's rows: the bounds widen as their number falls."""
    for seed in range(20):
        _, _, acc, reference = gemm(64, 256, 64, torch.bfloat16, seed)
        assert_close((acc**3).bfloat16(), reference**3)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_a_correct_fp32_gemm_passes(shape):
    a, b, acc, reference = gemm(*shape, torch.float32)
    magnitude = a.double().abs() @ b.double().abs()
    assert_close(acc, reference, k=shape[2], magnitude=magnitude)
    if min(shape) > 16:
        off = acc.clone()
        off[1, 2] += 2 * shape[2] * 2.0**-24 * magnitude[1, 2]
        assert "element" in measure(off, reference, k=shape[2], magnitude=magnitude).broken
        halved = (a.bfloat16().float() @ b.bfloat16().float(), reference)
        assert "frobenius" in measure(*halved, k=shape[2], magnitude=magnitude).broken


def short_accumulator(a, b, dtype):
    acc = torch.zeros(a.shape[0], b.shape[1])
    for k in range(0, a.shape[1], 32):
        acc = (acc + a[:, k : k + 32].float() @ b[k : k + 32].float()).to(dtype).float()
    return acc


def truncate(x):
    return (x.view(torch.int32) & -65536).view(torch.float32)


def changed(x, where, value):
    x = x.clone()
    x[where] = value(x[where])
    return x


FAULTS = {
    "bf16-accumulator": lambda a, b, acc: short_accumulator(a, b, torch.bfloat16),
    "fp16-accumulator": lambda a, b, acc: short_accumulator(a, b, torch.float16),
    "truncating-store": lambda a, b, acc: truncate(acc),
    "last-row-1-percent": lambda a, b, acc: changed(acc, -1, lambda row: row * 1.01),
    "one-column-0.99": lambda a, b, acc: changed(acc, (..., 7), lambda column: column * 0.99),
    "k-loop-short": lambda a, b, acc: a[:, :-8].float() @ b[:-8].float(),
    "tile-never-written": lambda a, b, acc: changed(
        acc, (slice(32), slice(32)), lambda tile: tile * float("nan")
    ),
    "element-swapped": lambda a, b, acc: changed(acc, 3, lambda row: row.roll(1)),
    "bias-of-0.05-percent": lambda a, b, acc: acc * 1.0005,
}
EXPECTED = {
    "bf16-accumulator": "element",
    "fp16-accumulator": "element",
    "truncating-store": "bias",
    "last-row-1-percent": "row",
    "one-column-0.99": "element",
    "k-loop-short": "frobenius",
    "tile-never-written": "finite",
    "element-swapped": "row",
    "bias-of-0.05-percent": "bias",
}


@pytest.mark.parametrize("shape", LARGE, ids=shape_id)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, shape):
    for seed in range(5):
        a, b, acc, reference = gemm(*shape, torch.bfloat16, seed)
        actual = FAULTS[fault](a, b, acc).bfloat16()
        assert EXPECTED[fault] in measure(actual, reference).broken, seed
        with pytest.raises(AssertionError, match=r"worst |NaN or infinite"):
            assert_close(actual, reference)


def test_the_worst_element_is_named():
    *_, acc, reference = gemm(40, 48, 160, torch.bfloat16)
    acc[7, 11] += 5
    with pytest.raises(AssertionError, match=r"element .*<-.* worst element \(7, 11\): got"):
        assert_close(acc.bfloat16(), reference)


def test_special_values_must_be_where_the_reference_has_them():
    reference = torch.randn(4, 64, dtype=torch.float64)
    reference[1, 2], reference[2, 3] = float("nan"), float("-inf")
    assert_close(reference.bfloat16(), reference)
    for value in (0.0, float("inf")):
        actual = reference.bfloat16()
        actual[2, 3] = value
        with pytest.raises(AssertionError, match=r"1 elements are NaN or infinite .* \(2, 3\)"):
            assert_close(actual, reference)


def test_zeros_and_empty_results():
    zeros = torch.zeros(4, 64, dtype=torch.float64)
    assert_close(zeros.bfloat16(), zeros)
    assert measure(zeros.bfloat16() + 1e-3, zeros).broken
    assert_close(torch.empty(0, 5).bfloat16(), torch.empty(0, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match="reference must be torch.float64, got torch.float32"):
        assert_close(zeros.bfloat16(), zeros.float())
    with pytest.raises(ValueError, match="shapes differ"):
        assert_close(zeros.bfloat16(), zeros[:2])


def test_two_roundings_are_a_norm():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 256, generator=generator, dtype=torch.float64)
        w = torch.rand(256, generator=generator, dtype=torch.float64).bfloat16()
        twice = x.float().bfloat16() * w
        assert_close(twice, x * w.double(), kind="norm")
        assert measure(twice, x * w.double()).broken
        assert measure(truncate(x.float()).bfloat16() * w, x * w.double(), kind="norm").broken


def test_as_close_as_a_peer():
    *_, acc, reference = gemm(64, 64, 128, torch.bfloat16)
    peer = acc.bfloat16()
    assert_close_as(peer, reference, peer)
    with pytest.raises(AssertionError, match="rms .*<-"):
        assert_close_as(peer * 1.01, reference, peer)
    with pytest.raises(AssertionError, match="max .*<-.* worst element"):
        assert_close_as(changed(peer, (3, 4), lambda x: x + 1), reference, peer)
    with pytest.raises(AssertionError, match="max nan"):
        assert_close_as(changed(peer, (3, 4), lambda x: x * float("nan")), reference, peer)


# Poison.

POISON = {
    torch.float32: "nan",
    torch.float64: "nan",
    torch.bfloat16: "nan",
    torch.float16: "nan",
    torch.float8_e4m3fn: "nan",
    torch.float8_e5m2: "nan",
    torch.int8: -(2**7),
    torch.int32: -(2**31),
    torch.int64: -(2**63),
    torch.uint8: 0xAA,
    torch.uint16: 0xAAAA,
    torch.bool: True,
}


@pytest.mark.parametrize(("dtype", "value"), POISON.items(), ids=map(dtype_id, POISON))
def test_empty_is_poisoned(dtype, value):
    like = torch.zeros(2, 3, dtype=dtype)
    with poisoned_empty():
        made = [
            torch.empty(2, 3, dtype=dtype),
            torch.empty((2, 3), dtype=dtype),
            torch.empty_like(like),
            torch.empty_strided((2, 3), (4, 1), dtype=dtype),
            like.new_empty(2, 3),
            like.new_empty_strided((2, 3), (1, 2)),
        ]
    for tensor in made:
        assert tensor.dtype == dtype and tensor.shape == (2, 3)
        values = tensor.float().flatten().tolist() if value == "nan" else tensor.flatten().tolist()
        assert all(v != v if value == "nan" else v == value for v in values)
    assert made[3].stride() == (4, 1) and made[5].stride() == (1, 2)


def test_poison_leaves_fake_meta_and_empty_tensors_alone():
    with poisoned_empty():
        with FakeTensorMode():
            assert isinstance(torch.empty(3), FakeTensor)
        assert torch.empty(3, device="meta").is_meta
        assert torch.empty(0, 4).shape == (0, 4)
        assert torch.zeros(3).sum() == 0
        with torch.inference_mode():
            assert torch.empty(3).isnan().all()
        assert not torch.empty(3, requires_grad=True).isfinite().any()
    assert poison(torch.zeros(2)).isnan().all()


def test_poison_is_removed():
    before = dict(vars(torch.Tensor)), torch.empty, torch.empty_strided
    with poisoned_empty(), poisoned_empty():
        assert torch.empty is not before[1]
    assert (dict(vars(torch.Tensor)), torch.empty, torch.empty_strided) == before


def test_opcheck_passes_under_poison():
    library = torch.library.Library("llama4_triton_poison_test", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")

    def double(x):
        return torch.empty_like(x).copy_(x) * 2

    library.impl("double", double, "CPU")
    torch.library.register_fake(
        "llama4_triton_poison_test::double", lambda x: torch.empty_like(x), lib=library
    )
    try:
        with poisoned_empty():
            op = torch.ops.llama4_triton_poison_test.double.default
            torch.library.opcheck(op, (torch.randn(3, 4),))
            assert torch.equal(op(torch.ones(2)), torch.full((2,), 2.0))
    finally:
        library._destroy()
