"""The reference of the expert layer, which kernels are tested against, from plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels.expert_weights import Experts, Projection, dequantize, quantize_experts

pytestmark = pytest.mark.no_kernels

T, E, H, F = 7, 4, 256, 128
BF16, FP64 = torch.bfloat16, torch.float64
FORMATS = ["plain", "e4m3_channel", "e4m3_block", "int4_group"]


def _experts(E=E, dtype=BF16, format="plain"):
    shapes = {"gate": (E, F, H), "up": (E, F, H), "down": (E, H, F)}
    weights = {part: torch.randn(shape) / shape[2] ** 0.5 for part, shape in shapes.items()}
    experts = Experts(**{part: Projection(weight=w.to(dtype)) for part, w in weights.items()})
    return experts if format == "plain" else quantize_experts(experts, format)


def _routing(top_k=2):
    ids = torch.stack([torch.randperm(E)[:top_k] for _ in range(T)]).int()
    return ids, torch.rand(T, top_k)


def _by_slot(x, experts, ids, weights):
    """(T, H) in float64, one slot after the other, weights on the input."""
    out = torch.zeros(len(x), H, dtype=FP64)
    for t, k in itertools.product(range(T), range(ids.shape[1])):
        e = int(ids[t, k])
        gate, up, down = (dequantize(p, FP64)[e] for p in (experts.gate, experts.up, experts.down))
        scaled = x[t].double() * weights[t, k].double()
        gate = gate @ scaled
        out[t] += down @ (gate * torch.sigmoid(gate) * (up @ scaled))
    return out


@pytest.mark.parametrize("format", FORMATS)
def test_without_quantised_activations_weights_are_what_they_stand_for(format):
    """In float64 up to the rounding of z, which an x of float64 does not have."""
    experts, (ids, weights) = _experts(format=format), _routing()
    x, residual = torch.randn(T, H), torch.randn(T, H)
    want = _by_slot(x, experts, ids, weights) + residual.double()
    got = reference.moe_layer(x.double(), experts, ids, weights, residual=residual, out_dtype=FP64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got.dtype == FP64
    in_fp32 = reference.moe_layer(x, experts, ids, weights, residual=residual)
    assert in_fp32.dtype == torch.float32
    torch.testing.assert_close(in_fp32.double(), want, rtol=1e-5, atol=1e-5)


def test_z_is_rounded_to_the_type_of_x_even_in_float64():
    experts, (ids, weights) = _experts(), _routing(1)
    x = torch.randn(T, H).bfloat16()
    got = reference.moe_layer(x, experts, ids, weights, out_dtype=FP64)
    for t in range(T):
        e = int(ids[t, 0])
        gate, up = (
            x[t].double() @ p.weight[e].double().T * weights[t, 0].double()
            for p in (experts.gate, experts.up)
        )
        z = (gate * torch.sigmoid(gate) * up).to(BF16)
        want = z.double() @ experts.down.weight[e].double().T
        torch.testing.assert_close(got[t], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "format, activation", [("e4m3_channel", "row"), ("e4m3_block", "group")], ids=str
)
def test_activations_count_as_quantised(format, activation):
    experts, shared, (ids, weights) = (
        _experts(format=format),
        _experts(1, format=format),
        _routing(),
    )
    x = torch.randn(T, H).bfloat16()
    quantize = getattr(reference, {"row": "quantize_rowwise"}.get(activation, "quantize_groupwise"))
    x_q, scale = quantize(x)
    seen = x_q.double() * scale.double().reshape(T, -1).repeat_interleave(H // scale[0].numel(), 1)

    want = torch.zeros(T, H, dtype=FP64)
    slots = [(t, int(e), s.double(), experts) for t in range(T)
             for e, s in zip(ids[t], weights[t], strict=True)]  # fmt: skip
    slots += [(t, 0, 1.0, shared) for t in range(T)]
    for t, e, score, which in slots:
        gate, up = (seen[t] @ dequantize(p, FP64)[e].T * score for p in (which.gate, which.up))
        z = (torch.nn.functional.silu(gate) * up).to(BF16)
        z_q, z_scale = reference.quantize_groupwise(z[None])
        z = z_q.double() * z_scale.double().repeat_interleave(128, 1)
        want[t] += (z @ dequantize(which.down, FP64)[e].T)[0]
    got = reference.moe_layer(
        x, experts, ids, weights, shared=shared, activation=activation, z_activation="group",
        out_dtype=FP64,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    given = reference.moe_layer(
        x_q, experts, ids, weights, x_scale=scale, shared=shared, z_activation="group",
        z_dtype=BF16, out_dtype=FP64,
    )  # fmt: skip
    assert torch.equal(given, got)
    plain = reference.moe_layer(x, experts, ids, weights, shared=shared, out_dtype=FP64)
    assert 1e-3 < (plain - want).norm() / want.norm() < 0.1


def test_weights_of_16_bit_see_activations_of_16_bit():
    """A checkpoint may quantise the routed experts only."""
    experts, shared, (ids, weights) = _experts(format="e4m3_channel"), _experts(1), _routing()
    x = torch.randn(T, H).bfloat16()
    options = dict(activation="row", z_activation="group", out_dtype=FP64)
    both = reference.moe_layer(x, experts, ids, weights, shared=shared, **options)
    routed = reference.moe_layer(x, experts, ids, weights, **options)
    alone = reference.moe_layer(x, shared, torch.zeros(T, 1), torch.ones(T, 1), out_dtype=FP64)
    torch.testing.assert_close(both, routed + alone, rtol=1e-12, atol=1e-12)


def test_the_weight_is_on_the_input_or_on_the_output():
    experts, (ids, weights) = _experts(), _routing(1)
    x = torch.randn(T, H).double()
    output = reference.moe_layer(x, experts, ids, weights, weight_on="output", out_dtype=FP64)
    unit = reference.moe_layer(x, experts, ids, torch.ones(T, 1), out_dtype=FP64)
    torch.testing.assert_close(output, unit * weights.double(), rtol=1e-12, atol=1e-12)
    scaled = reference.moe_layer(
        x * weights.double(), experts, ids, torch.ones(T, 1), out_dtype=FP64
    )
    got = reference.moe_layer(x, experts, ids, weights, out_dtype=FP64)
    torch.testing.assert_close(got, scaled, rtol=1e-12, atol=1e-12)
    assert (got - output).norm() > 0.1 * got.norm()


def test_dropped_slots_add_nothing_and_bad_rows_stay_alone():
    experts, (ids, weights) = _experts(), _routing()
    x = torch.randn(T, H).bfloat16()
    clean = reference.moe_layer(x, experts, ids, weights)
    ids[2], ids[3, 0] = torch.tensor([-1, E]), -1
    x[5, 3] = torch.nan
    got = reference.moe_layer(x, experts, ids, weights)
    assert not got[2].any() and got[5].isnan().all()
    torch.testing.assert_close(got[[0, 1, 4, 6]], clean[[0, 1, 4, 6]], rtol=2**-7, atol=1e-3)
    one = reference.moe_layer(x[3:4], experts, ids[3:4, 1:], weights[3:4, 1:])
    torch.testing.assert_close(got[3:4], one, rtol=2**-7, atol=1e-3)


def test_no_tokens():
    got = reference.moe_layer(
        torch.zeros(0, H), _experts(), torch.zeros(0, 1).int(), torch.zeros(0, 1)
    )
    assert got.shape == (0, H)


def test_quantize_groupwise_is_quantize_rowwise_of_each_group():
    x = torch.randn(3, 300)  # 44 are left for the third group
    x[1, 128:256], x[2, 5] = 0.0, torch.inf
    x_q, scale = reference.quantize_groupwise(x)
    assert x_q.shape == x.shape and scale.shape == (3, 3) and scale[1, 1] == 1.0
    for g in range(3):
        want_q, want_scale = reference.quantize_rowwise(x[:, 128 * g : 128 * g + 128])
        assert torch.equal(scale[:, g], want_scale)
        assert torch.equal(x_q[:, 128 * g : 128 * g + 128].float(), want_q.float())
