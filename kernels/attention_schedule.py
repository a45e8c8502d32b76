"""The row tiles of attention_prefill, made on the device once per step for all layers of a type.

    tiles[r] = (sequence, first row, end row, position of the first row)      r < count, else -1
    cost     = ceil((position of the last row + 1 - start of its chunk) / block_m)      key tiles

Rows lo to hi - 1 of a tile are rows of q, at most block_m of one sequence, and lie in one chunk:
the rows of a sequence are cut where a chunk begins, each piece every block_m rows from its start.
Tiles are in order of descending cost, so that what is left for the end is short; equal costs in
order of sequence, then of rows.
Tiling: a program takes BLOCK_I tiles. It finds their sequences by a sum over all sequences, and
their places by another: the tiles that cost more, and the equal ones before. The costs of a piece
are consecutive integers, and the whole chunks of a sequence have the same ones, so a sequence
answers in a few operations whatever its length, and no program needs another's result.
Source: longest processing time first (Graham 1969); FlashAttention-3's scheduler sorts likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import check_devices, check_index, require
from ._launch import launch
from ._library import define
from ._names import named, nbytes
from ._remembered import remembered
from ._sizes import above, smallest

__all__ = ["PrefillSchedule", "prefill_schedule", "tile_capacity"]

NO_CHUNK = tl.constexpr(2**30)  # beyond every position
BLOCK_I = 32  # tiles of a program
BLOCK_B = 128  # sequences at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillSchedule:
    """Where the work of one step's prefill lies; made by `prefill_schedule`.

    Args:
        tiles: (capacity, 4) int32: sequence, first row, end row, position of the first row; -1 in
            unused entries, all at the end.
        count: (1,) int32: entries that are used.
        block_m: the most rows of a tile.
        chunk_size: 0 for global layers.
    """

    tiles: torch.Tensor
    count: torch.Tensor
    block_m: int
    chunk_size: int


def tile_capacity(num_tokens: int, num_seqs: int, chunk_size: int, block_m: int) -> int:
    """The most tiles that so many tokens of so many sequences can need.

    A piece of n rows has n // block_m full tiles and perhaps a ragged one. A sequence has one
    piece, or two with whole chunks between them, whose tiles are full if block_m divides them.
    """
    T, B = num_tokens, num_seqs
    most = T // block_m + B
    if chunk_size:
        most += B + above(chunk_size % block_m, 0) * (T // chunk_size)
    return smallest(T, most)


@triton.jit
def _pieces(cu_seqlens_ptr, seq_lens_ptr, b, mask_b, chunk, block_m):
    """Of sequences b: first row, its place in its chunk, rows of the first piece, others, tiles.

    Rows of padding stand at negative positions: in chunks too, in front of token 0 without.
    """
    row = tl.load(cu_seqlens_ptr + b, mask=mask_b, other=0)
    q_len = tl.load(cu_seqlens_ptr + b + 1, mask=mask_b, other=0) - row
    seq_len = tl.load(seq_lens_ptr + b, mask=mask_b, other=0)
    first_p = seq_len - q_len
    start = tl.maximum(first_p, 0) % chunk
    in_chunk = chunk - 1 - (-1 - tl.minimum(first_p, -1)) % chunk
    start = tl.where((first_p < 0) & (chunk < NO_CHUNK), in_chunk, start)
    first = tl.minimum(q_len, chunk - start)
    rest = q_len - first
    tiles = tl.cdiv(first, block_m) + rest // chunk * tl.cdiv(chunk, block_m)
    return row, start, first, rest, tiles + tl.cdiv(rest % chunk, block_m)


@triton.jit
def _first_costs(start, first, block_m):
    """Costs of the first piece: after `below` one each up to `upto`, and that of its last tile."""
    below = tl.cdiv(start, block_m)
    upto = below + tl.maximum(tl.cdiv(first, block_m) - 1, 0)
    return below, upto, tl.where(first > 0, tl.cdiv(start + first, block_m), 0)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    return nbytes(*(args[name] for name in ("cu_seqlens_ptr", "seq_lens_ptr", "tiles_ptr"))), 0


@triton.jit(
    do_not_specialize=["num_seqs", "capacity", "chunk", "block_m"],
    **named("prefill_schedule", "tiles_ptr", _cost),
)
def _prefill_schedule_kernel(
    cu_seqlens_ptr, seq_lens_ptr, tiles_ptr, count_ptr,
    num_seqs, capacity, chunk, block_m,
    BLOCK_I: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(capacity, BLOCK_I),): tiles i in order of sequence and row, to their places."""
    offs_b = tl.arange(0, BLOCK_B)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)

    # Their sequences, the tiles before those, and all tiles.
    seq = tl.zeros((BLOCK_I,), dtype=tl.int32)
    before = tl.zeros((BLOCK_I,), dtype=tl.int32)
    count = 0
    for b0 in tl.range(0, num_seqs, BLOCK_B):
        b = b0 + offs_b
        tiles = _pieces(cu_seqlens_ptr, seq_lens_ptr, b, b < num_seqs, chunk, block_m)[4]
        ends = count + tl.cumsum(tiles, axis=0)
        over = (ends[None, :] <= i[:, None]) & (b < num_seqs)[None, :]
        seq += tl.sum(over.to(tl.int32), axis=1)
        before += tl.sum(tl.where(over, tiles[None, :], 0), axis=1)
        count += tl.sum(tiles, axis=0)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, count)
    used = i < count

    # Their rows, and their costs.
    row0, start, first, rest, _ = _pieces(cu_seqlens_ptr, seq_lens_ptr, seq, used, chunk, block_m)
    of_chunk = tl.cdiv(chunk, block_m)
    of_first = tl.cdiv(first, block_m)
    after = i - before - of_first  # of the tiles after the first piece
    is_first = after < 0
    which = tl.where(is_first, 0, after // of_chunk)  # chunk after the first piece
    offset = tl.where(is_first, after + of_first, after % of_chunk) * block_m  # in the piece
    piece_row = tl.where(is_first, 0, first + which * chunk)
    piece_rows = tl.where(is_first, first, tl.minimum(rest - which * chunk, chunk))
    rows = tl.minimum(piece_rows - offset, block_m)
    cost = tl.cdiv(tl.where(is_first, start, 0) + offset + rows, block_m)

    # Their places.
    below_i, upto_i, last_i = _first_costs(start, first, block_m)
    in_range = ((below_i < cost) & (cost <= upto_i)).to(tl.int32)
    is_last = is_first & (offset + block_m >= first)
    place = tl.where(is_first, in_range * is_last.to(tl.int32), 0)
    place += tl.where(is_first, 0, which + in_range + (last_i == cost).to(tl.int32))
    for b0 in tl.range(0, num_seqs, BLOCK_B):
        b = b0 + offs_b
        pieces = _pieces(cu_seqlens_ptr, seq_lens_ptr, b, b < num_seqs, chunk, block_m)
        below, upto, last = _first_costs(pieces[1], pieces[2], block_m)
        below, upto, last = below[None, :], upto[None, :], last[None, :]
        chunks = (pieces[3] // chunk)[None, :]
        tail = tl.cdiv(pieces[3] % chunk, block_m)[None, :]  # costs of the last piece: 1 to tail
        c = cost[:, None]
        more = tl.maximum(upto - tl.maximum(below, c), 0) + (last > c).to(tl.int32)
        more += chunks * tl.maximum(of_chunk - c, 0) + tl.maximum(tail - c, 0)
        equal = ((below < c) & (c <= upto)).to(tl.int32) + (last == c).to(tl.int32)
        equal += chunks * (c <= of_chunk).to(tl.int32) + (c <= tail).to(tl.int32)
        place += tl.sum(more + tl.where(b[None, :] < seq[:, None], equal, 0), axis=1)

    # Places from `count` on belong to nobody, and so do tiles i from `count` on. Lengths that
    # contradict num_tokens could ask for more places than there are.
    place = tl.where(used, place, i)
    ptrs = tiles_ptr + place.to(tl.int64) * 4
    row = row0 + piece_row + offset
    end = tl.load(cu_seqlens_ptr + seq + 1, mask=used, other=0)
    position = tl.load(seq_lens_ptr + seq, mask=used, other=0) - end + row
    mask = (i < capacity) & (place < capacity)
    tl.store(ptrs, tl.where(used, seq, -1), mask=mask)
    tl.store(ptrs + 1, tl.where(used, row, -1), mask=mask)
    tl.store(ptrs + 2, tl.where(used, row + rows, -1), mask=mask)
    tl.store(ptrs + 3, tl.where(used, position, -1), mask=mask)


def prefill_schedule(
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    num_tokens: int,
    *,
    chunk_size: int,
    block_m: int,
) -> PrefillSchedule:
    """Cut the new tokens of B sequences into tiles of rows, the most expensive ones first.

    Args:
        cu_seqlens_q: (B + 1,) int32, cu[0] == 0, cu[B] == num_tokens.
        seq_lens: (B,) int32, cached plus new tokens.
        num_tokens: T, the rows of q.
        chunk_size: of local layers; 0 for global ones.
        block_m: the most rows of a tile.
    Returns:
        PrefillSchedule with room for the most tiles that T tokens of B sequences can need.
    Raises:
        ValueError: shapes, devices, num_tokens, chunk_size, block_m.   TypeError: dtypes.
    Numerics: integers only; the table is a function of the lengths.
    Cost: one launch; O(B) integer operations per tile, 16 bytes written for each.
    Source: see the module; reference: kernels/reference.py:prefill_schedule.
    """
    _check("prefill_schedule", cu_seqlens_q, seq_lens, num_tokens, chunk_size, block_m)
    tiles, count = _prefill_schedule(cu_seqlens_q, seq_lens, num_tokens, chunk_size, block_m)
    return PrefillSchedule(tiles=tiles, count=count, block_m=block_m, chunk_size=chunk_size)


@remembered
def _check(
    op: str,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    num_tokens: int,
    chunk_size: int,
    block_m: int,
) -> None:
    check_index(op, "cu_seqlens_q", cu_seqlens_q, ("B + 1",))
    num_seqs = cu_seqlens_q.shape[0] - 1
    require(num_seqs >= 0, op, "cu_seqlens_q must have at least one element", 0)
    check_index(op, "seq_lens", seq_lens, (num_seqs,))
    check_devices(op, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens)
    must = f"num_tokens must be in 0..{NO_CHUNK.value - 1}"
    require(0 <= num_tokens < NO_CHUNK.value, op, must, num_tokens)
    must = "num_tokens must be 0 where there is no sequence"
    require(num_tokens == 0 or num_seqs > 0, op, must, num_tokens)
    require(chunk_size >= 0, op, "chunk_size must be >= 0 (0: no chunks)", chunk_size)
    require(block_m >= 1, op, "block_m must be >= 1", block_m)


def _empty_tables(
    cu_seqlens_q: torch.Tensor, num_tokens: int, chunk_size: int, block_m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    capacity = tile_capacity(num_tokens, cu_seqlens_q.shape[0] - 1, chunk_size, block_m)
    tiles, count = (cu_seqlens_q.new_empty(shape) for shape in ((capacity, 4), (1,)))
    return tiles, count


def _prefill_schedule_impl(
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    num_tokens: int,
    chunk_size: int,
    block_m: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    tiles, count = _empty_tables(cu_seqlens_q, num_tokens, chunk_size, block_m)
    capacity = len(tiles)
    launch(
        _prefill_schedule_kernel, (max(1, -(-capacity // BLOCK_I)),),
        cu_seqlens_q, seq_lens, tiles, count,
        seq_lens.shape[0], capacity, min(chunk_size, NO_CHUNK.value) or NO_CHUNK.value, block_m,
        BLOCK_I=BLOCK_I, BLOCK_B=BLOCK_B, num_warps=4,
    )  # fmt: skip
    return tiles, count


_prefill_schedule = define(
    "prefill_schedule(Tensor cu_seqlens_q, Tensor seq_lens, SymInt num_tokens, int chunk_size,"
    " SymInt block_m) -> (Tensor, Tensor)",
    _prefill_schedule_impl,
    lambda cu_seqlens_q, seq_lens, num_tokens, chunk_size, block_m: _empty_tables(
        cu_seqlens_q, num_tokens, chunk_size, block_m
    ),
)
