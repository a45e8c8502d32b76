"""How `moe` does a step: which launches, tiles and splits, from sizes alone.

    plan(T=64, H=5120, F=1024, E=16, top_k=1)      # Scout's layer on one of 8 GPUs, 64 tokens

Nothing here reads a tensor. batch_invariant takes T out of every choice but where the routing is
computed, which is integers and comparisons of the same logits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from . import router
from ._launch import SM_90, DeviceProperties
from .expert_weights import GROUP
from .grouped_gemm_config import (
    WEIGHT_BYTES,
    GroupedGemmConfig,
    default_config,
    stages_that_fit,
)
from .router import RouterConfig
from .routing import default_block_m

__all__ = ["Beside", "MoePlan", "plan"]

Regime = Literal["few", "some", "many"]

E4M3 = torch.float8_e4m3fn
FEW_SLOTS = 4  # each program of GEMM 1 chooses the experts of so many itself
FUSED_TOKENS = 512  # up to here routing leaves most of the GPU to the shared expert
INVARIANT_ROWS = 64
MAX_STAGES = 10
MARGIN = 4096  # of shared memory, for barriers and what changes layout at the end
B_BYTES = 204_800  # of shared memory, for the shared expert's tiles beside the routing


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """Tiles of the shared expert in launches that others share with it."""

    up: GroupedGemmConfig  # beside the routing
    down: GroupedGemmConfig  # beside GEMM 1, with its warps and stages


@dataclass(frozen=True, kw_only=True, slots=True)
class MoePlan:
    regime: Regime
    block_m: int
    router: RouterConfig
    router_splits: int
    up: GroupedGemmConfig
    up_splits: int  # of H, "few" only
    down: GroupedGemmConfig
    down_splits: int  # of F, "few" only: the last program of a column adds up the others
    quantize_z: bool  # by GEMM 1; GEMM 2 quantises on its way otherwise
    beside: Beside | None  # "some" with a shared expert


@functools.lru_cache(maxsize=4096)
def plan(
    *,
    T: int,
    H: int,
    F: int,
    E: int,
    top_k: int,
    routed_to: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    multiplied: torch.dtype | None = None,
    format: str = "plain",
    has_shared: bool = True,
    fast_accum: bool = False,
    batch_invariant: bool = False,
    last_arriver: bool = False,
    aligned: bool = True,
    properties: DeviceProperties = SM_90,
) -> MoePlan:
    """Choose for T tokens and E experts on this GPU, of `routed_to` in all (None: E).

    `multiplied` is what the tensor cores multiply, by default `dtype`.
    """
    routed_to = routed_to or E
    multiplied = multiplied or dtype
    block_m = INVARIANT_ROWS if batch_invariant else default_block_m(T * top_k, E)
    options = dict(fast_accum=fast_accum, aligned=aligned)
    up = default_config("up", block_m, multiplied, format, properties, **options)
    down = default_config("down", block_m, multiplied, format, properties, **options)
    tokens = FUSED_TOKENS + 1 if batch_invariant else T
    few = (T == 1 or top_k == 1) and T * top_k <= FEW_SLOTS and not batch_invariant
    regime: Regime = (
        "few" if few else "some" if T <= FUSED_TOKENS and not batch_invariant else "many"
    )
    up_splits = 1
    if few:
        if format != "int4_group":  # whose GEMM 2 would have too few weights in flight
            up_splits = _up_splits(T * top_k + has_shared, H, F, up, properties)
        down = _few_down(down, up_splits, format, dtype, properties)
    beside = None
    if regime == "some" and has_shared:
        beside_up = _beside(T, up, 4, 10 if format == "int4_group" else 4, B_BYTES, dtype, format)
        stages = stages_that_fit(beside_up, format, properties)
        beside = Beside(
            up=replace(beside_up, num_stages=stages),
            down=(
                up
                if format == "plain" and up.BLOCK_M >= 64  # enough tokens for the same tile
                else _beside(T, up, up.num_warps, up.num_stages, 0, dtype, format)
            ),
        )
    return MoePlan(
        regime=regime,
        block_m=block_m,
        router=router.default_config(
            tokens, routed_to, H, itemsize=dtype.itemsize, properties=properties
        ),
        router_splits=router.default_split(tokens, routed_to),
        up=up,
        up_splits=up_splits,
        down=down,
        down_splits=_down_splits(H, F, down, properties) if few and last_arriver else 1,
        quantize_z=(
            regime == "many" and multiplied == E4M3 and F % GROUP == 0 and up.BLOCK_N == 2 * GROUP
        ),
        beside=beside,
    )


def _beside(
    T: int,
    up: GroupedGemmConfig,
    num_warps: int,
    num_stages: int,
    shared_bytes: int,
    dtype: torch.dtype,
    format: str,
) -> GroupedGemmConfig:
    """Tiles of the shared expert in a launch with these warps and stages.

    As many tokens as fit in `shared_bytes` of shared memory, or in what GEMM 1 uses if that is
    more, so that weights are read once; but only 64 rows of weights per four warps, so that there
    are enough programs.
    """
    weight_bytes = dtype.itemsize if format == "plain" else WEIGHT_BYTES.get(format, 1.0)

    def size(m: int, n: int, k: int) -> float:
        return (n * weight_bytes + m * dtype.itemsize) * k * num_stages

    budget = max(shared_bytes, size(up.BLOCK_M, up.BLOCK_N, up.BLOCK_K))
    narrow = dtype == torch.float32 or up.BLOCK_K < 64  # where products are done one by one
    rows = [up.BLOCK_M] if narrow else [m for m in (64, 16) if m < 4 * max(16, T)]
    depths = [64] if format == "plain" and up.BLOCK_K == 128 else []
    BLOCK_N = 16 * num_warps
    tiles = [(m, k) for m in rows for k in (up.BLOCK_K, *depths) if size(m, BLOCK_N, k) <= budget]
    BLOCK_M, BLOCK_K = tiles[0] if tiles else (16, up.BLOCK_K)
    return GroupedGemmConfig(
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=16,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def _few_down(
    down: GroupedGemmConfig,
    splits: int,
    format: str,
    dtype: torch.dtype,
    properties: DeviceProperties,
) -> GroupedGemmConfig:
    """`down` with the stages that fit: each holds gate and up of z in fp32, a tile per slice."""
    if dtype == torch.float32 or down.num_stages <= 2:
        return down
    weights = down.BLOCK_N * down.BLOCK_K * WEIGHT_BYTES.get(format, 1.0)
    stage = weights + splits * 2 * 16 * down.BLOCK_K * 4
    stages = int((properties.shared_bytes - MARGIN) // stage)
    return replace(down, num_stages=max(2, min(MAX_STAGES, stages)))


def _up_splits(
    groups: int, H: int, F: int, up: GroupedGemmConfig, properties: DeviceProperties
) -> int:
    """Two slices of H if without them there are fewer programs of GEMM 1 than SMs.

    Not more, because GEMM 2 holds a tile of every slice in shared memory.
    """
    programs = groups * -(-F // (up.BLOCK_N // 2))
    return 2 if programs < properties.sm_count and H >= 8 * up.BLOCK_K else 1


def _down_splits(H: int, F: int, down: GroupedGemmConfig, properties: DeviceProperties) -> int:
    """Slices of F that give every SM a program of GEMM 2, each of at least 2 steps."""
    most = max(1, F // (2 * down.BLOCK_K))
    return max(1, min(most, -(-properties.sm_count // -(-H // down.BLOCK_N))))
