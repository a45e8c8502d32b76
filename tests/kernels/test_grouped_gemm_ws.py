"""Warp-specialised GEMMs of the experts: off by default, right in every half, specialised."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch
import triton
from support.moe_layers import Call, assert_layer, make_experts, make_shared

from llama4_triton.autotune.compile import artifacts, compile_launch
from llama4_triton.autotune.recorder import recorded_launches
from llama4_triton.kernels import _launch, grouped_gemm_ws
from llama4_triton.kernels._launch import SM_90, assume_device
from llama4_triton.kernels._paths import assume_covered, use
from llama4_triton.kernels.expert_weights import Experts
from llama4_triton.kernels.moe import moe

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
TRITON = grouped_gemm_ws.TRITON
UP, DOWN = "_grouped_gemm_swiglu_ws_kernel", "_grouped_gemm_scatter_ws_kernel"

# Rows per expert; with 600 tokens and so few experts, routing makes tiles of 128 rows.
RAGGED = (0, 1, 63, 64, 65, 127, 128, 129, 300)
ONE = (0, 0, 600, 0)
WHOLE = (128,) * 5

# (H, F): multiples of 16, as TMA wants. Rows along N end with K, which is whole steps of 64 then.
SIZES = {"vllm": (336, 208), "hf": (320, 192), "e4m3": (336, 256)}
SMALL = {"vllm": (80, 48), "hf": (64, 64), "e4m3": (144, 128)}  # for the interpreter


def make_call(
    device, counts=RAGGED, *, dropped=0, dtype=BF16, format="plain", layout="vllm", shared=False,
    residual=True, sizes=SIZES, seed=0, **kwargs,
):  # fmt: skip
    """A call whose experts get `counts` tokens each; `dropped` get none."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(sizes, dict):
        sizes = sizes["e4m3" if format.startswith("e4m3") else layout]
    H, F = sizes
    E, T = len(counts), sum(counts) + dropped
    ids = torch.repeat_interleave(torch.arange(-1, E), torch.tensor([dropped, *counts]))
    ids = ids[torch.randperm(T, generator=generator)].int()[:, None]
    weights = torch.rand(T, 1, generator=generator) + 0.2
    options = dict(format=format, generator=generator)
    kwargs |= dict(topk_ids=ids.to(device), topk_weights=weights.to(device))
    if residual:
        kwargs["residual"] = torch.randn(T, H, generator=generator).to(dtype).to(device)
    if shared:
        kwargs["shared"] = _to(device, make_shared(H, F, dtype, **options))
    x = torch.randn(T, H, generator=generator).to(dtype).to(device)
    return Call(x, _to(device, make_experts(E, H, F, dtype, layout=layout, **options)), 1, kwargs)


def _to(device, experts):
    def moved(part):
        scale = None if part.scale is None else part.scale.to(device)
        return dataclasses.replace(part, weight=part.weight.to(device), scale=scale)

    parts = {name: moved(getattr(experts, name)) for name in ("gate", "up", "down")}
    return type(experts)(**parts)


def specialised(call, **changes):
    with assume_covered({grouped_gemm_ws.FEATURE}):
        return call.run(**changes)


def expected(call):
    """With a shared expert what is not routed is rounded by itself first."""
    want = call.expected()
    if "shared" not in call.kwargs:
        return want
    weights = torch.zeros_like(call.kwargs["topk_weights"])
    ids = torch.full_like(call.kwargs["topk_ids"], -1)
    alone = Call(call.x, call.experts, 1, call.kwargs | dict(topk_ids=ids, topk_weights=weights))
    return dataclasses.replace(want, before=alone.expected().out)


def names_of(call, **changes):
    """The kernels that one call launches, specialisation assumed to be covered."""
    names = []
    with _launch.intercept(lambda kernel, *_, **__: names.append(kernel.__name__)):
        specialised(call, **changes)
    return names


CASES = {
    "ragged": dict(),
    "ragged-hf": dict(layout="hf"),
    "ragged-e4m3": dict(format="e4m3_channel"),
    "one": dict(counts=ONE),
    "one-e4m3": dict(counts=ONE, format="e4m3_channel"),
    "whole-hf": dict(counts=WHOLE, layout="hf"),
    "fp16": dict(counts=ONE, dtype=FP16),
    "dropped": dict(dropped=140),
    "dropped-e4m3": dict(dropped=140, format="e4m3_channel"),
    "shared": dict(shared=True),
    "shared-hf": dict(shared=True, layout="hf", residual=False),
    "shared-e4m3": dict(shared=True, format="e4m3_channel"),
    "no-residual": dict(residual=False),
    "on-output": dict(weight_on="output"),
    "on-output-e4m3": dict(weight_on="output", format="e4m3_channel"),
    "fast-accum": dict(format="e4m3_channel", fast_accum=True),
}


# The interpreter takes half a minute for some; these say what the others would.
INTERPRETED = ("ragged", "ragged-hf", "ragged-e4m3", "fp16", "dropped", "shared", "on-output")


def _marked(names):
    for name in names:
        marks = () if name in INTERPRETED else (pytest.mark.compiled_only,)
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("case", _marked(CASES))
def test_matches_reference(device, executor, case):
    """Every row of both halves of each tile, and of the rows that nobody owns."""
    sizes = SMALL if executor == "interpreter" else SIZES
    call = make_call(device, sizes=sizes, **CASES[case])
    assert {UP, DOWN} <= set(names_of(call))
    assert_layer(specialised(call), expected(call))


EQUAL = {name: CASES[name] for name in ("ragged", "ragged-hf", "fp16", "dropped", "on-output")}
EQUAL["ragged-e4m3"] = dict(format="e4m3_channel", residual=False)


@pytest.mark.compiled_only
@pytest.mark.parametrize("case", EQUAL)
def test_equals_the_pointer_kernels(device, executor, case):
    """Each sum is the same one; a tensor core may add in another order than the model of it."""
    call = make_call(device, **EQUAL[case])
    want, got = call.run(), specialised(call)
    if executor == "ptx":
        assert torch.equal(got, want)
    assert_layer(got, expected(call))
    assert torch.equal(specialised(call), got)


SCHEDULES = [
    dict(mode="late"), dict(mode="late", seed=3), dict(mode="late", seed=11),
    dict(mode="early_loads"), dict(mode="early_loads", seed=5), dict(mode="eager"),
    dict(mode="late", seed=7, races=True),
]  # fmt: skip


@pytest.mark.compiled_only
@pytest.mark.parametrize("case", ["ragged", "ragged-hf", "dropped", "ragged-e4m3", "shared"])
def test_every_schedule_gives_the_same(executor, case):
    """When copies and products take effect, and in which order the warps run, is nobody's say."""
    if executor != "ptx":
        pytest.skip("only an executor of compiled code has schedules")
    from ptxrun import Options, ptx_device
    from support.proxy_fence import fence_before_barrier

    call = make_call(torch.device("cpu"), **CASES[case])
    outs = []
    for options in SCHEDULES:
        with ptx_device(Options(strict=True, **options), on_launch=fence_before_barrier):
            outs.append(specialised(call))
    assert_layer(outs[0], expected(call))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(
    "format", ["plain", pytest.param("e4m3_channel", marks=pytest.mark.compiled_only)]
)
def test_rows_do_not_mix(device, executor, format):
    """NaN of one token, or of one that is dropped, stays where it is."""
    sizes = SMALL if executor == "interpreter" else SIZES
    call = make_call(device, dropped=20, format=format, sizes=sizes)
    want = specialised(call)
    ids = call.kwargs["topk_ids"][:, 0]
    lost, kept = (ids == -1).nonzero()[3, 0], (ids == 5).nonzero()[70, 0]
    call.x[lost] = call.x[kept] = torch.nan
    got = specialised(call)
    assert got[kept].isnan().all()
    assert torch.equal(got[lost], call.kwargs["residual"][lost])
    others = torch.arange(len(got), device=device) != kept
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("programs", [1, 132])
def test_any_number_of_programs(device, programs):
    """One takes all tiles; or there are more than tiles."""
    call = make_call(device, sizes=(64, 48))
    with assume_device(dataclasses.replace(SM_90, sm_count=programs)):
        assert_layer(specialised(call), expected(call))


@pytest.mark.no_kernels
def test_off_by_default():
    call = make_call(torch.device("cpu"))
    names = []
    with _launch.intercept(lambda kernel, *_, **__: names.append(kernel.__name__)):
        call.run()
    assert names and not {UP, DOWN} & set(names)
    for path in ("safe", "fast"):
        with use(moe=path):
            assert ({UP, DOWN} <= set(names_of(call))) == (path == "fast")


@pytest.mark.no_kernels
def test_launches():
    routed = ["_sort_kernel", "_gather_rows_kernel", UP, DOWN]
    cpu = torch.device("cpu")
    assert names_of(make_call(cpu)) == routed
    shared = ["_grouped_gemm_swiglu_kernel", "_shared_down_kernel"]
    assert names_of(make_call(cpu, shared=True)) == routed[:1] + shared + routed[1:]
    router = dict(w_router=torch.zeros(16, 336, dtype=BF16), topk_ids=None, topk_weights=None)
    call = make_call(cpu, (256,) * 16, shared=True)
    first = ["_router_kernel", "_top_k_kernel", "_scan_kernel", "_scatter_kernel"]
    assert names_of(call, **router) == first + shared + routed[1:]
    call = make_call(cpu, (256,) * 16, format="e4m3_channel")
    assert names_of(call, **router) == first + routed[1:]  # x is quantised in the router's launch


OUTSIDE = {
    "few rows per expert": dict(counts=(10,) * 60),
    "512 tokens": dict(counts=(256, 256)),
    "batch-invariant": dict(batch_invariant=True),
    "fp32": dict(dtype=FP32),
    "e4m3_block": dict(format="e4m3_block", sizes=(256, 256)),
    "int4_group": dict(format="int4_group", sizes=(256, 256)),
    "odd H": dict(sizes=(344, 208)),
    "odd F": dict(sizes=(336, 200)),
    "rows along N that do not end with a step": dict(layout="hf", sizes=(336, 192)),
    "groups of z that do not end with F": dict(format="e4m3_channel", sizes=(256, 192)),
}


@pytest.mark.no_kernels
@pytest.mark.parametrize("case", OUTSIDE)
def test_takes_only_what_it_can(case):
    names = names_of(make_call(torch.device("cpu"), **OUTSIDE[case]))
    assert names and not {UP, DOWN} & set(names)


@pytest.mark.no_kernels
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
@pytest.mark.parametrize("format", ["plain", "e4m3_channel"])
def test_other_gpus_are_left_alone(capability, format):
    with assume_device(dataclasses.replace(SM_90, capability=capability)):
        names = names_of(make_call(torch.device("cpu"), format=format))
    assert names and not {UP, DOWN} & set(names)


@pytest.mark.no_kernels
def test_older_triton_and_odd_tensors_are_left_alone(monkeypatch):
    call = make_call(torch.device("cpu"))
    T, H = call.x.shape
    wide = torch.zeros(T, H + 8, dtype=BF16)
    for residual in (wide[:, :H], wide.flatten()[4:][: T * H].view(T, H)):
        assert UP not in names_of(call, residual=residual)
    odd = dataclasses.replace(call, x=wide[:, 8:])
    assert UP not in names_of(odd)
    names = "topk_ids", "topk_weights"
    two = {name: call.kwargs[name].expand(-1, 2).contiguous() for name in names}
    assert UP not in names_of(dataclasses.replace(call, top_k=2), **two)
    assert UP in names_of(call)
    monkeypatch.setattr(grouped_gemm_ws, "LIMIT", T * H)
    assert UP not in names_of(call)
    monkeypatch.undo()
    monkeypatch.setattr(grouped_gemm_ws, "TRITON", (3, 6))
    assert UP not in names_of(call)


@pytest.mark.no_kernels
def test_scratch_is_torchs_and_the_callers_allocator_stays():
    from triton.runtime._allocation import _allocator

    def theirs(size, alignment, stream):
        raise AssertionError("not for us")

    before, seen = _allocator.get(), []
    call = make_call(torch.device("cpu"))

    def interceptor(kernel, *_, **__):
        if kernel.__name__ in (UP, DOWN):
            seen.append(_allocator.get()(384, 128, None))
        else:
            assert _allocator.get() is theirs

    triton.set_allocator(theirs)
    try:
        with _launch.intercept(interceptor):
            specialised(call)
        assert _allocator.get() is theirs
    finally:
        triton.set_allocator(before)
    assert [(x.device.type, x.nbytes) for x in seen] == [("cpu", 384)] * 2


@pytest.mark.no_kernels
def test_the_callers_allocator_stays_when_a_launch_fails():
    from triton.runtime._allocation import _allocator

    before = _allocator.get()

    def failing(kernel, *_, **__):
        if kernel.__name__ == UP:
            raise ZeroDivisionError

    with _launch.intercept(failing), pytest.raises(ZeroDivisionError):
        specialised(make_call(torch.device("cpu")))
    assert _allocator.get() is before


COMPILED = {
    "plain": dict(), "hf": dict(layout="hf"), "e4m3": dict(format="e4m3_channel"),
    "fast-accum": dict(format="e4m3_channel", fast_accum=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    """By case the reports of both kernels with their texts, of Scout on one of 8 GPUs."""
    H, F, E, T = 5120, 1024, 16, 4096

    def layer(format="plain", layout="vllm", fast_accum=False):
        dtype = BF16 if format == "plain" else E4M3
        w13, w2 = torch.empty(E, 2 * F, H, dtype=dtype), torch.empty(E, H, F, dtype=dtype)
        scales = () if dtype == BF16 else (torch.empty(E, 2 * F), torch.empty(E, H))
        if layout == "hf":
            w13, w2 = (w.mT.contiguous().mT for w in (w13, w2))
        experts = Experts.from_vllm(w13, w2, *scales)
        x, logits = torch.empty(2, T, H, dtype=BF16)[0], torch.empty(T, E, dtype=BF16)
        moe(x, experts, top_k=1, logits=logits, residual=x, fast_accum=fast_accum)

    reports = {}
    for case, options in COMPILED.items():
        with assume_covered({grouped_gemm_ws.FEATURE}):
            launches = recorded_launches(functools.partial(layer, **options))
        for launch in launches:
            if launch.name in (UP, DOWN):
                report = compile_launch(launch, "sm_90")
                texts = {kind: path.read_text() for kind, path in artifacts(report).items()
                         if kind != "cubin"}  # fmt: skip
                reports[case, launch.name] = report, texts
    return reports


@pytest.mark.compiled_only
@pytest.mark.parametrize("name", [UP, DOWN])
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_code_is_specialised(compiled, case, name):
    """12 warps, registers handed from the loading warps to the consumers, and nothing spilt."""
    report, texts = compiled[case, name]
    assert re.search(r"\.reqntid 384\b", texts["ptx"]), "no warp specialisation"
    given = set(re.findall(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+)", texts["ptx"]))
    assert {("dec", "40"), ("inc", "232")} <= given
    facts = report.facts
    # Triton 3.9 keeps two registers of GEMM 1 elsewhere from one tile to its end with fast_accum.
    spilt = 8 if TRITON >= (3, 9) and (case, name) == ("fast-accum", UP) else 0
    assert report.stack <= spilt and facts.local == 0, str(report)
    assert report.spills <= spilt
    assert facts.sass["wgmma"] and not facts.sass["mma.sync"]
    assert not facts.ptx["float atomic"]
    assert report.shared <= SM_90.shared_bytes
    assert report.scratch == 128 * (3 if name == UP else 2)
    promoted = COMPILED[case].get("format") and not (case == "fast-accum" and name == UP)
    dots = 2 if name == UP else 1
    for loop in facts.main_loops:
        assert not loop.serialised
        if name == UP:  # GEMM 2 multiplies by a scale as it adds
            assert loop.fp32_adds == (64 * 128 // 128 * dots if promoted else 0)


@pytest.mark.compiled_only
@pytest.mark.parametrize("name", [UP, DOWN])
@pytest.mark.parametrize("case", COMPILED)
def test_consumers_take_different_halves(compiled, case, name):
    """Field failure: both consumers computed the same half, or stored it 64 rows too far."""
    ttgir = compiled[case, name][1]["ttgir"]
    loader, *consumers = re.split(r"\n +partition\d\(", ttgir.split("default {")[1])
    assert len(consumers) == 2
    dots = 2 if name == UP else 1
    rows_read, weights_read, rows_counted = [], [], []
    for body in consumers:
        indexed = dict(re.findall(r"(%\S+) = ttg\.memdesc_index (%\w+)\[", body))
        indexed |= {
            new: indexed[old]
            for new, old in re.findall(r"(%\S+) = ttg\.memdesc_trans (%\w+) ", body)
        }
        products = re.findall(r"warp_group_dot (%\w+), (%\w+),", body)
        assert len(products) == dots
        rows_read.append({indexed[rows] for rows, _ in products})
        weights_read.append([indexed[weights] for _, weights in products])
        ranges = re.findall(r"make_range \{.*?end = (\d+) : i32, start = (\d+) : i32\}", body)
        rows_counted.append({(int(a), int(b)) for b, a in ranges if int(b) - int(a) == 64})
    assert len(rows_read[0]) == len(rows_read[1]) == 1
    assert rows_read[0] != rows_read[1]
    assert weights_read[0] == weights_read[1] and len(set(weights_read[0])) == dots
    assert rows_counted == [{(0, 64)}, {(64, 128)}]
    half = r"async_tma_copy_global_to_local \S+\[(%\w+), .*?<64x(?:64xbf16|128xf8\w+), #\w+>+, "
    copies = re.findall(half, loader)
    assert len(copies) == len(set(copies)) == 2, "the loader fetches two different halves"
