"""Poison is seen, and does no harm."""

from __future__ import annotations

import pytest
import torch
from support.poison import poison, poisoned_empty
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

pytestmark = pytest.mark.no_kernels


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


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


def test_poison_leaves_device_contexts_as_they_were():
    """torch keeps the factories that `with torch.device(...)` acts on, once, at its first use."""
    from torch.utils import _device

    _device._device_constructors.cache_clear()
    with poisoned_empty(), torch.device("meta"):
        assert torch.empty(2).is_meta and torch.zeros(2).is_meta
    with torch.device("meta"):
        assert torch.empty(2).is_meta


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
