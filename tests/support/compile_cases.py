"""Every operator's default configurations at real Llama 4 shapes, for the compile check.

A case calls an operator on tensors that exist in address space only. Its launches are recorded and
compiled, and each must satisfy the case's requirements, by kernel. "aligned" cases are what the
model runs; "ragged" ones have odd sizes: they must compile and fit, and may be slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from llama4_triton.autotune.compile import (
    CompiledReport,
    Requirements,
    compile_launch,
    recorded_launches,
)
from llama4_triton.bench.shapes import MAVERICK, MODELS, SCOUT, TENSOR_PARALLEL, TextShape, linears
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_prefill import AttentionPrefillConfig, attention_prefill
from llama4_triton.kernels.fp8_matmul import Fp8MatmulConfig, fp8_matmul
from llama4_triton.kernels.grouped_gemm import Experts
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.rope import RopeTable, Temperature
from llama4_triton.kernels.rope_and_cache import rope_and_cache

__all__ = ["CASES", "FAULTY_CASES", "Case", "reports_of"]

BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
PAGE = 64
WGMMA = Requirements(wgmma=True, pipelined=True)
PIPELINED = Requirements(pipelined=True)
RAGGED = Requirements(spill_free=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    id: str
    call: Callable[[], object]
    required: Requirements = Requirements()  # of every kernel not named in `by_kernel`
    by_kernel: dict[str, Requirements] = field(default_factory=dict)

    def requirements(self, kernel: str) -> Requirements:
        return self.by_kernel.get(kernel, self.required)


def reports_of(case_id: str) -> list[CompiledReport]:
    """Compile every launch of a case; in a function of its own, so that processes can share it."""
    launches = recorded_launches(ALL[case_id].call)
    assert launches, f"{case_id} launches nothing"
    return [compile_launch(launch, "sm_90") for launch in launches]


def _empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _int32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)


def _norm_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for name, H in (("aligned", SCOUT.hidden), ("ragged", SCOUT.hidden + 1)):

            def call(H: int = H, dtype: torch.dtype = dtype) -> None:
                x, weight = _empty(4096, H, dtype=dtype), _empty(H, dtype=dtype)
                rms_norm(x, weight, SCOUT.eps)
                add_rms_norm(x, x, weight, SCOUT.eps)

            yield Case(id=f"rms_norm-{str(dtype)[6:]}-{name}", call=call)


def _quantize_cases() -> Iterator[Case]:
    widths = sorted(
        {K for s in MODELS for tp in TENSOR_PARALLEL for _, K in linears(s, tp).values()}
    )

    def aligned() -> None:
        for K in widths:
            quantize_rowwise(_empty(4096, K))

    yield Case(id="quantize_rowwise-aligned", call=aligned)
    yield Case(
        id="quantize_rowwise-ragged", call=lambda: quantize_rowwise(_empty(4096, SCOUT.hidden + 1))
    )


def _fp8(M: int, N: int, K: int, **options: object) -> torch.Tensor:
    scales = (_empty(rows, dtype=FP32) for rows in (M, N))
    x_scale, w_scale = scales
    return fp8_matmul(
        _empty(M, K, dtype=E4M3), x_scale, _empty(N, K, dtype=E4M3), w_scale, **options
    )


def _fp8_cases() -> Iterator[Case]:
    shapes = sorted(
        {nk for s in MODELS for tp in TENSOR_PARALLEL for nk in linears(s, tp).values()}
    )
    # fp32 additions per thread and tile: BLOCK_M * BLOCK_N / threads.
    for M, adds in ((1, 8), (17, 16), (64, 32), (4096, 64)):
        required = Requirements(wgmma=True, pipelined=True, promotion_adds=adds)

        def promoted(M: int = M) -> None:
            for N, K in shapes:
                _fp8(M, N, K, strict=True)

        yield Case(id=f"fp8_matmul-T{M}", call=promoted, required=required)

    def fast() -> None:
        for N, K in shapes:
            _fp8(4096, N, K, strict=True, fast_accum=True)

    yield Case(id="fp8_matmul-fast_accum", call=fast, required=WGMMA)
    # Found by hand to be free of spills as well; nothing asynchronous can move single bytes.
    slow = Requirements(wgmma=True, promotion_adds=32)
    yield Case(
        id="fp8_matmul-ragged", call=lambda: _fp8(33, SCOUT.hidden, SCOUT.hidden + 1), required=slow
    )


def _cache(shape: TextShape, tp: int, tokens: int, B: int, dtype: torch.dtype) -> PagedKV:
    cache = (B * tokens // PAGE, PAGE, shape.kv_heads // tp, shape.head_dim)
    return PagedKV(
        k_cache=_empty(*cache, dtype=dtype),
        v_cache=_empty(*cache, dtype=dtype),
        block_table=_int32(B, tokens // PAGE),
    )


def _rope_cases() -> Iterator[Case]:
    for T, tp in ((1, 8), (4096, 1)):
        yield Case(id=f"rope_and_cache-T{T}-tp{tp}", call=lambda T=T, tp=tp: _rope(T, tp))


def _rope(T: int, tp: int) -> None:
    Hq, Hkv, D = SCOUT.heads // tp, SCOUT.kv_heads // tp, SCOUT.head_dim
    q, k, v = _empty(T, Hq + 2 * Hkv, D).split([Hq, Hkv, Hkv], dim=1)
    kv = _cache(SCOUT, tp, SCOUT.chunk, 1, BF16)
    slots = torch.empty(T, dtype=torch.int64)
    table = RopeTable(cos_sin=_empty(SCOUT.chunk, D, dtype=FP32), period=SCOUT.chunk)
    scale = Temperature(attn_scale=0.1, floor_scale=8192.0)
    for rope, eps, temperature in (
        (table, SCOUT.eps, None),  # local layers of Scout
        (table, None, None),  # of Maverick
        (None, None, scale),  # global layers
    ):
        rope_and_cache(
            q, k, v, kv, _int32(T), slots, rope=rope, qk_norm_eps=eps, temperature=temperature
        )


def _prefill(
    T: int,
    B: int,
    tp: int,
    dtype: torch.dtype = BF16,
    D: int = 128,
    config: AttentionPrefillConfig | None = None,
) -> None:
    shape = SCOUT if D == SCOUT.head_dim else TextShape(name="", experts=1, ffn_dense=0, head_dim=D)
    kv = _cache(shape, tp, 16 * shape.chunk, B, dtype)
    q = _empty(T, shape.heads // tp, shape.head_dim, dtype=dtype)
    for chunk_size in (0, shape.chunk):
        attention_prefill(q, kv, _int32(B + 1), _int32(B), chunk_size=chunk_size, config=config)


def _decode(B: int, tp: int, dtype: torch.dtype = BF16) -> None:
    kv = _cache(SCOUT, tp, 16 * SCOUT.chunk, B, dtype)
    q = _empty(B, SCOUT.heads // tp, SCOUT.head_dim, dtype=dtype)
    for chunk_size in (0, SCOUT.chunk):
        attention_decode(q, kv, _int32(B), chunk_size=chunk_size)


def _attention_cases() -> Iterator[Case]:
    for tp in TENSOR_PARALLEL:
        for T, B, required in ((4096, 2, WGMMA), (4096, 64, WGMMA), (16, 2, PIPELINED)):
            yield Case(
                id=f"attention_prefill-T{T}-B{B}-tp{tp}",
                call=lambda T=T, B=B, tp=tp: _prefill(T, B, tp),
                required=required,
            )
        for B in (1, 64):
            yield Case(
                id=f"attention_decode-B{B}-tp{tp}",
                call=lambda B=B, tp=tp: _decode(B, tp),
                by_kernel={"_attention_decode_kernel": PIPELINED},
            )
    yield Case(id="attention_prefill-fp32", call=lambda: _prefill(256, 2, 8, FP32))
    yield Case(id="attention_decode-fp32", call=lambda: _decode(4, 8, FP32))
    yield Case(
        id="attention_prefill-ragged", call=lambda: _prefill(4096, 2, 1, BF16, 66), required=RAGGED
    )


def _experts(shape: TextShape, tp: int, layout: str, dtype: torch.dtype, odd: int) -> Experts:
    E, H, F = shape.experts, shape.hidden + odd, shape.ffn // tp + odd
    if layout == "hf":
        return Experts.from_hf(_empty(E, H, 2 * F, dtype=dtype), _empty(E, F, H, dtype=dtype))
    return Experts.from_vllm(_empty(E, 2 * F, H, dtype=dtype), _empty(E, H, F, dtype=dtype))


def _moe(
    shape: TextShape,
    T: int,
    layout: str,
    *,
    top_k: int = 1,
    dtype: torch.dtype = BF16,
    odd: int = 0,
) -> None:
    experts = _experts(shape, 8, layout, dtype, odd)
    x = _empty(T, shape.hidden + odd, dtype=dtype)
    moe(x, _empty(T, shape.experts, dtype=dtype), experts, top_k=top_k, residual=x)


def _moe_cases() -> Iterator[Case]:
    gemms = ("_grouped_gemm_swiglu_kernel", "_grouped_gemm_scatter_kernel")
    for layout in ("hf", "vllm"):
        for shape, T, required in (
            (SCOUT, 1, PIPELINED),  # tiles of 16 rows
            (MAVERICK, 4096, PIPELINED),  # 32
            (SCOUT, 1024, WGMMA),  # 64
            (SCOUT, 4096, WGMMA),  # 128
        ):
            yield Case(
                id=f"moe-{shape.name}-T{T}-{layout}",
                call=lambda s=shape, T=T, layout=layout: _moe(s, T, layout),
                by_kernel=dict.fromkeys(gemms, required),
            )
    yield Case(
        id="moe-top2",
        call=lambda: _moe(SCOUT, 4096, "hf", top_k=2),
        by_kernel=dict.fromkeys(gemms, WGMMA),
    )
    yield Case(id="moe-fp32", call=lambda: _moe(SCOUT, 16, "hf", dtype=FP32))
    yield Case(id="moe-ragged", call=lambda: _moe(SCOUT, 4096, "hf", odd=1), required=RAGGED)


CASES = (
    *_norm_cases(),
    *_quantize_cases(),
    *_fp8_cases(),
    *_rope_cases(),
    *_attention_cases(),
    *_moe_cases(),
)


def _faulty(
    id: str, M: int, N: int, *, K: int = 128, warps: int = 8, stages: int, fast_accum: bool = False
) -> Case:
    config = Fp8MatmulConfig(
        BLOCK_M=M,
        BLOCK_N=N,
        BLOCK_K=K,
        GROUP_M=8,
        SWAP_AB=False,
        num_warps=warps,
        num_stages=stages,
    )
    return Case(
        id=id,
        call=lambda: _fp8(4096, 5120, 5120, config=config, fast_accum=fast_accum),
        required=Requirements(wgmma=True, pipelined=True, promotion_adds=1),
    )


def _serialised() -> None:
    config = AttentionPrefillConfig(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=5)
    _prefill(4096, 2, 1, config=config)


# Each breaks one requirement, to show that the gate turns red. By what the gate then says.
FAULTY_CASES = {
    "stack": _faulty("spilling", 128, 256, stages=3),
    "serialised": Case(id="serialised", call=_serialised, required=WGMMA),
    "shared memory": _faulty("too much shared memory", 128, 128, stages=8),
    "no wgmma": _faulty("mma.sync", 16, 128, warps=4, stages=3),
    "fp32 additions": _faulty("not promoted", 128, 128, stages=3, fast_accum=True),
    "no asynchronous copies": _faulty("not pipelined", 128, 128, stages=1),
}
ALL = {case.id: case for case in (*CASES, *FAULTY_CASES.values())}
