"""The tiles of attention_decode, and the memory of its partial results."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._launch import SM_90, DeviceProperties
from ._sizes import tiles
from .attention_decode_schedule import DecodeSchedule
from .paged_kv import E4M3

__all__ = ["AttentionDecodeConfig", "decode_workspace_numel", "default_config", "default_tiles"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionDecodeConfig:
    BLOCK_N: int
    num_warps: int
    num_stages: int


def default_config(
    D: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    rows: int = 16,
    properties: DeviceProperties = SM_90,
    *,
    dense: bool = False,
) -> AttentionDecodeConfig:
    """Two tiles of 64 keys in flight: 32 KiB of e4m3, 64 KiB of bf16 per program of D = 128.

    It takes five stages: the page id is loaded ahead of the tile, which takes every second one;
    dense rows, which have no pages, take three.
    Many rows take eight warps, which are all that an SM then holds, or tiles of half the keys.
    Without tensor cores, which fp32 never uses, the tiles live in registers.
    """
    if dtype == torch.float32 or not properties.has_mma:
        return AttentionDecodeConfig(BLOCK_N=16, num_warps=4, num_stages=1)
    quantized = cache_dtype == E4M3
    if quantized and 16 < rows <= 64:
        half = D > 128 or rows > 32  # never dense: e4m3 lies in pages
        return AttentionDecodeConfig(BLOCK_N=32 if half else 64, num_warps=8, num_stages=9)
    wide = D > 128 and rows <= 16 and properties.has_wide_mma
    many = rows > (64 if properties.has_wide_mma else 32)
    return AttentionDecodeConfig(
        BLOCK_N=32 if D > 128 and not wide else 64,
        num_warps=8 if wide or many else 4,
        num_stages=3 if dense else 5,
    )


default_tiles = tiles(default_config)


def decode_workspace_numel(Hq: int, D: int, schedule: DecodeSchedule) -> int:
    """fp32 elements that `attention_decode` needs as `workspace`."""
    rows = schedule.num_items * schedule.max_q_len * Hq
    return rows * (D + 1) if schedule.may_split else 0
