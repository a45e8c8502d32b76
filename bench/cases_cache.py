"""Cases of what fills the paged cache: rope_and_cache in 16 bits and e4m3, and convert_layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels.convert_layout import convert_layout
from llama4_triton.kernels.paged_kv import E4M3, Layout, PagedKV
from llama4_triton.kernels.rope import RopeScaling, RopeTable, Temperature, rope_inv_freq
from llama4_triton.kernels.rope_and_cache import default_config as rope_config
from llama4_triton.kernels.rope_and_cache import rope_and_cache

from . import cost
from .accuracy import E4M3_NEIGHBOUR, E4M3_SCALE, Bound, Exact, Rounded, Within
from .case import BF16, F16, F32, Case, Inputs, Outputs, dtype_name, randn, seeded
from .shapes import PARALLEL, SCOUT, TOKENS

__all__ = ["FORMATS", "convert_cases", "rope_cases"]

PAGE = 64
D = SCOUT.head_dim
SCALING = RopeScaling(
    factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192
)
TEMPERATURE = Temperature(attn_scale=0.1, floor_scale=8192.0)

# Which operations a layer asks for: (rotations, QK norm, temperature).
ROPE_KINDS = {
    "scout-local": ("chunk", True, False),
    "maverick-local": ("chunk", False, False),
    "global": (None, False, True),
    "scout-local-absolute": ("absolute", True, False),
    "maverick-local-absolute": ("absolute", False, False),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How a cache is kept; scales: "none", "head" (one for the tensor) or "token"."""

    scales: str = "none"
    layout: Layout = "nhd"
    quantize_q: bool = False


FORMATS = {
    "e4m3": Format(scales="head"),
    "e4m3-token": Format(scales="token", quantize_q=True),
    "e4m3-transposed": Format(scales="head", layout="transposed_v", quantize_q=True),
    "e4m3-token-transposed": Format(scales="token", layout="transposed_v", quantize_q=True),
    "transposed": Format(layout="transposed_v"),
}
PLAIN = Format()


def rope_cases(size: str) -> Iterator[Case]:
    op = "rope_and_cache"
    if size == "small":
        for kind in ROPE_KINDS:
            for T, like in ((5, 5), (21, 4096)):
                yield _rope(f"{op}-small-{kind}-T{like}", kind, T, 8, BF16, like=like)
        for name, format in FORMATS.items():
            for kind in ("scout-local", "global"):
                for T, like in ((5, 5), (37, 4096)):
                    id = f"{op}-small-{kind}-{name}-T{like}"
                    yield _rope(id, kind, T, 8, BF16, format=format, like=like)
        for dtype in (F16, F32):
            id = f"{op}-small-{dtype_name(dtype)}"
            yield _rope(id, "scout-local", 5, 8, dtype)
        return
    for kind in ROPE_KINDS:
        for tp in PARALLEL:
            for T in TOKENS:
                yield _rope(f"{op}-{kind}-tp{tp}-T{T}", kind, T, tp, BF16)
    for name, format in FORMATS.items():
        for kind in ("scout-local", "global"):
            for T in TOKENS:
                yield _rope(f"{op}-{kind}-{name}-tp8-T{T}", kind, T, 8, BF16, format=format)


def _cache(
    pages: int, Hkv: int, dtype: torch.dtype, format: Format, device: torch.device
) -> PagedKV:
    """NaN where nothing is written, and in scales of tokens."""
    quantized = format.scales != "none"
    shape = (pages, PAGE, Hkv, D)
    shapes = (shape, (pages, Hkv, D, PAGE) if format.layout == "transposed_v" else shape)
    k, v = (torch.full(s, torch.nan, dtype=dtype, device=device) for s in shapes)
    if quantized:
        k, v = k.to(E4M3), v.to(E4M3)
    k_scale = v_scale = None
    if format.scales == "token":
        k_scale, v_scale = (torch.full(shape[:3], torch.nan, device=device) for _ in "kv")
    elif quantized:
        k_scale, v_scale = (torch.full((1,), s, device=device) for s in (0.02, 0.03))
    return PagedKV(
        k_cache=k, v_cache=v, k_scale=k_scale, v_scale=v_scale, layout=format.layout,
        block_table=torch.zeros(1, 16, dtype=torch.int32, device=device),
    )  # fmt: skip


def _rope(
    id: str,
    kind: str,
    T: int,
    tp: int,
    dtype: torch.dtype,
    *,
    format: Format = PLAIN,
    like: int | None = None,
) -> Case:
    """like: the number of tokens whose default configuration is taken."""
    Hq, Hkv = SCOUT.heads // tp, SCOUT.kv_heads // tp
    rotations, norm, tuned = ROPE_KINDS[kind]
    chunk = SCOUT.chunk
    options: dict[str, Any] = dict(
        qk_norm_eps=SCOUT.eps if norm else None,
        temperature=TEMPERATURE if tuned else None,
        quantize_q=format.quantize_q,
    )
    quantized = format.scales != "none"
    itemsize = 1 if quantized else dtype.itemsize

    def make(device: torch.device, seed: int = 0) -> Inputs:
        inv_freq = rope_inv_freq(5e5, D, scaling=SCALING, device=device)
        pages = -(-T // PAGE) + 1
        with seeded(device, seed):
            q, k, v = (randn(T, heads, D, dtype=dtype, device=device) for heads in (Hq, Hkv, Hkv))
            slots = torch.randperm(pages * PAGE, device=device)[:T]
            # Neighbours within their chunks, each in a chunk of its own: min(T, chunk) table rows.
            first = torch.randint(0, chunk, (1,), device=device)
            positions = first + torch.randperm(T, device=device)
            positions += chunk * torch.randint(0, 2**20 // chunk, (T,), device=device)
        positions = positions.to(torch.int32)
        t = torch.arange(T, device=device)
        if format.layout == "transposed_v":  # a run of one sequence, which shares sectors
            slots = torch.where(t >= T - T // 5, -1, t + PAGE)
        else:
            slots = torch.where(t % 5 == 4, -1, slots)  # some unwritten
        rope = None
        if rotations == "chunk":
            rope = RopeTable.for_chunk(inv_freq, chunk)
        elif rotations == "absolute":
            rope = RopeTable.for_positions(inv_freq, positions)
        kv = _cache(pages, Hkv, dtype, format, device)
        run_of_v = 32 // itemsize if format.layout == "transposed_v" else 1
        config = rope_config(like, D, run_of_v) if like else None
        return dict(
            q=q, k=k, v=v, kv=kv, positions=positions, slot_mapping=slots, rope=rope, config=config
        )

    def outputs(q: Any, kv: PagedKV) -> Outputs:
        scales = (kv.k_scale, kv.v_scale) if format.scales == "token" else ()
        return (*(q if format.quantize_q else (q,)), kv.k_cache, kv.v_cache, *scales)

    def exact(i: Inputs) -> Outputs:
        wide = torch.float64
        rope = i["rope"] and RopeTable(cos_sin=i["rope"].cos_sin.to(wide), period=i["rope"].period)
        kv = _cache(i["kv"].num_pages, Hkv, wide, format, i["q"].device)
        q, k, v = (i[name].to(wide) for name in "qkv")
        q = reference.rope_and_cache(
            q, k, v, kv, i["positions"], i["slot_mapping"], rope=rope, **options
        )
        return outputs(q, kv)

    q_bounds: tuple[Bound, ...] = (Rounded(),)
    if format.quantize_q:
        q_bounds = (E4M3_NEIGHBOUR, E4M3_SCALE)
    kv_bounds: tuple[Bound, ...] = (Rounded(), Exact())
    if quantized:
        kv_bounds = (E4M3_NEIGHBOUR, E4M3_NEIGHBOUR) + (E4M3_SCALE,) * 2 * (
            format.scales == "token"
        )
    return Case(
        op="rope_and_cache",
        id=id,
        make=make,
        run=lambda i: outputs(rope_and_cache(**i, **options), i["kv"]),
        reference=exact,
        bounds=(*q_bounds, *kv_bounds),
        cost_of=lambda: cost.rope_and_cache(
            tokens=T,
            cached=T - T // 5,
            heads=Hq,
            kv_heads=Hkv,
            head_dim=D,
            itemsize=dtype.itemsize,
            table_rows={"chunk": min(T, chunk), "absolute": T, None: 0}[rotations],
            cache_itemsize=itemsize,
            scales={"none": 0, "head": 2}.get(format.scales, 0),
            token_scales=format.scales == "token",
            quantize_q=format.quantize_q,
        ),
    )


# (dtype, page size) of the caches that convert_layout moves.
POOLS = {"e4m3": (E4M3, 64), "bf16": (BF16, 64)}


def convert_cases(size: str) -> Iterator[Case]:
    for layout in ("transposed_v", "nhd"):
        for name, (dtype, page) in POOLS.items():
            if size == "small":
                yield _convert(f"convert_layout-small-{layout}-{name}", layout, 3, 1, dtype, page)
                id = f"convert_layout-small-{layout}-{name}-listed"
                yield _convert(id, layout, 5, 1, dtype, page, listed=3)
                continue
            for tp in PARALLEL:  # a chunk of a local layer
                id = f"convert_layout-{layout}-{name}-tp{tp}"
                heads = SCOUT.kv_heads // tp
                yield _convert(id, layout, SCOUT.chunk // page, heads, dtype, page)
                yield _convert(
                    f"{id}-listed", layout, SCOUT.chunk // page, heads, dtype, page, listed=16
                )
    if size == "small":
        for dtype in (F16, F32):
            id = f"convert_layout-small-{dtype_name(dtype)}"
            yield _convert(id, "transposed_v", 3, 1, dtype, PAGE)


def _convert(
    id: str,
    layout: Layout,
    num_pages: int,
    Hkv: int,
    dtype: torch.dtype,
    page: int,
    *,
    listed: int | None = None,
) -> Case:
    """listed: how many of the pages are named; None: all are moved."""
    there, here = (num_pages, page, Hkv, D), (num_pages, Hkv, D, page)
    if layout == "nhd":
        there, here = here, there

    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            v = randn(*there, dtype=F32, device=device).to(dtype)
            order = torch.randperm(num_pages, device=device)
        pages = None if listed is None else order[:listed].to(torch.int32)
        out = torch.full(here, torch.nan, dtype=BF16, device=device).to(dtype)
        return dict(v_cache=v, out=out, pages=pages)

    def exact(i: Inputs) -> Outputs:
        moved = reference.convert_layout(i["v_cache"].float(), layout)
        pages = i["pages"]
        if pages is None:
            return (moved,)
        out = torch.full_like(moved, torch.nan)
        out[pages.long()] = moved[pages.long()]
        return (out,)

    return Case(
        op="convert_layout",
        id=id,
        make=make,
        run=lambda i: (convert_layout(**i, layout=layout),),
        reference=exact,
        bounds=(Within(),),
        cost_of=lambda: cost.convert_layout(
            pages=num_pages if listed is None else listed,
            page_size=page,
            kv_heads=Hkv,
            head_dim=D,
            itemsize=dtype.itemsize,
            listed=listed is not None,
        ),
    )
