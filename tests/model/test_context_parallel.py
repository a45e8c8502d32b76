"""Context parallelism with simulated ranks: shards, and that merging them changes nothing."""

from __future__ import annotations

import pytest
import torch
from support.decode import SMALL

from llama4_triton.kernels import reference
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_prefill import AttentionPrefillConfig, attention_prefill
from llama4_triton.kernels.merge_attention import merge_attention
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.model.context_parallel import owner_of, shard_sequence

F32 = torch.float32
PREFILL = AttentionPrefillConfig(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)
Hq, Hkv, D, PAGE, CHUNK = 4, 2, 16, 16, 32

NO_KERNELS = pytest.mark.no_kernels


@NO_KERNELS
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 300, 16 * 32])
def test_every_token_has_one_owner(num_tokens, num_ranks):
    shards = shard_sequence(num_tokens, num_ranks, CHUNK)
    positions = torch.cat([shard.positions() for shard in shards])
    assert torch.equal(positions.sort().values, torch.arange(num_tokens, dtype=torch.int32))
    for shard in shards:
        mine = shard.positions().tolist()
        assert all(owner_of(p, num_ranks, CHUNK) == shard.rank for p in mine)
        assert shard.owned == len(mine) and all(first % CHUNK == 0 for first, _ in shard.ranges)
        for length in (0, 1, num_tokens // 2, num_tokens):
            assert shard.local_len(length) == sum(p < length for p in mine)
            assert mine[: shard.local_len(length)] == [p for p in mine if p < length]


@NO_KERNELS
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_causal_work_is_balanced(num_ranks):
    """Keys seen by a rank's queries, after 16 rounds: within 1 %; in order of chunks, 1.9 x."""
    num_tokens = 16 * num_ranks * CHUNK
    shards = shard_sequence(num_tokens, num_ranks, CHUNK)
    work = [int((shard.positions().long() + 1).sum()) for shard in shards]
    assert max(work) <= 1.01 * min(work)
    assert {shard.owned for shard in shards} == {16 * CHUNK}


@NO_KERNELS
@pytest.mark.parametrize(
    "arguments, match",
    [
        ((-1, 2, 32), "num_tokens must be >= 0, got -1"),
        ((5, 0, 32), "num_ranks must be >= 1, got 0"),
        ((5, 2, 0), "chunk_size must be >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match="^shard_sequence: " + match):
        shard_sequence(*arguments)


def _int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def _paged(k, v):
    """k, v (tokens, Hkv, D) in pages in descending order; what is behind them is NaN."""
    pages = -(-len(k) // PAGE) + 1
    caches = torch.full((2, pages * PAGE, Hkv, D), torch.nan, device=k.device)
    caches[0, : len(k)], caches[1, : len(v)] = k, v
    k_cache, v_cache = caches.view(2, pages, PAGE, Hkv, D).flip(1)
    table = torch.arange(pages - 1, -1, -1, dtype=torch.int32, device=k.device)[None]
    return PagedKV(k_cache=k_cache.contiguous(), v_cache=v_cache.contiguous(), block_table=table)


@pytest.fixture
def sequence(device):
    """q, k, v (tokens, heads, D) of a sequence with a part of a chunk at its end."""
    tokens = 5 * CHUNK + 7
    q, k, v = torch.randn(tokens, Hq + 2 * Hkv, D).to(device).split([Hq, Hkv, Hkv], dim=1)
    return q.contiguous(), k.contiguous(), v.contiguous()


def _whole(q, k, v, chunk_size):
    """The unsharded result in float64, every token a query."""
    kv = _paged(k, v)
    bounds = _int32([0, len(q)], q.device)
    return reference.attention_prefill(
        q.double(),
        PagedKV(
            k_cache=kv.k_cache.double(), v_cache=kv.v_cache.double(), block_table=kv.block_table
        ),
        bounds,
        _int32([len(q)], q.device),
        chunk_size=chunk_size,
    )


def _close(got, want):
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=4e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_global_decode(device, sequence, num_ranks):
    """Every rank attends its own keys; two of eight ranks have none."""
    q, k, v = sequence
    shards = shard_sequence(len(q), num_ranks, CHUNK)
    for position in (len(q) - 1, 2 * CHUNK, 5):
        parts = []
        for shard in shards:
            mine = shard.positions().long()
            lens = _int32([shard.local_len(position + 1)], device)
            kv = _paged(k[mine], v[mine])
            parts.append(attention_decode(q[position : position + 1], kv, lens, config=SMALL))
        got = merge_attention(*(torch.stack(part) for part in zip(*parts, strict=True)))
        want = _whole(q[: position + 1], k, v, 0)
        _close(got, (want[0][-1:], want[1][-1:]))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_global_prefill(device, sequence, num_ranks):
    """The queries of each chunk meet every rank's keys before them, and their own rank's causally.

    Of another rank a chunk's queries see the same keys all, as so many rows of decode: some of them
    stand for the rest.
    """
    q, k, v = sequence
    shards = shard_sequence(len(q), num_ranks, CHUNK)
    caches = [_paged(k[s.positions().long()], v[s.positions().long()]) for s in shards]
    want = _whole(q, k, v, 0)
    for owner in shards:
        for first, end in owner.ranges:
            rows = sorted({first, (first + end) // 2, end - 1})
            parts = []
            for shard, kv in zip(shards, caches, strict=True):
                if shard is owner:
                    lens = _int32([shard.local_len(end)], device)
                    bounds = _int32([0, end - first], device)
                    out, lse = attention_prefill(q[first:end], kv, bounds, lens, config=PREFILL)
                    mine = [row - first for row in rows]
                    parts.append((out[mine], lse[mine]))
                    continue
                lens = _int32([shard.local_len(first)] * len(rows), device)
                table = kv.block_table.repeat(len(rows), 1)
                wide = PagedKV(k_cache=kv.k_cache, v_cache=kv.v_cache, block_table=table)
                parts.append(attention_decode(q[rows], wide, lens, config=SMALL))
            got = merge_attention(*(torch.stack(part) for part in zip(*parts, strict=True)))
            _close(got, (want[0][rows], want[1][rows]))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_local_layers_need_their_own_chunks_only(device, sequence, num_ranks):
    """The same two calls as on a whole sequence, on the shard alone."""
    q, k, v = sequence
    want = _whole(q, k, v, CHUNK)
    for shard in shard_sequence(len(q), num_ranks, CHUNK):
        mine = shard.positions().long()
        kv, lens = _paged(k[mine], v[mine]), _int32([shard.owned], device)
        bounds = _int32([0, shard.owned], device)
        got = attention_prefill(q[mine], kv, bounds, lens, chunk_size=CHUNK, config=PREFILL)
        _close(got, (want[0][mine], want[1][mine]))
        got = attention_decode(q[mine[-1:]], kv, lens, chunk_size=CHUNK, config=SMALL)
        _close(got, (want[0][mine[-1:]], want[1][mine[-1:]]))
