"""Full-size steps, recorded: how many launches, which ATen calls, what memory; the shipped set."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from llama4_triton.autotune.recorder import record
from llama4_triton.bench import steps
from llama4_triton.bench.shapes import (
    MAVERICK,
    MODELS,
    PARALLEL,
    SCOUT,
    WORKLOADS,
    Workload,
    linears,
)
from llama4_triton.bench.steps import (
    by_binary,
    model_launches,
    rank_config,
    record_step,
    shipped_launches,
    two_layers,
)
from llama4_triton.kernels._launch import MAX_GRID, MAX_GRID_YZ
from llama4_triton.kernels.rms_norm import rms_norm
from llama4_triton.model.cache import KVCache

pytestmark = pytest.mark.no_kernels

KERNELS = Path(__file__).parents[2] / "kernels"


def workload(id):
    (found,) = [w for w in WORKLOADS if w.id == id]
    return found


# Of one full-size step on one of 8 GPUs: launches by kernel, and GEMMs that are cuBLAS's.
# A layer has two norms, QKV as three GEMMs, one rotation and cache write, attention, O; a MoE layer
# 3, 4 or 6 launches; a dense layer three GEMMs and a SwiGLU. The embedding, and rows and norm of
# the last.
PER_LAYER = {"_rms_norm_kernel": 2, "_rope_and_cache_kernel": 1}
FEW = ("_router_kernel", "_few_up_kernel", "_few_down_kernel")
SOME = (
    "_router_kernel",
    "_route_and_up_kernel",
    "_up_and_down_kernel",
    "_grouped_gemm_scatter_kernel",
)
MANY = (
    "_router_kernel",
    "_top_k_kernel",
    "_scan_kernel",
    "_scatter_kernel",
    "_grouped_gemm_swiglu_kernel",
    "_grouped_gemm_scatter_kernel",
)
DECODE = ("_attention_decode_kernel", "_attention_merge_kernel")
SCHEDULES = {"_attention_decode_schedule_kernel": 2}  # of local and of global layers, once a step
FULL = {
    "scout-tp8-decode-B1-T1-8k": (48, FEW, DECODE),
    "scout-tp8-prefill-B1-T16384-16k": (48, MANY, ("_attention_prefill_kernel",)),
    "maverick-tp8-decode-B64-T64-8k": (24, SOME, DECODE),
    "maverick-tp8-prefill-B8-T4096-512": (24, MANY, ("_attention_prefill_kernel",)),
}


@pytest.fixture(scope="module")
def recordings():
    return {id: record_step(workload(id)) for id in FULL}


@pytest.mark.parametrize("id", FULL)
def test_the_launches_of_a_step(recordings, id):
    moe_layers, routed, attention = FULL[id]
    want = Counter({name: 48 * count for name, count in PER_LAYER.items()})
    want += Counter(dict.fromkeys(routed, moe_layers)) + Counter(dict.fromkeys(attention, 48))
    want += Counter(SCHEDULES if attention is DECODE else {})
    want += Counter({"_swiglu_kernel": 48 - moe_layers})
    want += Counter({"_gather_rows_kernel": 3, "_rms_norm_kernel": 1})
    if attention != DECODE:  # for all local layers, and for all global ones
        want += Counter({"_prefill_schedule_kernel": 2})
    assert Counter(launch.name for launch in recordings[id].launches) == want


@pytest.mark.parametrize("id", FULL)
def test_only_dense_gemms_are_pytorch_s(recordings, id):
    moe_layers, _, _ = FULL[id]
    gemms = 48 * 4 + (48 - moe_layers) * 3 + 1  # QKV and O; dense MLPs; the head
    assert Counter(call.name for call in recordings[id].aten) == {"aten.mm": gemms}


@pytest.mark.parametrize("id", FULL)
def test_grids_are_what_cuda_launches(recordings, id):
    for launch in recordings[id].launches:
        assert 0 < math.prod(launch.grid) <= MAX_GRID
        assert all(size <= MAX_GRID_YZ for size in launch.grid[1:])


def test_a_grid_that_cuda_refuses_raises():
    with pytest.raises(ValueError, match="grid must have a product of at most 2147483647"):
        record(
            lambda: rms_norm(
                torch.empty(2**31, 16, device="cuda"), torch.empty(16, device="cuda"), 1e-5
            )
        )


def test_the_list_is_the_same_each_time(recordings):
    id = "scout-tp8-decode-B1-T1-8k"
    assert record_step(workload(id)) == recordings[id]


def test_decode_workspaces_are_their_formula(recordings):
    recording = recordings["scout-tp8-decode-B1-T1-8k"]
    items = {x.grid[0] for x in recording.launches if x.name == "_attention_decode_kernel"}
    assert items == {8192 // 512}  # one KV head
    numel = 16 * 40 // 8 * (128 + 1)
    fp32 = [a for a in recording.allocations if a.dtype == torch.float32]
    assert sum(a.shape == (numel,) for a in fp32) == 48
    # Besides: lse of attention, routing weights, what top-1 does not use of workspaces and scales,
    # slices of the router's logits and of gate and up, of the routed and of the shared expert.
    others = {(1, 5), (1, 1), (0,), (8, 1, 16), (2, 2, 2 * 1024)}
    assert {a.shape for a in fp32} == {(numel,), *others}


@pytest.mark.parametrize("id", FULL)
def test_no_allocation_exceeds_the_activations(recordings, id):
    """T rows of the widest activation, or the logits: nothing grows with the context."""
    w = workload(id)
    width = max(w.shape.hidden, 2 * w.shape.ffn // w.tp, 2 * w.shape.ffn_dense // w.tp)
    limit = max(2 * w.tokens * width, 2 * len(w.new_tokens) * w.shape.vocab, 1 << 20)
    assert max(a.nbytes for a in recordings[id].allocations) <= limit


def test_the_step_is_that_of_the_cache():
    """_step_and_cache knows the shapes and strides that KVCache.step makes."""
    config = two_layers(rank_config(SCOUT, 8))
    small = Workload(
        shape=SCOUT, tp=8, kind="mixed", new_tokens=(200, 1, 1), cached_tokens=(70, 1055, 64)
    )
    want, want_cache = steps._step_and_cache(small, config, torch.bfloat16, device="meta")
    cache = KVCache.for_lengths(config, [270, 1056, 65], step_tokens=200, device="meta")
    for row, cached in enumerate(small.cached_tokens):
        cache.step([[1] * cached], rows=[row])
    got = cache.step([[1] * new for new in small.new_tokens])
    for name in type(got).__slots__:
        a, b = getattr(got, name), getattr(want, name)
        if isinstance(a, torch.Tensor):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name
        else:
            assert a == b, name
    for layer in range(2):
        a, b = cache.layer(layer, got), want_cache.layer(layer, want)
        assert a.k_cache.stride() == b.k_cache.stride() and a.v_cache.dtype == b.v_cache.dtype


def test_copies_per_step_are_counted(monkeypatch):
    sent = []
    monkeypatch.setattr(KVCache, "_send", lambda self, host: sent.append(host) or host)
    cache = KVCache.for_lengths(two_layers(rank_config(SCOUT, 8)), [64], device="meta")
    cache.step([[1, 2, 3]])
    assert len(sent) == steps.COPIES_PER_STEP


def test_a_rank_has_its_share():
    for shape in MODELS:
        for tp in PARALLEL:
            config = rank_config(shape, tp)
            qkv = config.num_attention_heads + 2 * config.num_key_value_heads
            assert linears(shape, tp)["qkv"] == (qkv * config.head_dim, config.hidden_size)
            assert linears(shape, tp)["shared_down"][1] == config.intermediate_size
    assert rank_config(MAVERICK, 8).intermediate_size_mlp == MAVERICK.ffn_dense // 8


# Off by default, for engines, or for other models; variants.py and tests of their own gate them.
NO_MODEL_LAUNCHES = {
    "_sum_slots_kernel", "_shared_down_kernel", "_grouped_gemm_swiglu_ws_kernel",
    "_grouped_gemm_scatter_ws_kernel", "_rms_norm_quantize_kernel", "_convert_layout_kernel",
    "_merge_attention_kernel", "_quantize_groupwise_kernel",
}  # fmt: skip


@pytest.mark.compiled_only
def test_the_shipped_set():
    shipped = shipped_launches()
    assert len({launch.binary() for launch in shipped}) == len(shipped) <= 250
    assert not [launch.misaligned() for launch in shipped if launch.misaligned()]
    written = {
        name
        for file in KERNELS.glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert {launch.name for launch in shipped} == written - NO_MODEL_LAUNCHES


def _random_steps(shape, count):
    """Batches, prompts and contexts of any length, up to the model's."""
    draw = random.Random(0)
    for _ in range(count):
        decode = draw.random() < 0.5
        B = draw.choice((1, 2, 3, 7, 16, 33, 64, 100, 256, 511))
        longest = int(shape.context ** draw.uniform(0.3, 1.0)) // (B if B > 16 else 1)
        new = (1,) * B if decode else tuple(draw.randrange(1, 300) for _ in range(B))
        cached = tuple(draw.randrange(max(1, longest)) for _ in range(B))
        yield Workload(shape=shape, tp=8, kind="mixed", new_tokens=new, cached_tokens=cached)


@pytest.mark.compiled_only
@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_the_set_is_closed(shape):
    """100 seeded steps of each model ask for no binary that was not compiled beforehand."""
    known = {launch.binary() for launch in shipped_launches()}
    steps_of_any_length = list(_random_steps(shape, 100))
    asked = {launch.binary() for launch in model_launches(shape, 8, workloads=steps_of_any_length)}
    assert asked <= known
    assert len(asked) > 10


@pytest.mark.compiled_only
@pytest.mark.long
@pytest.mark.parametrize("w", WORKLOADS, ids=lambda w: w.id)
def test_whole_models_ask_for_nothing_else(w):
    """Two layers and two of the four degrees of parallelism stand for all."""
    shipped = by_binary(shipped_launches())
    assert by_binary(record_step(w).launches).keys() <= shipped.keys()
