"""What each operator cannot do without: bytes and FLOPs from shapes, by formula.

    fp8_matmul(M=64, N=5120, K=5120)

Those of the mixture of experts are in cost_experts.py. Every floating point operand read once,
every result written once, every integer that says where things are read once. The counter
(traffic.py) measures the same quantities in 32-byte sectors: a contiguous piece that does not begin
and end on a sector boundary costs up to 31 bytes more at either end, so `Compulsory` says how many
such pieces there are. FLOPs are those of matrix products, 2 per multiply-add, without padding;
elementwise work is not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Compulsory",
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "convert_layout",
    "decode_schedule",
    "fp8_matmul",
    "gather_rows",
    "merge_attention",
    "prefill_schedule",
    "quantize_groupwise",
    "quantize_rowwise",
    "rms_norm",
    "rms_norm_quantize",
    "rope_and_cache",
    "swiglu",
    "visible_pairs",
]

FP32 = INT32 = 4
INT64 = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Compulsory:
    """Bytes and FLOPs without which there is no result."""

    flops: int = 0  # of matrix products
    read: int = 0  # floating point operands
    index: int = 0  # integers: ids, offsets, page tables, lengths
    written: int = 0  # results
    pieces: int = 8  # contiguous pieces of operands and results: 62 bytes of slack each at most
    index_pieces: int = 4

    @property
    def bytes(self) -> int:
        return self.read + self.index + self.written


def rms_norm(*, tokens: int, hidden: int, itemsize: int) -> Compulsory:
    row = hidden * itemsize
    return Compulsory(read=(tokens + 1) * row, written=tokens * row)


def add_rms_norm(*, tokens: int, hidden: int, itemsize: int) -> Compulsory:
    row = hidden * itemsize
    return Compulsory(read=(2 * tokens + 1) * row, written=2 * tokens * row)


def swiglu(*, tokens: int, width: int, itemsize: int) -> Compulsory:
    return Compulsory(read=2 * tokens * width * itemsize, written=tokens * width * itemsize)


def gather_rows(
    *, rows: int, distinct: int, hidden: int, itemsize: int, index_itemsize: int = INT32
) -> Compulsory:
    """distinct: rows of the matrix that are read; one that is outside gives zeros."""
    row = hidden * itemsize
    return Compulsory(read=distinct * row, index=rows * index_itemsize, written=rows * row)


def rope_and_cache(
    *,
    tokens: int,
    cached: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    table_rows: int = 0,
    cache_itemsize: int | None = None,
    scales: int = 0,
    token_scales: bool = False,
    quantize_q: bool = False,
) -> Compulsory:
    """cached: tokens whose slot is not negative; table_rows: distinct rows of cos and sin read;
    cache_itemsize: of the caches, where it is not q's; scales: how many are read."""
    row = head_dim * itemsize
    q_row = head_dim + FP32 if quantize_q else row
    kv_row = head_dim * (cache_itemsize or itemsize) + FP32 * token_scales
    return Compulsory(
        read=(tokens * (heads + kv_heads) + cached * kv_heads) * row
        + table_rows * head_dim * FP32
        + scales * FP32,
        index=tokens * (INT32 + INT64),
        written=tokens * heads * q_row + 2 * cached * kv_heads * kv_row,
    )


def convert_layout(
    *, pages: int, page_size: int, kv_heads: int, head_dim: int, itemsize: int, listed: bool = False
) -> Compulsory:
    """listed: the pages are named by an id each."""
    moved = pages * page_size * kv_heads * head_dim * itemsize
    return Compulsory(read=moved, index=pages * INT32 * listed, written=moved)


def quantize_rowwise(*, rows: int, width: int, itemsize: int) -> Compulsory:
    return Compulsory(read=rows * width * itemsize, written=rows * width + rows * FP32)


def quantize_groupwise(*, rows: int, width: int, itemsize: int) -> Compulsory:
    scales = rows * width // 128
    return Compulsory(read=rows * width * itemsize, written=rows * width + scales * FP32)


def rms_norm_quantize(
    *, tokens: int, hidden: int, itemsize: int, has_residual: bool = False
) -> Compulsory:
    """y, and with the residual their sum, beside y in e4m3 and its scales."""
    norm = (add_rms_norm if has_residual else rms_norm)(
        tokens=tokens, hidden=hidden, itemsize=itemsize
    )
    return Compulsory(read=norm.read, written=norm.written + tokens * (hidden + FP32))


def fp8_matmul(*, M: int, N: int, K: int, out_itemsize: int = 2) -> Compulsory:
    return Compulsory(flops=2 * M * N * K, read=(M + N) * (K + FP32), written=M * N * out_itemsize)


def visible_pairs(q_len: int, seq_len: int, chunk: int = 0) -> int:
    """(query, key) pairs of a sequence whose last `q_len` tokens are new."""

    def upto(n: int) -> int:  # pairs of queries 0 .. n - 1
        if not chunk:
            return n * (n + 1) // 2
        whole, rest = divmod(n, chunk)
        return whole * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2

    return upto(seq_len) - upto(seq_len - q_len)


def _live_keys(q_len: int, seq_len: int, chunk: int, page_size: int) -> tuple[int, int]:
    """Keys that some new token sees, from the first one's chunk on, and their pages."""
    if not q_len:
        return 0, 0
    oldest = (seq_len - q_len) // chunk * chunk if chunk else 0
    return seq_len - oldest, -(-seq_len // page_size) - oldest // page_size


def prefill_schedule(*, sequences: int, capacity: int) -> Compulsory:
    """capacity: entries of the table, of four integers each."""
    return Compulsory(index=(2 * sequences + 1) * INT32, written=(4 * capacity + 1) * INT32)


def attention_prefill(
    *,
    q_lens: Sequence[int],
    seq_lens: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    page_size: int,
    chunk: int = 0,
    out_itemsize: int | None = None,
    scales: int = 0,
) -> Compulsory:
    """Sequences that share pages would read less; here each has its own.

    out_itemsize: where it is not the operands'. scales: by token and head, of q, or of k and v too:
    0, 1 or 3 tensors.
    """
    tokens, B = sum(q_lens), len(q_lens)
    live = [_live_keys(q, n, chunk, page_size) for q, n in zip(q_lens, seq_lens, strict=True)]
    keys, pages = sum(keys for keys, _ in live), sum(pages for _, pages in live)
    pairs = sum(visible_pairs(q, n, chunk) for q, n in zip(q_lens, seq_lens, strict=True))
    row, out_row = head_dim * itemsize, head_dim * (out_itemsize or itemsize)
    by_token = FP32 * (min(scales, 1) * tokens * heads + scales // 3 * 2 * keys * kv_heads)
    return Compulsory(
        flops=4 * head_dim * heads * pairs,
        read=tokens * heads * row + 2 * keys * kv_heads * row + by_token,
        index=(2 * B + 1 + pages) * INT32,
        index_pieces=4 + 2 * B,
        written=tokens * heads * (out_row + FP32),
    )


def attention_decode(
    *,
    seq_lens: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    page_size: int,
    chunk: int = 0,
    q_lens: Sequence[int] | None = None,
    kv_itemsize: int | None = None,
    scales: str = "",
) -> Compulsory:
    """q_lens None: one row each, a sequence of length 0 has one too. scales: "head" or "token"."""
    rows = [1] * len(seq_lens) if q_lens is None else q_lens
    new = [min(q, n) for q, n in zip(rows, seq_lens, strict=True)]
    live = [_live_keys(q, n, chunk, page_size) for q, n in zip(new, seq_lens, strict=True)]
    keys, pages = sum(keys for keys, _ in live), sum(pages for _, pages in live)
    pairs = sum(visible_pairs(q, n, chunk) for q, n in zip(new, seq_lens, strict=True))
    row, kv_row = head_dim * itemsize, head_dim * (kv_itemsize or itemsize)
    scale_bytes = 2 * kv_heads * FP32 * {"": 0, "head": 1, "token": keys}[scales]
    bounds = 0 if q_lens is None else len(seq_lens) + 1
    return Compulsory(
        flops=4 * head_dim * heads * pairs,
        read=sum(rows) * heads * row + 2 * keys * kv_heads * kv_row + scale_bytes,
        index=(len(seq_lens) + bounds + pages) * INT32,
        index_pieces=4 + 2 * len(seq_lens),
        written=sum(rows) * heads * (row + FP32),
    )


def decode_schedule(*, B: int, items: int) -> Compulsory:
    """B lengths to a list of so many items, at most."""
    return Compulsory(index=B * INT32, index_pieces=1, written=(4 * items + 2 * B + 1) * INT32)


def merge_attention(*, R: int, rows: int, head_dim: int, itemsize: int) -> Compulsory:
    """R partial results of so many (token, head) rows."""
    row = head_dim * itemsize + FP32
    return Compulsory(read=R * rows * row, written=rows * row)
