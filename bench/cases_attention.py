"""Cases of prefill attention over the paged cache, and of its schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels._launch import device_properties
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.attention_prefill import default_config as prefill_config
from llama4_triton.kernels.attention_schedule import prefill_schedule, tile_capacity
from llama4_triton.kernels.paged_kv import Layout, PagedKV

from . import cost
from .accuracy import BOUNDS, Exact, Rounded, Within
from .case import BF16, F16, F32, Case, Inputs, Outputs, dtype_name, randn, seeded
from .dense_cache import dense_cache
from .e4m3_cache import E4M3, quantized_cache, quantized_queries
from .shapes import SCOUT, WORKLOADS

__all__ = ["CHUNKS", "STALE", "bounds", "paged", "prefill_cases", "prefill_schedule_cases", "sizes"]

PAGE = 64
STALE = 2**30  # a page id that no cache has, where the table must not be read
D = SCOUT.head_dim
CHUNKS = {"global": 0, "local": SCOUT.chunk}


def bounds(dtype: torch.dtype) -> tuple[Rounded, Within]:
    """Of out and lse.

    The probabilities are rounded to dtype before the second product: for values that do not know
    of each other that is, beside the output's own, one rounding relative to the row. In fp32,
    scores of magnitude 10 carry 2**-21 into the exponent, 5e-7 into each probability, and a GPU's
    ex2.approx 2**-22 more; the same bounds lse.
    """
    noise = BOUNDS[dtype].rms if dtype in BOUNDS else 0.0
    return Rounded(noise=noise, fp32=4e-6), Within(absolute=1e-5)


def paged(
    q_lens: Sequence[int],
    seq_lens: Sequence[int],
    tp: int,
    chunk: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Inputs:
    """Pages in random order; what is behind a sequence's end or before its live range is NaN."""
    B, Hkv = len(seq_lens), SCOUT.kv_heads // tp
    width = -(-max(seq_lens) // (16 * PAGE)) * 16  # as KVCache.step makes it
    oldest = [
        (n - q) // chunk * chunk if chunk else 0 for q, n in zip(q_lens, seq_lens, strict=True)
    ]
    with seeded(device, seed):
        k, v = (randn(B * width, PAGE, Hkv, D, dtype=dtype, device=device) for _ in range(2))
        q = randn(sum(q_lens), SCOUT.heads // tp, D, dtype=dtype, device=device)
        order = torch.randperm(B * width, device=device)  # logical page -> page
    lo, hi = (torch.tensor(list(x), device=device) for x in (oldest, seq_lens))
    logical = torch.argsort(order)
    first = logical % width * PAGE  # token of the first slot of each page
    t = first[:, None] + torch.arange(PAGE, device=device)
    which = logical // width
    dead = (t < lo[which][:, None]) | (t >= hi[which][:, None])
    for cache in (k, v):
        cache.masked_fill_(dead[:, :, None, None], torch.nan)
    pages = torch.arange(width, device=device)
    live = (pages >= lo[:, None] // PAGE) & (pages * PAGE < hi[:, None])
    table = torch.where(live, order.view(B, width), STALE).to(torch.int32)
    return dict(
        q=q,
        kv=PagedKV(k_cache=k, v_cache=v, block_table=table),
        seq_lens=hi.to(torch.int32),
    )


def _wide(kv: PagedKV) -> PagedKV:
    return replace(kv, k_cache=kv.k_cache.double(), v_cache=kv.v_cache.double())


def sizes(tp: int, chunk: int, dtype: torch.dtype) -> dict[str, int]:
    """What the formulas of cost.py are given beside the lengths."""
    return dict(
        heads=SCOUT.heads // tp,
        kv_heads=SCOUT.kv_heads // tp,
        head_dim=D,
        itemsize=dtype.itemsize,
        page_size=PAGE,
        chunk=chunk,
    )


# name: (new tokens, lengths); each a batch of sequences, some of them with a cached prefix.
SMALL_PREFILL = {
    "rows-128": ([130, 3], [201, 3]),
    "rows-64": ([30, 1, 41], [47, 90, 41]),
    "rows-16": ([7, 1, 5], [70, 64, 5]),
}
LIKE = {"rows-128": (4096, 1), "rows-64": (4096, 64), "rows-16": (16, 1)}  # (T, B)


def prefill_schedule_cases(size: str) -> Iterator[Case]:
    if size == "small":
        for layer, chunk in (("global", 0), ("local", 64)):
            q_lens, seq_lens = SMALL_PREFILL["rows-64"]
            yield _schedule(f"prefill_schedule-small-{layer}", q_lens, seq_lens, chunk, 16)
        return
    for w in WORKLOADS:
        if w.kind != "decode" and w.shape is SCOUT and w.tp == 8:  # no heads in it
            seq_lens = [a + b for a, b in zip(w.new_tokens, w.cached_tokens, strict=True)]
            for layer, chunk in CHUNKS.items():
                id = f"prefill_schedule-{w.id.removeprefix('scout-tp8-')}-{layer}"
                yield _schedule(id, w.new_tokens, seq_lens, chunk, 128)


def _schedule(
    id: str, q_lens: Sequence[int], seq_lens: Sequence[int], chunk: int, block_m: int
) -> Case:
    T, B = sum(q_lens), len(q_lens)
    capacity = tile_capacity(T, B, chunk, block_m)

    def make(device: torch.device, seed: int = 0) -> Inputs:
        bounds = [sum(q_lens[:b]) for b in range(B + 1)]
        return dict(
            cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        )

    def run(i: Inputs) -> Outputs:
        made = prefill_schedule(**i, num_tokens=T, chunk_size=chunk, block_m=block_m)
        return made.tiles, made.count

    return Case(
        op="prefill_schedule",
        id=id,
        make=make,
        run=run,
        reference=lambda i: reference.prefill_schedule(
            **i, chunk_size=chunk, block_m=block_m, capacity=capacity
        ),
        bounds=(Exact(), Exact()),
        cost_of=lambda: cost.prefill_schedule(sequences=B, capacity=capacity),
    )


# Of probabilities in e4m3: uniform within half of 2**-3 of a value, at most.
E4M3_NOISE = 2.0**-3 / 12**0.5
FORMS: tuple[tuple[str, Layout], ...] = (
    ("head", "nhd"),
    ("head", "transposed_v"),
    ("token", "nhd"),
    ("token", "transposed_v"),
)


def _small_e4m3() -> Iterator[Case]:
    for kind, layout in FORMS:
        for name in ("rows-128", "rows-64"):
            id = f"attention_prefill-small-e4m3-{kind}-{layout}-{name}"
            q_lens, seq_lens = SMALL_PREFILL[name]
            yield _prefill_e4m3(id, q_lens, seq_lens, 8, 0, kind, layout, like=LIKE[name])
    q_lens, seq_lens = SMALL_PREFILL["rows-128"]
    id = "attention_prefill-small-bf16-over-e4m3"
    yield _prefill_e4m3(
        id, q_lens, seq_lens, 8, 0, "head", "nhd", like=LIKE["rows-128"], queries=False
    )


def _prefill_e4m3(
    id: str,
    q_lens: Sequence[int],
    seq_lens: Sequence[int],
    tp: int,
    chunk: int,
    kind: str,
    layout: Layout,
    *,
    like: tuple[int, int] | None = None,
    queries: bool = True,
) -> Case:
    """queries: in e4m3 as well; otherwise bf16."""
    plain = _prefill(id, q_lens, seq_lens, tp, chunk, BF16)

    def make(device: torch.device, seed: int = 0) -> Inputs:
        inputs = plain.make(device, seed)
        inputs["kv"] = quantized_cache(inputs["kv"], kind, layout)
        if queries:
            inputs["q"], inputs["q_scale"] = quantized_queries(inputs["q"])
        if like:
            inputs["config"] = prefill_config(
                *like, D, inputs["q"].dtype, device_properties(device),
                kv_dtype=E4M3, by_token=kind == "token", transposed_v=layout == "transposed_v",
            )  # fmt: skip
        return inputs

    def exact(i: Inputs) -> Outputs:
        given = {name: i[name] for name in i if name != "config"}
        return reference.attention_prefill(**given, chunk_size=chunk, out_dtype=torch.float64)

    noise = E4M3_NOISE if queries else BOUNDS[BF16].rms
    shape = sizes(tp, chunk, BF16) | dict(itemsize=1, out_itemsize=2)
    return replace(
        plain,
        make=make,
        reference=exact,
        bounds=(Rounded(noise=noise), Within(absolute=1e-5)),
        cost_of=lambda: cost.attention_prefill(
            q_lens=q_lens, seq_lens=seq_lens, **shape, scales=3 if kind == "token" else 1
        ),
    )


def prefill_cases(size: str) -> Iterator[Case]:
    if size == "small":
        for name, (q_lens, seq_lens) in SMALL_PREFILL.items():
            for layer, chunk in (("global", 0), ("local", 64)):
                id = f"attention_prefill-small-{name}-{layer}"
                yield _prefill(id, q_lens, seq_lens, 8, chunk, BF16, like=LIKE[name])
        for dtype in (F16, F32):
            id = f"attention_prefill-small-{dtype_name(dtype)}"
            like = LIKE["rows-128"]
            yield _prefill(id, *SMALL_PREFILL["rows-64"], 8, 0, dtype, like=like)
        yield from _small_e4m3()
        for name in ("rows-128", "rows-64"):
            yield _dense(f"attention_prefill-small-dense-{name}", *SMALL_PREFILL[name])
        return
    for w in WORKLOADS:
        if w.kind != "decode" and w.shape is SCOUT:  # Maverick's attention is Scout's
            seq_lens = [a + b for a, b in zip(w.new_tokens, w.cached_tokens, strict=True)]
            for layer, chunk in CHUNKS.items():
                id = f"attention_prefill-{w.id}-{layer}"
                yield _prefill(id, w.new_tokens, seq_lens, w.tp, chunk, BF16)
                if w.tp == 8 and max(w.new_tokens) >= 1024:
                    for kind in ("head", "token"):
                        yield _prefill_e4m3(
                            f"{id}-e4m3-{kind}", w.new_tokens, seq_lens, w.tp, chunk,
                            kind, "transposed_v",
                        )  # fmt: skip


def _dense(id: str, q_lens: Sequence[int], seq_lens: Sequence[int]) -> Case:
    """Rows of transformers' kind of a local layer."""
    paged = _prefill(id, q_lens, seq_lens, 8, 64, BF16)

    def make(device: torch.device, seed: int = 0) -> Inputs:
        inputs = paged.make(device, seed)
        return inputs | dict(kv=dense_cache(inputs["kv"], q_lens, seq_lens, 64))

    return replace(paged, make=make)


def _prefill(
    id: str,
    q_lens: Sequence[int],
    seq_lens: Sequence[int],
    tp: int,
    chunk: int,
    dtype: torch.dtype,
    *,
    like: tuple[int, int] | None = None,
) -> Case:
    """like: (tokens, sequences) whose default configuration is taken."""

    def make(device: torch.device, seed: int = 0) -> Inputs:
        inputs = paged(q_lens, seq_lens, tp, chunk, dtype, device, seed)
        bounds = [sum(q_lens[:b]) for b in range(len(q_lens) + 1)]
        inputs["cu_seqlens_q"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        inputs["config"] = None
        if like:
            inputs["config"] = prefill_config(*like, D, dtype, device_properties(device))
        return inputs

    def exact(i: Inputs) -> Outputs:
        return reference.attention_prefill(
            i["q"].double(), _wide(i["kv"]), i["cu_seqlens_q"], i["seq_lens"], chunk_size=chunk
        )

    return Case(
        op="attention_prefill",
        id=id,
        make=make,
        run=lambda i: attention_prefill(**i, chunk_size=chunk),
        reference=exact,
        bounds=bounds(dtype),
        cost_of=lambda: cost.attention_prefill(
            q_lens=q_lens, seq_lens=seq_lens, **sizes(tp, chunk, dtype)
        ),
    )
