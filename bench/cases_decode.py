"""Cases of decode attention over the paged cache, of its schedule and of the merge of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels._launch import device_properties
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_decode_schedule import (
    DecodeScheduleConfig,
    decode_schedule,
    default_config,
    num_items,
)
from llama4_triton.kernels.merge_attention import merge_attention
from llama4_triton.kernels.paged_kv import DENSE, E4M3, LAYOUTS, Layout, PagedKV
from llama4_triton.kernels.rope import Temperature

from . import cost
from .accuracy import BOUNDS, Bound, Exact, Rounded, Within
from .case import BF16, F16, F32, Case, Inputs, Outputs, dtype_name, randn, seeded
from .cases_attention import CHUNKS, bounds, paged, sizes
from .dense_cache import dense_cache
from .shapes import SCOUT, WORKLOADS

__all__ = ["decode_cases", "decode_schedule_cases", "merge_cases"]

PAGE, D = 64, SCOUT.head_dim
MANY = 64  # programs per SM, so that every split has the fewest keys it may have
TEMPERATURE = Temperature(attn_scale=0.1, floor_scale=64.0)
E4M3_NOISE = BOUNDS[BF16].rms * 2**4  # e4m3 keeps four bits less than bf16's eight


@dataclass(frozen=True, kw_only=True, slots=True)
class Cached:
    """How keys and values lie in the cache."""

    layout: Layout = "nhd"
    scales: str = ""  # "head" or "token" of e4m3; "": the type of q


def decode_cases(size: str) -> Iterator[Case]:
    if size == "small":
        yield from _small_decode_cases()
        return
    for w in WORKLOADS:
        if w.kind == "decode" and w.shape is SCOUT:
            seq_lens = [a + b for a, b in zip(w.new_tokens, w.cached_tokens, strict=True)]
            for layer, chunk in CHUNKS.items():
                yield _decode(f"attention_decode-{w.id}-{layer}", seq_lens, w.tp, chunk, BF16)


def _small_decode_cases() -> Iterator[Case]:
    for splits, programs in (("one-split", 0), ("many-splits", MANY)):
        for layer, chunk in (("global", 0), ("local", 1024)):
            id = f"attention_decode-small-{splits}-{layer}"
            yield _decode(id, [1100, 1, 64], 8, chunk, BF16, programs_per_sm=programs)
    for dtype in (F16, F32):
        id = f"attention_decode-small-{dtype_name(dtype)}"
        yield _decode(id, [600, 33], 8, 0, dtype, programs_per_sm=MANY)
    for layout in LAYOUTS:
        for scales in ("head", "token"):
            cached = Cached(layout=layout, scales=scales)
            id = f"attention_decode-small-e4m3-{layout}-{scales}"
            yield _decode(id, [1100, 33], 8, 0, BF16, programs_per_sm=MANY, cached=cached)
    dense = Cached(layout="dense")
    yield _decode(
        "attention_decode-small-dense", [1100, 33], 8, 1024, BF16, programs_per_sm=MANY,
        cached=dense,
    )  # fmt: skip
    for rows, q_lens in (("32", [4, 1]), ("64", [8, 3])):
        for name, cached in (
            ("bf16", Cached()),
            ("e4m3", Cached(layout="transposed_v", scales="head")),
            ("dense", dense),
        ):
            id = f"attention_decode-small-{name}-rows-{rows}"
            yield _decode(id, [256, 64], 8, 128, BF16, q_lens=q_lens, cached=cached)


def _decode(
    id: str,
    seq_lens: Sequence[int],
    tp: int,
    chunk: int,
    dtype: torch.dtype,
    *,
    programs_per_sm: int | None = None,
    q_lens: Sequence[int] | None = None,
    cached: Cached = Cached(),
) -> Case:
    """programs_per_sm: in place of the default's; it decides how many splits there are."""
    rows = [1] * len(seq_lens) if q_lens is None else list(q_lens)
    options: dict[str, Any] = dict(chunk_size=chunk, temperature=None if chunk else TEMPERATURE)

    def inputs_of(device: torch.device, seed: int = 0) -> Inputs:
        inputs = paged(rows, seq_lens, tp, chunk, dtype, device, seed)
        if cached.layout == DENSE:
            inputs["kv"] = dense_cache(inputs["kv"], rows, seq_lens, chunk)
        else:
            inputs["kv"] = _as_cached(inputs["kv"], cached)
        inputs["splits"] = None
        if programs_per_sm is not None:
            config = default_config(PAGE, device_properties(device))
            inputs["splits"] = replace(config, programs_per_sm=programs_per_sm)
        inputs["verify"] = {}
        if q_lens is not None:
            cu = torch.tensor([0, *rows], device=device).cumsum(0).to(torch.int32)
            inputs["verify"] = dict(cu_seqlens_q=cu, max_q_len=max(rows))
        return inputs

    def run(i: Inputs) -> Outputs:
        kv, schedule = i["kv"], None
        if i["splits"] is not None:
            schedule = decode_schedule(
                i["seq_lens"], chunk_size=chunk, capacity=kv.capacity, page_size=PAGE,
                num_kv_heads=kv.num_kv_heads, config=i["splits"], **i["verify"],
            )  # fmt: skip
        return attention_decode(
            i["q"], kv, i["seq_lens"], schedule=schedule, **i["verify"], **options
        )

    def exact(i: Inputs) -> Outputs:
        q, kv = i["q"].double(), i["kv"]
        if cached.layout == "transposed_v" and cached.scales:  # whose q is rounded to e4m3
            q_q, scale = reference.quantize_rowwise(i["q"].flatten(0, 1))
            q = (q_q.double() * scale.double()[:, None]).view(q.shape)
        return reference.attention_decode(q, kv, i["seq_lens"], **i["verify"], **options)

    out, lse = bounds(dtype)
    if cached.layout == "transposed_v" and cached.scales:
        out = Rounded(noise=E4M3_NOISE)
    return Case(
        op="attention_decode",
        id=id,
        make=inputs_of,
        run=run,
        reference=exact,
        bounds=(out, lse),
        cost_of=lambda: cost.attention_decode(
            seq_lens=seq_lens, q_lens=q_lens, **sizes(tp, chunk, dtype),
            kv_itemsize=1 if cached.scales else None, scales=cached.scales,
        ),
    )  # fmt: skip


def _as_cached(kv: PagedKV, cached: Cached) -> PagedKV:
    """The same keys and values as the case's cache holds them; dead ones stay NaN."""
    made = {"k": kv.k_cache, "v": kv.v_cache}
    scales = {}
    for name, x in list(made.items()) if cached.scales else []:
        wide = x.float()
        amax = (
            wide.abs().amax(-1) if cached.scales == "token" else wide.new_full((x.shape[2],), 6.0)
        )
        scales[f"{name}_scale"] = amax / 448.0
        made[name] = (wide / (amax / 448.0)[..., None]).to(E4M3)
    v = made["v"]
    if cached.layout == "transposed_v":
        v = v.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    return replace(kv, k_cache=made["k"], v_cache=v, layout=cached.layout, **scales)


def decode_schedule_cases(size: str) -> Iterator[Case]:
    if size == "small":
        yield _schedule("decode_schedule-small-local", [8200, 1, 0, 513] * 80, 1, 8192)
        yield _schedule("decode_schedule-small-global", [1_000_000, 5, 100_000], 8, 0)
        return
    for w in WORKLOADS:
        if w.kind == "decode" and w.shape is SCOUT:
            seq_lens = [a + b for a, b in zip(w.new_tokens, w.cached_tokens, strict=True)]
            for layer, chunk in CHUNKS.items():
                Hkv = SCOUT.kv_heads // w.tp
                yield _schedule(f"decode_schedule-{w.id}-{layer}", seq_lens, Hkv, chunk)


def _schedule(id: str, seq_lens: Sequence[int], Hkv: int, chunk: int) -> Case:
    capacity = -(-max(seq_lens) // (16 * PAGE)) * 16 * PAGE

    def inputs_of(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            order = torch.randperm(len(seq_lens), device=device)
        return dict(seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device)[order])

    def config(device: torch.device) -> DecodeScheduleConfig:
        return default_config(PAGE, device_properties(device))

    def run(i: Inputs) -> Outputs:
        made = decode_schedule(
            i["seq_lens"], chunk_size=chunk, capacity=capacity, num_kv_heads=Hkv, page_size=PAGE
        )
        return made.items, made.spans, made.count

    def exact(i: Inputs) -> Outputs:
        lens = i["seq_lens"]
        c, sms = config(lens.device), device_properties(lens.device).sm_count
        items, spans = reference.decode_schedule(
            lens, chunk_size=chunk, unit=c.UNIT, shortest=c.MIN_SPLIT, wanted=c.wanted(Hkv, sms)
        )
        room = num_items(len(lens), Hkv, capacity, chunk, 1, 0, sms, c)
        padded = items + [[-1] * 4] * (room - len(items))
        return tuple(torch.tensor(x, dtype=torch.int32) for x in (padded, spans, [len(items)]))

    def room() -> int:
        c = config(torch.device("cpu"))
        sms = device_properties(torch.device("cpu")).sm_count
        return num_items(len(seq_lens), Hkv, capacity, chunk, 1, 0, sms, c)

    return Case(
        op="decode_schedule",
        id=id,
        make=inputs_of,
        run=run,
        reference=exact,
        bounds=(Exact(), Exact(), Exact()),
        cost_of=lambda: cost.decode_schedule(B=len(seq_lens), items=room()),
    )


RANKS = (2, 8)


def merge_cases(size: str) -> Iterator[Case]:
    tokens = (3,) if size == "small" else (1, 64, 4096)
    for T in tokens:
        for R in RANKS:
            for dtype in (BF16, F32, *((F16,) if size == "small" else ())):
                id = f"merge_attention-{size}-T{T}-R{R}-{dtype_name(dtype)}"
                yield _merge(id, R, T, dtype)


def _merge(id: str, R: int, T: int, dtype: torch.dtype) -> Case:
    """Rank 0 has no key of the first token, no rank has one of the last."""

    def inputs_of(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            outs = randn(R, T, SCOUT.heads, D, dtype=dtype, device=device)
            lses = randn(R, T, SCOUT.heads, dtype=F32, device=device) * 4
        rank, token = (torch.arange(n, device=device) for n in (R, T))
        nothing = ((rank == 0)[:, None] & (token == 0)) | ((token == T - 1) & (token > 0))
        outs.masked_fill_(nothing[:, :, None, None], 0.0)
        lses.masked_fill_(nothing[:, :, None], -torch.inf)
        return dict(outs=outs, lses=lses)

    lse: Bound = Within(absolute=1e-5)
    return Case(
        op="merge_attention",
        id=id,
        make=inputs_of,
        run=lambda i: merge_attention(**i),
        reference=lambda i: reference.merge_attention(i["outs"].double(), i["lses"].double()),
        bounds=(Rounded(), lse),
        cost_of=lambda: cost.merge_attention(
            R=R, rows=T * SCOUT.heads, head_dim=D, itemsize=dtype.itemsize
        ),
    )
