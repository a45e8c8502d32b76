"""Cases of the mixture of experts: routing, the two grouped GEMMs, and all of it in one call.

A case fixes how many tokens go to each expert (`routing_counts`); which ones they are is shuffled
by the seed. Nothing is read back from the device: the experts' numbers come from the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from llama4_triton.kernels import grouped_gemm_combine as combine_module
from llama4_triton.kernels import reference
from llama4_triton.kernels.counting_sort import tile_capacity
from llama4_triton.kernels.grouped_gemm import grouped_gemm_swiglu
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.routing import Routing, route, sort_by_expert

from . import cost
from .accuracy import SIGMAS, Exact, Rounded, Within
from .case import F16, F32, Case, Inputs, Outputs, dtype_name, randn, seeded
from .expert_load import Load, make_experts, make_ids, make_logits, make_routing
from .shapes import MAVERICK, MODELS, PARALLEL, ROUTINGS, SCOUT, TOKENS, TextShape

__all__ = ["combine_cases", "grouped_swiglu_cases", "moe_cases", "route_cases", "sort_cases"]

# Wide enough for the blocks that the real widths get, and for several steps of each loop.
SMALL_H, SMALL_F = 640, 512
# z is rounded within `moe`. Where the fp32 sum or the sigmoid differs in its last bits that
# rounding goes the other way, by 2**-7 of z. z is heavy-tailed: the largest may be 0.3 of its row's
# norm, and meet a weight of three sigmas, which moves an output by 7e-3 of the row's rms.
MOE_NOISE = 7e-3 / SIGMAS
ROUTING_BOUNDS = (Exact(), Within(relative=2e-6), Exact(), Exact(), Exact(), Exact())


def _tensors(routing: Routing) -> Outputs:
    return (
        routing.expert_ids,
        routing.expert_weights,
        routing.expert_offsets,
        routing.row_slot,
        routing.tiles,
        routing.tile_count,
    )


def _order(ids: torch.Tensor, weights: torch.Tensor, E: int, block_m: int) -> Outputs:
    """What `_tensors` must be."""
    offsets, row_slot = reference.sort_by_expert(ids, E)
    used = reference.tile_table(offsets, ids.numel(), block_m)
    unused = tile_capacity(ids.numel(), E, block_m) - len(used)
    tiles = torch.tensor([*used, *[(-1, 0, 0)] * unused], dtype=torch.int32)
    weights = torch.where((ids >= 0) & (ids < E), weights, 0.0)
    count = torch.tensor([len(used)], dtype=torch.int32)
    return ids, weights, offsets, row_slot, tiles.view(-1, 3), count


def route_cases(size: str) -> Iterator[Case]:
    if size == "real":
        for shape in MODELS:
            for load in _token_loads(shape, 1):
                yield _route(f"route-{shape.name}-{load.suffix()}", load)
        return
    for T, E, routing in ((37, 16, "skewed"), (70, 128, "uniform"), (300, 16, "one-hot")):
        load = Load(T=T, E=E, routing=routing)
        yield _route(f"route-small-E{E}-{load.suffix()}", load)
    yield _route("route-small-top2", Load(T=23, E=16, top_k=2))
    for dtype in (F16, F32):
        yield _route(f"route-small-{dtype_name(dtype)}", Load(T=23, E=16, dtype=dtype))


def _route(id: str, load: Load) -> Case:
    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            return dict(logits=make_logits(load, device, seed))

    def exact(i: Inputs) -> Outputs:
        ids, weights = reference.route(i["logits"], load.top_k)
        return _order(ids, weights, load.E, load.tile_rows())

    return Case(
        op="route",
        id=id,
        make=make,
        run=lambda i: _tensors(route(i["logits"], load.top_k, block_m=load.block_m)),
        reference=exact,
        bounds=ROUTING_BOUNDS,
        cost_of=lambda: cost.route(
            tokens=load.T,
            experts=load.E,
            top_k=load.top_k,
            itemsize=load.dtype.itemsize,
            block_m=load.tile_rows(),
        ),
    )


def sort_cases(size: str) -> Iterator[Case]:
    if size == "real":
        for shape in MODELS:
            for ep in PARALLEL:
                for load in _token_loads(shape, ep):
                    yield _sort(f"sort_by_expert-{shape.name}-{load.suffix()}", load)
        return
    # The experts of one GPU of 1 to 8, of either model; most slots are elsewhere.
    for E, ep in ((2, 8), (16, 1), (32, 4), (64, 2), (128, 1)):
        load = Load(T=70, E=E, ep=ep, routing="uniform")
        yield _sort(f"sort_by_expert-small-E{E}", load)
    yield _sort("sort_by_expert-small-top2", Load(T=23, E=16, top_k=2))


def _sort(id: str, load: Load) -> Case:
    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            weights = torch.rand(load.T, load.top_k, device=device)
        return dict(ids=make_ids(load, device, seed), weights=weights)

    return Case(
        op="sort_by_expert",
        id=id,
        make=make,
        run=lambda i: _tensors(
            sort_by_expert(i["ids"], i["weights"], load.E, block_m=load.block_m)
        ),
        reference=lambda i: _order(i["ids"], i["weights"], load.E, load.tile_rows()),
        bounds=(Exact(), *[Exact()] * 5),
        cost_of=lambda: cost.sort_by_expert(
            slots=load.T * load.top_k,
            rows=load.rows,
            experts=load.E,
            block_m=load.tile_rows(),
        ),
    )


def _token_loads(shape: TextShape, ep: int) -> Iterator[Load]:
    for T in TOKENS:
        for routing in ROUTINGS:
            yield Load(T=T, E=shape.experts // ep, ep=ep, routing=routing)


def _gemm_loads(size: str) -> Iterator[tuple[str, Load]]:
    """(id without the operator, load) of every grouped GEMM."""
    if size == "real":
        for shape in MODELS:
            for tp in PARALLEL:
                for T in TOKENS:
                    for routing in ROUTINGS:
                        load = Load(T=T, E=shape.experts, F=shape.ffn // tp, routing=routing)
                        yield f"{shape.name}-tp{tp}-{load.suffix()}", load
                    load = Load(T=T, E=shape.experts, F=shape.ffn // tp, layout="vllm")
                    yield f"{shape.name}-tp{tp}-{load.suffix()}", load
            for ep in PARALLEL[1:]:
                for load in _token_loads(shape, ep):
                    yield f"{shape.name}-{load.suffix()}", load
                    if load.routing == "uniform":
                        load = replace(load, layout="vllm")
                        yield f"{shape.name}-{load.suffix()}", load
        yield "scout-tp8-T4096-uniform-k2", Load(T=4096, E=16, F=1024, top_k=2)
        return
    small = dict(E=3, H=SMALL_H, F=SMALL_F)
    for block_m, T in ((16, 21), (32, 40), (64, 80), (128, 150)):
        for layout in ("hf", "vllm"):
            load = Load(T=T, block_m=block_m, layout=layout, routing="skewed", **small)  # type: ignore[arg-type]
            yield f"small-m{block_m}-{layout}", load
    for block_m in (16, 128):
        load = Load(T=45, block_m=block_m, top_k=2, **small)  # type: ignore[arg-type]
        yield f"small-m{block_m}-top2", load
    # Slots that are another GPU's are dropped, and the shared expert is added elsewhere.
    for block_m, T in ((16, 21), (32, 60), (64, 100), (128, 150)):
        for layout in ("hf", "vllm"):
            load = Load(T=T, block_m=block_m, ep=2, layout=layout, **small)  # type: ignore[arg-type]
            yield f"small-m{block_m}-ep2-{layout}", load
    for dtype in (F16, F32):
        load = Load(T=40, block_m=16, dtype=dtype, **small)  # type: ignore[arg-type]
        yield f"small-{dtype_name(dtype)}", load


def grouped_swiglu_cases(size: str) -> Iterator[Case]:
    for id, load in _gemm_loads(size):
        yield _swiglu(f"grouped_gemm_swiglu-{id}", load)


def _swiglu(id: str, load: Load) -> Case:
    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            x = randn(load.T, load.H, dtype=load.dtype, device=device)
            weights = torch.rand(load.T, load.top_k, device=device).mul_(0.8).add_(0.1)
            experts = make_experts(load, device)
        return dict(x=x, experts=experts, routing=make_routing(load, weights, seed))

    def exact(i: Inputs) -> Outputs:
        routing, w = i["routing"], i["experts"].w_gate_up.double()
        x, weights = i["x"].double(), routing.expert_weights
        return (reference.grouped_gemm_swiglu(x, w, routing.expert_ids, weights),)

    return Case(
        op="grouped_gemm_swiglu",
        id=id,
        make=make,
        run=lambda i: (grouped_gemm_swiglu(i["x"], i["experts"], i["routing"]),),
        reference=exact,
        bounds=(Rounded(),),
        cost_of=lambda: cost.grouped_gemm_swiglu(
            tokens_per_expert=load.counts(),
            tokens=load.rows // load.top_k,
            hidden=load.H,
            ffn=load.F,
            itemsize=load.dtype.itemsize,
            block_m=load.tile_rows(),
            slots=load.T * load.top_k,
        ),
    )


def combine_cases(size: str) -> Iterator[Case]:
    for id, load in _gemm_loads(size):
        yield _combine(f"grouped_gemm_combine-{id}", load)


def _combine(id: str, load: Load) -> Case:
    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            z = randn(load.T * load.top_k, load.F, dtype=load.dtype, device=device)
            residual = None
            if load.ep == 1:
                residual = randn(load.T, load.H, dtype=load.dtype, device=device)
            experts = make_experts(load, device)
        weights = torch.ones(load.T, load.top_k, device=device)
        routing = make_routing(load, weights, seed)
        return dict(z=z, experts=experts, routing=routing, residual=residual)

    def exact(i: Inputs) -> Outputs:
        operands = i["z"].double(), i["experts"].w_down.double(), i["routing"].expert_ids
        residual = None if i["residual"] is None else i["residual"].double()
        return (reference.grouped_gemm_combine(*operands, residual),)

    return Case(
        op="grouped_gemm_combine",
        id=id,
        make=make,
        run=lambda i: (combine_module.grouped_gemm_combine(**i),),
        reference=exact,
        bounds=(Rounded(),),
        cost_of=lambda: cost.grouped_gemm_combine(
            tokens_per_expert=load.counts(),
            tokens=load.T,
            hidden=load.H,
            ffn=load.F,
            itemsize=load.dtype.itemsize,
            block_m=load.tile_rows(),
            has_residual=load.ep == 1,
            slots=load.T * load.top_k,
        ),
    )


def moe_cases(size: str) -> Iterator[Case]:
    if size == "real":
        for shape in MODELS:
            for tp in PARALLEL:
                for T in TOKENS:
                    for routing in ROUTINGS:
                        load = Load(T=T, E=shape.experts, F=shape.ffn // tp, routing=routing)
                        yield _moe(f"moe-{shape.name}-tp{tp}-{load.suffix()}", load)
        return
    for E in (SCOUT.experts, MAVERICK.experts):
        yield _moe(f"moe-small-E{E}", Load(T=37, E=E, routing="skewed", H=256, F=128))
    yield _moe("moe-small-top2", Load(T=9, E=16, top_k=2, H=SMALL_H, F=128))


def _moe(id: str, load: Load) -> Case:
    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            x, residual = (randn(load.T, load.H, dtype=load.dtype, device=device) for _ in range(2))
            return dict(
                x=x,
                router=make_logits(load, device, seed),
                experts=make_experts(load, device),
                residual=residual,
            )

    def exact(i: Inputs) -> Outputs:
        ids, weights = reference.route(i["router"], load.top_k)
        w_gate_up, w_down = i["experts"].w_gate_up.double(), i["experts"].w_down.double()
        z = reference.grouped_gemm_swiglu(i["x"].double(), w_gate_up, ids, weights)
        z = z.to(load.dtype).double()
        return (reference.grouped_gemm_combine(z, w_down, ids, i["residual"].double()),)

    return Case(
        op="moe",
        id=id,
        make=make,
        run=lambda i: (moe(**i, top_k=load.top_k),),
        reference=exact,
        bounds=(Rounded(noise=MOE_NOISE),),
        cost_of=lambda: cost.moe(
            tokens_per_expert=load.counts(),
            tokens=load.T,
            hidden=load.H,
            ffn=load.F,
            itemsize=load.dtype.itemsize,
            has_residual=True,
        ),
    )
