"""Every operator in plain PyTorch: the one definition of what the kernels must compute.

Written for reading and for tests: it loops, synchronises and computes in fp32 (or, given float64
inputs, in float64). It never imports Triton.
"""

from __future__ import annotations

import math

import torch

from .paged_kv import PagedKV
from .rope import RopeTable, Temperature

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "fp8_matmul",
    "gather_rows",
    "grouped_gemm_combine",
    "grouped_gemm_swiglu",
    "moe",
    "quantize_rowwise",
    "query_temperature",
    "rms_norm",
    "rope_and_cache",
    "route",
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
) -> torch.Tensor:
    """Rotated, normalised, scaled q (T, Hq, D); writes kv.k_cache and kv.v_cache at the slots."""
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
    q_out, k_out = (x.to(q.dtype) for x in new)
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, kv.page_size)
            kv.k_cache[page, offset] = k_out[t]
            kv.v_cache[page, offset] = v[t]
    return q_out


def query_temperature(
    positions: torch.Tensor, attn_scale: float, floor_scale: float
) -> torch.Tensor:
    """1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1), (T,) float64."""
    steps = torch.floor((positions.double() + 1) / floor_scale)
    return 1 + attn_scale * torch.log1p(steps)


def attention_prefill(
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    chunk_size: int = 0,
    sm_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (T, Hq, D) in q.dtype, lse (T, Hq) wide): masked softmax attention over the pages.

    Query row i of sequence b stands at p = seq_lens[b] - q_len[b] + i and sees key t iff t <= p
    and, with chunks, t // chunk_size == p // chunk_size. No visible key: out 0, lse -inf.
    """
    T, Hq, D = q.shape
    group = Hq // kv.num_kv_heads
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    out = torch.zeros(T, Hq, D, dtype=_wide(q).dtype, device=q.device)
    lse = torch.full((T, Hq), -torch.inf, dtype=out.dtype, device=q.device)
    bounds = cu_seqlens_q.tolist()
    for b, seq_len in enumerate(seq_lens.tolist()):
        first, last = bounds[b], bounds[b + 1]
        for i in range(first, last):
            p = seq_len - last + i
            start = p // chunk_size * chunk_size if chunk_size else 0
            if p < 0:
                continue
            t = torch.arange(start, p + 1, device=q.device)
            pages = kv.block_table[b].long()[t // kv.page_size]
            k = _wide(kv.k_cache[pages, t % kv.page_size]).repeat_interleave(group, dim=1)
            v = _wide(kv.v_cache[pages, t % kv.page_size]).repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,thd->ht", _wide(q[i]), k) * sm_scale
            lse[i] = torch.logsumexp(scores, dim=1)
            out[i] = torch.einsum("ht,thd->hd", torch.softmax(scores, dim=1), v)
    return out.to(q.dtype), lse


def attention_decode(
    q: torch.Tensor,
    kv: PagedKV,
    seq_lens: torch.Tensor,
    *,
    chunk_size: int = 0,
    sm_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """attention_prefill of one query row per sequence, (B, Hq, D) and (B, Hq)."""
    rows = torch.arange(len(seq_lens) + 1)
    return attention_prefill(q, kv, rows, seq_lens, chunk_size=chunk_size, sm_scale=sm_scale)


def route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of the largest logits, (T, top_k) int32, and the sigmoids of those, fp32.

    NaN counts as -inf; ties go to the lowest expert.
    """
    wide = logits.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    rows = [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in wide.tolist()]
    expert_ids = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), top_k).to(wide.device)
    weights = torch.sigmoid(wide.gather(1, expert_ids))
    return expert_ids.int(), weights.float()


def sort_by_expert(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """expert_offsets (E + 1,) and row_slot (R,): the slots sorted by (expert, slot).

    Slots of ids outside [0, E) come last.
    """
    groups = [e if 0 <= e < num_experts else num_experts for e in expert_ids.flatten().tolist()]
    row_slot = sorted(range(len(groups)), key=lambda slot: (groups[slot], slot))
    offsets = [sum(group < e for group in groups) for e in range(num_experts + 1)]
    tables = torch.tensor(offsets, dtype=torch.int32), torch.tensor(row_slot, dtype=torch.int32)
    return tables[0].to(expert_ids.device), tables[1].to(expert_ids.device)


def tile_table(expert_offsets: torch.Tensor, rows: int, block_m: int) -> list[tuple[int, int, int]]:
    """(expert, row, end row) of each tile of at most `block_m` rows; E stands for dropped."""
    bounds = [*expert_offsets.tolist(), rows]
    return [
        (e, row, min(row + block_m, end))
        for e, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        for row in range(begin, end, block_m)
    ]


def grouped_gemm_swiglu(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
) -> torch.Tensor:
    """z[r] = silu(s * x[t] @ w_gate[e]) * (s * x[t] @ w_up[e]), (R, F), rows in expert order.

    s is the weight of the row's slot: it scales the expert's input, so not its output. Rows of
    dropped slots are 0.
    """
    top_k, F = expert_ids.shape[1], w_gate_up.shape[2] // 2
    _, row_slot = sort_by_expert(expert_ids, len(w_gate_up))
    z = torch.zeros(len(row_slot), F, dtype=x.dtype, device=x.device)
    for r, slot in enumerate(row_slot.tolist()):
        e = int(expert_ids[slot // top_k, slot % top_k])
        if 0 <= e < len(w_gate_up):
            score = expert_weights[slot // top_k, slot % top_k]
            gate, up = (_wide(x[slot // top_k]) @ _wide(w_gate_up[e]) * score).chunk(2)
            z[r] = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    return z


def grouped_gemm_combine(
    z: torch.Tensor,
    w_down: torch.Tensor,
    expert_ids: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t] = sum over k of z[row of slot (t, k)] @ w_down[e] + residual[t], (T, H)."""
    T, top_k = expert_ids.shape
    _, row_slot = sort_by_expert(expert_ids, len(w_down))
    partial = _wide(z).new_zeros(T, top_k, w_down.shape[2])
    for r, slot in enumerate(row_slot.tolist()):
        e = int(expert_ids[slot // top_k, slot % top_k])
        if 0 <= e < len(w_down):
            partial[slot // top_k, slot % top_k] = _wide(z[r]) @ _wide(w_down[e])
    out = partial.sum(1)
    return (out if residual is None else out + _wide(residual)).to(z.dtype)


def moe(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The routed experts of every token on their weighted inputs, summed, plus residual, (T, H)."""
    z = grouped_gemm_swiglu(x, w_gate_up, expert_ids, expert_weights)
    return grouped_gemm_combine(z, w_down, expert_ids, residual)
