"""How ranks share one long sequence: whole chunks, dealt out in a zig-zag; plain Python.

    shards = shard_sequence(num_tokens, num_ranks=8, chunk_size=8192)
    shards[rank].positions()                  # of the tokens that the rank owns, ascending

A rank owns whole chunks. A local layer's token sees its own chunk only, so local layers exchange
nothing. A global layer's token sees every earlier one: each rank attends its own keys, and
kernels/merge_attention.py merges the ranks' results, which is exact. Ranks that owned consecutive
chunks would have unequal work, since the last tokens of a causal sequence see the most keys: chunk
i goes to rank i in one round and to rank num_ranks - 1 - i in the next, which evens it out.

A rank stores its shard densely, chunk after chunk. So a prefix of the sequence is a prefix of every
shard, whose length `local_len` tells, and a local layer is the same call on a shard as on a whole
sequence: chunks begin at multiples of the chunk size there too. In decode the new token's owner
writes its key and the query goes to all ranks. It goes pre-scaled: a rank's kernel does not know
the position that the temperature depends on.
Source: zig-zag context parallelism as in "Context Parallelism for Scalable Million-Token
Inference" (arXiv 2411.01783), with the model's attention chunks as its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Shard", "owner_of", "shard_sequence"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """What one rank owns of a sequence of `num_tokens`, as [first, end) ranges in order.

    All but the sequence's last range are one chunk long.
    """

    rank: int
    num_ranks: int
    chunk_size: int
    num_tokens: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def owned(self) -> int:
        return sum(end - first for first, end in self.ranges)

    def positions(self, device: torch.device | None = None) -> torch.Tensor:
        """(owned,) int32: where the shard's tokens stand in the sequence."""
        parts = [torch.arange(*r, dtype=torch.int32, device=device) for r in self.ranges]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device=device)

    def local_len(self, length: int) -> int:
        """How many of the sequence's first `length` tokens the rank owns."""
        return sum(max(0, min(end, length) - first) for first, end in self.ranges)


def owner_of(position: int, num_ranks: int, chunk_size: int) -> int:
    """The rank that owns the token at `position`."""
    round_, place = divmod(position // chunk_size, num_ranks)
    return num_ranks - 1 - place if round_ % 2 else place


def shard_sequence(num_tokens: int, num_ranks: int, chunk_size: int) -> list[Shard]:
    """Deal the chunks of a sequence out to the ranks.

    Args:
        num_tokens: of the sequence, cached and new together.
        num_ranks: at least 1; ranks without a chunk own nothing.
        chunk_size: the model's attention chunk; a model without takes any block size.
    Returns:
        One Shard per rank. Every token is in exactly one; no two ranks differ by more than one
        chunk, and after every second round of all ranks they own equally many.
    Raises:
        ValueError: an argument is out of range.
    """
    for name, value, least in (
        ("num_tokens", num_tokens, 0), ("num_ranks", num_ranks, 1), ("chunk_size", chunk_size, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"shard_sequence: {name} must be >= {least}, got {value}")
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for first in range(0, num_tokens, chunk_size):
        owner = owner_of(first, num_ranks, chunk_size)
        ranges[owner].append((first, min(first + chunk_size, num_tokens)))
    return [
        Shard(
            rank=rank, num_ranks=num_ranks, chunk_size=chunk_size, num_tokens=num_tokens,
            ranges=tuple(owned),
        )
        for rank, owned in enumerate(ranges)
    ]  # fmt: skip
