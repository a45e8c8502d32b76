"""Which program of a decode step attends which keys: one small launch, shared by the layers.

    live[b]  = [chunk start of the first new row, seq_lens[b])      [0, seq_lens[b]) without chunks
    split    = the length, in units, whose work list keeps the SMs busy for the shortest time
    items    = (sequence, first token, end token, partial slot) of every split of every sequence

Layout: items (N, 4), spans (B, 2) with a sequence's first item and its number of items, count (1,);
int32. N follows from what the host knows, so a graph of the step stays valid; items from `count`
on are -1. The partial slot is the item's own number, -1 where it is its sequence's only
one: that result is final.
Tiling: a program writes BLOCK_I items. Each goes over all lengths three times: the total work,
the number of items under each of 16 split lengths, and the ordinals of the sequences' first items.
No program reads what another has written.

Splits begin at multiples of a unit that whole pages and whole key tiles make up, so every page is
read by one program per KV head. None is shorter than MIN_SPLIT, below which writing its partial
result would take more than 2 % of the bytes of its keys and values in e4m3. Nor is there a longest
one: the even share of the work is what the slowest program should have.
Source: FlashDecoding's split of the keys (Dao et al. 2023), with lengths on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import check_devices, check_index, require
from ._launch import SM_90, DeviceProperties, device_properties, launch
from ._library import define
from ._names import named, nbytes
from ._remembered import remembered
from ._sizes import flat, largest, smallest

__all__ = [
    "DecodeSchedule",
    "DecodeScheduleConfig",
    "decode_schedule",
    "default_config",
    "num_items",
    "unpacked",
]

CANDIDATES = tl.constexpr(16)  # split lengths from 8 times to half of the even share


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeScheduleConfig:
    UNIT: int  # tokens; splits begin at multiples of it
    MIN_SPLIT: int  # tokens, a multiple of UNIT; no split of several is shorter
    programs_per_sm: int  # that an SM runs at a time
    BLOCK_B: int
    BLOCK_I: int
    num_warps: int

    def wanted(self, num_kv_heads: int, sm_count: int) -> int:
        """Items that the GPU works on at a time."""
        return max(1, -(-self.programs_per_sm * sm_count // num_kv_heads))


def default_config(page_size: int, properties: DeviceProperties = SM_90) -> DecodeScheduleConfig:
    """Units are whole pages where a page and 128 keys, the largest tile, divide one another."""
    whole = page_size % 128 == 0 or 128 % page_size == 0
    unit = max(128, page_size) if whole else 128
    return DecodeScheduleConfig(
        UNIT=unit, MIN_SPLIT=max(512, unit), programs_per_sm=2, BLOCK_B=256, BLOCK_I=32, num_warps=4
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSchedule:
    """The work list of one kind of layer for one step; `decode_schedule` makes it.

    items (N, 4), spans (B, 2) and count (1,) are int32 on the device; the rest is what they were
    made for, which the layers are held to.
    """

    items: torch.Tensor
    spans: torch.Tensor
    count: torch.Tensor
    chunk_size: int
    max_q_len: int
    num_kv_heads: int
    unit: int
    has_cu_seqlens: bool

    @property
    def num_items(self) -> int:
        """Room in the list: programs per KV head."""
        return self.items.shape[0]

    @property
    def may_split(self) -> bool:
        """Whether a sequence can have two items; without, every result is final."""
        return self.num_items > self.spans.shape[0]


def num_items(
    B: int,
    num_kv_heads: int,
    capacity: int,
    chunk_size: int,
    max_q_len: int,
    split_tokens: int,
    sm_count: int,
    config: DecodeScheduleConfig,
) -> int:
    """Most items that B sequences of up to `capacity` tokens can have."""
    longest = capacity
    if chunk_size:
        longest = smallest(longest, chunk_size + max_q_len - 1)
        longest += config.UNIT - 1 if chunk_size % config.UNIT else 0  # from a unit's start on
    if split_tokens:
        return B * largest(1, -(-longest // split_tokens))
    wanted = config.wanted(num_kv_heads, sm_count)
    return smallest(B * largest(1, longest // config.MIN_SPLIT), B + 2 * wanted)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    tensors = args["seq_lens_ptr"], args["cu_seqlens_ptr"], args["items_ptr"], args["spans_ptr"]
    return nbytes(*tensors), 0


@triton.jit
def _live(
    seq_lens_ptr, cu_seqlens_ptr, b, mask, chunk_size,
    HAS_CU: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """(origin, tokens from there to the end, whether there are new rows) of the sequences b."""
    seq_len = tl.maximum(tl.load(seq_lens_ptr + b, mask=mask, other=0), 0)
    q_len = (seq_len >= 0).to(tl.int32)
    if HAS_CU:
        q_len = tl.load(cu_seqlens_ptr + b + 1, mask=mask, other=0)
        q_len -= tl.load(cu_seqlens_ptr + b, mask=mask, other=0)
    chunk = tl.where(chunk_size > 0, chunk_size, 2147483647)
    lo = tl.maximum(seq_len - tl.maximum(q_len, 1), 0) // chunk * chunk
    origin = lo // UNIT * UNIT
    return origin, seq_len - origin, mask & (q_len > 0)


@triton.jit
def _splits(
    tokens, has_rows, split,
    FIXED: tl.constexpr, UNIT: tl.constexpr, MIN_SPLIT: tl.constexpr,
):  # fmt: skip
    """Number of items of sequences with so many live tokens; 1 for rows that see no key."""
    count = tl.cdiv(tl.cdiv(tokens, UNIT), split)
    if not FIXED:
        count = tl.minimum(count, tokens // MIN_SPLIT)
    return tl.where(has_rows, tl.maximum(count, 1), 0)


@triton.jit(
    do_not_specialize=["B", "room", "wanted", "chunk_size", "split_units"],
    **named("attention_decode_schedule", "seq_lens_ptr", _cost),
)
def _attention_decode_schedule_kernel(
    seq_lens_ptr, cu_seqlens_ptr, items_ptr, spans_ptr, count_ptr,
    B, room, wanted, chunk_size, split_units,
    HAS_CU: tl.constexpr, FIXED: tl.constexpr, UNIT: tl.constexpr, MIN_SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Grid (max(1, cdiv(room, BLOCK_I)),); `wanted` items keep the GPU busy."""
    pid = tl.program_id(0)
    offs_b = tl.arange(0, BLOCK_B)

    # The split length in units: the even share of the work times 8 / i that takes the least time.
    split = split_units
    if not FIXED:
        total = tl.sum(tl.zeros((BLOCK_B,), dtype=tl.int64), axis=0)
        for b0 in tl.range(0, B, BLOCK_B):
            b = b0 + offs_b
            _, tokens, has_rows = _live(
                seq_lens_ptr, cu_seqlens_ptr, b, b < B, chunk_size, HAS_CU, UNIT
            )
            units = tl.where(has_rows, tl.cdiv(tokens, UNIT), 0)
            total += tl.sum(units.to(tl.int64), axis=0)
        eighths = (1 + tl.arange(0, CANDIDATES)) * wanted.to(tl.int64)
        lengths = tl.maximum(tl.cdiv(8 * total, eighths), MIN_SPLIT // UNIT)  # descending
        items = tl.zeros((CANDIDATES,), dtype=tl.int32)
        for b0 in tl.range(0, B, BLOCK_B):
            b = b0 + offs_b
            _, tokens, has_rows = _live(
                seq_lens_ptr, cu_seqlens_ptr, b, b < B, chunk_size, HAS_CU, UNIT
            )
            split_of = lengths.to(tl.int32)[:, None]
            items += tl.sum(
                _splits(tokens[None, :], has_rows[None, :], split_of, FIXED, UNIT, MIN_SPLIT),
                axis=1,
            )
        # Rounds of the GPU, each as long as one split and a unit's worth of starting and ending.
        time = tl.cdiv(items, wanted) * (lengths + 1)
        best = tl.min(time * CANDIDATES + tl.arange(0, CANDIDATES), axis=0) % CANDIDATES
        split = tl.sum(tl.where(tl.arange(0, CANDIDATES) == best, lengths, 0), axis=0).to(tl.int32)

    # An item's sequence is the last one that begins at or before it.
    offs_i = pid * BLOCK_I + tl.arange(0, BLOCK_I)
    seq = tl.full((BLOCK_I,), -1, dtype=tl.int32)
    start = tl.zeros((BLOCK_I,), dtype=tl.int32)
    done = tl.sum(tl.zeros((BLOCK_B,), dtype=tl.int32), axis=0)
    for b0 in tl.range(0, B, BLOCK_B):
        b = b0 + offs_b
        _, tokens, has_rows = _live(
            seq_lens_ptr, cu_seqlens_ptr, b, b < B, chunk_size, HAS_CU, UNIT
        )
        count = _splits(tokens, has_rows, split, FIXED, UNIT, MIN_SPLIT)
        first = done + tl.cumsum(count, axis=0) - count
        begun = (b < B)[None, :] & (first[None, :] <= offs_i[:, None])
        seq += tl.sum(begun.to(tl.int32), axis=1)
        start = tl.maximum(start, tl.max(tl.where(begun, first[None, :], 0), axis=1))
        mask = (b < B) & (pid == 0)
        tl.store(spans_ptr + 2 * b, first, mask=mask)
        tl.store(spans_ptr + 2 * b + 1, count, mask=mask)
        done += tl.sum(count, axis=0)
    if pid == 0:
        tl.store(count_ptr, done)

    mask_i = offs_i < tl.minimum(done, room)
    origin, tokens, has_rows = _live(
        seq_lens_ptr, cu_seqlens_ptr, seq, mask_i, chunk_size, HAS_CU, UNIT
    )
    count = tl.maximum(_splits(tokens, has_rows, split, FIXED, UNIT, MIN_SPLIT), 1)
    units = tl.cdiv(tokens, UNIT).to(tl.int64)
    i = (offs_i - start).to(tl.int64)
    if FIXED:
        lower, upper = i * split, (i + 1) * split
    else:
        lower, upper = i * units // count, (i + 1) * units // count
    begin = origin + (lower * UNIT).to(tl.int32)
    end = origin + tl.minimum(upper * UNIT, tokens.to(tl.int64)).to(tl.int32)
    item_ptrs = items_ptr + 4 * offs_i
    mask = offs_i < room
    tl.store(item_ptrs, tl.where(mask_i, seq, -1), mask=mask)
    tl.store(item_ptrs + 1, tl.where(mask_i, begin, -1), mask=mask)
    tl.store(item_ptrs + 2, tl.where(mask_i, end, -1), mask=mask)
    tl.store(item_ptrs + 3, tl.where(mask_i & (count > 1), offs_i, -1), mask=mask)


def decode_schedule(
    seq_lens: torch.Tensor,
    *,
    chunk_size: int,
    capacity: int,
    num_kv_heads: int,
    page_size: int,
    cu_seqlens_q: torch.Tensor | None = None,
    max_q_len: int = 1,
    split_tokens: int = 0,
    config: DecodeScheduleConfig | None = None,
) -> DecodeSchedule:
    """Share the keys of B sequences out over the programs of `attention_decode`.

    Args:
        seq_lens: (B,) int32 with the new tokens; 0 for a row that is not in use.
        chunk_size: of the layers that will use the schedule; 0 for global layers.
        capacity: tokens that a row of the block table can address.
        num_kv_heads: of the caches.
        page_size: of the caches; 1 for dense ones.
        cu_seqlens_q: (B + 1,) int32, new rows of b are cu[b] .. cu[b + 1] - 1; None: one each.
        max_q_len: most new rows of a sequence, 1 to 8.
        split_tokens: > 0: every split is this long, a multiple of config.UNIT. A sequence's bits
            then depend neither on the other sequences nor on the GPU.
        config: None takes `default_config(page_size, ...)`.
    Returns:
        DecodeSchedule, for all layers with this chunk_size in this step.
    Raises:
        ValueError: shapes, sizes, devices, config.   TypeError: dtypes.
    Numerics: integers; equal for equal lengths.
    Cost: three passes over the lengths per 32 items.
    Source: see the module; reference: kernels/reference.py:decode_schedule.
    """
    unit, chosen = _check(
        "decode_schedule", seq_lens, chunk_size, capacity, num_kv_heads, page_size, cu_seqlens_q,
        max_q_len, split_tokens, config,
    )  # fmt: skip
    items, spans, count = _decode_schedule(
        seq_lens, cu_seqlens_q, chunk_size, capacity, num_kv_heads, max_q_len, split_tokens,
        [*chosen],
    )  # fmt: skip
    return DecodeSchedule(
        items=items, spans=spans, count=count, chunk_size=chunk_size, max_q_len=max_q_len,
        num_kv_heads=num_kv_heads, unit=unit, has_cu_seqlens=cu_seqlens_q is not None,
    )  # fmt: skip


@remembered
def _check(
    op: str,
    seq_lens: torch.Tensor,
    chunk_size: int,
    capacity: int,
    num_kv_heads: int,
    page_size: int,
    cu_seqlens_q: torch.Tensor | None,
    max_q_len: int,
    split_tokens: int,
    config: DecodeScheduleConfig | None,
) -> tuple[int, tuple[int, ...]]:
    """Return the unit of splits, and the configuration as the flat operator takes it."""
    check_index(op, "seq_lens", seq_lens, ("B",))
    B = seq_lens.shape[0]
    if cu_seqlens_q is not None:
        check_index(op, "cu_seqlens_q", cu_seqlens_q, (B + 1,))
    check_devices(op, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    require(chunk_size >= 0, op, "chunk_size must be >= 0 (0: no chunks)", chunk_size)
    require(0 <= capacity < 2**31, op, "capacity must be in 0..2**31 - 1", capacity)
    require(num_kv_heads >= 1, op, "num_kv_heads must be >= 1", num_kv_heads)
    require(page_size >= 1, op, "page_size must be >= 1", page_size)
    require(1 <= max_q_len <= 8, op, "max_q_len must be in 1..8", max_q_len)
    must = "max_q_len must be 1 without cu_seqlens_q"
    require(max_q_len == 1 or cu_seqlens_q is not None, op, must, max_q_len)
    config = config or default_config(page_size, device_properties(seq_lens.device))
    unit, shortest = config.UNIT, config.MIN_SPLIT
    must = "config.MIN_SPLIT must be a positive multiple of config.UNIT"
    require(unit >= 1 and shortest >= 1 and shortest % unit == 0, op, must, (shortest, unit))
    must = f"split_tokens must be 0 or a positive multiple of {unit}"
    require(split_tokens >= 0 and split_tokens % unit == 0, op, must, split_tokens)
    return unit, tuple(flat(config))


def unpacked(config: list[int]) -> DecodeScheduleConfig:
    """The config of a flat operator's call."""
    return DecodeScheduleConfig(**dict(zip(DecodeScheduleConfig.__slots__, config, strict=True)))


def _empty(
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    chunk_size: int,
    capacity: int,
    num_kv_heads: int,
    max_q_len: int,
    split_tokens: int,
    config: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B = seq_lens.shape[0]
    sm_count = device_properties(seq_lens.device).sm_count
    room = num_items(
        B, num_kv_heads, capacity, chunk_size, max_q_len, split_tokens, sm_count, unpacked(config)
    )
    made = (seq_lens.new_empty(shape) for shape in ((room, 4), (B, 2), (1,)))
    items, spans, count = made
    return items, spans, count


def _decode_schedule_impl(
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    chunk_size: int,
    capacity: int,
    num_kv_heads: int,
    max_q_len: int,
    split_tokens: int,
    config: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = unpacked(config)
    items, spans, count = _empty(
        seq_lens, cu_seqlens_q, chunk_size, capacity, num_kv_heads, max_q_len, split_tokens, config
    )
    room = items.shape[0]
    wanted = made.wanted(num_kv_heads, device_properties(seq_lens.device).sm_count)
    launch(
        _attention_decode_schedule_kernel, (max(1, -(-room // made.BLOCK_I)),),
        seq_lens, cu_seqlens_q, items, spans, count,
        seq_lens.shape[0], room, wanted, chunk_size, split_tokens // made.UNIT,
        HAS_CU=cu_seqlens_q is not None, FIXED=split_tokens > 0, UNIT=made.UNIT,
        MIN_SPLIT=made.MIN_SPLIT, BLOCK_B=made.BLOCK_B, BLOCK_I=made.BLOCK_I,
        num_warps=made.num_warps,
    )  # fmt: skip
    return items, spans, count


_decode_schedule = define(
    "decode_schedule(Tensor seq_lens, Tensor? cu_seqlens_q, int chunk_size, SymInt capacity,"
    " int num_kv_heads, int max_q_len, int split_tokens, int[] config)"
    " -> (Tensor, Tensor, Tensor)",
    _decode_schedule_impl,
    _empty,
)
