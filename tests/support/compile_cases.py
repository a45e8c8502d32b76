"""Launches whose machine code breaks one requirement each, to show that every gate turns red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from llama4_triton.autotune.gates import Requirements
from llama4_triton.autotune.launches import Launch
from llama4_triton.autotune.recorder import record
from llama4_triton.bench.moe_layer import MoeLayer
from llama4_triton.bench.shapes import SCOUT
from llama4_triton.kernels import _launch
from llama4_triton.kernels.attention_prefill import AttentionPrefillConfig, attention_prefill
from llama4_triton.kernels.attention_schedule import PrefillSchedule
from llama4_triton.kernels.fp8_matmul import Fp8MatmulConfig, fp8_matmul
from llama4_triton.kernels.grouped_gemm_combine import grouped_gemm_combine
from llama4_triton.kernels.grouped_gemm_config import GroupedGemmConfig
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.routing import Routing

__all__ = ["FAULTS", "Fault", "good_gemm"]

BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
WGMMA = Requirements(wgmma=True, pipelined=True)
IN_FLIGHT = replace(WGMMA, in_flight=32_768, weight_rows=(64,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    id: str
    call: Callable[[], object]  # launches on "cuda"
    required: Requirements
    gates: frozenset[str]  # exactly these turn red

    def launch(self) -> Launch:
        (launch,) = record(self.call).launches
        return launch


def _empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _gemm(
    fault: str = "", *, m: int = 64, dtype: torch.dtype = BF16, warps: int = 4, stages: int = 3
) -> None:
    from support.faulty_kernels import faulty_gemm_kernel  # decorated at first use

    n, k, block_k = 128, 4096, 64
    _launch.launch(
        faulty_gemm_kernel, (1,),
        _empty(m, k, dtype=dtype), _empty(k, n, dtype=dtype), _empty(n, k, dtype=torch.int8),
        _empty(m, n, dtype=FP32),
        k, k, n, k, 3.0,
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=block_k, FAULT=fault, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def good_gemm() -> Launch:
    """The same kernel without a fault."""
    (launch,) = record(_gemm).launches
    return launch


def _fp8(n: int, *, fast_accum: bool = False) -> None:
    config = Fp8MatmulConfig(
        BLOCK_M=128, BLOCK_N=n, BLOCK_K=128, GROUP_M=8, SWAP_AB=False, num_warps=8, num_stages=3
    )
    x_q, w_q = _empty(4096, 5120, dtype=E4M3), _empty(5120, 5120, dtype=E4M3)
    x_scale, w_scale = _empty(4096, dtype=FP32), _empty(5120, dtype=FP32)
    fp8_matmul(x_q, x_scale, w_q, w_scale, config=config, fast_accum=fast_accum)


def _decode(stages: int) -> None:
    """GEMM 2 of a decode step by tiles of many rows, so that few of weights are on their way."""
    config = GroupedGemmConfig(
        BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, GROUP_M=16, num_warps=4, num_stages=stages
    )
    layer = MoeLayer(shape=SCOUT, T=16)
    experts = layer.inputs()["experts"]
    tables = dict(expert_ids=(16, 1), expert_offsets=(17,), row_slot=(16,), tiles=(16, 4))
    made = {name: _empty(*shape, dtype=torch.int32) for name, shape in tables.items()}
    routing = Routing(
        **made, tile_count=_empty(1, dtype=torch.int32), expert_weights=_empty(16, 1, dtype=FP32),
        block_m=128, num_experts=16, top_k=1,
    )  # fmt: skip
    grouped_gemm_combine(_empty(16, layer.F), experts, routing, config=config)


def _serialised() -> None:
    """Too few warps for the tile: what is out of registers waits after each instruction."""
    cache = _empty(256, 64, 8, 128)
    tables = PrefillSchedule(
        tiles=_empty(34, 4, dtype=torch.int32), count=_empty(1, dtype=torch.int32),
        block_m=128, chunk_size=0,
    )  # fmt: skip
    attention_prefill(
        _empty(4096, 40, 128),
        PagedKV(k_cache=cache, v_cache=cache, block_table=_empty(2, 128, dtype=torch.int32)),
        _empty(3, dtype=torch.int32),
        _empty(2, dtype=torch.int32),
        schedule=tables,
        config=AttentionPrefillConfig(BLOCK_M=128, BLOCK_N=128, num_warps=4, num_stages=2),
    )


def _fault(id: str, call: Callable[[], object], required: Requirements, *gates: str) -> Fault:
    return Fault(id=id, call=call, required=required, gates=frozenset(gates))


FAULTS = (
    _fault("spilling", lambda: _fp8(256), WGMMA, "stack"),
    _fault("spilling-ragged", lambda: _fp8(256), Requirements(max_stack=64), "stack"),
    _fault("serialised", _serialised, replace(WGMMA, max_stack=None), "waits"),
    _fault("not-promoted", lambda: _fp8(128, fast_accum=True),
           Requirements(wgmma=True, pipelined=True, promotion_adds=64), "promotion"),
    _fault("bf16-for-e4m3", lambda: _decode(6), replace(WGMMA, e4m3=True), "e4m3"),
    _fault("two-stages", lambda: _decode(2), IN_FLIGHT, "in_flight"),
    _fault("too-many-stages", lambda: _gemm(stages=12), WGMMA, "shared"),
    _fault("two-warps", lambda: _gemm(warps=2), WGMMA, "wgmma", "mma.sync"),
    _fault("two-dots", lambda: _gemm("mma.sync"), WGMMA, "mma.sync"),
    _fault("one-stage", lambda: _gemm(stages=1), WGMMA, "copies", "loads"),
    _fault("plain-load", lambda: _gemm("loads"), WGMMA, "loads"),
    _fault("tf32", lambda: _gemm("tf32", dtype=FP32), Requirements(), "tf32"),
    _fault("atomics", lambda: _gemm("atomics"), WGMMA, "atomics"),
    _fault("scratch", lambda: _gemm("scratch"), WGMMA, "scratch"),
    _fault("division", lambda: _gemm("division"),
           Requirements(wgmma=True, pipelined=True, exact_division=True), "division"),
)  # fmt: skip
