"""moe: the whole of routing and experts against the reference, and where the score belongs."""

from __future__ import annotations

import math

import pytest
import torch
from support.no_sync import no_host_sync

from llama4_triton.bench.accuracy import assert_close
from llama4_triton.kernels import reference
from llama4_triton.kernels.grouped_gemm import Experts
from llama4_triton.kernels.grouped_gemm_combine import combine_workspace_numel
from llama4_triton.kernels.moe import moe

F32, BF16 = torch.float32, torch.bfloat16


def make(device, T, E, H, F, dtype):
    """x, logits, experts and residual, with scores far from 1."""
    gate_up = torch.randn(E, H, 2 * F, device=device) * 2 / H**0.5
    down = torch.randn(E, F, H, device=device) / F**0.5
    experts = Experts.from_hf(gate_up.to(dtype), down.to(dtype))
    x, residual = torch.randn(2, T, H, device=device).to(dtype)
    return x, (torch.randn(T, E, device=device) * 2 - 4).to(dtype), experts, residual


def exact(x, routing, experts, residual):
    weights = (experts.w_gate_up.double(), experts.w_down.double())
    return reference.moe(x.double(), *routing, *weights, residual.double())


# (T, E, top_k, H, F)
CASES = [(37, 5, 1, 45, 21), (19, 5, 2, 45, 21), (1, 128, 1, 45, 21), (0, 5, 1, 45, 21)]


@pytest.mark.parametrize(
    "T, E, top_k, H, F", CASES, ids=[f"T{T}-E{E}-k{k}-H{H}-F{F}" for T, E, k, H, F in CASES]
)
def test_fp32_matches_reference(device, T, E, top_k, H, F):
    x, logits, experts, residual = make(device, T, E, H, F, F32)
    out = moe(x, logits, experts, top_k=top_k, residual=residual)
    assert out.shape == x.shape and out.dtype == F32
    assert_close(out, exact(x, reference.route(logits, top_k), experts, residual))


def test_bf16_matches_reference(device):
    x, logits, experts, residual = make(device, 21, 16, 128, 64, BF16)
    routing = reference.route(logits, 1)
    out = moe(x, logits, experts, top_k=1, residual=torch.zeros_like(x))
    # Two roundings one after the other: of z, spread over the output by w_down, and of the output.
    want = exact(x, routing, experts, torch.zeros_like(x))
    assert (out.double() - want).norm() <= 2.6e-3 * want.norm()
    # With the reference's own roundings there is hardly a difference left.
    w_gate_up, w_down = experts.w_gate_up, experts.w_down
    same = reference.moe(x, *routing, w_gate_up, w_down)
    assert (out == same).float().mean() > 0.99
    out = moe(x, logits, experts, top_k=1, residual=residual)
    assert (out == reference.moe(x, *routing, w_gate_up, w_down, residual)).float().mean() > 0.99


def test_a_routing_made_elsewhere(device):
    x, logits, experts, residual = make(device, 19, 5, 45, 21, F32)
    ids, weights = reference.route(logits, 2)
    want = moe(x, logits, experts, top_k=2, residual=residual)
    got = moe(x, (ids, weights), experts, top_k=2, residual=residual)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ids[3], ids[4, 1], weights[4, 1] = -1, 5, math.nan
    got = moe(x, (ids, weights), experts, top_k=2, residual=residual)
    assert torch.equal(got[3], residual[3])
    assert_close(got, exact(x, (ids, weights), experts, residual))


def test_the_score_scales_the_input(device):
    """Field failure: the score applied to the output, which is the same only for a linear layer."""
    x, logits, experts, _ = make(device, 19, 5, 45, 21, F32)
    ids, weights = reference.route(logits, 1)
    out = moe(x, logits, experts, top_k=1)
    zero = torch.zeros_like(x)
    after = exact(x, (ids, torch.ones_like(weights)), experts, zero) * weights
    assert (out - after).norm() > 0.3 * after.norm()
    assert_close(out, exact(x * weights, (ids, torch.ones_like(weights)), experts, zero))


def test_a_nan_row_of_logits_gives_the_residual(device):
    x, logits, experts, residual = make(device, 19, 5, 45, 21, F32)
    want = moe(x, logits, experts, top_k=1, residual=residual)
    logits[7] = math.nan
    got = moe(x, logits, experts, top_k=1, residual=residual)
    assert torch.equal(got[7], residual[7])
    others = torch.arange(19, device=device) != 7
    torch.testing.assert_close(got[others], want[others], rtol=1e-5, atol=1e-5)


def test_nothing_waits_and_repeats_are_equal(device):
    x, logits, experts, residual = make(device, 19, 5, 45, 21, F32)
    workspace = torch.empty(combine_workspace_numel(19, 2, 45), device=device)
    want = moe(x, logits, experts, top_k=2, residual=residual)
    with no_host_sync():
        again = [
            moe(x, logits, experts, top_k=2, residual=residual, workspace=workspace)
            for _ in range(2)
        ]
    assert all(torch.equal(out, want) for out in again)


@pytest.mark.no_kernels
def test_bad_input():
    x, logits, experts, residual = make(torch.device("cpu"), 3, 4, 8, 4, F32)
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    for router, kwargs, error, match in (
        (logits[:, 1:], {}, ValueError, r"moe: router must have shape \(T, 4\), got \(3, 3\)"),
        (logits[0], {}, ValueError, "moe: router must have shape"),
        (logits.double(), {}, TypeError, "logits must be .*float64"),
        (logits, {"top_k": 5}, ValueError, "route: top_k must be in"),
        (logits, {"residual": residual[1:]}, ValueError, "residual must have shape"),
        (logits[1:], {}, ValueError, r"expert_weights must have shape \(3, 1\)"),
        (logits.tolist(), {}, TypeError, "moe: router must be logits or .*, got list"),
        ((ids, weights), {"top_k": 2}, ValueError, r"moe: expert_ids must have shape \(T, 2\)"),
        ((ids.long(), weights), {}, TypeError, "moe: expert_ids must be torch.int32"),
        ((ids, weights.half()), {}, TypeError, "expert_weights must be torch.float32"),
    ):
        with pytest.raises(error, match=match):
            moe(x, router, experts, **{"top_k": 1, **kwargs})
