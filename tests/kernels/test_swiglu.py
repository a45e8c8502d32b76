"""swiglu: values, rounding points, odd shapes, strides, extremes, errors, registration."""

from __future__ import annotations

import pytest
import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels.swiglu import SwigluConfig, swiglu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = SwigluConfig(BLOCK_F=128, num_warps=1)
# exp and the division are right to 2 units of fp32 each; rounding silu to dt may then go the other
# way, by one unit, which the product carries on and rounds once more.
BOUND = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def _inputs(T, F, dtype, device):
    gate = torch.randn(T, F, device=device).mul_(4).to(dtype)
    return gate, torch.randn(T, F, device=device).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("T, F", [(1, 1), (3, 129), (5, 640)], ids=["T1-F1", "T3-F129", "T5-F640"])
def test_matches_reference(device, T, F, dtype):
    gate, up = _inputs(T, F, dtype, device)
    got, want = swiglu(gate, up, config=SMALL), reference.swiglu(gate, up)
    torch.testing.assert_close(got, want, rtol=BOUND[dtype], atol=1e-7)
    if dtype != torch.float32:
        assert float((got == want).float().mean()) > 0.98  # the moved ones are rare


def test_the_reference_is_torch_s():
    gate, up = _inputs(4, 33, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(reference.swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_both_roundings_are_there(device):
    """Values where one rounding gives another bf16 than two."""
    gate, up = _inputs(8, 256, torch.bfloat16, device)
    once = (torch.nn.functional.silu(gate.double()) * up.double()).bfloat16()
    twice = reference.swiglu(gate, up)
    differ = once != twice
    assert differ.float().mean() > 0.1
    assert (swiglu(gate, up) == twice)[differ].float().mean() > 0.98


def test_halves_of_one_projection(device):
    both = torch.randn(6, 2 * 77, device=device)
    got = swiglu(both[:, :77], both[:, 77:])
    torch.testing.assert_close(
        got, reference.swiglu(both[:, :77], both[:, 77:]), rtol=2**-20, atol=0
    )
    assert got.is_contiguous()


def test_extremes(device):
    gate = torch.tensor([[0.0, -0.0, 1e4, -1e4, float("inf"), float("nan"), -3e38]], device=device)
    got = swiglu(gate, torch.ones_like(gate))[0]
    assert got[:3].tolist() == [0.0, 0.0, 1e4]
    assert got[3] == 0 and got[4] == float("inf") and got[5].isnan() and got[6] == 0


def test_no_rows(device):
    x = torch.empty(0, 64, device=device)
    assert swiglu(x, x).shape == (0, 64)


def test_errors(device):
    x = torch.randn(4, 64, device=device)
    with pytest.raises(ValueError, match=r"swiglu: up must have shape \(4, 64\), got \(4, 32\)"):
        swiglu(x, x[:, :32])
    with pytest.raises(TypeError, match=r"swiglu: up must be torch.float32, got torch.float16"):
        swiglu(x, x.half())
    with pytest.raises(ValueError, match=r"swiglu: gate must be contiguous in its last dim"):
        swiglu(x.t(), x.t())
