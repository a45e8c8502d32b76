"""Cases of the experts: the two grouped GEMMs, in every weight format.

A case fixes how many tokens go to each expert (`routing_counts`); which ones they are is shuffled
by the seed. Nothing is read back from the device: the experts' numbers come from the host. The
whole layer is in cases_moe.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from llama4_triton.kernels import grouped_gemm_combine as combine_module
from llama4_triton.kernels import reference
from llama4_triton.kernels.grouped_gemm import grouped_gemm_swiglu

from . import cost_experts as cost
from .accuracy import E4M3_NEIGHBOUR, E4M3_SCALE, Rounded
from .case import F16, F32, Case, Inputs, Outputs, dtype_name, randn, seeded
from .cases_routing import token_loads
from .expert_load import Load, make_experts, make_routing
from .expert_weights import FORMATS
from .shapes import MODELS, PARALLEL, ROUTINGS, TOKENS

__all__ = ["SMALL", "combine_cases", "grouped_swiglu_cases"]

# Wide enough for the blocks that the real widths get, for several steps of each loop, and with the
# strides of scales as divisible by 16 as the real ones.
SMALL: dict[str, Any] = dict(E=3, H=1280, F=1024)
X_SCALES = {"e4m3_channel": "row", "e4m3_block": "group"}
PROMOTED = 128  # e4m3 products between additions in fp32


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
            for T in TOKENS:
                for format in FORMATS[1:]:
                    load = Load(T=T, E=shape.experts, F=shape.ffn // 8, format=format)
                    yield f"{shape.name}-tp8-{load.suffix()}", load
            for ep in PARALLEL[1:]:
                for load in token_loads(shape, ep):
                    yield f"{shape.name}-{load.suffix()}", load
                    if load.routing == "uniform":
                        load = replace(load, layout="vllm")
                        yield f"{shape.name}-{load.suffix()}", load
        yield "scout-tp8-T4096-uniform-k2", Load(T=4096, E=16, F=1024, top_k=2)
        return
    for block_m, T in ((16, 21), (32, 40), (64, 80), (128, 150)):
        load = Load(T=T, block_m=block_m, layout="vllm", routing="skewed", **SMALL)
        yield f"small-m{block_m}-vllm", load
    for block_m, T in ((16, 21), (64, 80)):
        for format in FORMATS[1:]:
            load = Load(T=T, block_m=block_m, format=format, routing="skewed", **SMALL)
            yield f"small-m{block_m}-{format}", load
    yield "small-m16-top2", Load(T=45, block_m=16, top_k=2, **SMALL)
    # Slots that are another GPU's are dropped, and the shared expert is added elsewhere.
    yield "small-m128-ep2-hf", Load(T=150, block_m=128, ep=2, **SMALL)
    for dtype in (F16, F32):
        yield f"small-{dtype_name(dtype)}", Load(T=40, block_m=16, dtype=dtype, **SMALL)


def grouped_swiglu_cases(size: str) -> Iterator[Case]:
    for id, load in _gemm_loads(size):
        yield _swiglu(f"grouped_gemm_swiglu-{id}", load)
    if size == "small":
        for format in X_SCALES:  # bytes that are decoded, for x of 16 bits
            load = Load(T=21, block_m=16, format=format, **SMALL)
            yield _swiglu(f"grouped_gemm_swiglu-small-m16-{format}-a16", load, a16=True)
        for format in X_SCALES:
            load = Load(T=150, block_m=128, format=format, **SMALL)
            id = f"grouped_gemm_swiglu-small-m128-{format}-z-e4m3"
            yield _swiglu(id, load, quantize_z=True)
            yield _swiglu(f"{id}-fast", load, quantize_z=True, fast_accum=True)


def _quantized(x: torch.Tensor, how: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    if how is None:
        return x, None
    quantizer = {"row": reference.quantize_rowwise, "group": reference.quantize_groupwise}[how]
    return quantizer(x)


def _swiglu(
    id: str, load: Load, *, a16: bool = False, quantize_z: bool = False, fast_accum: bool = False
) -> Case:
    """a16: x of 16 bits also for e4m3 weights."""
    x_quantized = None if a16 else X_SCALES.get(load.format)

    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            x = randn(load.T, load.H, dtype=load.dtype, device=device)
            x, x_scale = _quantized(x, x_quantized)
            weights = torch.rand(load.T, load.top_k, device=device).mul_(0.8).add_(0.1)
            experts = make_experts(load, device)
        routing = make_routing(load, weights, seed)
        return dict(x=x, experts=experts, routing=routing, x_scale=x_scale)

    def run(i: Inputs) -> Outputs:
        out = grouped_gemm_swiglu(**i, quantize_z=quantize_z, fast_accum=fast_accum)
        return (out,) if isinstance(out, torch.Tensor) else out

    def exact(i: Inputs) -> Outputs:
        routing = i["routing"]
        z = reference.grouped_gemm_swiglu(
            i["x"], i["experts"], routing.expert_ids, routing.expert_weights,
            x_scale=i["x_scale"], out_dtype=torch.float64,
        )  # fmt: skip
        return reference.quantize_groupwise(z.to(load.dtype)) if quantize_z else (z,)

    fp8_sum = 0 if x_quantized is None else load.H if fast_accum else PROMOTED
    # z is a product of two fp32 sums, each with an error of its own.
    two_sums = Rounded(fp8_sum=fp8_sum, fp32=2e-6)
    return Case(
        op="grouped_gemm_swiglu",
        id=id,
        make=make,
        run=run,
        reference=exact,
        bounds=(E4M3_NEIGHBOUR, E4M3_SCALE) if quantize_z else (two_sums,),
        cost_of=lambda: cost.grouped_gemm_swiglu(
            tokens_per_expert=load.counts(),
            tokens=load.rows // load.top_k,
            hidden=load.H,
            ffn=load.F,
            itemsize=load.dtype.itemsize,
            block_m=load.tile_rows(),
            slots=load.T * load.top_k,
            format=load.format,
            x_quantized=x_quantized,
            z_quantized=quantize_z,
        ),
    )


def combine_cases(size: str) -> Iterator[Case]:
    for id, load in _gemm_loads(size):
        yield _combine(f"grouped_gemm_combine-{id}", load)
    if size == "small":
        for format in X_SCALES:
            load = Load(T=150, block_m=128, format=format, **SMALL)
            yield _combine(f"grouped_gemm_combine-small-m128-{format}-z-e4m3", load, z_e4m3=True)


def _combine(id: str, load: Load, *, z_e4m3: bool = False) -> Case:
    in_e4m3 = load.format in X_SCALES

    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            z = randn(load.T * load.top_k, load.F, dtype=load.dtype, device=device)
            z, z_scale = _quantized(z, "group" if z_e4m3 else None)
            residual = None
            if load.ep == 1:
                residual = randn(load.T, load.H, dtype=load.dtype, device=device)
            experts = make_experts(load, device)
        weights = torch.ones(load.T, load.top_k, device=device)
        routing = make_routing(load, weights, seed)
        return dict(z=z, experts=experts, routing=routing, residual=residual, z_scale=z_scale)

    def exact(i: Inputs) -> Outputs:
        # z of 16 bits is quantised on its way to e4m3 weights.
        out = reference.grouped_gemm_combine(
            i["z"], i["experts"], i["routing"].expert_ids, i["residual"], z_scale=i["z_scale"],
            activation="group" if in_e4m3 and not z_e4m3 else None, out_dtype=torch.float64,
        )  # fmt: skip
        return (out,)

    return Case(
        op="grouped_gemm_combine",
        id=id,
        make=make,
        run=lambda i: (combine_module.grouped_gemm_combine(**i),),
        reference=exact,
        bounds=(Rounded(fp8_sum=PROMOTED if in_e4m3 else 0),),
        cost_of=lambda: cost.grouped_gemm_combine(
            tokens_per_expert=load.counts(),
            tokens=load.T,
            hidden=load.H,
            ffn=load.F,
            itemsize=load.dtype.itemsize,
            block_m=load.tile_rows(),
            has_residual=load.ep == 1,
            slots=load.T * load.top_k,
            format=load.format,
            z_quantized=z_e4m3,
        ),
    )
