"""What attention_decode checks of its arguments, before anything is written."""

from __future__ import annotations

import torch

from ._attention import check_values
from ._check import FLOATS, check_architecture, check_devices, check_index, check_tensor, require
from ._launch import device_properties
from ._remembered import remembered
from .attention_decode_config import (
    AttentionDecodeConfig,
    decode_workspace_numel,
    default_config,
)
from .attention_decode_schedule import DecodeSchedule
from .paged_kv import DENSE, LAYOUTS, PagedKV, check_paged_kv
from .rope import Temperature

__all__ = ["check_decode", "check_decode_values", "check_scheduled_decode"]

MAX_ROWS = 128  # new tokens times q heads of a KV head, in one tile
CHUNK_UNIT = 128  # of layout "transposed_v", whose tiles are not masked on the left


@remembered
def check_decode(
    op: str,
    q: torch.Tensor,
    kv: PagedKV,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_q_len: int,
    chunk_size: int,
    sm_scale: float | None,
    temperature: Temperature | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Raise ValueError, TypeError or UnsupportedArchitectureError without reading a value."""
    check_index(op, "seq_lens", seq_lens, ("B",))
    B = seq_lens.shape[0]
    if cu_seqlens_q is not None:
        check_index(op, "cu_seqlens_q", cu_seqlens_q, (B + 1,))
    check_tensor(op, "q", q, (B if cu_seqlens_q is None else "T", "Hq", "D"), FLOATS)
    _, Hq, D = q.shape
    require(2 <= D <= 256 and D % 2 == 0, op, "q must have an even head_dim in 2..256", D)
    check_paged_kv(op, kv, D, q.dtype, B, allowed=(*LAYOUTS, DENSE), quantized=True)
    must = f"q must have a multiple of Hkv == {kv.num_kv_heads} heads"
    require(Hq > 0 and Hq % kv.num_kv_heads == 0, op, must, Hq)
    require(1 <= max_q_len <= 8, op, "max_q_len must be in 1..8", max_q_len)
    must = "max_q_len must be 1 without cu_seqlens_q"
    require(max_q_len == 1 or cu_seqlens_q is not None, op, must, max_q_len)
    group = Hq // kv.num_kv_heads
    must = f"max_q_len times the {group} q heads of a KV head must be <= {MAX_ROWS}"
    require(max_q_len * group <= MAX_ROWS, op, must, max_q_len * group)
    require(chunk_size >= 0, op, "chunk_size must be >= 0 (0: no chunks)", chunk_size)
    if kv.layout == "transposed_v":
        must = f"chunk_size must be a multiple of {CHUNK_UNIT} for layout transposed_v"
        require(chunk_size % CHUNK_UNIT == 0, op, must, chunk_size)
    valid = sm_scale is None or 0.0 < sm_scale < float("inf")
    require(valid, op, "sm_scale must be finite and > 0", sm_scale)
    if temperature is not None:
        must = "temperature.attn_scale must be finite"
        require(abs(temperature.attn_scale) < float("inf"), op, must, temperature.attn_scale)
        must = "temperature.floor_scale must be finite and > 0"
        valid = 0.0 < temperature.floor_scale < float("inf")
        require(valid, op, must, temperature.floor_scale)
    must = "out_dtype must be None, torch.float32, torch.float16 or torch.bfloat16"
    require(out_dtype in (None, *FLOATS), op, must, out_dtype, TypeError)
    check_architecture(op, q)
    check_architecture(op, kv.k_cache)
    check_devices(op, q=q, k_cache=kv.k_cache, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)


@remembered
def check_scheduled_decode(
    op: str,
    q: torch.Tensor,
    kv: PagedKV,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_q_len: int,
    chunk_size: int,
    sm_scale: float | None,
    temperature: Temperature | None,
    out_dtype: torch.dtype | None,
    schedule: DecodeSchedule,
    config: AttentionDecodeConfig | None,
) -> int:
    """Return the elements of the workspace."""
    check_decode(
        op, q, kv, seq_lens, cu_seqlens_q, max_q_len, chunk_size, sm_scale, temperature, out_dtype
    )
    _, Hq, D = q.shape
    if config is None:
        rows = max_q_len * Hq // kv.num_kv_heads
        properties = device_properties(q.device)
        config = default_config(D, q.dtype, kv.k_cache.dtype, rows, properties)
    multiplied = kv.is_quantized and kv.layout == "transposed_v" and q.dtype != torch.float32
    must = "config.BLOCK_N must be >= 32 where e4m3 is multiplied"
    require(not multiplied or config.BLOCK_N >= 32, op, must, config.BLOCK_N)
    _check_schedule(schedule, kv, seq_lens, cu_seqlens_q, max_q_len, chunk_size, config.BLOCK_N)
    return decode_workspace_numel(Hq, D, schedule)


def _check_schedule(
    schedule: DecodeSchedule,
    kv: PagedKV,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_q_len: int,
    chunk_size: int,
    BLOCK_N: int,
) -> None:
    """Raise ValueError where `schedule` was made for something else, as far as the host knows."""
    op = "attention_decode"
    made = schedule.chunk_size, schedule.max_q_len, schedule.num_kv_heads, schedule.has_cu_seqlens
    asked = chunk_size, max_q_len, kv.num_kv_heads, cu_seqlens_q is not None
    must = f"schedule must be for (chunk_size, max_q_len, num_kv_heads, has_cu_seqlens) == {asked}"
    require(made == asked, op, must, made)
    if schedule.spans.shape[0] != seq_lens.shape[0]:
        must = f"schedule must be for {seq_lens.shape[0]} sequences"
        require(False, op, must, schedule.spans.shape[0])
    must = f"schedule must have splits of whole tiles, a multiple of {BLOCK_N} tokens"
    require(schedule.unit % BLOCK_N == 0, op, must, schedule.unit)
    check_devices(op, seq_lens=seq_lens, schedule=schedule.items)


def check_decode_values(
    kv: PagedKV,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_q_len: int,
    chunk_size: int,
    T: int,
) -> None:
    """Raise IndexError where lengths or live page ids leave the cache; reads the tensors back."""
    op = "attention_decode"
    lengths = seq_lens.tolist()
    q_lens = [int(n != 0) for n in lengths]
    if cu_seqlens_q is not None:
        bounds = cu_seqlens_q.tolist()
        q_lens = [last - first for first, last in zip(bounds, bounds[1:], strict=False)]
        right = bounds[0] == 0 and bounds[-1] <= T
        right = right and all(0 <= n <= max_q_len for n in q_lens)
        must = f"cu_seqlens_q must ascend from 0 to at most T == {T} in steps of 0..{max_q_len}"
        require(right, op, must, bounds, IndexError)
    check_values(op, kv, q_lens, lengths, chunk_size)
