"""The whole MoE layer against float64, over hundreds of drawn calls; routing; batch invariance.

A family is what is compiled: sizes of weights, formats, options. Within one, tokens, experts in
use, the pattern of the choices, strides and bad rows are drawn from the number of the case, the
same in every run. The compiled code runs all cases, the interpreter every few of them at smaller
widths.
"""

from __future__ import annotations

import collections
import functools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.moe_layers import (
    Call,
    assert_layer,
    exact_router,
    make_experts,
    make_shared,
    sparse_rows,
)

from llama4_triton.bench.accuracy import BOUNDS, assert_close
from llama4_triton.kernels import reference
from llama4_triton.kernels._launch import SM_90, assume_device
from llama4_triton.kernels._paths import assume_covered
from llama4_triton.kernels.expert_weights import Experts, quantize_experts
from llama4_triton.kernels.grouped_gemm import grouped_gemm_swiglu
from llama4_triton.kernels.moe_plan import plan
from llama4_triton.kernels.routing import route, sort_by_expert

BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the cases of one family have in common."""

    E: int
    cases: int
    tokens: tuple[int, ...]
    top_k: int = 1
    format: str = "plain"
    dtype: torch.dtype = BF16
    layout: str = "vllm"
    routed_by: str = "logits"
    logits: torch.dtype = BF16
    valid: bool = False  # num_valid_tokens is given
    shared: bool = False
    residual: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    interpreted: int = 8  # how many of the cases
    H: int = 256
    F: int = 128
    small: tuple[int, int] = (64, 32)  # H and F in the interpreter


GROUPED = (256, 128)  # formats with groups of 128 have no smaller widths
# A tile of rows, a program's tokens and whether num_valid_tokens is given are compiled in: each
# family meets a few of the combinations, all of them together meet every one.
FAMILIES = {
    "bf16-E16-shared": Family(
        E=16, cases=56, tokens=(0, 1, 2, 3, 4, 5, 13, 15, 16, 17, 61, 97, 257, 1030),
        routed_by="w_router", shared=True, interpreted=14,
    ),
    "bf16-E16-hf": Family(
        E=16, cases=40, tokens=(1, 2, 3, 5, 13, 15, 16, 17, 61), layout="hf", interpreted=12
    ),
    "bf16-E128": Family(
        E=128, cases=48, tokens=(0, 1, 2, 3, 5, 15, 16, 17, 37, 61), logits=torch.float32,
        valid=True, interpreted=10,
    ),
    "bf16-E128-k8": Family(
        E=128, cases=40, tokens=(1, 2, 3, 5, 7, 13), top_k=8,
        options=dict(scoring="softmax", renormalize=True, weight_on="output"),
    ),
    "bf16-E160-k8": Family(
        E=160, cases=32, tokens=(1, 2, 3, 5, 7, 13), top_k=8, options=dict(scoring="softmax"),
        shared=True, interpreted=6,
    ),
    "bf16-E1": Family(
        E=1, cases=32, tokens=(1, 2, 3, 5, 7, 8), shared=True, logits=torch.float32
    ),
    "bf16-E2-k2": Family(
        E=2, cases=40, tokens=(0, 2, 3, 5, 7, 15, 16, 17, 37), top_k=2, routed_by="w_router",
    ),
    "bf16-E16-k2-ids": Family(
        E=16, cases=48, tokens=(1, 2, 3, 5, 7, 8, 9, 13, 61), top_k=2, routed_by="topk_ids",
        shared=True, residual=False, interpreted=10,
    ),
    "bf16-ragged": Family(
        E=5, cases=32, tokens=(2, 3, 5, 7, 13), top_k=2, H=150, F=83, small=(77, 69), shared=True
    ),
    "fp16-E16": Family(
        E=16, cases=32, tokens=(1, 2, 5, 15, 16, 17, 37), dtype=F16, routed_by="w_router"
    ),
    "e4m3_channel-E16-shared": Family(
        E=16, cases=40, tokens=(1, 2, 3, 4, 5, 13, 15, 16), format="e4m3_channel",
        routed_by="w_router", shared=True,
    ),
    "e4m3_channel-E2-shared": Family(  # z leaves GEMM 1 in e4m3
        E=2, cases=8, tokens=(520, 601), format="e4m3_channel", routed_by="w_router", shared=True,
        interpreted=0,
    ),
    "e4m3_channel-E128-k8": Family(
        E=128, cases=24, tokens=(1, 2, 3, 13), top_k=8, format="e4m3_channel", interpreted=4
    ),
    "e4m3_block-E16-shared": Family(
        E=16, cases=32, tokens=(1, 2, 3, 5, 13, 15), format="e4m3_block", shared=True,
        small=GROUPED,
    ),
    "int4-E16-shared": Family(
        E=16, cases=32, tokens=(1, 2, 3, 5, 13, 16), format="int4_group", routed_by="w_router",
        shared=True, small=GROUPED,
    ),
}  # fmt: skip
CASES = [(name, number) for name, family in FAMILIES.items() for number in range(family.cases)]


def pytest_generate_tests(metafunc):
    if {"name", "number"} <= set(metafunc.fixturenames):
        interpreted = metafunc.config.getoption("--executor") == "interpreter"
        cases = [case for case in CASES if not interpreted or _is_interpreted(*case)]
        metafunc.parametrize("name, number", cases, ids=[f"{n}-{i}" for n, i in cases])


def _is_interpreted(name, number):
    family = FAMILIES[name]
    return number * family.interpreted // family.cases != (
        (number - 1) * family.interpreted // family.cases
    )


@functools.lru_cache(maxsize=2)
def _weights(name, H, F):
    """Experts and a shared one: drawing and quantising them takes longer than a call."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(0)
    options = dict(format=family.format, generator=generator)
    experts = make_experts(family.E, H, F, family.dtype, layout=family.layout, **options)
    return experts, make_shared(H, F, family.dtype, **options)


def draw(name, number, device, executor):
    """The call of one case."""
    family = FAMILIES[name]
    interpreted = executor == "interpreter"
    seed = 1000 * list(FAMILIES).index(name) + number
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    # Every number of tokens comes up before any does again.
    tokens = [T for T in family.tokens if not interpreted or T <= 17]
    order = number if not interpreted else number * family.interpreted // family.cases
    T = tokens[order % len(tokens)]
    H, F = family.small if interpreted else (family.H, family.F)
    E, top_k, dtype = family.E, family.top_k, family.dtype
    experts, shared = _weights(name, H, F)
    kwargs: dict[str, Any] = dict(family.options)
    if family.shared:
        kwargs["shared"] = shared
    x = sparse_rows(T, H, dtype, generator)
    if rng.random() < 0.3:  # rows of a wider tensor
        wide = torch.full((T, H + 48), math.nan, dtype=dtype)
        x = wide[:, 16 : 16 + H].copy_(x)
    if family.residual:
        kwargs["residual"] = torch.randn(T, H, generator=generator).to(dtype)
    pattern = rng.choice(("uniform", "skewed", "one", "empty", "ties", "coarse"))
    if family.routed_by == "w_router":
        w_router = exact_router(E, H, dtype, generator)
        if pattern == "ties":
            w_router = w_router[torch.arange(E) // 2 * 2]
        if pattern == "one":
            w_router = w_router[:1].expand(E, H).contiguous()
        kwargs["w_router"] = w_router
    else:
        logits = _logits(T, E, pattern, rng, generator)
        if family.routed_by == "logits":
            kwargs["logits"] = logits.to(family.logits)
        else:
            ids = logits.argsort(1, descending=True)[:, :top_k].int()
            ids[torch.rand(T, top_k, generator=generator) < 0.2] = rng.choice((-1, E, 2**31 - 1))
            kwargs["topk_ids"] = ids.contiguous()
            kwargs["topk_weights"] = torch.rand(T, top_k, generator=generator) * 0.9 + 0.05
    bad = []
    if T > 2 and rng.random() < 0.3:
        bad = rng.sample(range(T), 2)
        x[bad[0]], x[bad[1], rng.randrange(H)] = math.nan, rng.choice((math.inf, -math.inf))
    if family.valid:
        valid = torch.tensor([rng.randint(0, T)], dtype=torch.int32)
        kwargs["num_valid_tokens"] = valid
    return Call(x, experts, top_k, kwargs), bad


def _logits(T, E, pattern, rng, generator):
    logits = torch.randn(T, E, generator=generator) * 2
    if pattern == "skewed":
        logits += torch.linspace(4, -4, E)
    elif pattern == "one":
        logits[:, rng.randrange(E)] += 12
    elif pattern == "empty":
        logits[:, rng.randrange(2) :: 2] -= 20
    elif pattern == "ties":
        logits[:] = 0.5
    elif pattern == "coarse":
        logits = logits.round()
    return logits


def test_there_are_as_many_cases_as_promised():
    assert len(CASES) >= 500
    assert sum(_is_interpreted(*case) for case in CASES) >= 100
    # Each number of tokens of a family comes up.
    assert all(family.cases >= len(family.tokens) for family in FAMILIES.values())


def test_the_drawn_calls_cover_what_they_must(device):
    """Bad rows, strides, dropped tokens: drawn by chance, but the draws are always the same."""
    seen = collections.Counter()
    for name, number in CASES[::3]:
        if not FAMILIES[name].interpreted:
            continue
        call, bad = draw(name, number, device, "interpreter")
        seen["bad rows"] += bool(bad)
        seen["strided x"] += call.x.stride(0) > call.x.shape[1]
        seen["not valid"] += "num_valid_tokens" in call.kwargs
        ids, _ = call.routing()
        used = ids[ids >= 0].unique().numel()
        seen["one expert"] += used == 1 and ids.numel() > 8 and call.experts.num_experts > 1
        seen["empty experts"] += 1 < used < call.experts.num_experts
        seen["dropped"] += bool((ids < 0).any())
    assert min(seen.values()) >= 5 and len(seen) == 6, seen


def test_layer(device, executor, name, number):
    call, bad = draw(name, number, device, executor)
    out = call.run()
    expected = call.expected()
    assert out.shape == call.x.shape and out.dtype == call.x.dtype and out.is_contiguous()
    others = torch.ones(len(out), dtype=torch.bool)
    others[bad] = False
    assert out[others].isfinite().all()
    if bad:
        want = expected.out[bad[0]].isnan()
        assert out[bad[0]].isnan().equal(want)
    assert_layer(out, expected, others)


# Routing: the order of rows, by itself.


@pytest.mark.parametrize("E", [1, 2, 16, 128, 160])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_rows_are_a_bijection_and_tiles_cover_them(device, E, top_k):
    if top_k > E:
        pytest.skip("more choices than experts")
    for T in (1, 2, 15, 16, 17, 61):
        for pattern in ("uniform", "skewed", "one", "ties"):
            rng, generator = random.Random(T), torch.Generator().manual_seed(T)
            logits = _logits(T, E, pattern, rng, generator).to(device)
            routing = route(logits, top_k)
            R = T * top_k
            assert torch.equal(routing.row_slot.long().sort()[0].cpu(), torch.arange(R))
            tiles = routing.tiles[: int(routing.tile_count)].tolist()
            block_m = routing.block_m
            rows_of = [
                range(first + i * block_m, min(first + (i + 1) * block_m, end))
                for _, first, end, i in tiles
            ]
            covered = [row for rows in rows_of for row in rows]
            assert sorted(covered) == list(range(R))
            slots, ids = routing.row_slot.tolist(), routing.expert_ids.flatten().tolist()
            assert all(
                ids[slots[row]] == expert
                for (expert, *_), rows in zip(tiles, rows_of, strict=True)
                for row in rows
            )


# Batch invariance: a row's bits are its own.

INVARIANT_TOKENS = (1, 2, 5, 16, 33, 65, 200)


def _scout(device, T, format="plain", *, H=256, F=128, E=16, dtype=BF16, **options):
    """A layer of Scout's kind with exact logits."""
    generator = torch.Generator().manual_seed(T)
    made = dict(format=format, generator=generator)
    experts = make_experts(E, H, F, dtype, **made)
    kwargs = dict(
        shared=make_shared(H, F, dtype, **made), w_router=exact_router(E, H, dtype, generator),
        residual=torch.randn(T, H, generator=generator).to(dtype), **options,
    )  # fmt: skip
    return Call(sparse_rows(T, H, dtype, generator), experts, 1, kwargs)


def _rows(call, rows):
    """The same layer for some of the tokens."""
    by_token = ("residual", "logits", "topk_ids", "topk_weights")
    kwargs = {k: v[rows] if k in by_token else v for k, v in call.kwargs.items()}
    return Call(call.x[rows], call.experts, call.top_k, kwargs)


def _same(a, b):
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.compiled_only  # the interpreter's matmul rounds by the place of a row
@pytest.mark.parametrize("format", ["plain", "e4m3_channel"])
def test_a_row_alone_is_as_in_any_batch(device, format):
    call = _scout(device, max(INVARIANT_TOKENS), format, batch_invariant=True)
    whole = call.run()
    for T in INVARIANT_TOKENS:
        first = torch.arange(T)
        assert _same(_rows(call, first).run(), whole[:T])
        permuted = torch.randperm(len(whole), generator=torch.Generator().manual_seed(T))[:T]
        assert _same(_rows(call, permuted).run(), whole[permuted])
        beside = _rows(call, permuted)
        beside.x = beside.x.clone()
        beside.x[1::2] = math.nan
        assert _same(beside.run()[::2], whole[permuted][::2])
    for t in range(0, len(whole), 7):
        assert _same(_rows(call, slice(t, t + 1)).run(), whole[t : t + 1])
    assert_layer(whole, call.expected())


@pytest.mark.compiled_only
@pytest.mark.parametrize("T", [3, 40, 600])
def test_ten_repeats_are_equal_in_every_bit(device, T):
    call = _scout(device, T)
    out = call.run()
    assert all(_same(call.run(), out) for _ in range(9))


# Very few tokens: slices of H and of F, which small widths on a CPU's few programs do not have.


@pytest.mark.parametrize("last_arriver", [False, True], ids=["whole", "last-arriver"])
@pytest.mark.parametrize("format", ["fp32", "plain", "e4m3_channel", "int4_group"])
@pytest.mark.parametrize("T", [1, 4])
def test_few_tokens_in_slices(device, executor, T, format, last_arriver):
    """All to one expert, whose weights are read once and whose rows one program stores."""
    if executor == "interpreter" and format != "fp32":
        pytest.skip("slices of 16-bit and quantised weights are too long to interpret")
    dtype, H, F = (torch.float32, 256, 128) if format == "fp32" else (BF16, 1280, 512)
    format = "plain" if format == "fp32" else format
    call = _scout(device, T, format, H=H, F=F, E=2, dtype=dtype)
    call.kwargs["w_router"][1] = call.kwargs["w_router"][0]
    sizes = dict(T=T, H=H, F=F, E=2, top_k=1, format=format, dtype=dtype)
    chosen = plan(**sizes, last_arriver=last_arriver, properties=SM_90)
    assert chosen.regime == "few" and (chosen.up_splits > 1) == (format != "int4_group")
    assert (chosen.down_splits > 1) == last_arriver
    with assume_device(SM_90), assume_covered({"last_arriver"} if last_arriver else ()):
        out = call.run()
        if dtype == BF16:
            assert_layer(out, call.expected())
        else:
            assert_close(out, call.expected().out)
        assert torch.equal(call.run(), out)


# Numerics at real widths and at the edges of what the formats hold.


@pytest.mark.compiled_only  # the interpreter would take minutes
@pytest.mark.parametrize("format", ["plain", "e4m3_channel", "e4m3_block", "int4_group"])
def test_real_widths(device, format):
    """Scout's on one of eight GPUs, with two experts; few tokens and more than a tile."""
    call = _scout(device, 20, format, H=5120, F=1024, E=2)
    for rows in (slice(0, 2), slice(0, 20)) if format == "plain" else (slice(0, 20),):
        some = _rows(call, rows)
        assert_layer(some.run(), some.expected())


@pytest.mark.compiled_only
@pytest.mark.parametrize("K", [5120, 8192])
@pytest.mark.parametrize("format", ["plain", "e4m3_channel"])
def test_sums_of_one_sign(device, format, K):
    """Nothing cancels, and so what an accumulator loses at each step adds up."""
    call = positive(device, format, K)
    for rows in (slice(0, 2), slice(0, 20)):
        some = _rows(call, rows)
        assert_layer(some.run(), some.expected())


def positive(device, format, K, T=20, F=128):
    """x and all weights positive, gate and up near 2 at any K."""
    generator = torch.Generator().manual_seed(K)

    def uniform(*shape):
        return torch.rand(shape, generator=generator) + 0.5

    weights = (uniform(2, 2 * F, K) * 4 / K).to(BF16), (uniform(2, K, F) / F).to(BF16)
    experts = Experts.from_vllm(*weights)
    if format != "plain":
        experts = quantize_experts(experts, format)
    x, residual = uniform(T, K).to(BF16), torch.zeros(T, K, dtype=BF16)
    return Call(x, experts, 1, dict(residual=residual, logits=torch.zeros(T, 2)))


def test_the_score_is_on_the_input(device):
    """Where it would make ten times the bound's difference on the output."""
    call = _scout(device, 19)
    del call.kwargs["w_router"]
    call.kwargs |= dict(
        topk_ids=torch.arange(19, dtype=torch.int32)[:, None] % 16,
        topk_weights=torch.full((19, 1), 0.25),
    )
    want = call.expected()
    after = Call(call.x, call.experts, 1, call.kwargs | dict(weight_on="output"))
    other = after.expected()
    bound = BOUNDS[BF16].frobenius
    assert (want.out - other.out).norm() > 10 * bound * want.out.norm()
    assert_layer(call.run(), want)
    assert_layer(after.run(), other)
    with pytest.raises(AssertionError, match="frobenius"):
        assert_layer(after.run(), want)


@pytest.mark.parametrize("format", ["plain", "e4m3_channel", "e4m3_block", "int4_group"])
@pytest.mark.parametrize("T", [3, 19])
def test_rows_at_the_edges(device, format, T):
    """Zeros, denormals, and rows whose largest value stands alone or at its type's end."""
    call = _scout(device, T, format)
    del call.kwargs["w_router"]
    call.kwargs |= dict(
        topk_ids=torch.arange(T, dtype=torch.int32)[:, None] % 16,
        topk_weights=torch.linspace(0.2, 0.8, T)[:, None].contiguous(),
    )
    call.x[0] = 0.0
    call.x[1] *= 2.0**-133  # bf16 denormals
    call.x[2, 17] = 200.0  # in e4m3 the others are left with few bits
    out = call.run()
    for row in range(T):  # each beside its own largest result
        assert_layer(out, call.expected(), torch.arange(T) == row)
    assert torch.equal(out[0], call.kwargs["residual"][0])


@pytest.mark.compiled_only
def test_e4m3_is_promoted(executor):
    """With an accumulator that keeps 13 bits, as Hopper's is taken to, and sums of one sign.

    Added to fp32 every 128 of K, GEMM 1 stays as close as 16-bit results are (each of its two
    factors is 5.8e-4 off); left to the tensor cores they are 8.7e-2 off at K = 5120.
    """
    if executor != "ptx":
        pytest.skip("only a model of the accumulator has a known number of bits")
    from ptxrun import Options, ptx_device
    from support.proxy_fence import fence_before_barrier

    call = positive(None, "e4m3_channel", 5120, T=3)
    x, scale = reference.quantize_rowwise(call.x)
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.full((3, 1), 0.5)
    want = reference.grouped_gemm_swiglu(
        x, call.experts, ids, weights, x_scale=scale, out_dtype=F64
    )
    errors = []
    for fast_accum in (False, True):
        with ptx_device(Options(strict=True, fp8acc=13), on_launch=fence_before_barrier):
            routing = sort_by_expert(ids, weights, 2)
            z = grouped_gemm_swiglu(x, call.experts, routing, x_scale=scale, fast_accum=fast_accum)
        errors.append(float((z.double() - want).norm() / want.norm()))
    assert errors[0] <= BOUNDS[BF16].row < errors[1], errors
