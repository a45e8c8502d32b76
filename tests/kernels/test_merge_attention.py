"""merge_attention: the exact merge by log-sum-exp, empty ranks, order, errors."""

from __future__ import annotations

import pytest
import torch

from llama4_triton.bench.accuracy import assert_close
from llama4_triton.kernels import reference
from llama4_triton.kernels.merge_attention import merge_attention

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _parts(R, T, Hq, D, dtype, device, spread=4.0):
    outs = torch.randn(R, T, Hq, D).to(dtype).to(device)
    return outs, (torch.randn(R, T, Hq) * spread).to(device)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("R, D", [(1, 128), (2, 64), (5, 40), (65, 16), (130, 256)])
def test_matches_float64(device, R, D, dtype):
    outs, lses = _parts(R, 3, 2, D, dtype, device)
    out, lse = merge_attention(outs, lses)
    want, lse_ref = reference.merge_attention(outs.double(), lses.double())
    assert_close(out, want, k=R, magnitude=outs.double().abs().sum(0))
    torch.testing.assert_close(lse.double(), lse_ref, rtol=0, atol=1e-5)


def test_splits_of_the_keys_are_the_whole(device):
    """Softmax attention of 90 keys, in three parts of which the middle one is empty for a row."""
    q, k, v = torch.randn(3, 90, 16, dtype=torch.float64)
    scores = q[:4] @ k.T
    parts = []
    for first, end in ((0, 17), (17, 17), (17, 90)):
        s = scores[:, first:end]
        parts.append((s.softmax(1) @ v[first:end], s.logsumexp(1)))
    outs, lses = (torch.stack(x)[:, :, None].float().to(device) for x in zip(*parts, strict=True))
    out, lse = merge_attention(outs, lses)
    torch.testing.assert_close(out[:, 0].double(), scores.softmax(1) @ v, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse[:, 0].double(), scores.logsumexp(1), rtol=0, atol=1e-5)


def test_empty_ranks_change_nothing_and_of_none_there_is_nothing(device):
    outs, lses = _parts(3, 2, 2, 32, F32, device)
    outs[1:, 0], lses[1:, 0] = 0.0, -torch.inf
    outs[:, 1], lses[:, 1] = 0.0, -torch.inf
    out, lse = merge_attention(outs, lses)
    assert torch.equal(out[0], outs[0, 0])
    torch.testing.assert_close(lse[0], lses[0, 0], rtol=2e-7, atol=2e-7)  # through base 2 and back
    assert not out[1].any() and (lse[1] == -torch.inf).all()


def test_scores_far_apart(device):
    outs, lses = _parts(2, 1, 1, 16, F32, device)
    lses[0], lses[1] = 3e4, -3e4
    out, lse = merge_attention(outs, lses)
    assert torch.equal(out, outs[0]) and lse.item() == pytest.approx(3e4, rel=1e-6)


def test_nan_stays_in_its_row(device):
    outs, lses = _parts(3, 2, 2, 32, F32, device)
    outs[1, 0, 1, 5] = torch.nan
    out, lse = merge_attention(outs, lses)
    assert out[0, 1, 5].isnan() and int(out.isnan().sum()) == 1 and not lse.isnan().any()


def test_repeats_are_bitwise_equal(device):
    parts = _parts(9, 3, 2, 40, BF16, device)
    first = merge_attention(*parts)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, merge_attention(*parts), strict=True))


def test_no_host_sync(device):
    from support.no_sync import no_host_sync

    parts = _parts(2, 1, 1, 16, F32, device)
    with no_host_sync():
        merge_attention(*parts)


BAD_INPUT = {
    "rank": (dict(outs=torch.zeros(2, 3, 4)), ValueError, r"outs must have shape \(R, T, Hq, D\)"),
    "dtype": (dict(outs=torch.zeros(2, 3, 4, 8).int()), TypeError, "outs must be torch.float32"),
    "lses-shape": (dict(lses=torch.zeros(2, 3)), ValueError, r"lses must have shape \(2, 3, 4\)"),
    "lses-dtype": (dict(lses=torch.zeros(2, 3, 4).half()), TypeError, "lses must be torch.float32"),
    "strides": (
        dict(outs=torch.zeros(3, 2, 4, 8).transpose(0, 1)), ValueError,
        "outs must be contiguous, got strides",
    ),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_launch(name):
    changes, error, match = BAD_INPUT[name]
    arguments = dict(outs=torch.zeros(2, 3, 4, 8), lses=torch.zeros(2, 3, 4)) | changes
    with pytest.raises(error, match="^merge_attention: .*" + match):
        merge_attention(**arguments)
