"""A full-size layer of the mixture of experts, recorded: launches and workspace, exactly.

From the normed x to out, with router, quantisation, routing and shared expert, on one of 8 GPUs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llama4_triton.bench import cost_experts as cost
from llama4_triton.bench.expert_weights import FORMATS
from llama4_triton.bench.moe_layer import MoeLayer
from llama4_triton.bench.shapes import MAVERICK, MODELS, SCOUT, routing_counts

pytestmark = pytest.mark.no_kernels

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
ONE_PROGRAM = (MANY[0], "_route_kernel", *MANY[4:])  # one program still sorts all slots
LAUNCHES = {
    1: FEW, 2: FEW, 3: FEW, 4: FEW, 5: SOME, 16: SOME, 64: SOME, 65: SOME, 512: SOME,
    4096: MANY, 16_384: MANY,
}  # fmt: skip

EVERY = [
    pytest.param(shape, format, id=f"{shape.name}-{format}")
    for shape in MODELS
    for format in FORMATS
]


def names(layer, **options):
    recording = layer.record(**options)
    assert not recording.aten, [str(call) for call in recording.aten]
    return tuple(launch.name for launch in recording.launches)


@pytest.mark.parametrize("shape, format", EVERY)
def test_three_launches_then_four_then_six(shape, format):
    for T, expected in LAUNCHES.items():
        layer = MoeLayer(shape=shape, T=T, format=format)
        assert names(layer) == expected, T
    for T in (513, 1024, 2048):
        assert names(replace(layer, T=T)) in (MANY, ONE_PROGRAM)
    assert [len(FEW), len(SOME), len(MANY)] == [3, 4, 6]


@pytest.mark.parametrize("layout, dtype", [("hf", torch.bfloat16), ("vllm", torch.float16)])
def test_layouts_and_types_launch_the_same(layout, dtype):
    for T in (1, 64, 4096):
        layer = MoeLayer(shape=SCOUT, T=T, layout=layout, dtype=dtype)
        assert names(layer) == LAUNCHES[T]
        assert (
            names(replace(layer, fast_accum=True, format="e4m3_channel", layout="vllm"))
            == (LAUNCHES[T])
        )


def test_a_gpu_of_an_expert_parallel_group_launches_no_more():
    for T in (1, 64, 4096):
        layer = MoeLayer(shape=MAVERICK, tp=1, ep=8, T=T, has_shared=False)
        assert len(names(layer)) <= len(LAUNCHES[T])


def test_a_routing_made_elsewhere_saves_the_router():
    """But e4m3 experts want x quantised, for which there is then no launch to join."""
    for T in (1, 4, 64, 4096):
        layer = MoeLayer(shape=SCOUT, T=T, routed_by="topk_ids")
        assert len(names(layer)) <= len(LAUNCHES[T])
        assert len(names(replace(layer, routed_by="logits"))) <= len(LAUNCHES[T])


def test_other_gpus_launch_as_many():
    """sm_80 and sm_86 decode e4m3 weights; sm_100 has more SMs and so more slices."""
    from llama4_triton.autotune.launches import DEVICES

    for arch in ("sm_80", "sm_86", "sm_89", "sm_100"):
        for format in ("plain", "e4m3_channel", "e4m3_block"):
            for T in (4, 64, 4096):
                layer = MoeLayer(shape=SCOUT, T=T, format=format)
                assert names(layer, device=DEVICES[arch]) == LAUNCHES[T], (arch, format)


def test_an_invariant_layer_takes_the_steps_of_a_prefill():
    for T in (1, 64, 4096):
        layer = MoeLayer(shape=SCOUT, T=T, batch_invariant=True)
        assert names(layer) == (MANY if T == 4096 else ONE_PROGRAM)


# Workspace: what is neither x, out, weights, z nor the tables of the routing.


def layer_cost(layer, routing):
    return cost.moe(
        tokens_per_expert=routing_counts(routing, layer.T, layer.E),
        tokens=layer.T,
        hidden=layer.shape.hidden,
        ffn=layer.F,
        itemsize=2,
        format=layer.format,
        has_shared=True,
        routed_by="w_router",
    )


def workspace(layer):
    """Bytes allocated beyond out, z and the tables; x in e4m3 counts as x."""
    T, F, H, E = layer.T, layer.F, layer.shape.hidden, layer.E
    z = {(T, F), (T, F // 128)}
    x = {(T, H), (T,), (T, H // 128)}
    ids = {(T, 1), (T,), (E + 1,), (1,)}
    return sum(
        a.nbytes
        for a in layer.record().allocations
        if tuple(a.shape) not in z | x | ids
        and not (a.dtype == torch.int32 and a.shape[-1:] == (4,))
    )


@pytest.mark.parametrize("shape, format", EVERY)
@pytest.mark.parametrize("T", [1, 2, 4, 8, 16, 64])
def test_workspace_of_a_decode_step(shape, format, T):
    """Against the bytes of the step that has fewest: all tokens with one expert."""
    layer = MoeLayer(shape=shape, T=T, format=format)
    limit = 0.08 if format == "plain" else 0.15
    assert workspace(layer) <= limit * layer_cost(layer, "one-hot").bytes


@pytest.mark.parametrize("shape, format", EVERY)
def test_a_prefill_has_no_workspace(shape, format):
    """But the logits of the router, and counts of experts, which are tables of the routing."""
    for T in (4096, 16_384):
        layer = MoeLayer(shape=shape, T=T, format=format)
        logits = 4 * T * layer.E
        counts = 2 * 4 * 256 * max(16, layer.E)  # and where each program's begin
        assert workspace(layer) <= logits + counts
