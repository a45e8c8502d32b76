"""What attention_prefill checks of its arguments, before anything is written."""

from __future__ import annotations

import torch

from ._attention import check_attention, check_values
from ._check import FLOATS, check_devices, check_index, check_tensor, is_aligned, require
from ._launch import device_properties
from ._remembered import remembered
from .attention_prefill_config import AttentionPrefillConfig, default_block_m
from .attention_schedule import PrefillSchedule, tile_capacity
from .paged_kv import DENSE, E4M3, LAYOUTS, PagedKV
from .rope import Temperature

__all__ = ["check_prefill", "check_prefill_values"]


@remembered
def check_prefill(
    op: str,
    q: torch.Tensor,
    kv: PagedKV,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    chunk_size: int,
    sm_scale: float | None,
    temperature: Temperature | None,
    q_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    schedule: PrefillSchedule | None,
    config: AttentionPrefillConfig | None,
) -> int:
    """Return the most rows of a tile.

    Raises:
        ValueError, TypeError or UnsupportedArchitectureError, without reading a value.
    """
    check_index(op, "cu_seqlens_q", cu_seqlens_q, ("B + 1",))
    num_seqs = cu_seqlens_q.shape[0] - 1
    require(num_seqs >= 0, op, "cu_seqlens_q must have at least one element", 0)
    check_index(op, "seq_lens", seq_lens, (num_seqs,))
    check_attention(
        op, q, "T", kv, num_seqs, chunk_size, sm_scale,
        q_dtypes=(*FLOATS, E4M3), layouts=(*LAYOUTS, DENSE), quantized=True,
    )  # fmt: skip
    T, _, D = q.shape
    require(T == 0 or num_seqs > 0, op, "q must be empty where there is no sequence", T)
    _check_factors(op, q, temperature, q_scale, out_dtype)
    check_devices(
        op, q=q, k_cache=kv.k_cache, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, q_scale=q_scale
    )
    if schedule is not None:
        _check_schedule(op, schedule, T, num_seqs, chunk_size, config)
        return schedule.block_m
    if config is not None:
        return config.BLOCK_M
    aligned = is_aligned((), q, kv.k_cache, kv.v_cache)
    properties = device_properties(q.device)
    return default_block_m(T, num_seqs, D, q.dtype, properties, aligned=aligned)


def _check_factors(
    op: str,
    q: torch.Tensor,
    temperature: Temperature | None,
    q_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    if temperature is not None:
        valid = 0.0 <= temperature.attn_scale < float("inf") and temperature.floor_scale > 0.0
        must = "temperature must have attn_scale >= 0 and floor_scale > 0"
        require(valid, op, must, temperature)
    must = "q_scale must be given with an e4m3 q, and with no other"
    got = None if q_scale is None else "one"
    require((q_scale is not None) == (q.dtype == E4M3), op, must, got)
    if q_scale is not None:
        check_tensor(op, "q_scale", q_scale, q.shape[:2], (torch.float32,))
        require(q_scale.is_contiguous(), op, "q_scale must be contiguous", q_scale.stride())
    must = "out_dtype must be torch.float32, torch.float16 or torch.bfloat16"
    require(out_dtype is None or out_dtype in FLOATS, op, must, out_dtype, TypeError)


def _check_schedule(
    op: str,
    schedule: PrefillSchedule,
    T: int,
    num_seqs: int,
    chunk_size: int,
    config: AttentionPrefillConfig | None,
) -> None:
    block_m = config.BLOCK_M if config else schedule.block_m
    if (schedule.chunk_size, schedule.block_m) != (chunk_size, block_m):
        must = f"schedule must have chunk_size == {chunk_size} and block_m == {block_m}"
        require(False, op, must, (schedule.chunk_size, schedule.block_m))
    capacity = tile_capacity(T, num_seqs, chunk_size, block_m)
    check_index(op, "schedule.tiles", schedule.tiles, (capacity, 4))


def check_prefill_values(
    kv: PagedKV, bounds: list[int], seq_lens: list[int], T: int, chunk_size: int
) -> None:
    """Raise IndexError where lengths, read back, or live page ids leave the cache."""
    op = "attention_prefill"
    q_lens = [last - first for first, last in zip(bounds, bounds[1:], strict=False)]
    ascending = bounds[0] == 0 and bounds[-1] == T and min(q_lens, default=0) >= 0
    must = f"cu_seqlens_q must ascend from 0 to T == {T}"
    require(ascending, op, must, bounds, IndexError)
    check_values(op, kv, q_lens, seq_lens, chunk_size)
