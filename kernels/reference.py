"""Every operator in plain PyTorch: the one definition of what the kernels must compute.

Written for reading and for tests: it loops, synchronises and computes in fp32 (or, given float64
inputs, in float64). It never imports Triton.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .paged_kv import Layout, PagedKV
from .rope import RopeTable, Temperature

if TYPE_CHECKING:
    from .expert_weights import Experts, Projection

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "cached",
    "convert_layout",
    "decode_schedule",
    "fp8_matmul",
    "gather_rows",
    "grouped_gemm_combine",
    "grouped_gemm_swiglu",
    "local_experts",
    "merge_attention",
    "moe_layer",
    "prefill_schedule",
    "quantize_groupwise",
    "quantize_heads",
    "quantize_rowwise",
    "query_temperature",
    "rms_norm",
    "rope_and_cache",
    "route",
    "router",
    "sort_by_expert",
    "swiglu",
    "tile_table",
]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = dt(dt(x * rsqrt(mean(x^2) + eps)) * weight), (T, H)."""
    wide = _wide(x)
    n = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return n * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = x + residual; (rms_norm(h), h)."""
    h = x + residual
    return rms_norm(h, weight, eps), h


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """y[i] = x[rows[i]], 0 where rows[i] is not in [0, V): (N, H)."""
    inside = (rows >= 0) & (rows < x.shape[0])
    y = x.new_zeros((rows.shape[0], x.shape[1]))
    y[inside] = x[rows[inside].long()]
    return y


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """dt(dt(silu(gate)) * up), (T, F)."""
    wide = _wide(gate)
    return (wide * torch.sigmoid(wide)).to(gate.dtype) * up


def quantize_rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = max(amax, 1e-12) / 448 per row, 1 for a row without a finite non-zero value;
    x_q = e4m3(clamp(x * (1 / scale), -448, 448)); (x_q (M, K), scale (M,) fp32)."""
    x = x.float()
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    amax = finite.amax(1) if x.shape[1] else finite.new_zeros(x.shape[0])
    scale = torch.where(amax > 0.0, amax.clamp(min=1e-12) / 448.0, 1.0)
    y = x * (1.0 / scale)[:, None]
    return y.clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


def fp8_matmul(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """y = dt((x_q * x_scale) @ (w_q * w_scale).T), (M, N); in float64 if that is out_dtype."""
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    acc = x_q.to(wide) @ w_q.to(wide).T
    return (acc * x_scale.to(wide)[:, None] * w_scale.to(wide)[None, :]).to(out_dtype)


def rope_and_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: PagedKV,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    rope: RopeTable | None,
    qk_norm_eps: float | None,
    temperature: Temperature | None,
    quantize_q: bool = False,
) -> Any:
    """Rotated, normalised, scaled q (T, Hq, D), or with quantize_q that in e4m3 and its scale
    (T, Hq); writes the caches and scales of tokens at the slots, which negative tokens lack."""
    T = q.shape[0]
    new = []
    for x in (q, k):
        x = _wide(x)
        if rope is not None:
            rows = positions.long() % rope.period if rope.period else torch.arange(T)
            cos, sin = rope.cos_sin[rows.to(q.device)].to(x.dtype)[:, None].chunk(2, dim=-1)
            a, b = x[..., 0::2], x[..., 1::2]
            x = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        if qk_norm_eps is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + qk_norm_eps)
        new.append(x)
    if temperature is not None:
        scale = query_temperature(positions, temperature.attn_scale, temperature.floor_scale)
        new[0] = new[0] * scale.to(new[0].dtype)[:, None, None]
    k_q, k_scale = _to_cache(new[1], kv.k_cache, kv.k_scale)
    v_q, v_scale = _to_cache(v, kv.v_cache, kv.v_scale)
    v_cache = kv.v_cache
    if kv.layout == "transposed_v":
        v_cache = v_cache.permute(0, 3, 1, 2)
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, kv.page_size)
            kv.k_cache[page, offset], v_cache[page, offset] = k_q[t], v_q[t]
            if kv.k_scale is not None and kv.v_scale is not None and kv.scale_kind == "token":
                kv.k_scale[page, offset], kv.v_scale[page, offset] = k_scale[t], v_scale[t]
    return quantize_heads(new[0]) if quantize_q else new[0].to(q.dtype)


def _to_cache(
    x: torch.Tensor, cache: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, Hkv, D) in the cache's type, and the scale of each token and head where x has one."""
    if scale is None:
        return x.to(cache.dtype), x.new_empty(len(x))
    if scale.ndim == 3:
        return quantize_heads(x)
    y = _wide(x) / scale[:, None]
    return y.clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


def quantize_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rowwise` of each token and head: (x_q (T, H, D), scale (T, H) fp32)."""
    x_q, scale = quantize_rowwise(x.flatten(0, 1))
    return x_q.view(x.shape), scale.view(x.shape[:2])


def convert_layout(v_cache: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The pages of V in `layout`, from the other one."""
    return v_cache.permute((0, 2, 3, 1) if layout == "transposed_v" else (0, 3, 1, 2))


def query_temperature(
    positions: torch.Tensor, attn_scale: float, floor_scale: float
) -> torch.Tensor:
    """1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1), (T,) float64."""
    steps = torch.floor((positions.double() + 1) / floor_scale)
    return 1 + attn_scale * torch.log1p(steps)


def _where(kv: PagedKV, b: int, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(page, slot) of the tokens t of sequence b, or (row, slot) without pages."""
    if kv.layout == "dense":
        return torch.full_like(t, b), t + kv.block_table[b, 0]
    return kv.block_table[b].long()[t // kv.page_size], t % kv.page_size


def cached_keys(
    kv: PagedKV, b: int, t: torch.Tensor, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v of tokens t of sequence b, (len(t), Hkv, D) each, times their scales."""
    page, slot = _where(kv, b, t)
    k = kv.k_cache[page, slot].to(wide)
    v_cache = kv.v_cache.permute(0, 3, 1, 2) if kv.layout == "transposed_v" else kv.v_cache
    v = v_cache[page, slot].to(wide)
    if kv.k_scale is None or kv.v_scale is None:
        return k, v
    by_token = kv.k_scale.ndim == 3
    scales = (x[page, slot] if by_token else x.expand(kv.num_kv_heads) for x in
              (kv.k_scale, kv.v_scale))  # fmt: skip
    k_scale, v_scale = (x.to(wide)[..., None] for x in scales)
    return k * k_scale, v * v_scale


def attention_prefill(
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    chunk_size: int = 0,
    sm_scale: float | None = None,
    temperature: Temperature | None = None,
    q_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (T, Hq, D) in out_dtype, lse (T, Hq) wide): masked softmax attention over the pages.

    Query row i of sequence b stands at p = seq_lens[b] - q_len[b] + i and sees key t iff t <= p
    and, with chunks, t // chunk_size == p // chunk_size. No visible key: out 0, lse -inf. Wide is
    float64 if q or out_dtype is. out_dtype None: q.dtype, bf16 where that is e4m3.
    """
    T, Hq, D = q.shape
    group = Hq // kv.num_kv_heads
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    wide = torch.float64 if torch.float64 in (q.dtype, out_dtype) else torch.float32
    out = torch.zeros(T, Hq, D, dtype=wide, device=q.device)
    lse = torch.full((T, Hq), -torch.inf, dtype=wide, device=q.device)
    bounds = cu_seqlens_q.tolist()
    for b, seq_len in enumerate(seq_lens.tolist()):
        first, last = bounds[b], bounds[b + 1]
        for i in range(first, last):
            p = seq_len - last + i
            start = p // chunk_size * chunk_size if chunk_size else 0
            if p < 0:
                continue
            t = torch.arange(start, p + 1, device=q.device)
            k, v = (x.repeat_interleave(group, dim=1) for x in cached_keys(kv, b, t, wide))
            row = q[i].to(wide) * sm_scale
            if q_scale is not None:
                row = row * q_scale[i].to(wide)[:, None]
            if temperature is not None:
                at = torch.tensor([p], device=q.device)
                row = row * query_temperature(
                    at, temperature.attn_scale, temperature.floor_scale
                ).to(wide)  # fmt: skip
            scores = torch.einsum("hd,thd->ht", row, k)
            lse[i] = torch.logsumexp(scores, dim=1)
            out[i] = torch.einsum("ht,thd->hd", torch.softmax(scores, dim=1), v)
    default = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    return out.to(out_dtype or default), lse


def prefill_schedule(
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    chunk_size: int,
    block_m: int,
    capacity: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles (capacity, 4) int32: sequence, first row, end row, position of the first; their count.

    The rows of a sequence are cut where a chunk begins, each piece every block_m rows; tiles with
    more blocks of keys from the chunk's start to the last row come first, equal ones as cut.
    """
    bounds, tiles = cu_seqlens_q.tolist(), []
    for b, seq_len in enumerate(seq_lens.tolist()):
        row, last = bounds[b], bounds[b + 1]
        oldest = max(seq_len - (last - row), 0)
        while row < last:
            p, place = seq_len - last + row, oldest + row - bounds[b]
            place = p % chunk_size if chunk_size else place
            left = [last - row, block_m, *([chunk_size - place] if chunk_size else [])]
            end = row + min(left)
            tiles.append((-(-(place + end - row) // block_m), (b, row, end, p)))
            row = end
    tiles.sort(key=lambda tile: -tile[0])
    table = torch.full((capacity, 4), -1, dtype=torch.int32)
    if tiles:
        table[: len(tiles)] = torch.tensor([entry for _, entry in tiles])
    return table.to(seq_lens.device), seq_lens.new_full((1,), len(tiles))


def attention_decode(
    q: torch.Tensor,
    kv: PagedKV,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    max_q_len: int = 1,
    chunk_size: int = 0,
    sm_scale: float | None = None,
    temperature: Temperature | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (T, Hq, D), lse (T, Hq) wide): attention of the newest tokens over the pages.

    Row i of the q_len of sequence b stands at p = seq_lens[b] - q_len + i and sees key t iff
    t <= p and, with chunks, t // chunk_size == p // chunk_size. No visible key: out 0, lse -inf.
    """
    T, Hq, D = q.shape
    group = Hq // kv.num_kv_heads
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    out = torch.zeros(T, Hq, D, dtype=_wide(q).dtype, device=q.device)
    lse = torch.full((T, Hq), -torch.inf, dtype=out.dtype, device=q.device)
    bounds = range(len(seq_lens) + 1) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for b, seq_len in enumerate(seq_lens.tolist()):
        for i in range(bounds[b], bounds[b + 1]):
            p = seq_len - bounds[b + 1] + i
            if p < 0:
                continue
            start = p // chunk_size * chunk_size if chunk_size else 0
            k, v = cached(kv, b, start, p + 1, out.dtype)
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            factor = sm_scale
            if temperature is not None:
                floor_scale, attn_scale = temperature.floor_scale, temperature.attn_scale
                factor *= 1.0 + attn_scale * math.log(math.floor((p + 1) / floor_scale) + 1)
            scores = torch.einsum("hd,thd->ht", _wide(q[i]), k) * factor
            lse[i] = torch.logsumexp(scores, dim=1)
            out[i] = torch.einsum("ht,thd->hd", torch.softmax(scores, dim=1), v)
    return out.to(out_dtype or q.dtype), lse


def cached(
    kv: PagedKV, b: int, first: int, end: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v (tokens, Hkv, D) of the tokens first .. end - 1 of sequence b, scaled."""
    t = torch.arange(first, end, device=kv.block_table.device)
    pages, slots = _where(kv, b, t)
    v_cache = kv.v_cache
    if kv.layout == "transposed_v":
        v_cache = v_cache.permute(0, 3, 1, 2)
    k, v = kv.k_cache[pages, slots].to(dtype), v_cache[pages, slots].to(dtype)
    if kv.k_scale is None or kv.v_scale is None:
        return k, v
    scales = kv.k_scale, kv.v_scale
    if kv.scale_kind == "token":
        scales = kv.k_scale[pages, slots], kv.v_scale[pages, slots]
    return k * scales[0].to(dtype)[..., None], v * scales[1].to(dtype)[..., None]


def merge_attention(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """lse = ln(sum_r exp(lses[r])), out = sum_r exp(lses[r] - lse) * outs[r]; (0, -inf) of none."""
    lse = torch.logsumexp(_wide(lses), dim=0)
    weight = torch.where(lse > -torch.inf, (_wide(lses) - lse).exp(), 0.0)
    out = (_wide(outs) * weight[..., None]).sum(0)
    return out.to(outs.dtype), lse.to(lses.dtype)


def decode_schedule(
    seq_lens: torch.Tensor,
    *,
    chunk_size: int,
    unit: int,
    shortest: int,
    wanted: int,
    cu_seqlens_q: torch.Tensor | None = None,
    split_tokens: int = 0,
) -> tuple[list[list[int]], list[list[int]]]:
    """([sequence, first token, end token, partial slot] of every item, [first item, number]).

    Of 16 split lengths, 8 / i of the even share of the work over `wanted` items, i = 1 .. 16, the
    first is taken that needs the least rounds of `wanted` items times (length + 1) units.
    """
    lives = []  # of each sequence: origin, tokens from there on, whether it has new rows
    for b, seq_len in enumerate(seq_lens.tolist()):
        q_len = 1
        if cu_seqlens_q is not None:
            q_len = int(cu_seqlens_q[b + 1] - cu_seqlens_q[b])
        lo = max(seq_len - max(q_len, 1), 0)
        lo = lo // chunk_size * chunk_size if chunk_size else 0
        origin = lo // unit * unit
        lives.append((origin, seq_len - origin, q_len > 0))

    def counts(split: int) -> list[int]:
        out = []
        for _, tokens, has_rows in lives:
            units = -(-tokens // unit)
            count = -(-units // split)
            if not split_tokens:
                count = min(count, tokens // shortest)
            out.append(max(count, 1) if has_rows else 0)
        return out

    split = split_tokens // unit
    if not split_tokens:
        total = sum(-(-tokens // unit) for _, tokens, has_rows in lives if has_rows)
        lengths = [max(-(-8 * total // (i * wanted)), shortest // unit) for i in range(1, 17)]
        rounds = [-(-sum(counts(length)) // wanted) for length in lengths]
        split = min(range(16), key=lambda i: rounds[i] * (lengths[i] + 1))
        split = lengths[split]
    items: list[list[int]] = []
    spans = []
    for b, ((origin, tokens, _), count) in enumerate(zip(lives, counts(split), strict=True)):
        spans.append([len(items), count])
        units = -(-tokens // unit)
        for i in range(count):
            bounds = (i * split, (i + 1) * split) if split_tokens else (
                i * units // count, (i + 1) * units // count
            )  # fmt: skip
            begin, end = (origin + min(x * unit, tokens) for x in bounds)
            items.append([b, begin, end, len(items) if count > 1 else -1])
    return items, spans


def router(x: torch.Tensor, w_router: torch.Tensor, slice_k: int) -> torch.Tensor:
    """(S, T, E): x @ w_router.T over each slice of `slice_k` elements of the rows, wide."""
    starts = range(0, max(x.shape[1], 1), slice_k)
    parts = ((_wide(t)[:, k : k + slice_k] for t in (x, w_router)) for k in starts)
    return torch.stack([a @ b.T for a, b in parts])


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "sigmoid",
    renormalize: bool = False,
    expert_range: tuple[int, int] | None = None,
    num_valid_tokens: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    score_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of the largest logits, (T, top_k) int32, and their weights, fp32.

    Logits (S, T, E) are added over S, in order, in fp32. NaN counts as -inf; ties go to the lowest
    expert; infinite logits share a softmax. The weights are rounded to score_dtype last. Dropped
    choices are as in `local_experts`.
    """
    if logits.ndim == 3:
        total = torch.zeros_like(logits[0])
        for part in logits:
            total = total + part
        logits = total
    wide = logits.to(logits_dtype or logits.dtype).double()
    wide = wide.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    rows = [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in wide.tolist()]
    expert_ids = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), top_k).to(wide.device)
    if scoring == "sigmoid":
        scores = torch.sigmoid(wide)
    else:
        top = wide.amax(1, keepdim=True)
        scores = torch.where(wide == top, 1.0, (wide - top).exp())
        scores = torch.where(top == -math.inf, 0.0, scores / scores.sum(1, keepdim=True))
    weights = scores.gather(1, expert_ids)
    if renormalize:
        total = weights.sum(1, keepdim=True)
        weights = torch.where(total > 0.0, weights / total, 0.0)
    weights = weights.float().to(score_dtype or torch.float32).float()
    everything = 0, logits.shape[1]
    return local_experts(expert_ids.int(), weights, expert_range or everything, num_valid_tokens)


def local_experts(
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    expert_range: tuple[int, int],
    num_valid_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids less `first`, and weights; -1 and 0 outside of [first, first + count) and for tokens
    from num_valid_tokens on."""
    first, count = expert_range
    kept = (expert_ids >= first) & (expert_ids < first + count)
    if num_valid_tokens is not None:
        kept[max(0, int(num_valid_tokens)) :] = False
    return torch.where(kept, expert_ids - first, -1), torch.where(kept, expert_weights, 0.0)


def sort_by_expert(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """expert_offsets (E + 1,) and row_slot (R,): the slots sorted by (expert, slot).

    Slots of ids outside [0, E) come last.
    """
    groups = [e if 0 <= e < num_experts else num_experts for e in expert_ids.flatten().tolist()]
    row_slot = sorted(range(len(groups)), key=lambda slot: (groups[slot], slot))
    offsets = [sum(group < e for group in groups) for e in range(num_experts + 1)]
    tables = torch.tensor(offsets, dtype=torch.int32), torch.tensor(row_slot, dtype=torch.int32)
    return tables[0].to(expert_ids.device), tables[1].to(expert_ids.device)


def tile_table(
    expert_offsets: torch.Tensor, rows: int, block_m: int
) -> list[tuple[int, int, int, int]]:
    """(expert, its first row, its end row, i) of each i-th `block_m` rows; E stands for dropped.

    Experts with more rows come first, those with as many by number, the dropped rows last.
    """
    bounds = [*expert_offsets.tolist(), rows]
    E = len(bounds) - 2
    experts = sorted(range(E), key=lambda e: (bounds[e] - bounds[e + 1], e))
    return [
        (e, bounds[e], bounds[e + 1], i)
        for e in (*experts, E)
        for i in range(-(-(bounds[e + 1] - bounds[e]) // block_m))
    ]


def quantize_groupwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_rowwise of every 128 elements of a row, or what is left of it at its end:
    (x_q (M, K), scale (M, ceil(K / 128)) fp32)."""
    M, K = x.shape
    groups = -(-K // 128)
    whole = torch.nn.functional.pad(x, (0, 128 * groups - K))
    x_q, scale = quantize_rowwise(whole.reshape(M * groups, 128))
    return x_q.reshape(M, 128 * groups)[:, :K].contiguous(), scale.reshape(M, groups)


def grouped_gemm_swiglu(
    x: torch.Tensor,
    experts: Experts,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    weight_on: str = "input",
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """z[r] = silu(s * w_gate[e] @ x[t]) * (s * w_up[e] @ x[t]), (R, F), rows in expert order.

    s is the weight of the row's slot: it scales the expert's input, so not its output; or, with
    weight_on="output", it scales z. Rows of dropped slots are 0. Weights of any format count as
    what they stand for, and so does x with `x_scale`, (T,) or (T, H / 128); `activation` is as in
    `moe_layer`. out_dtype is by default x.dtype; all sums are in float64 if it, or x, is that.
    """
    out_dtype = out_dtype or x.dtype
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    xs = _activated(x, experts, activation, wide) if x_scale is None else _scaled(x, x_scale, wide)
    T, top_k = expert_ids.shape
    z = torch.zeros(T * top_k, experts.width, dtype=out_dtype, device=x.device)
    for e, rows, slots in _groups(expert_ids, experts.num_experts):
        score = expert_weights.flatten()[slots].to(wide)[:, None]
        one = torch.ones_like(score)
        before, after = {"input": (score, one), "output": (one, score)}[weight_on]
        gate, up = (
            xs[slots // top_k] @ _matrix(projection, e, wide).T * before
            for projection in (experts.gate, experts.up)
        )
        z[rows] = (torch.nn.functional.silu(gate) * up * after).to(out_dtype)
    return z


def grouped_gemm_combine(
    z: torch.Tensor,
    experts: Experts,
    expert_ids: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    z_scale: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """out[t] = sum over k of w_down[e] @ z[row of slot (t, k)] + residual[t], (T, H).

    As in `grouped_gemm_swiglu`; z_scale is (R, F / 128).
    """
    out_dtype = out_dtype or z.dtype
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    zs = _activated(z, experts, activation, wide) if z_scale is None else _scaled(z, z_scale, wide)
    T, top_k = expert_ids.shape
    partial = torch.zeros(T * top_k, experts.hidden, dtype=wide, device=z.device)
    for e, rows, slots in _groups(expert_ids, experts.num_experts):
        partial[slots] = zs[rows] @ _matrix(experts.down, e, wide).T
    out = torch.zeros(T, experts.hidden, dtype=wide, device=z.device)
    for slot in partial.reshape(T, top_k, experts.hidden).unbind(1):
        out += slot
    return (out if residual is None else out + residual.to(wide)).to(out_dtype)


def moe_layer(
    x: torch.Tensor,
    experts: Experts,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    shared: Experts | None = None,
    residual: torch.Tensor | None = None,
    weight_on: str = "input",
    activation: str | None = None,
    z_activation: str | None = None,
    z_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """sum over k of expert (t, k) of x[t] + shared(x[t]) + residual[t], (T, H).

    Weights of any format count as what they stand for. `weight_on`: "input" multiplies gate and up
    by the routing weight, "output" the expert's result, by way of z. With e4m3 weights x counts as
    what its quantisation by "row" or "group" stands for, and z, rounded to z_dtype, by "group";
    None leaves them alone; x in e4m3 has its `x_scale` already. Ids outside [0, E) add nothing. One
    rounding to out_dtype, by default x.dtype, as is z_dtype; all sums are in float64 if out_dtype
    is that, z being rounded all the same.
    """
    out_dtype, z_dtype = out_dtype or x.dtype, z_dtype or x.dtype
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    everyone = torch.zeros_like(expert_ids[:, :1]), torch.ones_like(expert_weights[:, :1])
    out = torch.zeros(len(x), experts.hidden, dtype=wide, device=x.device)
    for part, (ids, weights) in ((experts, (expert_ids, expert_weights)), (shared, everyone)):
        if part is not None:
            z = grouped_gemm_swiglu(
                x, part, ids, weights, x_scale=x_scale, weight_on=weight_on,
                activation=activation, out_dtype=wide,
            )  # fmt: skip
            z = z.to(z_dtype)
            out += grouped_gemm_combine(z, part, ids, activation=z_activation, out_dtype=wide)
    if residual is not None:
        out += residual.to(wide)
    return out.to(out_dtype)


def _groups(
    expert_ids: torch.Tensor, num_experts: int
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """(expert, its rows in expert order, their slots) of each expert that has rows."""
    offsets, row_slot = sort_by_expert(expert_ids, num_experts)
    bounds = offsets.tolist()
    for e, (first, end) in enumerate(itertools.pairwise(bounds)):
        if end > first:
            yield e, slice(first, end), row_slot[first:end].long()


def _matrix(projection: Projection, e: int, wide: torch.dtype) -> torch.Tensor:
    from .expert_weights import dequantize

    return dequantize(projection.expert(e), wide)[0]


def _activated(
    x: torch.Tensor, experts: Experts, activation: str | None, wide: torch.dtype
) -> torch.Tensor:
    """What x counts as before weights of this format."""
    if activation is None or not experts.format.startswith("e4m3"):
        return x.to(wide)
    x_q, scale = {"row": quantize_rowwise, "group": quantize_groupwise}[activation](x)
    return _scaled(x_q, scale, wide)


def _scaled(x_q: torch.Tensor, scale: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """x_q times its scales per row (M,) or per 128 of a row (M, ceil(K / 128))."""
    if scale.ndim == 2:
        scale = scale.repeat_interleave(128, dim=1)[:, : x_q.shape[1]]
    else:
        scale = scale[:, None]
    return x_q.to(wide) * scale.to(wide)
