"""RoPE, QK norm, temperature and the write into the paged KV cache, in one launch.

    q, k = rotate(q, p), rotate(k, p)        interleaved pairs (x[2i], x[2i+1]); only with rope
    q, k = q * rsqrt(mean(q^2) + eps), ...   over D, no weight; only with qk_norm_eps
    q    = q * (1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1))   only with temperature
    cache[slot] = k, v                       slot = page * page_size + offset; negative: skipped

Everything is fp32 between the load and the one rounding to dt. The temperature belongs here and
not into the attention kernel, where a q changed in registers makes the compiler wait after every
tensor-core instruction.
Layout: q (T, Hq, D), k, v (T, Hkv, D) with any token stride, so the three may be views of one
fused projection; heads of a token dense. The cache is described in paged_kv.py.
Tiling: a program takes BLOCK_T tokens of one q or k head; a k head's program also copies v.
Source: Llama 4 (transformers Llama4TextAttention, llama-models Attention); orders checked there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import (
    FLOATS,
    check_architecture,
    check_devices,
    check_index,
    check_tensor,
    check_writable,
    require,
)
from ._debug import is_checked
from ._launch import launch
from ._library import define
from ._names import named, nbytes
from .paged_kv import PagedKV, check_paged_kv
from .rope import RopeTable, Temperature

__all__ = ["RopeAndCacheConfig", "default_config", "rope_and_cache"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeAndCacheConfig:
    BLOCK_T: int
    num_warps: int


def default_config(T: int, D: int) -> RopeAndCacheConfig:
    """16 elements per thread; few tokens are spread over more programs of one warp."""
    elements = 512 if T <= 256 else 2048
    block_t = max(1, elements // triton.next_power_of_2(D))
    return RopeAndCacheConfig(BLOCK_T=block_t, num_warps=elements // 512)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    q, k, T, D = args["q_ptr"], args["k_ptr"], args["T"], args["D"]
    rotated = args["cos_sin_ptr"] is not None
    moved = 2 * nbytes(q, k, k) + nbytes(args["positions_ptr"], args["slots_ptr"])
    per_element = 3 * rotated + 3 * (args["eps"] is not None)
    return moved + 4 * T * D * rotated, per_element * (q.numel() + k.numel())


@triton.jit(
    do_not_specialize=["T", "Hq", "num_slots", "period", "eps"],
    **named("rope_and_cache", "q_ptr", _cost),
)
def _rope_and_cache_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, slots_ptr, cos_sin_ptr,
    q_out_ptr, k_cache_ptr, v_cache_ptr,
    T, Hq, num_slots,
    strides_t, strides_kv,
    period, eps, temperature,
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(T / BLOCK_T), Hq + Hkv): tokens of q head h, or of KV head h - Hq.

    Strides of a token in q, k and v; of a page, a slot and a head in the caches. An operation is
    left out where its argument is None: cos_sin_ptr, eps, temperature (attn_scale, floor_scale).
    """
    stride_q_t, stride_k_t, stride_v_t = strides_t
    stride_kv_page, stride_kv_slot, stride_kv_h = strides_kv
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    h = tl.program_id(1)
    is_q = h < Hq
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    position = tl.load(positions_ptr + offs_t, mask=mask_t, other=0)

    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    if is_q:
        x_ptr = q_ptr + h * D
        offs_x = offs_t * stride_q_t
    else:
        x_ptr = k_ptr + (h - Hq) * D
        offs_x = offs_t * stride_k_t
    x = tl.load(x_ptr + offs_x[:, None] + offs_d[None, :], mask=mask, other=0.0)

    # (BLOCK_T, BLOCK_D // 2) each: the even and the odd elements of the pairs
    a, b = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_T, BLOCK_D // 2, 2)))
    if cos_sin_ptr is not None:
        offs_i = tl.arange(0, BLOCK_D // 2)
        row = tl.where(period > 0, position % tl.maximum(period, 1), offs_t)
        # A negative position (padding) would leave the table: it gets zeros instead.
        mask_i = (mask_t & (position >= 0))[:, None] & (offs_i < D // 2)[None, :]
        cos_ptrs = cos_sin_ptr + row[:, None] * D + offs_i[None, :]
        cos = tl.load(cos_ptrs, mask=mask_i, other=0.0)
        sin = tl.load(cos_ptrs + D // 2, mask=mask_i, other=0.0)
        a, b = a * cos - b * sin, a * sin + b * cos
    if eps is not None:
        rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + eps)[:, None]
        a, b = a * rstd, b * rstd
    if temperature is not None:
        attn_scale, floor_scale = temperature
        # Exact steps: p + 1 < 2^24, so the rounded quotient never reaches the next integer.
        steps = tl.floor(tl.div_rn((position + 1).to(tl.float32), floor_scale))
        scale = 1.0 + attn_scale * tl.log(steps + 1.0)
        scale = tl.where(is_q, scale, 1.0)[:, None]
        a, b = a * scale, b * scale
    y = tl.reshape(tl.join(a, b), (BLOCK_T, BLOCK_D)).to(x.dtype)

    if is_q:
        q_out_ptrs = q_out_ptr + (offs_t * Hq + h)[:, None] * D + offs_d[None, :]
        tl.store(q_out_ptrs, y, mask=mask)
    else:
        slot = tl.load(slots_ptr + offs_t, mask=mask_t, other=-1)
        mask = mask & ((slot >= 0) & (slot < num_slots))[:, None]
        v_ptrs = v_ptr + offs_t[:, None] * stride_v_t + (h - Hq) * D + offs_d[None, :]
        v = tl.load(v_ptrs, mask=mask, other=0.0)
        offs_kv = slot // PAGE_SIZE * stride_kv_page + slot % PAGE_SIZE * stride_kv_slot
        offs_kv = (offs_kv + (h - Hq) * stride_kv_h)[:, None] + offs_d[None, :]
        tl.store(k_cache_ptr + offs_kv, y, mask=mask)
        tl.store(v_cache_ptr + offs_kv, v, mask=mask)


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
    checked: bool = False,
    config: RopeAndCacheConfig | None = None,
) -> torch.Tensor:
    """Rotate, normalise and scale q and k, write k and v into the cache, return q.

    Args:
        q: (T, Hq, D) fp32, fp16 or bf16; D even. Tokens at any stride, heads of a token dense.
        k, v: (T, Hkv, D) in q.dtype, likewise.
        kv: the caches, written at `slot_mapping`; the block table is not read.
        positions: (T,) int32, position of each token in its own sequence, < 2^24.
        slot_mapping: (T,) int64, page * page_size + offset; negative: k and v are not written.
            No two tokens may share a slot. A slot beyond the cache is not written.
        rope: the table, or None for a layer without RoPE.
        qk_norm_eps: eps of the weightless RMS norm of q and k; None: no norm.
        temperature: of q; None: none.
        checked: read the slots back (one synchronisation) and raise on those out of range.
        config: tile configuration; None takes `default_config(T, D)`.
    Returns:
        (T, Hq, D) in q.dtype, contiguous.
    Raises:
        ValueError: shapes, strides, devices, eps, scales, the table.   TypeError: dtypes.
        IndexError: checked, a slot >= num_pages * page_size.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: fp32, one rounding to q.dtype; v is copied. A NaN token affects itself only.
    Cost: bytes = 2 * T * (Hq + 2*Hkv) * D * itemsize, plus the table's rows.
    Source: see the module; reference: kernels/reference.py:rope_and_cache.
    """
    _check(q, k, v, kv, positions, slot_mapping, rope, qk_norm_eps, temperature)
    if is_checked(checked, q):
        _check_slots(slot_mapping, kv)
    T, _, D = q.shape
    return _rope_and_cache(
        q,
        k,
        v,
        kv.k_cache,
        kv.v_cache,
        positions,
        slot_mapping,
        rope.cos_sin if rope else None,
        rope.period if rope else 0,
        qk_norm_eps,
        temperature.attn_scale if temperature else None,
        temperature.floor_scale if temperature else None,
        list(astuple(config or default_config(T, D))),
    )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: PagedKV,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    rope: RopeTable | None,
    qk_norm_eps: float | None,
    temperature: Temperature | None,
) -> None:
    op = "rope_and_cache"
    check_tensor(op, "q", q, ("T", "Hq", "D"), FLOATS)
    T, _, D = q.shape
    require(2 <= D <= 256 and D % 2 == 0, op, "q must have an even head_dim in 2..256", D)
    check_paged_kv(op, kv, D, q.dtype)
    check_writable(op, "kv.k_cache", kv.k_cache)  # v_cache has the same strides
    distinct = kv.k_cache is not kv.v_cache
    require(distinct, op, "kv.v_cache must be another tensor than kv.k_cache", "the same")
    for name, x in (("k", k), ("v", v)):
        check_tensor(op, name, x, (T, kv.num_kv_heads, D), (q.dtype,))
    for name, x in (("q", q), ("k", k), ("v", v)):
        must = f"{name} must have dense heads, stride(1) == {D}"
        require(x.shape[1] <= 1 or x.stride(1) == D, op, must, x.stride())
    check_architecture(op, q)
    check_index(op, "positions", positions, (T,))
    check_tensor(op, "slot_mapping", slot_mapping, (T,), (torch.int64,))
    table = None
    if rope is not None:
        table = rope.cos_sin
        check_tensor(op, "rope.cos_sin", table, ("rows", D), (torch.float32,))
        require(rope.period >= 0, op, "rope.period must be >= 0", rope.period)
        must = f"rope.cos_sin must be contiguous with at least {rope.period or T} rows"
        enough = table.is_contiguous() and table.shape[0] >= (rope.period or T)
        require(enough, op, must, tuple(table.shape))
    check_devices(
        op, q=q, k=k, v=v, k_cache=kv.k_cache, positions=positions, slot_mapping=slot_mapping,
        cos_sin=table,
    )  # fmt: skip
    if qk_norm_eps is not None:
        require(
            0 <= qk_norm_eps < float("inf"), op, "qk_norm_eps must be finite and >= 0", qk_norm_eps
        )
    if temperature is not None:
        for name in ("attn_scale", "floor_scale"):
            value = getattr(temperature, name)
            valid = abs(value) < float("inf") and (name == "attn_scale" or value > 0)
            must = "finite" if name == "attn_scale" else "finite and > 0"
            require(valid, op, f"temperature.{name} must be {must}", value)


def _check_slots(slot_mapping: torch.Tensor, kv: PagedKV) -> None:
    num_slots = kv.num_pages * kv.page_size
    largest = int(slot_mapping.max()) if slot_mapping.numel() else -1
    must = f"slot_mapping must be < num_pages * page_size == {num_slots}"
    require(largest < num_slots, "rope_and_cache", must, largest, IndexError)


def _rope_and_cache_impl(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin: torch.Tensor | None,
    period: int,
    qk_norm_eps: float | None,
    attn_scale: float | None,
    floor_scale: float | None,
    config: list[int],
) -> torch.Tensor:
    BLOCK_T, num_warps = config
    T, Hq, D = q.shape
    num_pages, page_size, Hkv, _ = k_cache.shape
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        _rope_and_cache_kernel, (triton.cdiv(T, BLOCK_T), Hq + Hkv),
        q, k, v, positions, slot_mapping, cos_sin,
        q_out, k_cache, v_cache,
        T, Hq, num_pages * page_size,
        (q.stride(0), k.stride(0), v.stride(0)), k_cache.stride()[:3],
        period, qk_norm_eps, None if attn_scale is None else (attn_scale, floor_scale),
        D=D, PAGE_SIZE=page_size, BLOCK_T=BLOCK_T, num_warps=num_warps,
    )  # fmt: skip
    return q_out


_rope_and_cache = define(
    "rope_and_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor positions, Tensor slot_mapping, Tensor? cos_sin, int period, float? qk_norm_eps,"
    " float? attn_scale, float? floor_scale, int[] config) -> Tensor",
    _rope_and_cache_impl,
    lambda q, *args: q.new_empty(q.shape),
)
