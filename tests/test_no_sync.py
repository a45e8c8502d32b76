"""The guard against host synchronisation turns red on what waits, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from support.no_sync import HostSyncError, no_host_sync

X = torch.tensor([1.5, -2.0, 0.0, 4.0])
COUNTS = torch.tensor([1, 2, 0, 1])


def set_by_mask(x):
    x = x.clone()
    x[x > 0] = torch.ones(2)


WAITING = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X[0]),
    "int": lambda: int(COUNTS[1]),
    "bool": lambda: bool(X[0] > 0),
    "if": lambda: 1 if X.any() else 0,
    "format": lambda: f"{X[0]}",
    "index-of-a-list": lambda: [1, 2, 3][COUNTS[0]],
    "slice-by-tensor": lambda: X[: COUNTS[1]],
    "arange-of-tensor": lambda: torch.arange(COUNTS[1]),
    "nonzero": lambda: X.nonzero(),
    "where-of-one": lambda: torch.where(X > 0),
    "argwhere": lambda: torch.argwhere(X > 0),
    "boolean-index": lambda: X[X > 0],
    "boolean-assignment": lambda: set_by_mask(X),
    "masked-select": lambda: X.masked_select(X > 0),
    "unique": lambda: COUNTS.unique(),
    "unique-consecutive": lambda: torch.unique_consecutive(COUNTS),
    "bincount": lambda: COUNTS.bincount(),
    "repeat-interleave": lambda: X.repeat_interleave(COUNTS),
    "one-hot": lambda: F.one_hot(COUNTS),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "numpy-asarray": lambda: np.asarray(X),
    "cpu": lambda: X.cpu(),
    "to-cpu": lambda: X.to("cpu"),
    "to-cpu-device": lambda: X.to(device=torch.device("cpu"), dtype=torch.float16),
    "tensor-on-device": lambda: torch.tensor([1, 2], device=X.device),
    "as-tensor-on-device": lambda: torch.as_tensor([1, 2], device=X.device),
    "synchronize": lambda: torch.cuda.synchronize(),
}

FREE = {
    "arithmetic": lambda: (X * 2 + 1).sum(),
    "where-of-three": lambda: torch.where(X > 0, X, 0.0),
    "masked-fill": lambda: X.masked_fill(X > 0, 1.0),
    "integer-index": lambda: X[COUNTS],
    "slices": lambda: X[None, 1:3].expand(2, 2).contiguous(),
    "repeat-interleave-int": lambda: X.repeat_interleave(2),
    "cumsum-sort-topk": lambda: (COUNTS.cumsum(0), X.sort(), X.topk(2)),
    "to-dtype": lambda: X.to(torch.bfloat16),
    "host-scalar": lambda: torch.full((2,), 3.0, device=X.device),
    "host-tensor": lambda: torch.tensor([1, 2]),
    "shape": lambda: X.numel() + X.stride(0) + X.data_ptr(),
}


@pytest.mark.no_kernels
@pytest.mark.parametrize("call", WAITING.values(), ids=WAITING)
def test_what_waits_is_found(call):
    with no_host_sync(), pytest.raises(HostSyncError, match="synchronises the host"):
        call()


@pytest.mark.no_kernels
@pytest.mark.parametrize("call", FREE.values(), ids=FREE)
def test_what_does_not_wait_passes(call):
    with no_host_sync():
        call()


@pytest.fixture(scope="module")
def operator():
    library = torch.library.Library("llama4_triton_no_sync_test", "FRAGMENT")
    library.define("total(Tensor x, bool wait) -> Tensor")

    def total(x, wait):
        return torch.full((), x.sum().item()) if wait else x.sum()

    library.impl("total", total, "CPU")
    yield torch.ops.llama4_triton_no_sync_test.total
    library._destroy()


@pytest.mark.no_kernels
def test_the_body_of_an_operator_is_guarded(operator):
    with no_host_sync():
        assert operator(X, False).shape == ()
        with pytest.raises(HostSyncError):
            operator(X, True)
        operator(X, False)


@triton.jit
def _double_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    if N > 0:
        tl.store(y_ptr + offs, 2 * x, mask=offs < N)


def test_launches_pass(device):
    x = X.to(device)
    y = torch.empty_like(x)
    with no_host_sync():
        _double_kernel[(1,)](x, y, 4, 4)
        with pytest.raises(HostSyncError):
            y.tolist()
    assert torch.equal(y, 2 * x)


@pytest.mark.no_kernels
def test_everything_is_restored():
    before = dict(vars(torch.Tensor)), torch.tensor
    with no_host_sync(), no_host_sync():
        assert torch.tensor is not before[1]
    assert (dict(vars(torch.Tensor)), torch.tensor) == before
    assert X.tolist() == [1.5, -2.0, 0.0, 4.0] and X.sum().item() == 3.5
    assert X.cpu() is X and X[X > 0].shape == (2,)
