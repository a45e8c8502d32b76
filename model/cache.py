"""The paged KV cache and the `Step` that one forward call works on.

Two pools of pages, because the layers need different lengths of history:

* the global pool serves the NoPE layers, which see everything: a sequence keeps all its pages;
* the local pool serves the RoPE layers, which see only the chunk their query is in. After each
  step a sequence keeps the pages its next query can see, at most one chunk (and one page more
  where the page size does not divide the chunk); the rest goes back to the free list. During a
  step that crosses a chunk's end the pages of both chunks are held, so the pool must have room
  for one chunk and the step's tokens.

All layers of a pool share its block table. Tables are indexed by the absolute logical page
t // page_size of token t, in both pools; entries outside the live range are -1 and must not be
read. Everything is decided on the host from lengths the host knows: a step reads nothing back
from the device.

Freed pages are handed out again by a later `step()`, whose kernels the stream runs later, so
they are put on the free list as soon as the step that still reads them has been prepared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .config import Llama4Config

__all__ = ["CacheFull", "KVCache", "LayerKV", "Step", "kv_bytes", "pages_needed"]

DEFAULT_PAGE_SIZE = 64


class CacheFull(RuntimeError):
    """A pool has fewer free pages than a step needs; nothing was changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one forward call needs besides weights: B sequences, T new tokens packed end to end."""

    input_ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int32, position of each token in its own sequence
    # (T,) int32: `positions`, or transformers' cache slots if `begin` was given hf_slot_offsets
    temperature_positions: torch.Tensor
    cu_seqlens_q: torch.Tensor  # (B + 1,) int32; sequence b owns tokens [cu[b], cu[b + 1])
    seq_lens: torch.Tensor  # (B,) int32, cached and new tokens together
    max_q_len: int  # most new tokens of one sequence; 1 means this is a decode step
    global_block_table: torch.Tensor  # (B, max_pages) int32, page of logical page t // page_size
    global_slot_mapping: torch.Tensor  # (T,) int64, page * page_size + t % page_size
    local_block_table: torch.Tensor  # (B, max_pages) int32
    local_slot_mapping: torch.Tensor  # (T,) int64
    logits_rows: torch.Tensor | None  # (N,) int64 tokens that need logits; None: all T of them

    @property
    def is_decode(self) -> bool:
        """Every sequence has exactly one new token."""
        return self.max_q_len == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKV:
    """One layer's pages, and where this step reads and writes them."""

    k_cache: torch.Tensor  # (num_pages, page_size, num_key_value_heads, head_dim)
    v_cache: torch.Tensor  # as k_cache
    block_table: torch.Tensor  # (B, max_pages) int32
    slot_mapping: torch.Tensor  # (T,) int64


class _Pool:
    """Host-side allocator of one pool: which page holds which logical page of which sequence."""

    def __init__(self, name: str, num_pages: int, page_size: int) -> None:
        self.name, self.num_pages, self.page_size = name, num_pages, page_size
        self.reset(0)

    def reset(self, batch: int) -> None:
        self.free = list(range(self.num_pages - 1, -1, -1))
        self.table = torch.full((batch, 16), -1, dtype=torch.int32)
        self.live = [(0, 0)] * batch  # logical pages [first, end) a sequence holds

    def missing(self, row: int, length: int) -> int:
        """Pages that `row` lacks to hold `length` tokens."""
        return -(-length // self.page_size) - self.live[row][1]

    def grow(self, row: int, length: int) -> None:
        first, end = self.live[row]
        count = self.missing(row, length)
        if count <= 0:
            return
        if end + count > self.table.shape[1]:
            wider = torch.full((self.table.shape[0], 2 * (end + count)), -1, dtype=torch.int32)
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
        pages = self.free[-count:][::-1]
        del self.free[-count:]
        self.table[row, end : end + count] = torch.tensor(pages, dtype=torch.int32)
        self.live[row] = (first, end + count)

    def drop_before(self, row: int, token: int) -> None:
        """Free the pages of `row` whose last token comes before `token`."""
        first, end = self.live[row]
        keep = min(end, token // self.page_size)
        if keep > first:
            self.free.extend(self.table[row, first:keep].tolist())
            self.table[row, first:keep] = -1
            self.live[row] = (keep, end)

    def release(self, row: int) -> None:
        self.drop_before(row, self.live[row][1] * self.page_size)
        self.live[row] = (0, 0)

    def slots(self, row_of_token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Slot of each token, (T,) int64."""
        pages = self.table[row_of_token, positions // self.page_size].long()
        return pages * self.page_size + positions % self.page_size


class KVCache:
    """Pages of all layers on one device, and the host-side state of a batch of sequences.

    Args:
        config: the model's; gives the layers of each pool, the heads and the chunk.
        num_global_pages, num_local_pages: pages per pool, shared by all sequences.
            `KVCache.for_lengths` computes them from the lengths that must fit.
        page_size: tokens per page.
    """

    def __init__(
        self,
        config: Llama4Config,
        *,
        num_global_pages: int,
        num_local_pages: int,
        page_size: int = DEFAULT_PAGE_SIZE,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (
            ("num_global_pages", num_global_pages),
            ("num_local_pages", num_local_pages),
        ):
            if value < 0:
                raise ValueError(f"KVCache: {name} must be >= 0, got {value}")
        if page_size < 1:
            raise ValueError(f"KVCache: page_size must be >= 1, got {page_size}")
        self.config, self.page_size, self.device = config, page_size, torch.device(device)
        self.lengths: list[int] = []
        self._slot_offsets: list[int] | None = None
        self._pools = {
            "global": _Pool("global", num_global_pages, page_size),
            "local": _Pool("local", num_local_pages, page_size),
        }
        self._layer: list[tuple[str, int]] = []  # layer -> (pool, index among the pool's layers)
        counts = {"global": 0, "local": 0}
        for layer in range(config.num_hidden_layers):
            name = "local" if config.is_rope_layer(layer) else "global"
            self._layer.append((name, counts[name]))
            counts[name] += 1
        # (2, layers, pages, page_size, heads, head_dim): K and V of every layer of the pool
        self._memory = {
            name: torch.empty(
                2,
                counts[name],
                pool.num_pages,
                page_size,
                config.num_key_value_heads,
                config.head_dim,
                dtype=dtype,
                device=self.device,
            )
            for name, pool in self._pools.items()
        }

    @classmethod
    def for_lengths(
        cls,
        config: Llama4Config,
        lengths: Sequence[int],
        *,
        step_tokens: int | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """A cache for sequences that grow to `lengths`; arguments as in `pages_needed`."""
        num_global, num_local = pages_needed(
            config, lengths, step_tokens=step_tokens, page_size=page_size
        )
        cache = cls(
            config,
            num_global_pages=num_global,
            num_local_pages=num_local,
            page_size=page_size,
            dtype=dtype,
            device=device,
        )
        cache.begin(len(lengths))
        return cache

    def begin(self, batch: int, *, hf_slot_offsets: Sequence[int] | None = None) -> None:
        """Forget everything and open `batch` empty sequences.

        Args:
            hf_slot_offsets: a parity option. transformers takes the attention temperature from a
                token's cache slot, which counts left padding; give each sequence's padding here
                to get the same. The default is the true position in the sequence.
        """
        if batch < 0:
            raise ValueError(f"KVCache: batch must be >= 0, got {batch}")
        if hf_slot_offsets is not None and len(hf_slot_offsets) != batch:
            raise ValueError(
                f"KVCache: hf_slot_offsets must have one entry per sequence ({batch}), got "
                f"{len(hf_slot_offsets)}"
            )
        self.lengths = [0] * batch
        self._slot_offsets = None if hf_slot_offsets is None else list(hf_slot_offsets)
        for pool in self._pools.values():
            pool.reset(batch)

    def release(self, row: int) -> None:
        """Free all pages of one sequence, which becomes empty."""
        for pool in self._pools.values():
            pool.release(row)
        self.lengths[row] = 0

    def step(
        self,
        new_tokens: Sequence[Sequence[int]],
        *,
        rows: Sequence[int] | None = None,
        logits: Literal["last", "all"] = "last",
    ) -> Step:
        """Reserve room for new tokens and prepare the tensors of the forward call that adds them.

        Args:
            new_tokens: token ids per sequence, at least one each.
            rows: the sequences they belong to, each once; None: all of them in order.
            logits: "last": of each sequence's last token; "all": of every token.
        Raises:
            CacheFull: not enough free pages; nothing was changed.
            ValueError: rows, counts or token ids out of range.
        """
        rows = range(len(self.lengths)) if rows is None else list(rows)
        counts = [len(tokens) for tokens in new_tokens]
        self._check_rows(rows, counts)
        if logits not in ("last", "all"):
            raise ValueError(f'KVCache.step: logits must be "last" or "all", got {logits!r}')
        input_ids = torch.tensor([t for tokens in new_tokens for t in tokens], dtype=torch.int64)
        vocab = self.config.vocab_size
        if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab:
            bad = int(input_ids[(input_ids < 0) | (input_ids >= vocab)][0])
            raise ValueError(f"KVCache.step: token ids must be in [0, {vocab}), got {bad}")
        starts = [self.lengths[row] for row in rows]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self._reserve(rows, ends)

        offsets = torch.tensor([0, *counts]).cumsum(0)
        which = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
        positions = torch.arange(len(which)) - offsets[which] + torch.tensor(starts)[which]
        index = torch.tensor(rows)
        sent = self._send
        positions_dev = sent(positions.int())
        temperature_positions = positions_dev
        if self._slot_offsets is not None:
            shift = torch.tensor(self._slot_offsets)[index][which]
            temperature_positions = sent((positions + shift).int())
        # Whole multiples of 16 entries keep the tables' row stride divisible by 16.
        width = -(-max(ends) // (16 * self.page_size)) * 16
        tables, slots = {}, {}
        for name, pool in self._pools.items():
            table = torch.full((len(rows), width), -1, dtype=torch.int32)
            part = pool.table[index, :width]
            table[:, : part.shape[1]] = part
            tables[name] = sent(table)
            slots[name] = sent(pool.slots(index[which], positions))
        step = Step(
            input_ids=sent(input_ids),
            positions=positions_dev,
            temperature_positions=temperature_positions,
            cu_seqlens_q=sent(offsets.int()),
            seq_lens=sent(torch.tensor(ends, dtype=torch.int32)),
            max_q_len=max(counts),
            global_block_table=tables["global"],
            global_slot_mapping=slots["global"],
            local_block_table=tables["local"],
            local_slot_mapping=slots["local"],
            logits_rows=None if logits == "all" else sent(offsets[1:] - 1),
        )
        chunk = self.config.attention_chunk_size
        for row, end in zip(rows, ends, strict=True):
            self.lengths[row] = end
            if chunk is not None:
                self._pools["local"].drop_before(row, end // chunk * chunk)
        return step

    def layer(self, layer: int, step: Step) -> LayerKV:
        """Pages of `layer`, with the block table and slots of its pool for `step`."""
        name, index = self._layer[layer]
        k_cache, v_cache = self._memory[name][:, index].unbind(0)
        if name == "global":
            table, slots = step.global_block_table, step.global_slot_mapping
        else:
            table, slots = step.local_block_table, step.local_slot_mapping
        return LayerKV(k_cache=k_cache, v_cache=v_cache, block_table=table, slot_mapping=slots)

    @property
    def used_pages(self) -> dict[str, int]:
        """Pages held per pool: {"global": ..., "local": ...}."""
        return {name: pool.num_pages - len(pool.free) for name, pool in self._pools.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the pages take."""
        return sum(memory.nbytes for memory in self._memory.values())

    def _check_rows(self, rows: Sequence[int], counts: list[int]) -> None:
        if len(rows) != len(counts) or not rows:
            raise ValueError(
                f"KVCache.step: new_tokens must have one entry per sequence ({len(rows)}) and at "
                f"least one, got {len(counts)}"
            )
        if len(set(rows)) != len(rows) or not all(0 <= row < len(self.lengths) for row in rows):
            raise ValueError(
                f"KVCache.step: rows must be different and in [0, {len(self.lengths)}), got "
                f"{list(rows)}"
            )
        if min(counts) < 1:
            raise ValueError("KVCache.step: new_tokens must have a token per sequence, got none")

    def _reserve(self, rows: Sequence[int], ends: list[int]) -> None:
        for pool in self._pools.values():
            need = sum(max(0, pool.missing(row, end)) for row, end in zip(rows, ends, strict=True))
            if need > len(pool.free):
                raise CacheFull(
                    f"KVCache.step: the {pool.name} pool must have {need} free pages of "
                    f"{pool.page_size} tokens for this step, got {len(pool.free)} of "
                    f"{pool.num_pages} (release sequences, take smaller steps, or make it larger)"
                )
        for pool in self._pools.values():
            for row, end in zip(rows, ends, strict=True):
                pool.grow(row, end)

    def _send(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.device)


def pages_needed(
    config: Llama4Config,
    lengths: Sequence[int],
    *,
    step_tokens: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
) -> tuple[int, int]:
    """(global, local) pages with which sequences can grow to `lengths` in any order.

    Args:
        lengths: final number of tokens of each sequence.
        step_tokens: most new tokens one sequence gets in one step; None: all of them at once.
    """
    chunk = config.attention_chunk_size
    num_global = num_local = 0
    for length in lengths:
        pages = -(-length // page_size)
        num_global += pages
        if chunk is not None and length:
            # A query that starts a step at its chunk's last position sees chunk - 1 older tokens.
            live = min(length, chunk - 1 + min(length, step_tokens or length))
            unaligned = 1 if chunk % page_size else 0
            pages = min(pages, -(-live // page_size) + unaligned)
        num_local += pages
    return num_global, num_local


def kv_bytes(
    config: Llama4Config,
    lengths: Sequence[int],
    *,
    step_tokens: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of a cache made by `KVCache.for_lengths` with the same arguments."""
    num_global, num_local = pages_needed(
        config, lengths, step_tokens=step_tokens, page_size=page_size
    )
    page = 2 * page_size * config.num_key_value_heads * config.head_dim * dtype.itemsize
    layers = config.num_global_layers
    return page * (layers * num_global + (config.num_hidden_layers - layers) * num_local)
