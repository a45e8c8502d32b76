"""grouped_gemm_swiglu and _combine: values, layouts, odd shapes, groups, addresses, errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.no_sync import no_host_sync

from llama4_triton.bench.accuracy import assert_close
from llama4_triton.kernels import reference
from llama4_triton.kernels._launch import SM_90, assume_device
from llama4_triton.kernels.expert_weights import (
    Experts,
    Projection,
    dequantize,
    quantize_block,
    quantize_experts,
)
from llama4_triton.kernels.grouped_gemm import GroupedGemmConfig, grouped_gemm_swiglu
from llama4_triton.kernels.grouped_gemm_combine import combine_workspace_numel
from llama4_triton.kernels.grouped_gemm_combine import grouped_gemm_combine as combine
from llama4_triton.kernels.routing import Routing, RoutingConfig, sort_by_expert

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SMALL = GroupedGemmConfig(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, GROUP_M=2, num_warps=1, num_stages=2)
SMALL_SORT = RoutingConfig(BLOCK_T=4, BLOCK_R=4, max_programs=3, num_warps=1)


@dataclasses.dataclass
class Case:
    x: torch.Tensor  # (T, H)
    experts: Experts
    ids: torch.Tensor  # (T, top_k)
    weights: torch.Tensor
    residual: torch.Tensor

    def routing(self, **kwargs):
        E = self.experts.num_experts
        return sort_by_expert(self.ids, self.weights, E, config=SMALL_SORT, **kwargs)

    def exact_swiglu(self, **kwargs):
        return reference.grouped_gemm_swiglu(
            self.x, self.experts, self.ids, self.weights, out_dtype=F64, **kwargs
        )

    def exact_combine(self, z, residual=True, **kwargs):
        return reference.grouped_gemm_combine(
            z, self.experts, self.ids, self.residual if residual else None, out_dtype=F64, **kwargs
        )


def make(device, T, E, top_k, H, F, dtype, *, vllm=False, ids=None, seed=0):
    """A case with scores far from 1 and weights that keep every magnitude near 1."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device)

    gate_up, down = (randn(E, H, 2 * F) * 2 / max(H, 1) ** 0.5), randn(E, F, H) / max(F, 1) ** 0.5
    if vllm:
        w13, w2 = (w.to(dtype).transpose(1, 2).contiguous() for w in (gate_up, down))
        experts = Experts.from_vllm(w13, w2)
    else:
        experts = Experts.from_hf(gate_up.to(dtype), down.to(dtype))
    if ids is None:
        ids = torch.rand(T, E, generator=generator).argsort(1)[:, :top_k]
    weights = (torch.rand(T, top_k, generator=generator) * 0.8 + 0.1).to(device)
    ids = torch.as_tensor(ids, dtype=torch.int32).reshape(T, top_k).contiguous().to(device)
    x, residual = randn(T, H).to(dtype), randn(T, H).to(dtype)
    return Case(x, experts, ids, weights, residual)


def mapped(experts, function):
    """`experts` with `function` of each weight."""
    parts = experts.gate, experts.up, experts.down
    gate, up, down = (Projection(weight=function(p.weight), scale=p.scale) for p in parts)
    return Experts(gate=gate, up=up, down=down)


def magnitudes(case, routing, z):
    """sum |a||b| of each element of z and of the output: fp32 may be off by K * 2^-24 of it."""
    E, top_k = routing.num_experts, routing.top_k
    slots = routing.row_slot.long()
    ids = case.ids.flatten()[slots].long().clamp(0, E - 1)
    scores = routing.expert_weights.flatten()[slots].double()[:, None, None]
    x = case.x.double()[slots // top_k, None]
    gate, up = (dequantize(p, F64)[ids].mT for p in (case.experts.gate, case.experts.up))
    down = dequantize(case.experts.down, F64)[ids].mT
    gate_size, up_size = ((scores * (x.abs() @ w.abs())).squeeze(1) for w in (gate, up))
    gate, up = ((scores * (x @ w)).squeeze(1) for w in (gate, up))
    # |silu'| <= 1.1, and the sigmoid itself is good to a few units.
    of_z = 1.1 * up.abs() * gate_size + gate.abs() * (up_size + 3 * up.abs())
    rows = (z.double().abs()[:, None] @ down.abs()).squeeze(1)
    of_out = case.residual.double().abs().index_add(0, slots // top_k, rows)
    return of_z, of_out


def check(case, *, config=None, **kwargs):
    """Both operators against float64; return the z and the output they gave."""
    (_, H), F = case.x.shape, case.experts.width
    routing = case.routing(**kwargs)
    z = grouped_gemm_swiglu(case.x, case.experts, routing, config=config)
    out = combine(z, case.experts, routing, residual=case.residual, config=config)
    assert z.dtype == out.dtype == case.x.dtype and z.is_contiguous() and out.is_contiguous()
    of_z, of_out = magnitudes(case, routing, z) if case.x.dtype == F32 else (None, None)
    assert_close(z, case.exact_swiglu(), k=H + 3, magnitude=of_z)
    assert_close(out, case.exact_combine(z), k=F + routing.top_k, magnitude=of_out)
    return z, out


# (T, E, top_k, H, F, dtype, vLLM's layout, block_m)
CASES = {
    "bf16-k1": (37, 5, 1, 128, 64, BF16, False, None),
    "bf16-k2-ragged": (19, 5, 2, 51, 37, BF16, True, None),
    "fp32-k1": (21, 4, 1, 64, 96, F32, False, None),
    "fp32-k2-ragged": (19, 5, 2, 51, 37, F32, True, None),
    "fp16-k1-vllm": (21, 4, 1, 128, 64, F16, True, None),
    "bf16-E128": (12, 128, 1, 128, 64, BF16, False, None),
    "bf16-k8": (7, 9, 8, 128, 64, BF16, False, None),
    "bf16-m32": (70, 3, 1, 128, 64, BF16, False, 32),
    "bf16-m64": (150, 3, 1, 128, 192, BF16, False, 64),
    "bf16-m128": (300, 3, 1, 192, 160, BF16, False, 128),
    "fp32-m128": (70, 2, 1, 64, 96, F32, False, 128),
    "one-element": (1, 1, 1, 1, 1, F32, False, None),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(device, name):
    *sizes, vllm, block_m = CASES[name]
    check(make(device, *sizes, vllm=vllm), block_m=block_m)


# What x is, what z is when GEMM 2 gets it, the GPU's capability; H, F and E of all: 256, 128, 5.
FORMATS = {
    "e4m3_channel": ("row", "quantise", (9, 0)),
    "e4m3_channel-z": ("row", "group", (9, 0)),
    "e4m3_block": ("group", "quantise", (9, 0)),
    "e4m3_block-z": ("group", "group", (9, 0)),
    "int4_group": (None, None, (9, 0)),
    "e4m3_channel-sm_80": (None, None, (8, 0)),
    "e4m3_block-sm_80": (None, None, (8, 0)),
}


@pytest.mark.parametrize("vllm", [False, True], ids=["hf", "vllm"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights(device, name, vllm):
    """Against what x, z and the weights stand for, each GEMM by itself."""
    activation, z_format, capability = FORMATS[name]
    case = make(device, 21, 5, 1, 256, 128, BF16, vllm=vllm, ids=[-1, 5, 4, 4, 2] + [0] * 16)
    case.experts = quantize_experts(case.experts, name.split("-")[0])
    case.weights[:2] = 0.0
    routing = case.routing(block_m=16 if z_format != "group" else 64)
    x, options, scale = case.x, {}, None
    if activation:
        quantize = {"row": reference.quantize_rowwise, "group": reference.quantize_groupwise}
        x, scale = quantize[activation](case.x)
        options["x_scale"] = scale
    with assume_device(dataclasses.replace(SM_90, capability=capability)):
        z = grouped_gemm_swiglu(x, case.experts, routing, **options)
        exact = reference.grouped_gemm_swiglu(
            x, case.experts, case.ids, case.weights, x_scale=scale, out_dtype=F64
        )
        assert_close(z, exact)
        if z_format == "group":
            wide = GroupedGemmConfig(
                BLOCK_M=64, BLOCK_N=256, BLOCK_K=128, GROUP_M=2, num_warps=8, num_stages=2
            )
            z_q, z_scale = grouped_gemm_swiglu(
                x, case.experts, routing, quantize_z=True, config=wide, **options
            )
            # The same bits as z in bf16 and quantised then, which other tiles round otherwise.
            again = grouped_gemm_swiglu(x, case.experts, routing, config=wide, **options)
            want_q, want_scale = reference.quantize_groupwise(again)
            assert torch.equal(z_scale, want_scale)
            assert torch.equal(z_q.view(torch.uint8), want_q.view(torch.uint8))
            out = combine(
                z_q, case.experts, routing, z_scale=z_scale, residual=case.residual, out_dtype=BF16
            )
            want = case.exact_combine(z_q, z_scale=z_scale)
        else:
            out = combine(z, case.experts, routing, residual=case.residual)
            want = case.exact_combine(z, activation="group" if z_format else None)
        assert_close(out, want)
    assert torch.equal(out[:2], case.residual[:2])


def test_the_weight_is_on_the_output(device):
    case = make(device, 21, 4, 2, 64, 96, F32)
    z = grouped_gemm_swiglu(case.x, case.experts, case.routing(), weight_on="output")
    want = case.exact_swiglu(weight_on="output")
    assert_close(z, want)
    assert (case.exact_swiglu() - want).norm() > 0.2 * want.norm()


def test_scales_of_any_stride(device):
    """One scale for all of an expert, as a view of a single value; block scales transposed."""
    case = make(device, 9, 3, 1, 256, 128, BF16)
    experts = quantize_experts(case.experts, "e4m3_channel")
    parts = (experts.gate, experts.up, experts.down)
    one = torch.tensor([[0.25]], device=device)
    case.experts = Experts(
        **{
            name: Projection(weight=p.weight, scale=one.expand(p.scale.shape))
            for name, p in zip(("gate", "up", "down"), parts, strict=True)
        }
    )
    x, scale = reference.quantize_rowwise(case.x)
    case.x = x
    z = grouped_gemm_swiglu(x, case.experts, case.routing(), x_scale=scale, out_dtype=BF16)
    assert_close(z, case.exact_swiglu(x_scale=scale))

    case = make(device, 9, 3, 1, 256, 128, BF16)
    blocks = [quantize_block(p.weight) for p in (case.experts.gate, case.experts.up)]
    down = quantize_block(case.experts.down.weight)
    gate, up = (Projection(weight=p.weight, scale=p.scale.mT.contiguous().mT) for p in blocks)
    case.experts = Experts(gate=gate, up=up, down=down)
    case.x, scale = reference.quantize_groupwise(case.x)
    far = torch.full((9, 5), math.nan, device=device)[:, 1:3].copy_(scale)
    z = grouped_gemm_swiglu(case.x, case.experts, case.routing(), x_scale=far, out_dtype=BF16)
    assert_close(z, case.exact_swiglu(x_scale=scale))


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens(device, top_k):
    z, out = check(make(device, 0, 5, top_k, 45, 21, F32))
    assert z.shape == (0, 21) and out.shape == (0, 45)


def test_no_columns(device):
    case = make(device, 7, 5, 1, 45, 0, F32)
    z, out = check(case)
    assert z.shape == (7, 0) and torch.equal(out, case.residual)
    case = make(device, 7, 5, 1, 0, 21, F32)
    z, out = check(case)
    assert not z.any() and out.shape == (7, 0)


def test_without_residual(device):
    for top_k in (1, 2):
        case = make(device, 19, 3, top_k, 45, 21, F32)
        routing = case.routing()
        z = case.exact_swiglu().to(F32)
        assert_close(combine(z, case.experts, routing), case.exact_combine(z, residual=False))


def test_layouts_give_the_same_bits(device):
    for shape in ((37, 5, 1, 128, 64, BF16), (19, 3, 2, 45, 21, F32)):
        hf, vllm = make(device, *shape), make(device, *shape, vllm=True)
        for name in ("gate", "up", "down"):
            a, b = (getattr(case.experts, name).weight for case in (hf, vllm))
            assert a.stride() != b.stride() and torch.equal(a, b)
        routing = hf.routing()
        z = grouped_gemm_swiglu(hf.x, hf.experts, routing)
        assert torch.equal(z, grouped_gemm_swiglu(vllm.x, vllm.experts, routing))
        assert torch.equal(combine(z, hf.experts, routing), combine(z, vllm.experts, routing))


def test_strided_inputs(device):
    """Rows, experts and columns with NaN between them, which must not be read."""
    case = make(device, 19, 3, 2, 45, 21, F32)
    z, out = check(case)

    def spread(t, pads):
        wide = torch.full([n + 2 * p for n, p in zip(t.shape, pads, strict=True)], math.nan)
        view = wide.to(device)
        for dim, pad in enumerate(pads):
            view = view.narrow(dim, pad, t.shape[dim])
        return view.copy_(t)

    case.x, case.residual = spread(case.x, (1, 5)), spread(case.residual, (0, 3))
    case.experts = mapped(case.experts, lambda w: spread(w.mT, (1, 2, 3)).mT)
    spread_z, spread_out = check(case)
    assert torch.equal(spread_z, z) and torch.equal(spread_out, out)


def test_experts_may_share_their_weights(device):
    case = make(device, 19, 3, 2, 45, 21, F32)
    case.experts = mapped(case.experts, lambda w: w[:1].expand(3, -1, -1))
    check(case)


@pytest.mark.parametrize("expert", [0, 4])
def test_all_tokens_to_one_expert(device, expert):
    check(make(device, 53, 5, 1, 45, 21, F32, ids=[expert] * 53))


def test_dropped_slots(device):
    bad = [-1, 5, 2**31 - 1, -(2**31)]
    case = make(device, 20, 5, 1, 45, 21, F32, ids=[0, 4, *bad, 3] + bad + [1] * 9)
    dropped = (case.ids < 0) | (case.ids >= 5)
    case.weights[dropped] = math.nan
    z, out = check(case)
    assert not z[-8:].any() and torch.equal(out[dropped[:, 0]], case.residual[dropped[:, 0]])
    case.x[dropped[:, 0]] = math.nan  # 0 times NaN is NaN
    assert not grouped_gemm_swiglu(case.x, case.experts, case.routing())[-8:].any()

    case = make(device, 4, 5, 2, 45, 21, F32, ids=[[0, -1], [5, 4], [9, -1], [2, 3]])
    routing = case.routing()
    z, out = check(case)
    assert torch.equal(out[2], case.residual[2])
    assert not combine(z, case.experts, routing)[2].any()


def test_score_scales_the_input_and_not_the_output(device):
    case = make(device, 19, 5, 1, 45, 21, F32)
    case.weights.fill_(0.125)
    z, _ = check(case)
    unscaled = dataclasses.replace(case, weights=torch.ones_like(case.weights))
    after = unscaled.exact_swiglu() * 0.125
    assert (z - after).norm() > 0.5 * after.norm()


def test_a_nan_token_changes_no_other(device):
    case = make(device, 19, 3, 2, 45, 21, F32)
    z, out = check(case)
    case.x[11] = math.nan
    case.x[12] = math.inf
    routing = case.routing()
    z_nan = grouped_gemm_swiglu(case.x, case.experts, routing)
    out_nan = combine(z_nan, case.experts, routing, residual=case.residual)
    spoilt = torch.isin(routing.row_slot // 2, torch.tensor([11, 12], device=device))
    assert torch.equal(z_nan[~spoilt], z[~spoilt]) and z_nan[spoilt].isnan().any()
    token = torch.arange(19, device=device)
    kept = (token != 11) & (token != 12)
    assert torch.equal(out_nan[kept], out[kept]) and out_nan[~kept].isnan().any(1).all()


def test_a_token_alone_is_as_in_the_batch(device, executor):
    case = make(device, 19, 3, 2, 45, 21, F32)
    _, out = check(case)
    for t in (0, 18):
        alone = Case(
            case.x[t : t + 1], case.experts, case.ids[t : t + 1], case.weights[t : t + 1],
            case.residual[t : t + 1],
        )  # fmt: skip
        _, alone_out = check(alone)
        if executor != "interpreter":  # whose matmul rounds by the place of a row
            assert torch.equal(alone_out[0], out[t])


def test_repeats_are_bitwise_equal(device):
    case = make(device, 7, 2, 2, 45, 21, F32)
    routing = case.routing()
    z = grouped_gemm_swiglu(case.x, case.experts, routing)
    out = combine(z, case.experts, routing)
    for _ in range(9):
        assert torch.equal(grouped_gemm_swiglu(case.x, case.experts, routing), z)
        assert torch.equal(combine(z, case.experts, routing), out)


def test_workspace(device):
    assert combine_workspace_numel(19, 1, 45) == 0
    case = make(device, 19, 3, 2, 45, 21, F32)
    routing = case.routing()
    z = case.exact_swiglu().to(F32)
    numel = combine_workspace_numel(19, 2, 45)
    workspace = torch.full((numel + 7,), math.nan, device=device)
    out = combine(z, case.experts, routing, workspace=workspace)
    assert torch.equal(out, combine(z, case.experts, routing))
    assert workspace[numel:].isnan().all() and not workspace[:numel].isnan().any()
    for bad, error in ((workspace[: numel - 1], ValueError), (workspace.double(), TypeError)):
        with pytest.raises(error, match="grouped_gemm_combine: workspace must"):
            combine(z, case.experts, routing, workspace=bad)


# Odd sizes, none of them 1: one compiled kernel for all of them.
odd = st.sampled_from([3, 15, 17, 31, 33])
few = settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@few
@given(
    T=st.integers(0, 25),
    E=st.sampled_from([2, 3, 7]),
    top_k=st.integers(1, 2),
    H=odd,
    F=odd,
    vllm=st.booleans(),
    block_m=st.sampled_from([16, 32, 128]),
    seed=st.integers(0, 2**16),
)
def test_property(device, T, E, top_k, H, F, vllm, block_m, seed):
    generator = torch.Generator().manual_seed(seed)
    # Skewed, so that some experts get several tiles and some nothing; some are dropped.
    ids = (torch.rand(T, top_k, generator=generator) ** 3 * (E + 2)).long() - 1
    case = make(device, T, E, top_k, H, F, F32, vllm=vllm, ids=ids, seed=seed)
    case.weights *= (ids >= 0).to(device) & (ids < E).to(device)
    check(case, config=SMALL, block_m=block_m)


def spread(t):
    """A copy of `t` with its rows or experts far apart: strides below 2^31, their products not."""
    strides = (2**29 + 1, *t.stride()[1:])
    return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)


def lazy_zeros(shape, **_):
    """Memory that takes no room before it is touched."""
    return torch.from_numpy(np.zeros(shape, np.float32))


@pytest.fixture
def far_device(request, device):
    """`device`, where memory that is not touched costs nothing."""
    if device.type == "cuda":
        pytest.skip("memory of a GPU is real")
    if "races" in request.node.name:
        pytest.skip("the race shadow is larger than the memory, all of it touched")
    return device


@pytest.mark.parametrize("part", ["tokens", "experts"])
def test_strides_are_64_bit(far_device, part):
    case = make(far_device, 5, 5, 1, 45, 21, F32, ids=[0, 4, 4, 1, 3])
    z, out = check(case, config=SMALL)
    if part == "tokens":
        case.x, case.residual = spread(case.x), spread(case.residual)
    else:
        case.experts = mapped(case.experts, spread)
    far_z, far_out = check(case, config=SMALL)
    assert torch.equal(far_z, z) and torch.equal(far_out, out)


def test_rows_are_64_bit(far_device, monkeypatch):
    """The last 5 of so many tokens that x, z and the output have more than 2^31 elements."""
    case = make(far_device, 5, 3, 1, 33, 33, F32, ids=[2, 0, 2, 0, 2])
    want_z, want = check(case, config=SMALL)
    T, config = 2**26, list(dataclasses.astuple(SMALL))
    x, weights = lazy_zeros((T, 33)), lazy_zeros((T, 1))
    row_slot = weights.clone().int().view(-1)
    x[-5:], weights[-5:], row_slot[-5:] = case.x, case.weights, case.routing().row_slot + T - 5
    tiles = torch.tensor([[0, T - 5, T - 3, 0], [2, T - 3, T, 0]], dtype=torch.int32)
    monkeypatch.setattr(torch, "empty", lazy_zeros)
    real_new_empty = torch.Tensor.new_empty

    def new_empty(like, shape, **kwargs):
        large = isinstance(shape, tuple) and shape[0] == T
        return lazy_zeros(shape) if large else real_new_empty(like, shape, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    ops, experts = torch.ops.llama4_triton, case.experts
    flat = [p.weight for p in (experts.gate, experts.up, experts.down)], []
    z, _ = ops.grouped_gemm_swiglu(
        x, None, *flat, weights, row_slot, tiles, 16, "plain", True, False, False, F32, config
    )
    assert torch.equal(z[-5:], want_z)
    x[-5:] = case.residual  # the same memory, as the residual
    out = ops.grouped_gemm_combine(
        z, None, *flat, row_slot, tiles, 1, 16, "plain", False, x, weights.view(-1)[:0], F32,
        config,
    )  # fmt: skip
    assert torch.equal(out[-5:], want)


def test_no_host_sync(device):
    case = make(device, 19, 3, 2, 45, 21, F32)
    routing = case.routing()
    with no_host_sync():
        z = grouped_gemm_swiglu(case.x, case.experts, routing)
        combine(z, case.experts, routing, residual=case.residual)


def _bad(change=None, *, of="swiglu", **kwargs):
    """Call an operator on a good case after `change(case)`, which may return a routing."""
    case = make(torch.device("cpu"), 6, 4, 2, 32, 16, F32)
    # Built by hand: these tests launch nothing.
    ints = {"dtype": torch.int32}
    routing = Routing(
        expert_ids=case.ids, expert_weights=case.weights, expert_offsets=torch.zeros(5, **ints),
        row_slot=torch.zeros(12, **ints), tiles=torch.zeros(5, 4, **ints),
        tile_count=torch.zeros(1, **ints), block_m=16, num_experts=4, top_k=2,
    )  # fmt: skip
    case.z = torch.zeros(12, 16)
    changed = change(case, routing) if change else None
    if of == "swiglu":
        return grouped_gemm_swiglu(case.x, case.experts, changed or routing, **kwargs)
    return combine(case.z, case.experts, changed or routing, **kwargs)


def _set(name, value):
    def change(case, routing):
        setattr(case, name, value(getattr(case, name)))

    return change


def _weights(**changes):
    """Replace weights by functions of them: gate=.., up=.., down=.."""

    def change(case, routing):
        parts = {name: getattr(case.experts, name) for name in ("gate", "up", "down")}
        for name, f in changes.items():
            parts[name] = Projection(weight=f(parts[name].weight))
        case.experts = Experts(**parts)

    return change


def _routing(**changes):
    return lambda case, routing: dataclasses.replace(routing, **changes)


I32 = {"dtype": torch.int32}
WIDE = dataclasses.replace(SMALL, BLOCK_M=32)
# (call, error, match)
BAD_INPUTS = {
    "x double": (lambda: _bad(_set("x", torch.Tensor.double)), TypeError, "x must be .*float64"),
    "x rank": (lambda: _bad(_set("x", lambda x: x[0])), ValueError, r"x must have shape \(T, H\)"),
    "x strides": (
        lambda: _bad(_set("x", lambda x: x.t().contiguous().t())), ValueError, "x must be contig"
    ),
    "x width": (
        lambda: _bad(_set("x", lambda x: x[:, 1:])), ValueError, r"experts.gate.weight .* 31\)"
    ),
    "x grad": (
        lambda: _bad(_set("x", lambda x: x.requires_grad_())), NotImplementedError, "inference only"
    ),
    "fp16 weights, fp32 x": (
        lambda: _bad(_weights(gate=torch.Tensor.half)), TypeError, "experts.gate.weight .*float16"
    ),
    "fp16 weights, bf16 x": (
        lambda: _bad(_set("x", torch.Tensor.bfloat16)), TypeError, "gate.weight must .*bfloat16"
    ),
    "gate rank": (
        lambda: _bad(_weights(gate=lambda w: w[0])), ValueError, "experts.gate.weight must be 3-D"
    ),
    "down experts": (
        lambda: _bad(_weights(down=lambda w: w[1:])), ValueError, r"experts.down.* got \(3, 32, 16"
    ),
    "up strides": (
        lambda: _bad(_weights(up=lambda w: w.mT.contiguous().mT)),
        ValueError, "experts.up.weight must have the strides of experts.gate.weight",
    ),
    "down strides": (
        lambda: _bad(_weights(down=lambda w: torch.ones(4, 64, 64)[:, ::2, ::4])),
        ValueError, "experts.down.weight must have stride 1 in one",
    ),
    "formats": (
        lambda: _bad(_weights(down=lambda w: w.byte())), TypeError, "must have one format, got pl"
    ),
    "experts type": (
        lambda: _bad(_set("experts", lambda e: e.down)), TypeError, "experts must be Experts"
    ),
    "w13 rank": (
        lambda: Experts.from_vllm(torch.ones(2, 3), torch.ones(2, 3)), ValueError, "w13 must be 3-D"
    ),
    "routing of other tokens": (
        lambda: _bad(_set("x", lambda x: x[1:])), ValueError, r"expert_weights must .*\(5, 2\)"
    ),
    "routing of other experts": (
        lambda: _bad(_routing(num_experts=5)), ValueError, "routing must be to 4 experts, got 5"
    ),
    "row_slot shape": (
        lambda: _bad(_routing(row_slot=torch.zeros(11, **I32))), ValueError, r"row_slot .*\(12\)"
    ),
    "row_slot int64": (
        lambda: _bad(_routing(row_slot=torch.zeros(12).long())), TypeError, "row_slot must be"
    ),
    "tiles shape": (
        lambda: _bad(_routing(tiles=torch.zeros(4, 4, **I32))), ValueError, r"tiles .*\(5, 4\)"
    ),
    "weights half": (
        lambda: _bad(_routing(expert_weights=torch.ones(6, 2).half())), TypeError, "expert_weights"
    ),
    "weights strides": (
        lambda: _bad(_routing(expert_weights=torch.ones(6, 4)[:, :2])), ValueError, "contiguous"
    ),
    "block": (lambda: _bad(config=WIDE), ValueError, "BLOCK_M must divide .* = 16, got 32"),
    "devices": (lambda: _bad(_set("x", lambda x: x.to("meta"))), ValueError, "on one device"),
    "z rows": (
        lambda: _bad(_set("z", lambda z: z[1:]), of="combine"), ValueError, r"z must .*\(12, F\)"
    ),
    "z columns": (
        lambda: _bad(_set("z", lambda z: z[:, 1:].contiguous()), of="combine"), ValueError, "F = 16"
    ),
    "z strides": (
        lambda: _bad(_set("z", lambda z: torch.ones(12, 20)[:, :16]), of="combine"),
        ValueError, "grouped_gemm_combine: z must be contiguous",
    ),
    "z double": (
        lambda: _bad(_set("z", torch.Tensor.double), of="combine"), TypeError, "z must be"
    ),
    "z bf16": (
        lambda: _bad(_set("z", torch.Tensor.bfloat16), of="combine"), TypeError, "gate.weight must"
    ),
    "residual shape": (
        lambda: _bad(of="combine", residual=torch.ones(6, 31)), ValueError, r"residual .*\(6, 32\)"
    ),
    "residual half": (
        lambda: _bad(of="combine", residual=torch.ones(6, 32).half()), TypeError, "residual must be"
    ),
    "combine block": (lambda: _bad(of="combine", config=WIDE), ValueError, "BLOCK_M must divide"),
    "weight_on": (lambda: _bad(weight_on="both"), ValueError, "weight_on must be input or output"),
    "x_scale of fp32 x": (lambda: _bad(x_scale=torch.ones(6)), TypeError, "x must be .*float8"),
    "e4m3 x without x_scale": (
        lambda: _bad(_set("x", lambda x: x.to(torch.float8_e4m3fn))), TypeError, "x_scale must be g"
    ),
    "e4m3 x, plain experts": (
        lambda: _bad(_set("x", lambda x: x.to(torch.float8_e4m3fn)), x_scale=torch.ones(6)),
        ValueError, "x must not be e4m3, got plain",
    ),
    "out_dtype": (lambda: _bad(out_dtype=BF16), TypeError, "out_dtype must be x.dtype"),
    "quantize_z": (
        lambda: _bad(quantize_z=True), ValueError, "config.BLOCK_N must be 256 and F a multiple"
    ),
    "combine tiles": (
        lambda: _bad(_routing(tiles=torch.zeros(4, 4, **I32)), of="combine"), ValueError, "tiles"
    ),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name):
    call, error, match = BAD_INPUTS[name]
    with pytest.raises(error, match=match):
        call()
