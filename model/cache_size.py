"""How a KV cache keeps its values, and how many pages and bytes that takes.

    bytes of a page and layer = 2 page_size Hkv (D * itemsize + 4 with scales of tokens)
    pages of a sequence       = global: ceil(length / page_size)
                                local:  of a chunk, and of what one step adds to it

A step needs the local pages from the start of its first token's chunk to its last token. Steps that
end where chunks end (`prefill_blocks`) thus need a chunk, or one step if that is longer; steps at
any positions need both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from llama4_triton.kernels.paged_kv import E4M3, Layout

from .config import Llama4Config

__all__ = [
    "DEFAULT_PAGE_SIZE",
    "CacheFormat",
    "kv_bytes",
    "pages_needed",
    "pool_bytes",
    "prefill_blocks",
]

DEFAULT_PAGE_SIZE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFormat:
    """Types of the two pools; the rest is about those in e4m3.

    Args:
        scales: "token", computed as tokens are appended, or "head", static, 1 until they are set.
        layout: of e4m3 pages. Others are "nhd": their tensor cores transpose V for nothing.
    """

    global_dtype: torch.dtype = torch.bfloat16
    local_dtype: torch.dtype = torch.bfloat16
    scales: Literal["token", "head"] = "token"
    layout: Layout = "nhd"

    def __post_init__(self) -> None:
        if self.scales not in ("token", "head"):
            raise ValueError(f'CacheFormat: scales must be "token" or "head", got {self.scales!r}')

    @classmethod
    def of(cls, dtype: torch.dtype) -> CacheFormat:
        return cls(global_dtype=dtype, local_dtype=dtype)

    def dtype(self, pool: str) -> torch.dtype:
        return self.global_dtype if pool == "global" else self.local_dtype

    def layout_of(self, pool: str) -> Layout:
        return self.layout if self.dtype(pool) == E4M3 else "nhd"

    def scale_shape(self, pool: str, num_pages: int, page_size: int, heads: int) -> tuple[int, ...]:
        """Of one layer's scales of K, or of V; (0,) where there are none."""
        if self.dtype(pool) != E4M3:
            return (0,)
        return (num_pages, page_size, heads) if self.scales == "token" else (heads,)


def prefill_blocks(
    config: Llama4Config, length: int, *, start: int = 0, step_tokens: int | None = None
) -> Iterator[tuple[int, int]]:
    """Tokens [begin, end) of each step of a prefill, so that the local pool needs least.

    Steps have `step_tokens` tokens at most (None: a chunk). Fewer than a chunk never cross a
    chunk's end; more are whole chunks, after a first step up to one's end.
    """
    chunk = config.attention_chunk_size
    most = step_tokens or chunk or 8192
    while start < length:
        end = start + most
        if chunk is not None:
            end = max(end // chunk * chunk, min(end, start // chunk * chunk + chunk))
        yield start, min(length, end)
        start = end


def pages_needed(
    config: Llama4Config,
    lengths: Sequence[int],
    *,
    step_tokens: int | None = None,
    aligned: bool = False,
    page_size: int = DEFAULT_PAGE_SIZE,
) -> tuple[int, int]:
    """(global, local) pages with which sequences can grow to `lengths` in any order.

    Args:
        lengths: final number of tokens of each sequence.
        step_tokens: most new tokens one sequence gets in one step; None: all of them at once.
        aligned: steps are those of `prefill_blocks`, or single tokens.
    """
    chunk = config.attention_chunk_size
    num_global = num_local = 0
    for length in lengths:
        pages = -(-length // page_size)
        num_global += pages
        if chunk is not None and length:
            most = min(length, step_tokens or length)
            # A query that starts a step at its chunk's last position sees chunk - 1 older tokens.
            live = min(length, max(chunk, most) if aligned else chunk - 1 + most)
            unaligned = 1 if chunk % page_size else 0
            pages = min(pages, -(-live // page_size) + unaligned)
        num_local += pages
    return num_global, num_local


def pool_bytes(
    config: Llama4Config,
    lengths: Sequence[int],
    *,
    step_tokens: int | None = None,
    aligned: bool = False,
    page_size: int = DEFAULT_PAGE_SIZE,
    format: CacheFormat | None = None,
) -> dict[str, int]:
    """Bytes of {"global": ..., "local": ...} of a cache made by `KVCache.for_lengths`."""
    format = format or CacheFormat()
    needed = pages_needed(
        config, lengths, step_tokens=step_tokens, aligned=aligned, page_size=page_size
    )
    layers = (config.num_global_layers, config.num_hidden_layers - config.num_global_layers)
    heads = config.num_key_value_heads
    out = {}
    for pool, num_layers, pages in zip(("global", "local"), layers, needed, strict=True):
        values = pages * page_size * heads * config.head_dim * format.dtype(pool).itemsize
        scales = 4
        for size in format.scale_shape(pool, pages, page_size, heads):
            scales *= size
        out[pool] = 2 * num_layers * (values + scales)
    return out


def kv_bytes(
    config: Llama4Config,
    lengths: Sequence[int],
    *,
    step_tokens: int | None = None,
    aligned: bool = False,
    page_size: int = DEFAULT_PAGE_SIZE,
    dtype: torch.dtype = torch.bfloat16,
    format: CacheFormat | None = None,
) -> int:
    """Bytes of a cache made by `KVCache.for_lengths` with the same arguments."""
    pools = pool_bytes(
        config,
        lengths,
        step_tokens=step_tokens,
        aligned=aligned,
        page_size=page_size,
        format=format or CacheFormat.of(dtype),
    )
    return sum(pools.values())
