"""Launches beyond the models' own steps: every operator in every dtype, and at awkward sizes.

    variants()                              # what there is, by id
    launches_of(variant, "sm_90")           # its launches, by the default configs for sm_90

steps.py records what Scout and Maverick ask for. Users can also ask for fp32 and fp16, for odd
sizes, strides and offsets, and for sizes of 1: those compile to other machine code, which must fit
and be right on every architecture. Sizes are the models'; an odd one is 1 more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llama4_triton.autotune.launches import DEVICES, Launch
from llama4_triton.autotune.recorder import record
from llama4_triton.kernels._check import UnsupportedArchitectureError
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.convert_layout import convert_layout
from llama4_triton.kernels.expert_weights import Experts
from llama4_triton.kernels.fp8_matmul import fp8_matmul
from llama4_triton.kernels.gather_rows import gather_rows
from llama4_triton.kernels.merge_attention import merge_attention
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.paged_kv import LAYOUTS, PagedKV
from llama4_triton.kernels.quantize import quantize_groupwise, quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.rms_norm_quantize import rms_norm_quantize
from llama4_triton.kernels.rope import RopeTable, Temperature
from llama4_triton.kernels.rope_and_cache import rope_and_cache
from llama4_triton.kernels.routing import sort_by_expert
from llama4_triton.kernels.swiglu import swiglu

from .expert_weights import FORMATS
from .moe_layer import MoeLayer
from .shapes import SCOUT
from .steps import shipped_launches

__all__ = ["DTYPES", "Variant", "all_launches", "launches_of", "variants"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PAGE = 64
TP = 8  # the sizes of one of eight GPUs
FEW, MANY = 16, 4096  # tokens: a step of decode, a prefill


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One operator at one size and dtype."""

    op: str
    dtype: torch.dtype
    size: str  # "few" or "many" tokens, or a word that starts with "ragged"
    call: Callable[[], object]  # on "cuda", which a recording provides

    @property
    def id(self) -> str:
        return f"{self.op}-{str(self.dtype).removeprefix('torch.')}-{self.size}"

    @property
    def ragged(self) -> bool:
        return self.size.startswith("ragged")


def launches_of(variant: Variant, arch: str = "sm_90") -> list[Launch]:
    """The launches of a variant with the default configs of `arch`.

    Raises:
        UnsupportedArchitectureError: the operator does not run there.
    """
    return record(variant.call, device=DEVICES[arch]).launches


def all_launches(arch: str = "sm_90") -> tuple[list[Launch], list[str]]:
    """One launch per binary of `arch`: what the models ask for, then the variants.

    Also, as sentences, what operators say that do not run there. The models' steps are recorded
    with an H100's configs, so other architectures have the variants alone.
    """
    launches = list(shipped_launches()) if arch == "sm_90" else []
    refused = []
    for variant in variants():
        try:
            launches += launches_of(variant, arch)
        except UnsupportedArchitectureError as error:
            refused.append(f"{variant.id}: {error}")
    return list({launch.binary(): launch for launch in reversed(launches)}.values())[::-1], refused


def variants(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Variant]:
    """Every operator: in each dtype at two sizes, then at awkward sizes in the first dtype."""
    for dtype in dtypes:
        for op, call in _OPERATORS.items():
            for size, T in (("few", FEW), ("many", MANY)):
                yield _variant(op, dtype, size, call, T)
        yield _variant("moe_top2", dtype, "many", _moe, MANY, top_k=2)
        if dtype != torch.float32:
            yield _variant("attention_decode_e4m3", dtype, "few", _attention_decode_e4m3, FEW)
            for format in FORMATS[1:]:
                for size, T in (("few", FEW), ("many", MANY)):
                    yield _variant(f"moe_{format}", dtype, size, _moe_quantized, T, format=format)
    dtype = dtypes[0]
    for op, call in _OPERATORS.items():
        for size, T in (("ragged-few", FEW + 1), ("ragged-many", MANY + 1)):
            yield _variant(op, dtype, size, call, T, odd=1)
    yield _variant("fp8_matmul", dtype, "ragged-one", _fp8_matmul, 1, N=1, K=1)
    yield _variant("rms_norm", dtype, "ragged-one", _rms_norm, 1, H=1)


def _variant(
    op: str, dtype: torch.dtype, size: str, call: Callable[..., object], T: int, **more: Any
) -> Variant:
    return Variant(op=op, dtype=dtype, size=size, call=lambda: call(T, dtype, **more))


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _int32(*shape: int) -> torch.Tensor:
    return _empty(*shape, dtype=torch.int32)


def _rms_norm(T: int, dtype: torch.dtype, *, odd: int = 0, H: int = SCOUT.hidden) -> None:
    x, weight = _empty(T, H + odd, dtype=dtype), _empty(H + odd, dtype=dtype)
    rms_norm(x, weight, SCOUT.eps)
    add_rms_norm(x, x, weight, SCOUT.eps)


def _gather_rows(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    gather_rows(_empty(SCOUT.vocab, SCOUT.hidden + odd, dtype=dtype), _int32(T))


def _swiglu(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    gate_up = _empty(T, 2 * (SCOUT.ffn // TP + odd), dtype=dtype)
    swiglu(*gate_up.chunk(2, dim=1))


def _kv(dtype: torch.dtype, B: int, D: int) -> PagedKV:
    pages = SCOUT.chunk // PAGE
    cache = (B * pages, PAGE, SCOUT.kv_heads // TP, D)
    return PagedKV(
        k_cache=_empty(*cache, dtype=dtype),
        v_cache=_empty(*cache, dtype=dtype),
        block_table=_int32(B, pages),
    )


def _rows(dtype: torch.dtype, B: int, D: int) -> PagedKV:
    """A row per sequence, heads apart, as transformers has it."""
    row = B, SCOUT.kv_heads // TP, SCOUT.chunk + 1, D
    k, v = (_empty(*row, dtype=dtype).transpose(1, 2) for _ in range(2))
    return PagedKV(k_cache=k, v_cache=v, block_table=_int32(B, 1), layout="dense")


def _rope_and_cache(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    Hq, Hkv, D = SCOUT.heads // TP, SCOUT.kv_heads // TP, SCOUT.head_dim + 2 * odd
    q, k, v = _empty(T, Hq + 2 * Hkv, D, dtype=dtype).split([Hq, Hkv, Hkv], dim=1)
    slots = _empty(T, dtype=torch.int64)
    table = RopeTable(cos_sin=_empty(SCOUT.chunk, D, dtype=torch.float32), period=SCOUT.chunk)
    scale = Temperature(attn_scale=0.1, floor_scale=8192.0)
    for rope, eps, temperature in ((table, SCOUT.eps, None), (None, None, scale)):
        rope_and_cache(
            q, k, v, _kv(dtype, 1, D), _int32(T), slots,
            rope=rope, qk_norm_eps=eps, temperature=temperature,
        )  # fmt: skip


def _rope_and_cache_e4m3(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    """A local layer with scales per token and V^T in pages, a global one with static scales."""
    Hq, Hkv, D = SCOUT.heads // TP, SCOUT.kv_heads // TP, SCOUT.head_dim + 2 * odd
    q, k, v = _empty(T, Hq + 2 * Hkv, D, dtype=dtype).split([Hq, Hkv, Hkv], dim=1)
    positions, slots = _int32(T), _empty(T, dtype=torch.int64)
    table = RopeTable(cos_sin=_empty(SCOUT.chunk, D, dtype=torch.float32), period=SCOUT.chunk)
    temperature = Temperature(attn_scale=0.1, floor_scale=8192.0)
    pages, page = SCOUT.chunk // PAGE, PAGE + odd
    for shape, v_shape, scales, options in (
        ((page, Hkv, D), (Hkv, D, page), (pages, page, Hkv), (table, SCOUT.eps, None)),
        ((page, Hkv, D), (page, Hkv, D), (1,), (None, None, temperature)),
    ):
        kv = PagedKV(
            k_cache=_empty(pages, *shape, dtype=torch.float8_e4m3fn),
            v_cache=_empty(pages, *v_shape, dtype=torch.float8_e4m3fn),
            block_table=_int32(1, pages),
            k_scale=_empty(*scales, dtype=torch.float32),
            v_scale=_empty(*scales, dtype=torch.float32),
            layout="nhd" if shape == v_shape else "transposed_v",
        )
        rope, eps, scale = options
        rope_and_cache(
            q, k, v, kv, positions, slots,
            rope=rope, qk_norm_eps=eps, temperature=scale, quantize_q=True,
        )  # fmt: skip


def _convert_layout(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    Hkv, D = SCOUT.kv_heads // TP, SCOUT.head_dim + 2 * odd
    pages, page = -(-T // PAGE), PAGE + odd
    convert_layout(_empty(pages, page, Hkv, D, dtype=dtype), layout="transposed_v")
    out = _empty(pages, page, Hkv, D, dtype=dtype)
    v_cache = _empty(pages, Hkv, D, page, dtype=dtype)
    convert_layout(v_cache, layout="nhd", out=out, pages=_int32(T))


def _attention_prefill(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    D = SCOUT.head_dim + 2 * odd
    q = _empty(T, SCOUT.heads // TP, D, dtype=dtype)
    kv, bounds, lengths = _kv(dtype, 1, D), _int32(2), _int32(1)
    attention_prefill(q, kv, bounds, lengths, chunk_size=SCOUT.chunk)
    scale = Temperature(attn_scale=0.1, floor_scale=8192.0)
    attention_prefill(q, kv, bounds, lengths, temperature=scale)
    attention_prefill(q, _rows(dtype, 1, D), bounds, lengths, chunk_size=SCOUT.chunk)


def _attention_decode(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    B, D = min(T, 64), SCOUT.head_dim + 2 * odd
    q = _empty(B, SCOUT.heads // TP, D, dtype=dtype)
    attention_decode(q, _kv(dtype, B, D), _int32(B))
    attention_decode(q, _rows(dtype, B, D), _int32(B))


def _attention_decode_e4m3(T: int, dtype: torch.dtype) -> None:
    """e4m3 caches in both layouts and by both kinds of scales, and the rows of a verification."""
    e4m3: Any = torch.float8_e4m3fn
    B, Hq, D = min(T, 64), SCOUT.heads // TP, SCOUT.head_dim
    q = _empty(B, Hq, D, dtype=dtype)
    pages, Hkv = B * SCOUT.chunk // PAGE, SCOUT.kv_heads // TP
    shape = pages, PAGE, Hkv, D
    for layout in LAYOUTS:
        v_shape = (pages, Hkv, D, PAGE) if layout == "transposed_v" else shape
        for scale_shape in ((Hkv,), shape[:3]):
            k_scale, v_scale = (_empty(*scale_shape, dtype=torch.float32) for _ in range(2))
            kv = PagedKV(
                k_cache=_empty(*shape, dtype=e4m3), v_cache=_empty(*v_shape, dtype=e4m3),
                block_table=_int32(B, SCOUT.chunk // PAGE), k_scale=k_scale, v_scale=v_scale,
                layout=layout,
            )  # fmt: skip
            attention_decode(q, kv, _int32(B))
        for max_q_len in (4, 8):
            rows = _empty(B * max_q_len, Hq, D, dtype=q.dtype)
            attention_decode(
                rows, kv, _int32(B), cu_seqlens_q=_int32(B + 1), max_q_len=max_q_len,
                temperature=Temperature(attn_scale=0.1, floor_scale=8192.0),
            )  # fmt: skip


def _merge_attention(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    shape = 4, T, SCOUT.heads, SCOUT.head_dim + 2 * odd
    merge_attention(_empty(*shape, dtype=dtype), _empty(*shape[:3], dtype=torch.float32))


def _moe(T: int, dtype: torch.dtype, *, odd: int = 0, top_k: int = 1) -> None:
    E, H, F = SCOUT.experts, SCOUT.hidden + odd, SCOUT.ffn // TP + odd
    w13, w2 = _empty(E, 2 * F, H, dtype=dtype), _empty(E, H, F, dtype=dtype)
    x, w_router = _empty(T, H, dtype=dtype), _empty(E, H, dtype=dtype)
    gate, up, down = (_empty(*shape, dtype=dtype) for shape in ((F, H), (F, H), (H, F)))
    shared = Experts.dense(gate, up, down)
    experts = Experts.from_vllm(w13, w2)
    moe(x, experts, top_k=top_k, w_router=w_router, shared=shared)


def _moe_quantized(T: int, dtype: torch.dtype, *, format: str) -> None:
    """Weights in 8 and 4 bits, for activations of 16 bits or, where the GPU has it, e4m3."""
    layer = MoeLayer(shape=SCOUT, T=T, tp=TP, format=format, dtype=dtype)
    moe(**layer.inputs())


def _quantize_groupwise(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    quantize_groupwise(_empty(T, SCOUT.hidden + 128 * odd, dtype=dtype))


def _rms_norm_quantize(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    x, weight = _empty(T, SCOUT.hidden + odd, dtype=dtype), _empty(SCOUT.hidden + odd, dtype=dtype)
    rms_norm_quantize(x, weight, SCOUT.eps)
    rms_norm_quantize(x, weight, SCOUT.eps, residual=x)


def _sort_by_expert(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    ids, weights = _int32(T, 1 + odd), _empty(T, 1 + odd, dtype=torch.float32)
    sort_by_expert(ids, weights, SCOUT.experts + odd)


def _quantize_rowwise(T: int, dtype: torch.dtype, *, odd: int = 0) -> None:
    quantize_rowwise(_empty(T, SCOUT.hidden + odd, dtype=dtype))


def _fp8_matmul(
    T: int, dtype: torch.dtype, *, odd: int = 0, N: int = SCOUT.hidden, K: int = SCOUT.hidden
) -> None:
    e4m3: Any = torch.float8_e4m3fn
    x_scale, w_scale = (_empty(rows, dtype=torch.float32) for rows in (T, N))
    x_q, w_q = _empty(T, K + odd, dtype=e4m3), _empty(N, K + odd, dtype=e4m3)
    for fast_accum in (False, True):
        fp8_matmul(x_q, x_scale, w_q, w_scale, out_dtype=dtype, fast_accum=fast_accum)


_OPERATORS: dict[str, Callable[..., object]] = {
    "rms_norm": _rms_norm,
    "gather_rows": _gather_rows,
    "swiglu": _swiglu,
    "rope_and_cache": _rope_and_cache,
    "rope_and_cache_e4m3": _rope_and_cache_e4m3,
    "convert_layout": _convert_layout,
    "sort_by_expert": _sort_by_expert,
    "moe": _moe,
    "attention_prefill": _attention_prefill,
    "attention_decode": _attention_decode,
    "merge_attention": _merge_attention,
    "quantize_rowwise": _quantize_rowwise,
    "quantize_groupwise": _quantize_groupwise,
    "rms_norm_quantize": _rms_norm_quantize,
    "fp8_matmul": _fp8_matmul,
}
