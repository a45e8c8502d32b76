"""The paged KV cache and the `Step` that one forward call works on.

Two pools of pages, because the layers need different lengths of history:

* the global pool serves the NoPE layers, which see everything: a sequence keeps all its pages;
* the local pool serves the RoPE layers, which see only the chunk their query is in. After each
  step a sequence keeps the pages its next query can see, at most one chunk (and one page more
  where the page size does not divide the chunk); the rest goes back to the free list. A step holds
  the pages of all chunks that it touches: `prefill_blocks` cuts a prompt so that it is one.

All layers of a pool share its block table. Tables are indexed by the absolute logical page
t // page_size of token t, in both pools; entries outside the live range are -1 and must not be
read. Everything is decided on the host from lengths the host knows: a step reads nothing back
from the device.

Freed pages are handed out again by a later `step()`, whose kernels the stream runs later, so
they are put on the free list as soon as the step that still reads them has been prepared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from llama4_triton.kernels.paged_kv import LAYOUTS, Layout, PagedKV

from .cache_size import DEFAULT_PAGE_SIZE, CacheFormat, kv_bytes, pages_needed, prefill_blocks
from .config import Llama4Config
from .page_pool import PagePool

__all__ = [
    "DEFAULT_PAGE_SIZE",
    "CacheFormat",
    "CacheFull",
    "KVCache",
    "LayerKV",
    "Step",
    "kv_bytes",
    "pages_needed",
    "prefill_blocks",
]


class CacheFull(RuntimeError):
    """A pool has fewer free pages than a step needs; nothing was changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one forward call needs besides weights: B sequences, T new tokens packed end to end."""

    input_ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int32, position of each token in its own sequence
    # (T,) int32: `positions`, or those of a padded batch if `begin` was given slot_offsets
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

    def copy_(self, new: Step) -> Step:
        """Write `new` into this step's tensors, which a captured CUDA graph reads; return self.

        Raises:
            ValueError: `new` has another number of tokens, sequences or pages in its tables, or
                asks for the logits of other tokens.
        """
        if self.max_q_len != new.max_q_len:
            raise ValueError(
                f"Step.copy_: new.max_q_len must be {self.max_q_len}, got {new.max_q_len}"
            )
        pairs = []
        for field in fields(self):
            mine, its = getattr(self, field.name), getattr(new, field.name)
            shapes = [tuple(getattr(x, "shape", ())) for x in (mine, its)]
            if type(mine) is not type(its) or shapes[0] != shapes[1]:
                raise ValueError(
                    f"Step.copy_: new.{field.name} must have shape {shapes[0]}, got {shapes[1]}"
                )
            if isinstance(mine, torch.Tensor):
                pairs.append((mine, its))
        for mine, its in pairs:
            mine.copy_(its)
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKV:
    """One layer's pages, and where this step reads and writes them."""

    k_cache: torch.Tensor  # (num_pages, page_size, num_key_value_heads, head_dim)
    v_cache: torch.Tensor  # as k_cache, or as `layout` says
    block_table: torch.Tensor  # (B, max_pages) int32
    slot_mapping: torch.Tensor  # (T,) int64
    k_scale: torch.Tensor | None = None  # of e4m3 pages
    v_scale: torch.Tensor | None = None
    layout: Layout = "nhd"

    def paged(self) -> PagedKV:
        """As the operators take it."""
        return PagedKV(
            k_cache=self.k_cache, v_cache=self.v_cache, block_table=self.block_table,
            k_scale=self.k_scale, v_scale=self.v_scale, layout=self.layout,
        )  # fmt: skip


class KVCache:
    """Pages of all layers on one device, and the host-side state of a batch of sequences.

    Args:
        config: the model's; gives the layers of each pool, the heads and the chunk.
        num_global_pages, num_local_pages: pages per pool, shared by all sequences.
            `KVCache.for_lengths` computes them from the lengths that must fit.
        page_size: tokens per page.
        dtype: of both pools, where `format` does not say more: types, scales, layout.
    """

    def __init__(
        self,
        config: Llama4Config,
        *,
        num_global_pages: int,
        num_local_pages: int,
        page_size: int = DEFAULT_PAGE_SIZE,
        dtype: torch.dtype = torch.bfloat16,
        format: CacheFormat | None = None,
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
        format = format or CacheFormat.of(dtype)
        if format.layout not in LAYOUTS:
            raise ValueError(
                f"KVCache: format.layout must be one of {', '.join(LAYOUTS)}, got {format.layout!r}"
            )
        self.config, self.page_size, self.device = config, page_size, torch.device(device)
        self.format = format
        self.lengths: list[int] = []
        self._slot_offsets: list[int] | None = None
        self._pools = {
            "global": PagePool("global", num_global_pages, page_size),
            "local": PagePool("local", num_local_pages, page_size),
        }
        self._layer: list[tuple[str, int]] = []  # layer -> (pool, index among the pool's layers)
        counts = {"global": 0, "local": 0}
        for layer in range(config.num_hidden_layers):
            name = "local" if config.is_rope_layer(layer) else "global"
            self._layer.append((name, counts[name]))
            counts[name] += 1
        self._memory = {name: self._allocated(name, count) for name, count in counts.items()}

    def _allocated(self, pool: str, layers: int) -> tuple[torch.Tensor, ...]:
        """K, V and the scales of both, of every layer of the pool; layers first."""
        pages, page_size, format = self._pools[pool].num_pages, self.page_size, self.format
        heads, D = self.config.num_key_value_heads, self.config.head_dim
        shape = (pages, page_size, heads, D)
        v_shape = (pages, heads, D, page_size)
        if format.layout_of(pool) == "nhd":
            v_shape = shape
        k, v = (
            torch.empty((layers, *s), dtype=format.dtype(pool), device=self.device)
            for s in (shape, v_shape)
        )
        scale = (layers, *format.scale_shape(pool, pages, page_size, heads))
        return k, v, *(torch.ones(scale, device=self.device) for _ in "kv")

    @classmethod
    def for_lengths(
        cls,
        config: Llama4Config,
        lengths: Sequence[int],
        *,
        step_tokens: int | None = None,
        aligned: bool = False,
        page_size: int = DEFAULT_PAGE_SIZE,
        **options: Any,
    ) -> KVCache:
        """A cache for sequences that grow to `lengths`; `pages_needed` says how."""
        num_global, num_local = pages_needed(
            config, lengths, step_tokens=step_tokens, aligned=aligned, page_size=page_size
        )
        cache = cls(
            config,
            num_global_pages=num_global,
            num_local_pages=num_local,
            page_size=page_size,
            **options,
        )
        cache.begin(len(lengths))
        return cache

    def begin(self, batch: int, *, slot_offsets: Sequence[int] | None = None) -> None:
        """Forget everything and open `batch` empty sequences.

        Args:
            slot_offsets: the padding on the left of each sequence, for a model whose parity takes
                the attention temperature from a token's slot in the padded batch, as transformers
                does. None: from its position in its own sequence.
        """
        if batch < 0:
            raise ValueError(f"KVCache: batch must be >= 0, got {batch}")
        if slot_offsets is not None and len(slot_offsets) != batch:
            raise ValueError(
                f"KVCache: slot_offsets must have one entry per sequence ({batch}), got "
                f"{len(slot_offsets)}"
            )
        self.lengths = [0] * batch
        self._slot_offsets = None if slot_offsets is None else list(slot_offsets)
        for pool in self._pools.values():
            pool.reset(batch)

    def release(self, row: int) -> None:
        """Free all pages of one sequence, which becomes empty."""
        for pool in self._pools.values():
            pool.release(row)
        self.lengths[row] = 0

    def share_prefix(self, source: int, row: int, length: int | None = None) -> int:
        """Begin the empty sequence `row` with the first tokens of `source`; nothing is copied.

        Both hold the pages from then on, and the last one to let go frees them. Pages are shared
        whole, so the length is rounded down to a multiple of the page size. Where it is no
        multiple of the chunk, the local pages of its chunk must still be there, which is where
        `source` itself stands in that chunk; else it is rounded down to a multiple of both.

        Args:
            length: of the prefix; None: all that `source` has.
        Returns:
            Tokens that are shared: `row` goes on at that position. 0: nothing.
        Raises:
            ValueError: rows or length out of range, or `row` is not empty.
        """
        batch = len(self.lengths)
        if not (0 <= source < batch and 0 <= row < batch and source != row):
            raise ValueError(
                f"KVCache.share_prefix: source and row must be different and in [0, {batch}), got "
                f"{source} and {row}"
            )
        if self.lengths[row]:
            raise ValueError(
                f"KVCache.share_prefix: row must be empty, got {self.lengths[row]} tokens"
            )
        length = self.lengths[source] if length is None else length
        if not 0 <= length <= self.lengths[source]:
            raise ValueError(
                "KVCache.share_prefix: length must be at most that of source, "
                f"{self.lengths[source]}, got {length}"
            )
        chunk, page, local = self.config.attention_chunk_size, self.page_size, self._pools["local"]
        shared = length // page * page
        first = shared  # token from which on local pages are needed
        if chunk is None:
            first = 0
        elif shared % chunk:
            first = shared // chunk * chunk
            if first // page < local.live[source][0]:  # some of them are gone
                both = math.lcm(chunk, page)
                shared = first = length // both * both
        self._pools["global"].share(source, row, 0, shared // page)
        local.share(source, row, first // page, shared // page)
        self.lengths[row] = shared
        return shared

    def set_scales(self, layer: int, k_scale: torch.Tensor, v_scale: torch.Tensor) -> None:
        """Set the static scales (num_key_value_heads,) of a layer, before anything is written."""
        name, index = self._layer[layer]
        memory = self._memory[name]
        if memory[2].ndim != 2 or not memory[2].numel():
            raise ValueError(
                f"KVCache.set_scales: layer must be of an e4m3 pool with scales of heads, got "
                f"{layer} of the {name} pool"
            )
        memory[2][index].copy_(k_scale)
        memory[3][index].copy_(v_scale)

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
        k_cache, v_cache, k_scale, v_scale = (memory[index] for memory in self._memory[name])
        if name == "global":
            table, slots = step.global_block_table, step.global_slot_mapping
        else:
            table, slots = step.local_block_table, step.local_slot_mapping
        return LayerKV(
            k_cache=k_cache,
            v_cache=v_cache,
            block_table=table,
            slot_mapping=slots,
            k_scale=k_scale if k_scale.numel() else None,
            v_scale=v_scale if v_scale.numel() else None,
            layout=self.format.layout_of(name),
        )

    @property
    def used_pages(self) -> dict[str, int]:
        """Pages held per pool: {"global": ..., "local": ...}."""
        return {name: pool.num_pages - len(pool.free) for name, pool in self._pools.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the pages take."""
        return sum(part.nbytes for memory in self._memory.values() for part in memory)

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
