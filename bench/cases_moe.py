"""Cases of the whole mixture-of-experts layer: router, routing, experts and shared expert.

In the three regimes of moe.py, for every weight format, on one GPU of a tensor-parallel or of an
expert-parallel group. x and the router's weights are made so that the load is what is chosen
(expert_load.py:make_router).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from llama4_triton.kernels import _launch, reference
from llama4_triton.kernels.moe import moe

from . import cost_experts as cost
from .accuracy import SIGMAS, Rounded
from .case import BF16, F16, F32, Case, Inputs, Outputs, dtype_name, randn, seeded
from .cases_experts import PROMOTED, X_SCALES
from .expert_load import (
    Load,
    make_experts,
    make_ids,
    make_logits,
    make_router,
    make_shared,
)
from .expert_weights import FORMATS
from .shapes import MODELS, PARALLEL, ROUTINGS, TOKENS

__all__ = ["moe_cases"]

# z is rounded within `moe`. Where the fp32 sum or the sigmoid differs in its last bits that
# rounding goes the other way, by 2**-7 of z. z is heavy-tailed: the largest may be 0.3 of its row's
# norm, and meet a weight of three sigmas, which moves an output by 7e-3 of the row's rms.
MOE_NOISE = 7e-3 / SIGMAS
# And before e4m3 experts to e4m3: where its largest of 128 is rounded the other way, all 128 have
# another scale, and one in 16 of them another neighbour, 2**-4 away.
E4M3_NOISE = 5e-3


def moe_cases(size: str) -> Iterator[Case]:
    if size == "real":
        yield from _real_cases()
        return
    # Every regime and tile that the models' layout ships with. More slices of H where that is wide.
    for T, E, H in (
        (1, 16, 1280), (4, 16, 640), (1, 128, 1280), (4, 128, 640),
        (8, 16, 640), (40, 16, 640), (256, 16, 640), (512, 16, 640), (8, 128, 640), (40, 128, 640),
        (600, 16, 640), (600, 128, 640), (800, 48, 640), (700, 3, 640),
    ):  # fmt: skip
        yield _moe(f"moe-small-hf-T{T}-E{E}", Load(T=T, E=E, H=H, F=128))
    for T, E in ((4, 16), (40, 16), (700, 3)):
        for format in FORMATS:
            # Strides of block scales are multiples of 16, as the real ones, at these sizes.
            H, F = (1024, 1024 if T == 4 else 256) if format == "e4m3_block" else (640, 256)
            load = Load(T=T, E=E, H=H, F=F, format=format, layout="vllm")
            yield _moe(f"moe-small-{format}-T{T}", load)
    for T, E in ((4, 128), (40, 128), (600, 16)):
        load = Load(T=T, E=E, H=640, F=256, format="e4m3_channel", layout="vllm")
        yield _moe(f"moe-small-e4m3_channel-T{T}-E{E}", load)
    for T in (4, 40, 700):
        load = Load(T=T, E=3 if T == 700 else 16, H=640, F=128)
        yield _moe(f"moe-small-topk_ids-T{T}", load, routed_by="topk_ids")
    for format in X_SCALES:
        load = Load(T=90, E=3, H=640, F=256, format=format)
        yield _moe(f"moe-small-{format}-a16", load, a16=True)
    load = Load(T=700, E=3, H=640, F=128, format="e4m3_channel")
    yield _moe("moe-small-e4m3_channel-fast", load, fast_accum=True)
    load = Load(T=21, E=8, H=640, F=128, ep=2)
    yield _moe("moe-small-ep2", load, has_shared=False)
    yield _moe("moe-small-logits", Load(T=21, E=8, H=640, F=128), routed_by="logits")
    yield _moe("moe-small-invariant", Load(T=21, E=8, H=640, F=128), batch_invariant=True)
    for T in (3, 21):
        load = Load(T=T, E=8, H=640, F=128)
        yield _moe(f"moe-small-score-bf16-T{T}", load, score_dtype=BF16)
    yield _moe("moe-small-top2", Load(T=9, E=16, top_k=2, H=640, F=128))
    for dtype in (F16, F32):
        yield _moe(f"moe-small-{dtype_name(dtype)}", Load(T=9, E=4, H=640, F=128, dtype=dtype))


def _real_cases() -> Iterator[Case]:
    for shape in MODELS:
        for tp in PARALLEL:
            for T in TOKENS:
                for routing in ROUTINGS:
                    load = Load(T=T, E=shape.experts, F=shape.ffn // tp, routing=routing)
                    yield _moe(f"moe-{shape.name}-tp{tp}-{load.suffix()}", load)
        for T in TOKENS:
            for routing in ROUTINGS:
                for format in FORMATS[1:]:
                    load = Load(
                        T=T, E=shape.experts, F=shape.ffn // 8, routing=routing, format=format
                    )
                    yield _moe(f"moe-{shape.name}-tp8-{load.suffix()}", load)
        for ep in PARALLEL[1:]:
            for T in TOKENS:
                load = Load(T=T, E=shape.experts // ep, ep=ep, layout="vllm")
                yield _moe(f"moe-{shape.name}-{load.suffix()}", load, has_shared=False)


def _moe(
    id: str,
    load: Load,
    *,
    has_shared: bool = True,
    routed_by: str = "w_router",
    a16: bool = False,
    fast_accum: bool = False,
    batch_invariant: bool = False,
    score_dtype: torch.dtype | None = None,
) -> Case:
    """a16: as on a GPU without e4m3, where bytes are decoded."""
    in_e4m3 = load.format in X_SCALES and not a16

    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            x, w_router = make_router(load, device, seed)
            routed = dict(w_router=w_router)
            if routed_by == "logits":
                routed = dict(logits=make_logits(load, device, seed))
            elif routed_by == "topk_ids":
                weights = torch.rand(load.T, load.top_k, device=device)
                routed = dict(topk_ids=make_ids(load, device, seed), topk_weights=weights)
            residual = None  # the models have none where there is a shared expert
            if not has_shared:
                residual = randn(load.T, load.H, dtype=load.dtype, device=device)
            return dict(
                x=x,
                experts=make_experts(load, device),
                shared=make_shared(load, device) if has_shared else None,
                residual=residual,
                **routed,
            )

    def run(i: Inputs) -> Outputs:
        options: dict[str, Any] = dict(
            fast_accum=fast_accum, batch_invariant=batch_invariant, score_dtype=score_dtype
        )
        kept = (0, load.E) if load.ep > 1 else None
        with _as_on_a_gpu(i["x"].device, a16):
            return (moe(**i, top_k=load.top_k, expert_range=kept, **options),)

    def exact(i: Inputs) -> Outputs:
        if routed_by == "topk_ids":
            chosen = reference.local_experts(i["topk_ids"], i["topk_weights"], (0, load.E))
        else:
            logits = i.get("logits")
            if logits is None:
                logits = (i["x"].double() @ i["w_router"].double().T).to(load.dtype)
            chosen = reference.route(
                logits, load.top_k, expert_range=(0, load.E), score_dtype=score_dtype
            )
        out = reference.moe_layer(
            i["x"], i["experts"], *chosen, shared=i["shared"], residual=i["residual"],
            activation=X_SCALES[load.format] if in_e4m3 else None,
            z_activation="group" if in_e4m3 else None, out_dtype=torch.float64,
        )  # fmt: skip
        return (out,)

    noise = E4M3_NOISE if in_e4m3 else MOE_NOISE
    fp8_sum = 0 if not in_e4m3 else load.H if fast_accum else PROMOTED
    # Up to 512 tokens the shared expert's result is rounded before the routed one is added.
    twice = has_shared and load.T <= 512 and not batch_invariant
    return Case(
        op="moe",
        id=id,
        make=make,
        run=run,
        reference=exact,
        bounds=(Rounded(roundings=2 if twice else 1, noise=noise, fp8_sum=fp8_sum),),
        cost_of=lambda: cost.moe(
            tokens_per_expert=load.counts(),
            tokens=load.T,
            hidden=load.H,
            ffn=load.F,
            itemsize=load.dtype.itemsize,
            format=load.format,
            has_residual=not has_shared,
            has_shared=has_shared,
            routed_by=routed_by,
            experts=load.E * load.ep,
            top_k=load.top_k,
        ),
    )


def _as_on_a_gpu(device: torch.device, a16: bool) -> contextlib.AbstractContextManager[None]:
    """Choose as on the GPU, or as on an H100 without one; a16: as if it were an sm_80."""
    properties = _launch.SM_90 if device.type == "cpu" else _launch.device_properties(device)
    return _launch.assume_device(replace(properties, capability=(8, 0)) if a16 else properties)
