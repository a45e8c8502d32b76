"""Checks that are not made again: what makes an answer another one, and that nothing goes stale."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llama4_triton.kernels import _launch, _remembered
from llama4_triton.kernels._check import UnsupportedArchitectureError
from llama4_triton.kernels._paths import use
from llama4_triton.kernels._remembered import remembered
from llama4_triton.kernels.expert_weights import Experts
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.rms_norm import check_rms_norm

pytestmark = pytest.mark.no_kernels


@pytest.fixture
def check():
    """A check that counts how often it is made, and its calls' own numbers as answers."""
    made = []

    @remembered
    def check(op, *args):
        made.append(args)
        return len(made)

    return check


X = torch.zeros(4, 6)
EXPERTS = Experts.from_hf(torch.zeros(2, 4, 6), torch.zeros(2, 3, 4))
KV = PagedKV(
    k_cache=torch.zeros(2, 4, 1, 8), v_cache=torch.zeros(2, 4, 1, 8),
    block_table=torch.zeros(1, 2, dtype=torch.int32),
)  # fmt: skip


@pytest.mark.parametrize(
    "first, second",
    [
        ((X,), (torch.ones(4, 6),)),
        ((X, None, "row", (1, 2)), (X.clone(), None, "row", (1, 2))),
        ((KV,), (dataclasses.replace(KV, k_cache=torch.ones(2, 4, 1, 8)),)),
        ((EXPERTS,), (Experts.from_hf(torch.ones(2, 4, 6), torch.ones(2, 3, 4)),)),
    ],
    ids=["values", "identity", "dataclass", "experts"],
)
def test_one_layout_is_checked_once(check, first, second):
    assert [check("rms_norm", *args) for args in (first, second, first)] == [1, 1, 1]


@pytest.mark.parametrize(
    "first, second",
    [
        ((X,), (torch.zeros(6, 4),)),
        ((X,), (torch.zeros(6, 4).t(),)),
        ((X,), (torch.zeros(25)[1:].view(4, 6),)),
        ((X,), (X.half(),)),
        ((X,), (torch.zeros(4, 6, device="meta"),)),
        ((X,), (torch.zeros(4, 6, requires_grad=True),)),
        ((X,), (None,)),
        ((1,), (True,)),
        ((1,), (1.0,)),
        ((X, 1), (X, 2)),
        (((1, 2), 3), ((1,), 2)),
        ((KV,), (dataclasses.replace(KV, layout="transposed_v"),)),
        ((KV,), (dataclasses.replace(KV, k_scale=torch.zeros(1)),)),
    ],
    ids=["shape", "strides", "offset", "dtype", "device", "grad", "none", "bool", "float", "number",
         "tuple", "field", "tensor of a field"],
)  # fmt: skip
def test_another_layout_is_checked(check, first, second):
    assert [check("rms_norm", *args) for args in (first, second, first)] == [1, 2, 1]


def test_surroundings_count(check):
    small = dataclasses.replace(_launch.SM_90, capability=(7, 5))
    assert check("rms_norm", X) == 1
    assert check("swiglu", X) == 2
    with _launch.assume_device(small):
        assert check("rms_norm", X) == 3
    with use(rms_norm="reference"):
        assert check("rms_norm", X) == 4
    with torch.no_grad():
        assert check("rms_norm", X) == 5
    assert check("rms_norm", X) == 1


def test_what_is_unknown_is_checked_every_time(check):
    with FakeTensorMode():
        fake = torch.zeros(4, 6)
    for given in (fake, [1], {"a": 1}, object()):
        assert check("rms_norm", given) < check("rms_norm", given)


def test_what_fails_is_checked_again():
    for _ in range(2):
        with pytest.raises(ValueError, match="eps must be finite"):
            check_rms_norm("rms_norm", X, torch.zeros(6), None, -1.0)


def test_an_old_gpu_is_told_after_a_new_one_has_passed():
    args = "rms_norm", X.bfloat16(), torch.zeros(6).bfloat16(), None, 1e-5
    check_rms_norm(*args)
    with _launch.assume_device(dataclasses.replace(_launch.SM_90, capability=(7, 5))):
        with use(rms_norm="reference"):
            check_rms_norm(*args)
        with pytest.raises(UnsupportedArchitectureError, match="sm_80 or newer"):
            check_rms_norm(*args)


def test_memory_is_bounded(check, monkeypatch):
    monkeypatch.setattr(_remembered, "KEPT", 3)
    assert [check("rms_norm", n) for n in (1, 2, 3)] == [1, 2, 3]
    assert check("rms_norm", 1) == 1
    assert check("rms_norm", 4) == 4  # and the others are forgotten
    assert check("rms_norm", 1) == 5
