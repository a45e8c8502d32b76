"""gather_rows: values, rows outside, index types, strides, addresses, errors, registration."""

from __future__ import annotations

import pytest
import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels.gather_rows import GatherRowsConfig, gather_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = GatherRowsConfig(BLOCK_H=128, num_warps=1)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "V, H", [(1, 1), (7, 129), (50, 640)], ids=["V1-H1", "V7-H129", "V50-H640"]
)
def test_matches_reference(device, V, H, dtype, index):
    x = torch.randn(V, H, device=device).to(dtype)
    rows = torch.tensor([V - 1, 0, 0, V // 2, -1, V, 2**30], dtype=index, device=device)
    got = gather_rows(x, rows, config=SMALL)
    assert torch.equal(got, reference.gather_rows(x, rows))
    assert torch.equal(got[:4], x[rows[:4].long()]) and not got[4:].any()


def test_the_reference_is_the_embedding():
    x, rows = torch.randn(9, 5), torch.tensor([8, 3, 3, 0])
    assert torch.equal(reference.gather_rows(x, rows), torch.nn.functional.embedding(rows, x))


def test_strided_rows_and_special_values(device):
    wide = torch.randn(12, 300, device=device).bfloat16()
    x = wide[::2, 7:136]
    x[3, 5] = float("nan")
    rows = torch.tensor([5, 3, 0], device=device)
    torch.testing.assert_close(gather_rows(x, rows), x[rows], rtol=0, atol=0, equal_nan=True)


def test_no_rows(device):
    x = torch.randn(3, 64, device=device)
    assert gather_rows(x, torch.empty(0, dtype=torch.int64, device=device)).shape == (0, 64)


def test_errors(device):
    x = torch.randn(4, 64, device=device)
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(TypeError, match=r"gather_rows: rows must be torch.int32 or torch.int64"):
        gather_rows(x, rows.float())
    with pytest.raises(ValueError, match=r"gather_rows: rows must have shape \(N\)"):
        gather_rows(x, rows[None])
    with pytest.raises(ValueError, match=r"gather_rows: x must be contiguous in its last dim"):
        gather_rows(x.t(), rows)
    with pytest.raises(TypeError, match=r"gather_rows: x must be torch.float32"):
        gather_rows(x.to(torch.int32), rows)
