"""The error metric turns red on each fault it is for; the bounds of operators' outputs too."""

from __future__ import annotations

import pytest
import torch

from llama4_triton.bench.accuracy import (
    Exact,
    Rounded,
    Within,
    assert_close,
    assert_close_as,
    measure,
    measure_all,
)

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


# Bounds of one output of an operator.


def test_exact_means_every_element():
    x = torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]])
    assert not Exact().measure(x, x.double()).broken
    assert not Exact().measure(x, x + torch.tensor([[0.0, 0.0], [0.0, 0.0]])).broken
    errors = Exact().measure(changed(x, (1, 1), lambda v: v + 1e-30), x)
    assert errors.broken == ["different"] and "element (1, 1)" in errors.worst
    assert Exact().measure(torch.tensor([3], dtype=torch.int32), torch.tensor([4])).broken
    assert not Exact().measure(torch.empty(0, 3), torch.empty(0, 3)).broken
    with pytest.raises(ValueError, match="shapes differ"):
        Exact().measure(x, x[:1])


def test_within_is_absolute_plus_relative():
    want = torch.tensor([0.0, 1.0, -100.0, float("-inf")], dtype=torch.float64)
    bound = Within(absolute=1e-3, relative=1e-2)
    assert not bound.measure(want + torch.tensor([9e-4, 1e-2, -0.99, 0.0]), want).broken
    assert bound.measure(want + torch.tensor([2e-3, 0.0, 0.0, 0.0]), want).broken == ["element"]
    assert bound.measure(want.nan_to_num(neginf=0.0), want).broken == ["finite"]
    assert not Within(relative=1.0).measure(want * 0.5, want).broken


def test_noise_before_the_rounding_is_allowed_where_it_is_declared():
    """As of attention, whose probabilities are rounded before they are summed."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        p = torch.rand(40, 60, generator=generator, dtype=torch.float64)
        v = torch.randn(60, 64, generator=generator, dtype=torch.float64).bfloat16()
        want = p @ v.double()
        got = (p.bfloat16().float() @ v.float()).bfloat16()
        assert Rounded().measure(got, want).broken
        assert not Rounded(noise=1.65e-3).measure(got, want).broken
        assert Rounded(noise=1.65e-3).measure(changed(got, (3, 7), lambda x: x + 0.5), want).broken
        assert Rounded(noise=1.65e-3).measure((got.float() * 0.99).bfloat16(), want).broken


def test_an_fp8_sum_is_exact_on_the_cpu_and_short_on_a_gpu(monkeypatch):
    *_, acc, reference = gemm(64, 64, 640, torch.bfloat16)
    cut = (acc * (1 - 5e-4)).bfloat16()  # four instructions cut off up to 4.9e-4
    bound = Rounded(fp8_sum=128)
    assert "bias" in bound.measure(cut, reference).broken
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert not bound.measure(cut, reference).broken
    assert bound.measure((acc * 0.995).bfloat16(), reference).broken
    assert Rounded().measure(acc.bfloat16(), reference).broken == []


def test_every_output_has_its_bound():
    x = torch.randn(3, 64, dtype=torch.float64)
    errors = measure_all((x.bfloat16(), x), (x, x + 1), (Rounded(), Exact()))
    assert [e.broken for e in errors] == [[], ["different"]]
    with pytest.raises(ValueError, match="zip"):
        measure_all((x.bfloat16(),), (x, x), (Rounded(),))
