"""moe: where routing comes from, what it is told, how many launches, and bad input.

Values over many sizes, formats and patterns are in tests/test_moe_properties.py.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.moe_layers import Call, assert_layer, exact_router, make_experts, make_shared
from support.no_sync import no_host_sync

from llama4_triton.bench.accuracy import assert_close
from llama4_triton.kernels import _launch, reference
from llama4_triton.kernels._launch import SM_90, assume_device
from llama4_triton.kernels.expert_weights import Experts, quantize_experts
from llama4_triton.kernels.grouped_gemm_combine import combine_workspace_numel
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.moe_plan import plan
from llama4_triton.kernels.quantize import quantize_rowwise

F64, F32, BF16, E4M3 = torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn


def make(device, T, E, top_k, H, F, dtype=F32, *, shared=False, format="plain"):
    """A call with logits and a residual."""
    generator = torch.Generator().manual_seed(T + E)
    options = dict(format=format, generator=generator)
    experts = make_experts(E, H, F, dtype, **options)
    x, residual = torch.randn(2, T, H, generator=generator).to(dtype)
    kwargs = dict(logits=torch.randn(T, E, generator=generator) * 2 - 4, residual=residual)
    if shared:
        kwargs["shared"] = make_shared(H, F, dtype, **options)
    return Call(*_to(device, (x, experts, top_k, kwargs)))


def _to(device, value):
    """`value` with every tensor in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(device, item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_to(device, item) for item in value)
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return type(value)(**{name: _to(device, getattr(value, name)) for name in fields})
    return value


# (T, E, top_k, H, F, shared)
CASES = [
    (37, 5, 1, 45, 21, False), (19, 5, 2, 45, 21, False), (1, 128, 1, 45, 21, False),
    (0, 5, 1, 45, 21, True), (37, 5, 1, 45, 21, True), (19, 5, 2, 45, 21, True),
    (3, 5, 1, 45, 21, True), (1, 5, 2, 45, 21, True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: "T{}-E{}-k{}-H{}-F{}-{}".format(*c))
def test_fp32_matches_reference(device, case):
    *sizes, shared = case
    call = make(device, *sizes, shared=shared)
    out = call.run()
    assert out.shape == call.x.shape and out.dtype == F32
    assert_close(out, call.expected().out)


def test_a_routing_made_elsewhere(device):
    call = make(device, 19, 5, 2, 45, 21, shared=True)
    ids, weights = reference.route(call.kwargs.pop("logits"), 2)
    call.kwargs |= dict(topk_ids=ids, topk_weights=weights)
    assert_close(call.run(), call.expected().out)
    ids[3], ids[4, 1], weights[4, 1] = -1, 5, math.nan
    out = call.run()
    assert_close(out, call.expected().out)
    del call.kwargs["shared"]
    assert torch.equal(call.run()[3], call.kwargs["residual"][3])


def test_strided_routing_made_elsewhere(device):
    call = make(device, 19, 5, 2, 45, 21)
    ids, weights = reference.route(call.kwargs.pop("logits"), 2)
    call.kwargs |= dict(topk_ids=ids, topk_weights=weights)
    want = call.run()
    wide_ids = torch.full((19, 5), 77, dtype=torch.int32, device=device)
    wide_weights = torch.full((19, 7), math.nan, device=device)
    call.kwargs["topk_ids"] = wide_ids[:, 1:3].copy_(ids)
    call.kwargs["topk_weights"] = wide_weights[:, 2:4].copy_(weights)
    assert torch.equal(call.run(), want)


@pytest.mark.parametrize("T", [3, 37])
def test_the_router_is_a_part(device, T):
    """w_router gives what its logits, rounded to x's type, give."""
    call = make(device, T, 16, 1, 64, 32, BF16, shared=True)
    call.x = (call.x * 16).round().clamp(-64, 64) / 16
    w_router = exact_router(16, 64, BF16).to(device)
    logits = (call.x.double() @ w_router.double().T).to(BF16)
    want = call.run(logits=logits)
    got = call.run(logits=None, w_router=w_router)
    assert torch.equal(got, want)


def test_the_score_scales_the_input(device):
    """Field failure: the score applied to the output, which is the same only for a linear layer."""
    call = make(device, 19, 5, 1, 45, 21)
    before, after = call.expected().out, dataclasses.replace(call, kwargs=dict(call.kwargs))
    after.kwargs["weight_on"] = "output"
    other = after.expected().out
    bound = 1e-6 * before.norm()  # of fp32 results
    assert (before - other).norm() > 10 * bound
    assert_close(call.run(), before)
    assert_close(after.run(), other)


@pytest.mark.parametrize("options", [dict(scoring="softmax"), dict(renormalize=True),
    dict(scoring="softmax", renormalize=True)], ids=str)  # fmt: skip
def test_scores_of_other_models(device, options):
    call = make(device, 19, 5, 2, 45, 21)
    plain = call.expected().out
    call.kwargs |= options
    want = call.expected().out
    assert (plain - want).norm() > 1e-3 * want.norm()
    assert_close(call.run(), want)


# One of each regime; routing in three launches is in test_routing.py.
REGIMES = {
    "few": dict(T=3, E=5, top_k=1, shared=True),
    "some": dict(T=19, E=5, top_k=2, shared=True),
    "in turn": dict(T=19, E=5, top_k=1),
    "many": dict(T=521, E=3, top_k=1, shared=True),
}


@pytest.mark.parametrize(
    "regime, dtype",
    [
        *zip(REGIMES, (BF16, torch.float16) * 2, strict=True),
        *(
            pytest.param(regime, dtype, marks=pytest.mark.long)
            for regime, dtype in zip(REGIMES, (torch.float16, BF16) * 2, strict=True)
        ),
    ],
    ids=str,
)
def test_scores_rounded_to_the_type_of_x(device, regime, dtype):
    """What transformers and SGLang do: equal to rounded weights that were given."""
    call = make(device, H=45, F=21, dtype=dtype, **REGIMES[regime])
    logits = (call.kwargs["logits"] * 4).round() / 4
    call.kwargs["logits"] = logits.clamp(-6, 2)
    ids, weights = reference.route(call.kwargs["logits"], call.top_k)
    low, high = ((weights * (1 + sign * 2e-6)).to(dtype) for sign in (-1, 1))
    assert torch.equal(low, high)  # no score is so near a tie that fp32 noise may round it
    call.kwargs["score_dtype"] = dtype
    got = call.run()
    assert_layer(got, call.expected())
    given = Call(call.x, call.experts, call.top_k, dict(call.kwargs))
    given.kwargs |= dict(logits=None, score_dtype=None)
    given.kwargs |= dict(topk_ids=ids, topk_weights=low.float())
    assert_layer(given.run(), call.expected())
    assert not torch.equal(got, call.run(score_dtype=None))
    assert torch.equal(call.run(score_dtype=None), call.run(score_dtype=F32))


@pytest.mark.parametrize("T", [3, 19])
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
def test_a_nan_row_of_logits_gives_the_rest(device, T, shared):
    call = make(device, T, 5, 1, 45, 21, shared=shared)
    want = call.run()
    call.kwargs["logits"][2] = math.nan
    got = call.run()
    if not shared:
        assert torch.equal(got[2], call.kwargs["residual"][2])
    others = torch.arange(T, device=device) != 2
    torch.testing.assert_close(got[others], want[others], rtol=1e-5, atol=1e-5)
    assert_close(got, call.expected().out)


@pytest.mark.parametrize("T", [1, 4, 19])
@pytest.mark.parametrize("valid", [0, 1, 3, 50, -2])
def test_tokens_that_are_not_valid(device, T, valid):
    call = make(device, T, 5, 1, 45, 21, shared=True)
    call.kwargs["num_valid_tokens"] = torch.tensor([valid], dtype=torch.int32, device=device)
    assert_close(call.run(), call.expected().out)


@pytest.mark.parametrize("T", [4, 19])
def test_a_dropped_token_adds_nothing_even_if_it_is_nan(device, T):
    """Its weight of 0 is not what keeps it out: 0 times NaN is NaN."""
    call = make(device, T, 5, 1, 45, 21)
    call.kwargs["num_valid_tokens"] = torch.tensor([2], dtype=torch.int32, device=device)
    call.x[3] = math.nan
    assert torch.equal(call.run()[2:], call.kwargs["residual"][2:])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("T", [2, 37])
def test_the_ranks_of_expert_parallelism_sum_to_the_whole(device, T, top_k):
    call = make(device, T, 8, top_k, 45, 21, shared=True)
    whole, residual, shared = call.expected().out, *map(call.kwargs.pop, ("residual", "shared"))
    total = torch.zeros_like(whole)
    for first, count in ((0, 3), (3, 1), (4, 4)):
        rank = Call(call.x, _slice(call.experts, first, count), top_k, dict(call.kwargs))
        rank.kwargs["expert_range"] = (first, count)
        if first == 3:  # what every token gets, by one of them
            rank.kwargs |= dict(residual=residual, shared=shared)
        out = rank.run()
        assert_close(out, rank.expected().out)
        total += out.double()
    assert_close(total.float(), whole)


def _slice(experts, first, count):
    parts = {
        name: dataclasses.replace(part, weight=part.weight[first : first + count])
        for name, part in (("gate", experts.gate), ("up", experts.up), ("down", experts.down))
    }
    return Experts(**parts)


def test_x_quantised_before(device):
    call = make(device, 19, 4, 1, 256, 128, BF16, shared=True, format="e4m3_channel")
    want = call.run()
    assert torch.equal(call.run(x_quantized=quantize_rowwise(call.x)), want)
    # It is used: another x_q gives another result.
    other = quantize_rowwise(call.x * 2)
    assert not torch.equal(call.run(x_quantized=other), want)
    # On a GPU without e4m3 x itself is what is multiplied.
    with assume_device(dataclasses.replace(SM_90, capability=(8, 0))):
        decoded = call.run(x_quantized=other)
        assert torch.equal(decoded, call.run())
        assert_layer(decoded, call.expected())


@pytest.mark.parametrize("format", ["e4m3_channel", "e4m3_block", "int4_group"])
@pytest.mark.parametrize("T", [1, 37])
def test_decoded_weights(device, format, T):
    """What sm_80 does with e4m3, and every GPU with int4."""
    call = make(device, T, 4, 2, 256, 128, BF16, shared=True, format=format)
    with assume_device(dataclasses.replace(SM_90, capability=(8, 0))):
        assert_layer(call.run(), call.expected())


def test_nothing_waits_and_repeats_are_equal(device):
    for T in (3, 19):
        call = make(device, T, 5, 2, 45, 21, shared=True)
        workspace = torch.empty(combine_workspace_numel(T, 2, 45), device=device)
        want = call.run()
        with no_host_sync():
            again = [call.run(workspace=workspace) for _ in range(2)]
        assert all(torch.equal(out, want) for out in again)


def _names(**changes):
    """The kernels that one call launches; Scout's widths on one of eight GPUs."""
    T, E, top_k = (changes.pop(name, n) for name, n in (("T", 1), ("E", 16), ("top_k", 1)))
    format, shared = changes.pop("format", "plain"), changes.pop("shared", True)
    H, F, names = 512, 256, []
    kwargs = dict(w_router=torch.zeros(E, H, dtype=BF16))
    kwargs |= dict(residual=torch.zeros(T, H, dtype=BF16)) | changes
    if shared:
        kwargs["shared"] = make_shared(H, F, BF16, format=format)
    experts = make_experts(E, H, F, BF16, format=format)
    with _launch.intercept(lambda kernel, *_, **__: names.append(kernel.__name__)):
        moe(torch.zeros(T, H, dtype=BF16), experts, top_k=top_k, **kwargs)
    return names


# tokens, launches for top_k = 1, from the normed bf16 x to out
LAUNCHES = [(1, 3), (2, 3), (4, 3), (5, 4), (64, 4), (512, 4), (520, 4), (4096, 6)]


@pytest.mark.no_kernels
@pytest.mark.parametrize("format", ["plain", "e4m3_channel", "e4m3_block", "int4_group"])
@pytest.mark.parametrize("T, launches", LAUNCHES)
def test_launches(T, launches, format):
    names = _names(T=T, format=format)
    assert names[0] == "_router_kernel" and len(names) == launches, names


@pytest.mark.no_kernels
def test_launches_of_other_layers():
    assert len(_names(T=64, top_k=2)) == 5  # the slots of a token are summed
    assert len(_names(T=64, shared=False)) == 4
    assert len(_names(T=4096, shared=False)) == 6
    logits = torch.zeros(64, 16)
    assert len(_names(T=64, w_router=None, logits=logits)) == 3
    ids, weights = torch.zeros(64, 1, dtype=torch.int32), torch.ones(64, 1)
    given = dict(w_router=None, topk_ids=ids, topk_weights=weights)
    assert len(_names(T=64, **given)) == 3
    assert len(_names(T=64, format="e4m3_channel", **given)) == 4  # x is quantised by itself
    x_quantized = torch.zeros(64, 512, dtype=E4M3), torch.ones(64)
    assert len(_names(T=64, format="e4m3_channel", x_quantized=x_quantized, **given)) == 3
    assert _names(T=0) == []


@pytest.mark.no_kernels
@pytest.mark.parametrize("format", ["plain", "e4m3_channel", "e4m3_block", "int4_group"])
def test_a_batch_invariant_plan_knows_no_tokens(format):
    sizes = dict(H=5120, F=1024, E=16, top_k=1, format=format, batch_invariant=True)
    plans = {plan(T=T, **sizes) for T in (1, 2, 5, 64, 513, 16_384)}
    assert len(plans) == 1
    assert plans != {plan(T=1, **sizes | dict(batch_invariant=False))}


@pytest.mark.no_kernels
def test_bad_input():
    call = make(torch.device("cpu"), 3, 4, 1, 8, 4)
    logits, residual = call.kwargs["logits"], call.kwargs["residual"]
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    chosen = dict(logits=None, topk_ids=ids, topk_weights=weights)
    shared = make_shared(8, 4, F32)
    quantised = quantize_experts(make_experts(4, 128, 128, BF16), "e4m3_channel")
    zero = torch.zeros(1, dtype=torch.int32)
    for kwargs, error, match in (
        (dict(logits=logits[:, 1:]), ValueError, r"logits must have shape \(3, 4\), got \(3, 3\)"),
        (dict(logits=logits[0]), ValueError, "moe: logits must have shape"),
        (dict(logits=logits.double()), TypeError, "moe: logits must be .*float64"),
        (dict(logits=logits[1:]), ValueError, r"logits must have shape \(3, "),
        (dict(logits=logits.tolist()), TypeError, "moe: logits must be a torch.Tensor"),
        (dict(logits=None), ValueError, r"w_router, logits or topk_ids must be given, one of"),
        (dict(topk_ids=ids, topk_weights=weights), ValueError, "one of them"),
        (dict(w_router=torch.ones(4, 8)), ValueError, "one of them"),
        (dict(logits=None, w_router=torch.ones(4, 7)), ValueError, "w_router must have shape"),
        (dict(logits=None, w_router=torch.ones(4, 8).half()), TypeError, "w_router must be"),
        (dict(top_k=5), ValueError, "moe: top_k must be in"),
        (dict(top_k=0), ValueError, "moe: top_k must be in"),
        (dict(residual=residual[1:]), ValueError, "residual must have shape"),
        (dict(residual=residual.half()), TypeError, "residual must be"),
        (chosen | dict(top_k=2), ValueError, r"moe: topk_ids must have shape \(3, 2\)"),
        (chosen | dict(topk_ids=ids.long()), TypeError, "moe: topk_ids must be torch.int32"),
        (chosen | dict(topk_weights=weights.half()), TypeError, "topk_weights must be torch.fl"),
        (chosen | dict(topk_weights=None), ValueError, "topk_weights must be given with topk_ids"),
        (dict(topk_weights=weights), ValueError, "topk_weights must be given with topk_ids"),
        (dict(score_dtype=torch.int32), TypeError, "moe: score_dtype must be None, fp32, fp16 or"),
        (chosen | dict(score_dtype=F32), ValueError, "score_dtype must be None with topk_ids"),
        (dict(scoring="relu"), ValueError, "scoring must be one of sigmoid, softmax, got 'relu'"),
        (dict(weight_on="both"), ValueError, "weight_on must be one of input, output"),
        (dict(expert_range=(0, 3)), ValueError, r"expert_range must be \(first, 4\)"),
        (dict(expert_range=(1, 4)), ValueError, "expert_range must end within the 4 experts"),
        (dict(expert_range=(-1, 4)), ValueError, r"expert_range must be \(first, 4\)"),
        (dict(num_valid_tokens=zero.long()), TypeError, "num_valid_tokens must be torch.int32"),
        (dict(num_valid_tokens=zero[:0]), ValueError, "num_valid_tokens must have shape"),
        (dict(shared=call.experts), ValueError, "shared must be one expert of width 4"),
        (dict(shared=make_shared(8, 5, F32)), ValueError, "shared must be one expert of width 4"),
        (dict(shared=make_shared(9, 4, F32)), ValueError, "shared.gate.weight must have shape"),
        (dict(shared=make_shared(8, 4, BF16)), TypeError, "shared.gate.weight must be"),
        (dict(experts=quantised), TypeError, "x must be float16 or bfloat16 for e4m3_channel"),
        (dict(experts=call.experts.gate), TypeError, "experts must be Experts"),
        (dict(x_quantized=(call.x.to(E4M3), torch.ones(3))), ValueError, "x must not be e4m3"),
        (dict(workspace=torch.ones(1), top_k=2), ValueError, "moe: workspace must"),
        (dict(x=call.x.to("meta")), ValueError, "on one device"),
    ):
        given = dict(x=call.x, experts=call.experts, top_k=1, shared=shared, **call.kwargs)
        with pytest.raises(error, match=match):
            moe(**given | kwargs)
