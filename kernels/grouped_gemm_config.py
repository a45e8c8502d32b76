"""Tiles of the experts' GEMMs: what each weight format, row count and GPU gets by default.

BLOCK_N counts rows of weights, the first operand: of GEMM 1 half are gate's and half are up's.
A decode step is bound by reading weights: 64 rows of them per program, which one wgmma fills, and
as many stages as leave two programs per SM. A prefill is bound by arithmetic: tiles as large as
the registers hold; e4m3 that is promoted to fp32 every 128 of k needs a second accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ._check import require
from ._launch import SM_90, DeviceProperties
from ._sizes import tiles

__all__ = [
    "Gemm",
    "GroupedGemmConfig",
    "check_config",
    "default_config",
    "default_tiles",
    "stages_that_fit",
]

Gemm = Literal["up", "down"]

WEIGHT_BYTES = {"plain": 2.0, "int4_group": 0.5}  # others: 1
MARGIN = 8192  # of shared memory, for what changes layout at the end


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedGemmConfig:
    BLOCK_M: int  # at most routing.block_m: a tile of rows is then done by several programs
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int  # most row tiles of an expert that go to its next column of weights together
    num_warps: int
    num_stages: int


def default_config(
    gemm: Gemm,
    block_m: int,
    dtype: torch.dtype,
    format: str = "plain",
    properties: DeviceProperties = SM_90,
    *,
    fast_accum: bool = False,
    aligned: bool = True,
) -> GroupedGemmConfig:
    """Pick tiles for at most `block_m` rows per expert, x (or z) in `dtype`, weights in `format`.

    dtype is what is multiplied: e4m3 where activations are, 16 bits where weights are decoded.
    """
    config = _tiles(
        gemm, block_m, dtype, format, properties, fast_accum=fast_accum, aligned=aligned
    )
    return replace(config, num_stages=stages_that_fit(config, format, properties))


default_tiles = tiles(default_config)


def stages_that_fit(config: GroupedGemmConfig, format: str, properties: DeviceProperties) -> int:
    """config.num_stages, or fewer, but 2 at least, where shared memory is small.

    A stage holds weights and 16-bit activations, which e4m3 experts may have too. Without wgmma
    the last one is in registers.
    """
    weights = config.BLOCK_N * WEIGHT_BYTES.get(format, 1.0)
    stage = (weights + config.BLOCK_M * 2) * config.BLOCK_K
    most = int((properties.shared_bytes - MARGIN) // stage)
    return max(2, min(config.num_stages, most + (0 if properties.has_wide_mma else 1)))


def _tiles(
    gemm: Gemm,
    block_m: int,
    dtype: torch.dtype,
    format: str,
    properties: DeviceProperties,
    *,
    fast_accum: bool,
    aligned: bool,
) -> GroupedGemmConfig:
    if dtype == torch.float32 or not properties.has_mma:  # what the registers hold
        return _config(16, 64, 32, 4, 2)
    if not aligned:  # each element takes a register of its own on its way
        return _config(min(block_m, 64), 64, 32 if format == "plain" else 128, 4, 2)
    few = block_m <= 32
    if format == "int4_group":
        if few:
            return _config(block_m, 64, 128, 4, 8)
        return _config(block_m, 128, 128, 8, 4)
    if dtype == torch.float8_e4m3fn:
        if few:
            return _config(block_m, 64, 128, 4, 8)
        # z has a scale per 128 and is promoted, whatever fast_accum says: a second accumulator.
        if gemm == "down":
            return _config(64, 128, 128, 8, 4)
        if block_m == 64 or not properties.has_wide_mma:
            return _config(64, 128, 128, 4, 4)
        return _config(128, 256, 128, 8, 3) if fast_accum else _config(64, 256, 128, 8, 4)
    if format != "plain":  # bytes, decoded to 16 bits
        if few:
            return _config(block_m, 64, 128, 4, 5)
        return _config(64, 128, 128, 8, 3)  # of 128 rows, sm_80's registers spill
    if block_m == 16:
        return _config(16, 64, 128, 4, 5)
    if block_m == 32:
        return _config(32, 64, 128, 4, 4)
    if not properties.has_wide_mma:
        return _config(block_m, 128, 64, block_m // 16, 3)
    if block_m == 64:
        return _config(64, 128, 64, 4, 4)
    return _config(128, 256, 64, 8, 4)


def _config(m: int, n: int, k: int, warps: int, stages: int) -> GroupedGemmConfig:
    return GroupedGemmConfig(
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=16, num_warps=warps, num_stages=stages
    )


def check_config(op: str, config: GroupedGemmConfig | None, block_m: int) -> None:
    """Check that tiles of BLOCK_M rows fill those of the routing; those of the default do."""
    if config is not None and block_m % config.BLOCK_M:
        must = f"config.BLOCK_M must divide routing.block_m = {block_m}"
        require(False, op, must, config.BLOCK_M)
