"""RoPE, QK norm, temperature, quantisation and the write into the paged KV cache, in one launch.

    q, k = rotate(q, p), rotate(k, p)        interleaved pairs (x[2i], x[2i+1]); only with rope
    q, k = q * rsqrt(mean(q^2) + eps), ...   over D, no weight; only with qk_norm_eps
    q    = q * (1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1))   only with temperature
    cache[slot] = k, v                       slot = page * page_size + offset; negative: skipped

e4m3 caches, by the kind of their scales (paged_kv.py):
    tensor, head     x_q = e4m3(clamp(x / scale, -448, 448)), scale read
    token            scale = max(amax, 1e-12) / 448 over D, written beside the token
                     x_q = e4m3(clamp(x * (1 / scale), -448, 448)), as quantize_rowwise does
and q by the last, with a scale per token and head, if quantize_q is set.

Everything is fp32 between the load and the one rounding, to dt or to e4m3. The temperature belongs
here and not into the attention kernel, where a q changed in registers makes the compiler wait after
every tensor-core instruction.
Layout: q (T, Hq, D), k, v (T, Hkv, D) with any token stride, so the three may be views of one
fused projection; heads of a token dense. The cache is described in paged_kv.py.
Tiling: a program takes BLOCK_T tokens of one q or k head; a k head's program also takes v. Pages of
V^T are written across tokens, so that neighbours of one sequence share sectors.
Source: Llama 4 (transformers Llama4TextAttention, llama-models Attention); orders checked there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from ._quantize_rows import quantize_groups, saturated
from ._remembered import remembered
from ._sizes import flat, tiles
from .paged_kv import E4M3, LAYOUTS, PagedKV, check_paged_kv
from .rope import RopeTable, Temperature, check_rope_options

__all__ = ["RopeAndCacheConfig", "default_config", "rope_and_cache"]

VARYING = ["T", "Hq", "num_slots", "period", "eps"]
VARYING += ["stride_scale_page", "stride_scale_slot", "stride_scale_h"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeAndCacheConfig:
    BLOCK_T: int
    num_warps: int


def default_config(T: int, D: int, v_run: int = 1) -> RopeAndCacheConfig:
    """16 elements per thread; few tokens are spread over more programs of one warp.

    v_run: tokens that share a sector of V; of many, as many are taken at a time if 8 warps can.
    """
    width = triton.next_power_of_2(D)
    block_t = max(1, (512 if T <= 256 else 2048) // width)
    if T > 256:
        block_t = max(block_t, min(v_run, 4096 // width))
    return RopeAndCacheConfig(BLOCK_T=block_t, num_warps=max(1, block_t * width // 512))


_default_tiles = tiles(default_config)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    q, k, T, D = args["q_ptr"], args["k_ptr"], args["T"], args["D"]
    rotated = args["cos_sin_ptr"] is not None
    q_scale, k_scale, _ = args["scale_ptrs"]
    moved = nbytes(q, k, k, args["q_out_ptr"], q_scale)
    moved += 2 * k.numel() * args["k_cache_ptr"].element_size()
    moved += 8 * k.shape[0] * k.shape[1] * (k_scale is not None and args["TOKEN_SCALES"])
    moved += nbytes(args["positions_ptr"], args["slots_ptr"])
    per_element = 3 * rotated + 3 * (args["eps"] is not None)
    return moved + 4 * T * D * rotated, per_element * (q.numel() + k.numel())


@triton.jit
def _cached(x, scale_ptr, offs_scale, mask, dtype: tl.constexpr, TOKEN_SCALES: tl.constexpr):
    """Rows x in the cache's type; a token's scale is written, any other is read."""
    if scale_ptr is None:
        return x.to(dtype)
    elif TOKEN_SCALES:
        x_q, scale = quantize_groups(x.to(tl.float32))
        tl.store(scale_ptr + offs_scale, scale, mask=mask)
        return x_q
    else:
        scale = tl.load(scale_ptr + offs_scale, mask=mask, other=1.0)
        return saturated(tl.div_rn(x.to(tl.float32), scale[:, None]))


@triton.jit(do_not_specialize=VARYING, **named("rope_and_cache", "q_ptr", _cost))
def _rope_and_cache_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, slots_ptr, cos_sin_ptr,
    q_out_ptr, k_cache_ptr, v_cache_ptr, scale_ptrs,
    T, Hq, num_slots,
    strides_t, strides_kv, stride_scale_page, stride_scale_slot, stride_scale_h,
    period, eps, temperature,
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, TRANSPOSED_V: tl.constexpr,
    TOKEN_SCALES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(T / BLOCK_T), Hq + Hkv): tokens of q head h, or of KV head h - Hq.

    strides_t: of a token in q, k and v; strides_kv: of a page, a slot and a head in K, of those and
    an element in V. An operation is left out where its argument is None: cos_sin_ptr, eps,
    temperature (attn_scale, floor_scale), each of scale_ptrs (of q, of K, of V).
    """
    stride_q_t, stride_k_t, stride_v_t = strides_t
    stride_k_page, stride_k_slot, stride_k_h = strides_kv[:3]
    stride_v_page, stride_v_slot, stride_v_h, stride_v_d = strides_kv[3:]
    q_scale_ptr, k_scale_ptr, v_scale_ptr = scale_ptrs
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    h = tl.program_id(1)
    is_q = h < Hq
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    position = tl.load(positions_ptr + offs_t, mask=mask_t, other=0)

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = mask_t[:, None] & mask_d[None, :]
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
    y = tl.reshape(tl.join(a, b), (BLOCK_T, BLOCK_D))

    if is_q:
        offs_q = offs_t * Hq + h
        q = _cached(y, q_scale_ptr, offs_q, mask_t, q_out_ptr.dtype.element_ty, True)
        tl.store(q_out_ptr + offs_q[:, None] * D + offs_d[None, :], q, mask=mask)
    else:
        h_kv = (h - Hq).to(tl.int64)
        slot = tl.load(slots_ptr + offs_t, mask=mask_t, other=-1)
        mask_t = (slot >= 0) & (slot < num_slots)
        mask = mask_t[:, None] & mask_d[None, :]
        page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
        offs_scale = page * stride_scale_page + offset * stride_scale_slot + h_kv * stride_scale_h
        dtype: tl.constexpr = k_cache_ptr.dtype.element_ty

        k = _cached(y, k_scale_ptr, offs_scale, mask_t, dtype, TOKEN_SCALES)
        offs_k = page * stride_k_page + offset * stride_k_slot + h_kv * stride_k_h
        tl.store(k_cache_ptr + offs_k[:, None] + offs_d[None, :], k, mask=mask)

        v_ptrs = v_ptr + (offs_t * stride_v_t + h_kv * D)[:, None] + offs_d[None, :]
        v_in = tl.load(v_ptrs, mask=mask, other=0.0)
        v = _cached(v_in, v_scale_ptr, offs_scale, mask_t, dtype, TOKEN_SCALES)
        offs_v = page * stride_v_page + offset * stride_v_slot + h_kv * stride_v_h
        if TRANSPOSED_V:
            # The last dimension of a tile is spread over neighbouring threads: here tokens.
            offs_vt = (offs_d * stride_v_d)[:, None] + offs_v[None, :]
            tl.store(v_cache_ptr + offs_vt, tl.trans(v), mask=tl.trans(mask))
        else:
            tl.store(v_cache_ptr + offs_v[:, None] + offs_d[None, :], v, mask=mask)


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
    checked: bool = False,
    config: RopeAndCacheConfig | None = None,
) -> Any:
    """Rotate, normalise and scale q and k, write k and v into the cache, return q.

    Args:
        q: (T, Hq, D) fp32, fp16 or bf16; D even. Tokens at any stride, heads of a token dense.
        k, v: (T, Hkv, D) in q.dtype, likewise.
        kv: the caches in q.dtype or e4m3, in either layout, written at `slot_mapping`; scales of
            tokens are written there too, others are read and must be > 0. The block table is not
            read.
        positions: (T,) int32, position of each token in its own sequence, < 2^24.
        slot_mapping: (T,) int64, page * page_size + offset; negative: k and v are not written.
            No two tokens may share a slot. A slot beyond the cache is not written.
        rope: the table, or None for a layer without RoPE.
        qk_norm_eps: eps of the weightless RMS norm of q and k; None: no norm.
        temperature: of q; None: none.
        quantize_q: return q in e4m3 with a scale per token and head.
        checked: read the slots back (one synchronisation) and raise on those out of range.
        config: tile configuration; None takes `default_config` for T, D and the layout of V.
    Returns:
        (T, Hq, D) in q.dtype, contiguous; with quantize_q a pair, that in e4m3 and its scale
        (T, Hq) fp32.
    Raises:
        ValueError: shapes, strides, devices, eps, scales, the table.   TypeError: dtypes.
        IndexError: checked, a slot >= num_pages * page_size.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80, e4m3 before sm_89.
    Numerics: fp32, one rounding to q.dtype or e4m3; v in q.dtype is copied. NaN stays NaN; e4m3
        saturates at 448, infinities too; an amax is of the finite values, and where that is 0 the
        scale is 1. A NaN token affects itself only.
    Cost: bytes = T * (2*Hq + 2*Hkv) * D * itemsize + 2 * T * Hkv * D * the cache's itemsize, plus
        scales and the table's rows.
    Source: see the module; reference: kernels/reference.py:rope_and_cache.
    """
    op = "rope_and_cache"
    _check(op, q, k, v, kv, positions, slot_mapping, rope, qk_norm_eps, temperature, quantize_q)
    # Not in `_check`, which looks at layouts only.
    if kv.k_cache is kv.v_cache:
        require(False, op, "kv.v_cache must be another tensor than kv.k_cache", "the same")
    if kv.k_scale is kv.v_scale and kv.scale_kind == "token":
        require(False, op, "kv.v_scale must be another tensor than kv.k_scale", "the same")
    if is_checked(checked, q):
        _check_slots(slot_mapping, kv)
    q_out, q_scale = _rope_and_cache(
        q, k, v, kv.k_cache, kv.v_cache, kv.k_scale, kv.v_scale, kv.layout == "transposed_v",
        positions, slot_mapping,
        rope.cos_sin if rope else None, rope.period if rope else 0, qk_norm_eps,
        temperature.attn_scale if temperature else None,
        temperature.floor_scale if temperature else None,
        quantize_q, config and flat(config),
    )  # fmt: skip
    return (q_out, q_scale) if quantize_q else q_out


@remembered
def _check(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: PagedKV,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    rope: RopeTable | None,
    qk_norm_eps: float | None,
    temperature: Temperature | None,
    quantize_q: bool,
) -> None:
    check_tensor(op, "q", q, ("T", "Hq", "D"), FLOATS)
    T, _, D = q.shape
    require(2 <= D <= 256 and D % 2 == 0, op, "q must have an even head_dim in 2..256", D)
    check_paged_kv(op, kv, D, q.dtype, allowed=LAYOUTS, quantized=True)
    for name in ("k_cache", "v_cache") + ("k_scale", "v_scale") * (kv.scale_kind == "token"):
        check_writable(op, f"kv.{name}", getattr(kv, name))
    for name, x in (("k", k), ("v", v)):
        check_tensor(op, name, x, (T, kv.num_kv_heads, D), (q.dtype,))
    for name, x in (("q", q), ("k", k), ("v", v)):
        must = f"{name} must have dense heads, stride(1) == {D}"
        require(x.shape[1] <= 1 or x.stride(1) == D, op, must, x.stride())
    check_architecture(op, q)
    check_architecture(op, q, kv.k_cache.dtype)
    if quantize_q:
        check_architecture(op, q, E4M3)
    check_index(op, "positions", positions, (T,))
    check_tensor(op, "slot_mapping", slot_mapping, (T,), (torch.int64,))
    check_rope_options(op, rope, qk_norm_eps, temperature, T, D)
    check_devices(
        op, q=q, k=k, v=v, k_cache=kv.k_cache, positions=positions, slot_mapping=slot_mapping,
        cos_sin=rope.cos_sin if rope else None,
    )  # fmt: skip


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
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    transposed_v: bool,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin: torch.Tensor | None,
    period: int,
    qk_norm_eps: float | None,
    attn_scale: float | None,
    floor_scale: float | None,
    quantize_q: bool,
    config: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, Hq, D = q.shape
    v_run = 32 // v_cache.element_size() if transposed_v else 1
    BLOCK_T, num_warps = config or _default_tiles(T, D, v_run)
    kv = PagedKV(
        k_cache=k_cache, v_cache=v_cache, block_table=positions, k_scale=k_scale, v_scale=v_scale,
        layout="transposed_v" if transposed_v else "nhd",
    )  # fmt: skip
    q_out, q_scale = _outputs(q, quantize_q)
    launch(
        _rope_and_cache_kernel, (-(-T // BLOCK_T), Hq + kv.num_kv_heads),
        q, k, v, positions, slot_mapping, cos_sin,
        q_out, k_cache, v_cache, (q_scale if quantize_q else None, k_scale, v_scale),
        T, Hq, kv.num_pages * kv.page_size,
        (q.stride(0), k.stride(0), v.stride(0)),
        (*k_cache.stride()[:3], *kv.v_strides()), *kv.scale_strides(),
        period, qk_norm_eps, None if attn_scale is None else (attn_scale, floor_scale),
        D=D, PAGE_SIZE=kv.page_size, TRANSPOSED_V=transposed_v,
        TOKEN_SCALES=kv.scale_kind == "token", BLOCK_T=BLOCK_T, num_warps=num_warps,
    )  # fmt: skip
    return q_out, q_scale


def _outputs(q: torch.Tensor, quantize_q: bool) -> tuple[torch.Tensor, torch.Tensor]:
    q_scale = torch.empty(q.shape[:2] if quantize_q else 0, dtype=torch.float32, device=q.device)
    dtype = E4M3 if quantize_q else q.dtype
    return torch.empty(q.shape, dtype=dtype, device=q.device), q_scale


_rope_and_cache = define(
    "rope_and_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor(c!)? k_scale, Tensor(d!)? v_scale, bool transposed_v, Tensor positions,"
    " Tensor slot_mapping, Tensor? cos_sin, int period, float? qk_norm_eps, float? attn_scale,"
    " float? floor_scale, bool quantize_q, int[]? config) -> (Tensor, Tensor)",
    _rope_and_cache_impl,
    lambda q, *args: _outputs(q, args[-2]),
)
