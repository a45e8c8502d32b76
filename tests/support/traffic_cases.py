"""Small runs of every operator for the traffic counter, each with what is compulsory for it.

Rows are whole sectors wide unless the id says ragged; configurations are given where the default
would put everything into one program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from support.decode import SPLITS

from llama4_triton.bench import cost, cost_experts
from llama4_triton.bench.cost import Compulsory
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_decode import default_config as decode_config
from llama4_triton.kernels.attention_decode_schedule import decode_schedule
from llama4_triton.kernels.attention_prefill import AttentionPrefillConfig, attention_prefill
from llama4_triton.kernels.expert_weights import Experts
from llama4_triton.kernels.fp8_matmul import Fp8MatmulConfig, fp8_matmul
from llama4_triton.kernels.grouped_gemm import grouped_gemm_swiglu
from llama4_triton.kernels.grouped_gemm_combine import grouped_gemm_combine
from llama4_triton.kernels.grouped_gemm_config import GroupedGemmConfig
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.rope import RopeTable
from llama4_triton.kernels.rope_and_cache import RopeAndCacheConfig, rope_and_cache
from llama4_triton.kernels.routing import route, sort_by_expert

__all__ = ["CASES", "TrafficCase"]

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class TrafficCase:
    id: str
    make: Callable[[], Callable[[], object]]  # returns what to measure; seeded
    compulsory: Compulsory
    launches: int
    padded: int = 0  # FLOPs of tl.dot, from tile counts worked out by hand


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(len(shape))).to(dtype)


def _norm(T: int, H: int, residual: bool, id: str) -> TrafficCase:
    def make():
        x, h, w = _randn(T, H), _randn(T, H), _randn(H)
        return (lambda: add_rms_norm(x, h, w, 1e-5)) if residual else lambda: rms_norm(x, w, 1e-5)

    formula = cost.add_rms_norm if residual else cost.rms_norm
    return TrafficCase(
        id=id, make=make, compulsory=formula(tokens=T, hidden=H, itemsize=2), launches=1
    )


def _quantize(M: int, K: int) -> TrafficCase:
    def make():
        x = _randn(M, K)
        return lambda: quantize_rowwise(x)

    compulsory = cost.quantize_rowwise(rows=M, width=K, itemsize=2)
    return TrafficCase(id="quantize_rowwise", make=make, compulsory=compulsory, launches=1)


def _fp8(id: str, M: int, N: int, K: int, config: Fp8MatmulConfig) -> TrafficCase:
    def make():
        x, w = _randn(M, K).to(E4M3), _randn(N, K).to(E4M3)
        return lambda: fp8_matmul(x, torch.ones(M), w, torch.ones(N), config=config)

    tiles = -(-M // config.BLOCK_M) * -(-N // config.BLOCK_N) * -(-K // config.BLOCK_K)
    padded = 2 * tiles * config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
    compulsory = cost.fp8_matmul(M=M, N=N, K=K)
    # The rows of ragged operands and of the output are pieces of their own.
    pieces = compulsory.pieces + (M if N * 2 % 32 else 0)
    compulsory = replace(compulsory, pieces=pieces)
    return TrafficCase(id=id, make=make, compulsory=compulsory, launches=1, padded=padded)


def _fp8_config(m: int, n: int, k: int, group: int = 2, swap: bool = False) -> Fp8MatmulConfig:
    return Fp8MatmulConfig(
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=group, SWAP_AB=swap, num_warps=4, num_stages=2
    )


def _ids(counts: list[int], top_k: int, dropped: int = 0) -> torch.Tensor:
    """(T, top_k) ids: counts[e] tokens go to e first, then to the experts after it."""
    first = [e for e, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(len(first) + dropped, generator=_generator())
    rows = [[(e + k) % len(counts) for k in range(top_k)] for e in first]
    rows += [[-1] * top_k] * dropped
    return torch.tensor(rows, dtype=torch.int32)[order]


def _experts(E: int, H: int, F: int, vllm: bool = False) -> Experts:
    if vllm:
        return Experts.from_vllm(_randn(E, 2 * F, H), _randn(E, H, F))
    return Experts.from_hf(_randn(E, H, 2 * F), _randn(E, F, H))


def _tiles(counts: list[int], block_m: int) -> int:
    return sum(-(-count // block_m) for count in counts)


def _swiglu(id: str, counts: list[int], block_m: int, *, F: int = 96, **options) -> TrafficCase:
    """BLOCK_M half of block_m: each tile of the table is done by two programs."""
    H, E, T = 64, len(counts), sum(counts)
    config = GroupedGemmConfig(
        BLOCK_M=block_m // 2, BLOCK_N=32, BLOCK_K=32, GROUP_M=3, num_warps=4, num_stages=2
    )

    def make():
        ids = _ids(counts, 1)
        x, experts = _randn(T, H), _experts(E, H, F, **options)
        routing = sort_by_expert(ids, torch.rand(T, 1, generator=_generator()), E, block_m=block_m)
        return lambda: grouped_gemm_swiglu(x, experts, routing, config=config)

    # Half of a tile's rows of weights are gate's, half are up's.
    tiles = _tiles(counts, config.BLOCK_M) * -(-2 * F // config.BLOCK_N) * (H // config.BLOCK_K)
    compulsory = cost_experts.grouped_gemm_swiglu(
        tokens_per_expert=counts, tokens=T, hidden=H, ffn=F, itemsize=2, block_m=block_m
    )
    return TrafficCase(
        id=id, make=make, compulsory=compulsory, launches=1,
        padded=2 * tiles * config.BLOCK_M * config.BLOCK_N * config.BLOCK_K,
    )  # fmt: skip


def _combine(id: str, counts: list[int], block_m: int) -> TrafficCase:
    H, F, E, T = 96, 64, len(counts), sum(counts)
    config = GroupedGemmConfig(
        BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=32, GROUP_M=2, num_warps=4, num_stages=2
    )

    def make():
        ids = _ids(counts, 1)
        z, experts, residual = _randn(T, F), _experts(E, H, F), _randn(T, H)
        routing = sort_by_expert(ids, torch.rand(T, 1, generator=_generator()), E, block_m=block_m)
        return lambda: grouped_gemm_combine(z, experts, routing, residual=residual, config=config)

    tiles = _tiles(counts, block_m) * -(-H // 64) * (F // 32)
    compulsory = cost_experts.grouped_gemm_combine(
        tokens_per_expert=counts, tokens=T, hidden=H, ffn=F, itemsize=2, block_m=block_m,
        has_residual=True,
    )  # fmt: skip
    return TrafficCase(
        id=id, make=make, compulsory=compulsory, launches=1, padded=2 * tiles * block_m * 64 * 32
    )


def _moe(id: str, counts: list[int], top_k: int, launches: int) -> TrafficCase:
    """From logits; block_m and the configurations are the defaults."""
    H, F, E, T = 128, 64, len(counts), sum(counts)
    rows = [sum(counts[(e - k) % E] for k in range(top_k)) for e in range(E)]

    def make():
        ids = _ids(counts, top_k).long()
        logits = torch.full((T, E), -4.0).scatter_(1, ids, torch.arange(2.0, 2 - top_k, -1).expand(
            T, top_k)).to(BF16)  # fmt: skip
        x, experts = _randn(T, H), _experts(E, H, F)
        return lambda: moe(x, experts, logits=logits, top_k=top_k)

    compulsory = cost_experts.moe(tokens_per_expert=rows, tokens=T, hidden=H, ffn=F, itemsize=2)
    # Tiles of 16 rows by 64 of weights and 128 of k: two of 64 columns each for either GEMM.
    tiles = _tiles(rows, 16)
    padded = 2 * tiles * 16 * (2 * 64 * 128 + 2 * 64 * 128)
    return TrafficCase(id=id, make=make, compulsory=compulsory, launches=launches, padded=padded)


def _route(id: str, T: int, E: int) -> TrafficCase:
    def make():
        logits = _randn(T, E)
        return lambda: route(logits, 1, block_m=16)

    compulsory = cost_experts.route(tokens=T, experts=E, top_k=1, itemsize=2, block_m=16)
    return TrafficCase(id=id, make=make, compulsory=compulsory, launches=1)


def _rope(T: int) -> TrafficCase:
    Hq, Hkv, D, page = 3, 2, 32, 16

    def make():
        q, k, v = (
            part.unflatten(1, (-1, D))
            for part in _randn(T, (Hq + 2 * Hkv) * D).split([Hq * D, Hkv * D, Hkv * D], dim=1)
        )
        kv = PagedKV(
            k_cache=torch.empty(5, page, Hkv, D, dtype=BF16),
            v_cache=torch.empty(5, page, Hkv, D, dtype=BF16),
            block_table=torch.zeros(1, 5, dtype=torch.int32),
        )
        slots = torch.randperm(5 * page, generator=_generator())[:T].clone()
        slots[::5] = -1
        positions = torch.arange(T, dtype=torch.int32)
        rope = RopeTable(cos_sin=torch.randn(T, D), period=0)
        config = RopeAndCacheConfig(BLOCK_T=8, num_warps=1)
        return lambda: rope_and_cache(
            q, k, v, kv, positions, slots, rope=rope, qk_norm_eps=1e-5, temperature=None,
            config=config,
        )  # fmt: skip

    compulsory = cost.rope_and_cache(
        tokens=T, cached=T - -(-T // 5), heads=Hq, kv_heads=Hkv, head_dim=D, itemsize=2,
        table_rows=T,
    )  # fmt: skip
    return TrafficCase(id="rope_and_cache", make=make, compulsory=compulsory, launches=1)


def _paged(lens: list[int], page: int, Hkv: int, D: int) -> PagedKV:
    width = max(1, -(-max(lens) // page))
    pages = torch.randperm(len(lens) * width, generator=_generator()).to(torch.int32)
    return PagedKV(
        k_cache=_randn(len(lens) * width, page, Hkv, D),
        v_cache=_randn(len(lens) * width, page, Hkv, D),
        block_table=pages.view(len(lens), width),
    )


def _prefill(id: str, q_lens: list[int], seq_lens: list[int], chunk: int, page: int):
    Hq, Hkv, D = 4, 2, 32
    config = AttentionPrefillConfig(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2)

    def make():
        q, kv = _randn(sum(q_lens), Hq, D), _paged(seq_lens, page, Hkv, D)
        bounds = [sum(q_lens[:b]) for b in range(len(q_lens) + 1)]
        cu = torch.tensor(bounds, dtype=torch.int32)
        lens = torch.tensor(seq_lens, dtype=torch.int32)
        return lambda: attention_prefill(q, kv, cu, lens, chunk_size=chunk, config=config)

    tiles = 0
    for q_len, n in zip(q_lens, seq_lens, strict=True):
        first = n - q_len
        while first < n:  # a tile of rows ends with its chunk
            lo = first // chunk * chunk if chunk else 0
            hi = min(first + 16, n, lo + chunk if chunk else n)
            tiles += -(-(hi - lo // 16 * 16) // 16)
            first = hi
    compulsory = cost.attention_prefill(
        q_lens=q_lens, seq_lens=seq_lens, heads=Hq, kv_heads=Hkv, head_dim=D, itemsize=2,
        page_size=page, chunk=chunk,
    )  # fmt: skip
    return TrafficCase(
        id=id, make=make, compulsory=compulsory, launches=2,
        padded=4 * tiles * Hq * 16 * 16 * D,
    )  # fmt: skip


def _decode(
    id: str, lens: list[int], chunk: int, page: int, split: int, launches: int, q_len: int = 0
):
    """split: tokens of a split; q_len: new rows of each sequence, 0: one, without cu_seqlens_q."""
    Hq, Hkv, D = 4, 2, 32
    config = replace(decode_config(D, BF16), BLOCK_N=16)
    q_lens = [min(q_len, n) for n in lens] if q_len else None

    def make():
        rows = sum(q_lens) if q_lens else len(lens)
        q, kv = _randn(rows, Hq, D), _paged(lens, page, Hkv, D)
        seq_lens = torch.tensor(lens, dtype=torch.int32)
        verify = {}
        if q_lens:
            cu = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
            verify = dict(cu_seqlens_q=cu, max_q_len=q_len)

        def run():
            schedule = decode_schedule(
                seq_lens, chunk_size=chunk, capacity=kv.capacity, num_kv_heads=Hkv,
                page_size=page, split_tokens=split, config=SPLITS, **verify,
            )  # fmt: skip
            return attention_decode(
                q, kv, seq_lens, chunk_size=chunk, schedule=schedule, config=config, **verify
            )

        return run

    tiles = 0  # of all splits together: they begin at multiples of BLOCK_N
    for n, new in zip(lens, q_lens or [1] * len(lens), strict=True):
        lo = max(n - new, 0) // chunk * chunk if chunk else 0
        tiles += -(-(n - lo // 16 * 16) // 16)
    compulsory = cost.attention_decode(
        seq_lens=lens, q_lens=q_lens, heads=Hq, kv_heads=Hkv, head_dim=D, itemsize=2,
        page_size=page, chunk=chunk,
    )  # fmt: skip
    return TrafficCase(
        id=id, make=make, compulsory=compulsory, launches=launches,
        padded=4 * tiles * Hkv * 16 * 16 * D,
    )  # fmt: skip


CASES = [
    _norm(5, 1200, False, "rms_norm"),
    _norm(3, 304, True, "add_rms_norm"),
    _norm(3, 301, False, "rms_norm-ragged"),
    _quantize(7, 320),
    _fp8("fp8_matmul", 80, 96, 160, _fp8_config(16, 32, 32)),
    _fp8("fp8_matmul-swapped", 5, 192, 128, _fp8_config(16, 64, 64, swap=True)),
    _fp8("fp8_matmul-ragged", 21, 45, 96, _fp8_config(16, 16, 64)),
    _swiglu("grouped_gemm_swiglu", [40, 0, 7, 33], 32),
    _swiglu("grouped_gemm_swiglu-vllm", [1, 40], 32, vllm=True),
    _combine("grouped_gemm_combine", [0, 17, 30, 1], 16),
    _moe("moe", [20, 0, 5, 7], 1, 3),
    _moe("moe-top2", [9, 1, 0, 6], 2, 4),
    _route("route", 70, 16),
    _rope(29),
    _prefill("attention_prefill", [40, 3], [40, 50], 0, 16),
    _prefill("attention_prefill-chunks", [37, 20], [90, 20], 32, 8),
    _decode("attention_decode", [100, 0, 33], 0, 16, 112, 2),
    *(_decode(f"attention_decode-split-{n}", [200, 64], 0, 8, n, 3) for n in (16, 48, 64, 112)),
    _decode("attention_decode-chunks", [130, 64], 64, 16, 32, 3),
    _decode("attention_decode-verify", [130, 64, 2], 0, 16, 32, 3, q_len=4),
]
