"""Cases of the router and of routing: logits, choices, the order of slots by experts.

A case fixes how many tokens go to each expert (`routing_counts`); which ones they are is shuffled
by the seed. Nothing is read back from the device: the experts' numbers come from the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels import router as router_module
from llama4_triton.kernels._launch import device_properties
from llama4_triton.kernels._sizes import flat
from llama4_triton.kernels.counting_sort import tile_capacity
from llama4_triton.kernels.router import router
from llama4_triton.kernels.routing import Routing, default_config, route, sort_by_expert

from . import cost_experts as cost
from .accuracy import Bound, Exact, Rounded, Within
from .case import BF16, F16, F32, Case, Inputs, Outputs, dtype_name, randn, seeded
from .expert_load import Load, make_ids, make_logits
from .shapes import MODELS, PARALLEL, ROUTINGS, SCOUT, TOKENS, TextShape

__all__ = ["route_cases", "router_cases", "sort_cases", "token_loads"]

ROUTING_BOUNDS = (Exact(), Within(relative=2e-6), Exact(), Exact(), Exact(), Exact())


def token_loads(shape: TextShape, ep: int) -> Iterator[Load]:
    for T in TOKENS:
        for routing in ROUTINGS:
            yield Load(T=T, E=shape.experts // ep, ep=ep, routing=routing)


def router_cases(size: str) -> Iterator[Case]:
    if size == "real":
        for shape in MODELS:
            for T in TOKENS:
                for quantize in (None, "row", "group"):
                    yield _router(shape.name, T, shape.experts, quantize=quantize)
        return
    # Every tile that token counts get, on few tokens; small E and large.
    for E in (16, 128):
        for like in (4, 256, 16_384):
            for quantize in (None, "row", "group"):
                yield _router("small", 37, E, H=640, quantize=quantize, like=like)
    for dtype in (F16, F32):
        yield _router(f"small-{dtype_name(dtype)}", 5, 16, H=640, dtype=dtype)


def _router(
    name: str,
    T: int,
    E: int,
    *,
    H: int = SCOUT.hidden,
    quantize: str | None = None,
    dtype: torch.dtype = BF16,
    like: int | None = None,
) -> Case:
    """like: the number of tokens whose default configuration is taken."""
    tokens = like or T
    split_k = router_module.default_split(tokens, E)

    def config(device: torch.device) -> router_module.RouterConfig:
        properties = device_properties(device)
        options: dict[str, Any] = dict(itemsize=dtype.itemsize, properties=properties)
        return router_module.default_config(tokens, E, H, **options)

    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            x = randn(T, H, dtype=dtype, device=device)
            w_router = randn(E, H, dtype=dtype, device=device).mul_(H**-0.5)
        return dict(x=x, w_router=w_router, config=config(device))

    def run(i: Inputs) -> Outputs:
        out = router(**i, split_k=split_k, quantize=quantize)
        made = (out.partials, out.x_q, out.x_scale)
        return tuple(tensor for tensor in made if tensor is not None)

    def exact(i: Inputs) -> Outputs:
        x, w_router = i["x"].double(), i["w_router"].double()
        config = flat(i["config"])
        splits = router_module.num_slices(H, split_k, i["config"].BLOCK_K)
        columns = router_module.slice_columns(x, w_router, splits, config)
        partials = reference.router(x, w_router, columns)
        if quantize is None:
            return (partials,)
        quantizer = {"row": reference.quantize_rowwise, "group": reference.quantize_groupwise}
        return partials, *quantizer[quantize](i["x"])

    bounds: tuple[Bound, ...] = (Rounded(),)
    splits = router_module.num_slices(H, split_k, 128 if tokens <= 4096 else 64)
    id = f"router-{name}-E{E}-T{T}" + (f"-like-T{like}" if like else "")
    return Case(
        op="router",
        id=id + (f"-{quantize}" if quantize else ""),
        make=make,
        run=run,
        reference=exact,
        bounds=bounds + ((Exact(), Exact()) if quantize else ()),
        cost_of=lambda: cost.router(
            tokens=T,
            experts=E,
            hidden=H,
            itemsize=dtype.itemsize,
            splits=splits,
            quantized=quantize,
        ),
    )


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
    """What `_tensors` must be, of local ids; -1 is dropped."""
    offsets, row_slot = reference.sort_by_expert(ids, E)
    used = reference.tile_table(offsets, ids.numel(), block_m)
    unused = tile_capacity(ids.numel(), E, block_m) - len(used)
    tiles = torch.tensor([*used, *[(-1, 0, 0, 0)] * unused], dtype=torch.int32)
    count = torch.tensor([len(used)], dtype=torch.int32)
    return ids, weights, offsets, row_slot, tiles.view(-1, 4), count


def route_cases(size: str) -> Iterator[Case]:
    if size == "real":
        for shape in MODELS:
            for load in token_loads(shape, 1):
                yield _route(f"route-{shape.name}-{load.suffix()}", load)
        return
    # Each block of tokens that counts get: in one program, and in three launches.
    for E in (16, 128):
        for like in (4, 64, 512, 4096):
            for splits in (0, 3):
                load = Load(T=70, E=E, routing="uniform")
                name = f"route-small-E{E}-like-T{like}" + (f"-S{splits}" if splits else "")
                yield _route(name, load, like=like, splits=splits)
    for T, E, routing in ((37, 16, "skewed"), (300, 16, "one-hot")):
        load = Load(T=T, E=E, routing=routing)
        yield _route(f"route-small-E{E}-{load.suffix()}", load)
    yield _route("route-small-top2", Load(T=23, E=16, top_k=2))
    mixtral: dict[str, Any] = dict(scoring="softmax", renormalize=True)
    yield _route("route-small-softmax-top2", Load(T=23, E=16, top_k=2), **mixtral)
    yield _route("route-small-score-bf16", Load(T=23, E=16, top_k=2), score_dtype=BF16)
    yield _route("route-small-range", Load(T=70, E=16), expert_range=(4, 8))
    for dtype in (F16, F32):
        yield _route(f"route-small-{dtype_name(dtype)}", Load(T=23, E=16, dtype=dtype))


def _route(
    id: str, load: Load, *, like: int | None = None, splits: int = 0, **options: Any
) -> Case:
    """like: the number of tokens whose default configuration is taken; splits: partial sums."""
    first, count = options.get("expert_range", (0, load.E))
    block_m = load.tile_rows()
    if like:
        options["config"] = default_config(like, load.E, load.top_k)
    if splits:
        options["logits_dtype"] = load.dtype

    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            logits = make_logits(load, device, seed)
            if splits:  # that add up to them, exactly: halves and zeros
                logits = logits.float().mul_(0.5).repeat(splits, 1, 1)
                logits.narrow(0, 2, splits - 2).zero_()
        return dict(logits=logits)

    def exact(i: Inputs) -> Outputs:
        kept = {k: v for k, v in options.items() if k != "config"}
        ids, weights = reference.route(i["logits"], load.top_k, **kept)
        return _order(ids, weights, count, block_m)

    return Case(
        op="route",
        id=id,
        make=make,
        run=lambda i: _tensors(route(i["logits"], load.top_k, block_m=block_m, **options)),
        reference=exact,
        bounds=ROUTING_BOUNDS,
        cost_of=lambda: cost.route(
            tokens=load.T,
            experts=load.E,
            top_k=load.top_k,
            itemsize=4 if splits else load.dtype.itemsize,
            block_m=block_m,
            splits=splits or 1,
            kept=count,
        ),
    )


def sort_cases(size: str) -> Iterator[Case]:
    if size == "real":
        for shape in MODELS:
            for ep in PARALLEL:
                for load in token_loads(shape, ep):
                    yield _sort(f"sort_by_expert-{shape.name}-{load.suffix()}", load)
        return
    # The experts of one GPU of 1 to 8, of either model; most slots are elsewhere.
    for E, ep in ((2, 8), (16, 1), (32, 4), (64, 2), (128, 1)):
        for like in (64, 4096):
            load = Load(T=70, E=E, ep=ep, routing="uniform")
            yield _sort(f"sort_by_expert-small-E{E}-like-T{like}", load, like=like)
    yield _sort("sort_by_expert-small-top2", Load(T=23, E=16, top_k=2))


def _sort(id: str, load: Load, *, like: int | None = None) -> Case:
    block_m = load.tile_rows()
    config = default_config(like, load.E, load.top_k) if like else None

    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            weights = torch.rand(load.T, load.top_k, device=device)
        return dict(ids=make_ids(load, device, seed), weights=weights)

    def exact(i: Inputs) -> Outputs:
        local = reference.local_experts(i["ids"], i["weights"], (0, load.E))
        return _order(*local, load.E, block_m)

    return Case(
        op="sort_by_expert",
        id=id,
        make=make,
        run=lambda i: _tensors(
            sort_by_expert(i["ids"], i["weights"], load.E, block_m=block_m, config=config)
        ),
        reference=exact,
        bounds=(Exact(), *[Exact()] * 5),
        cost_of=lambda: cost.sort_by_expert(
            slots=load.T * load.top_k, rows=load.rows, experts=load.E, block_m=block_m
        ),
    )
