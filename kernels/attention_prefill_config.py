"""The tiles of attention_prefill, by what the host knows: sizes, types and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._launch import SM_90, DeviceProperties
from ._sizes import above, largest, tiles

__all__ = ["AttentionPrefillConfig", "default_block_m", "default_config", "default_tiles"]

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPrefillConfig:
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def default_config(
    T: int,
    B: int,
    D: int,
    dtype: torch.dtype,
    properties: DeviceProperties = SM_90,
    *,
    aligned: bool = True,
    kv_dtype: torch.dtype | None = None,
    by_token: bool = False,
    transposed_v: bool = False,
    dense: bool = False,
    block_m: int | None = None,
) -> AttentionPrefillConfig:
    """Tiles by the mean number of new tokens per sequence, all that the host knows.

    Each is the largest that compiles for sm_90 without spills and, but for 16 rows, to wgmma with
    one wait per product. Stages are counted from the page id on, which is loaded ahead of its
    tile: three keep one tile of 128 keys in flight, five two of 64. What needs registers of its own
    takes fewer keys: scales by token, keys that are converted, transposed values of 16 bits.
    Tensor cores that do not read shared memory need registers for q: half the rows. Unaligned keys
    and values take a register per element on their way: 16 rows. e4m3 has no tensor-core product of
    fewer than 64 rows.

    Args:
        kv_dtype: of the caches; None: dtype.   by_token: their scales are by token.
        transposed_v: their layout.   dense: there are no pages, so half of the stages do.
        block_m: the rows of a schedule made beforehand.
    """

    def make(*, num_stages: int, **tile: int) -> AttentionPrefillConfig:
        stages = max(2, (num_stages + 1) // 2) if dense else num_stages
        return AttentionPrefillConfig(num_stages=stages, **tile)

    rows = block_m or default_block_m(T, B, D, dtype, properties, aligned=aligned)
    if dtype == torch.float32 or not properties.has_mma:  # the tiles live in registers
        block_n = 32 if D <= 128 or E4M3 in (dtype, kv_dtype) else 16
        return make(BLOCK_M=rows, BLOCK_N=block_n, num_warps=8, num_stages=2)
    if not aligned:
        return make(BLOCK_M=rows, BLOCK_N=32, num_warps=4, num_stages=2)
    wide = properties.has_wide_mma
    if D > 128:
        return make(BLOCK_M=rows, BLOCK_N=32, num_warps=8, num_stages=5 if wide else 4)
    if rows <= 64:
        return make(BLOCK_M=rows, BLOCK_N=64, num_warps=4 if wide or rows < 64 else 8, num_stages=5)
    converted = dtype != (kv_dtype or dtype)
    if not wide or by_token or converted or (transposed_v and dtype != E4M3):
        block_n = 32 if converted and by_token else 64
        return make(BLOCK_M=rows, BLOCK_N=block_n, num_warps=8, num_stages=5)
    return make(BLOCK_M=rows, BLOCK_N=128, num_warps=8, num_stages=3)


default_tiles = tiles(default_config)


def default_block_m(
    T: int,
    B: int,
    D: int,
    dtype: torch.dtype,
    properties: DeviceProperties = SM_90,
    *,
    aligned: bool = True,
) -> int:
    """BLOCK_M of `default_config`; T and B may be symbols."""
    if dtype == torch.float32 or not properties.has_mma or not aligned:
        return 16
    wide = properties.has_wide_mma
    if D > 128:
        return 128 if wide and dtype != E4M3 else 64
    mean = -(-T // largest(B, 1))
    few = 64 if dtype == E4M3 else 16 + 48 * above(mean, 16)
    return few + 64 * above(mean, 64) if wide else few
