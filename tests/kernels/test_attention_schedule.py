"""prefill_schedule: the table against a plain loop, its order, key tiles, ten million tokens."""

from __future__ import annotations

import random

import pytest
import torch

from llama4_triton.autotune.recorder import record
from llama4_triton.kernels import reference
from llama4_triton.kernels.attention_schedule import (
    PrefillSchedule,
    prefill_schedule,
    tile_capacity,
)

CHUNK, TOKENS = 8192, 10_485_760


def _make(q_lens, seq_lens, device) -> tuple[torch.Tensor, torch.Tensor, int]:
    bounds = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    return bounds.to(device), torch.tensor(seq_lens, dtype=torch.int32, device=device), sum(q_lens)


def _want(cu_seqlens, seq_lens, num_tokens, chunk_size, block_m):
    return reference.prefill_schedule(
        cu_seqlens, seq_lens, chunk_size=chunk_size, block_m=block_m,
        capacity=tile_capacity(num_tokens, len(seq_lens), chunk_size, block_m),
    )  # fmt: skip


def _check(q_lens, seq_lens, chunk_size, block_m, device) -> PrefillSchedule:
    cu, lens, T = _make(q_lens, seq_lens, device)
    got = prefill_schedule(cu, lens, T, chunk_size=chunk_size, block_m=block_m)
    tiles, count = _want(cu, lens, T, chunk_size, block_m)
    assert got.count.tolist() == count.tolist()
    assert torch.equal(got.tiles, tiles)
    assert (got.block_m, got.chunk_size) == (block_m, chunk_size)
    return got


# id: (q_lens, seq_lens, chunk_size, block_m)
CASES = {
    "one-token": ([1], [1], 0, 16),
    "tile-1": ([127], [127], 0, 128),
    "tile": ([128], [128], 0, 128),
    "tile+1": ([129], [129], 0, 128),
    "unaligned-prefix": ([300], [371], 0, 128),
    "empty-sequences": ([0, 130, 0, 0, 5, 0], [0, 200, 7, 0, 5, 0], 0, 64),
    "mixed": ([1, 1, 257, 1, 64, 3], [900, 1, 400, 33, 64, 4000], 0, 64),
    "chunk-1": ([63], [63], 64, 16),
    "chunk": ([64], [64], 64, 16),
    "chunk+1": ([65], [65], 64, 16),
    "chunk-straddled": ([200, 1, 30], [297, 65, 64], 64, 16),
    "chunks-of-one-tile": ([500, 100], [500, 130], 64, 64),
    "chunk-below-tile": ([40, 9], [55, 9], 5, 16),
    "chunk-1-token": ([7], [9], 1, 16),
    "chunk-33": ([100, 33, 34, 200], [100, 66, 100, 233], 33, 16),
    "more-sequences-than-a-block": ([3] * 300, [3 + i for i in range(300)], 0, 16),
    "lengths-too-short": ([6, 40], [2, 10], 0, 16),
    "padding-before-a-chunk": ([40, 40, 40, 9], [35, 3, 0, 30], 8, 16),
    "padding-of-chunks": ([300, 131], [172, 128], 64, 16),
}


@pytest.mark.parametrize("name", CASES)
def test_is_what_a_plain_loop_makes(device, name):
    _check(*CASES[name], device)


@pytest.mark.parametrize("seed", range(12))
def test_property_is_what_a_plain_loop_makes(device, seed):
    draw = random.Random(seed)
    B = draw.choice((1, 2, 5, 40))
    q_lens = [draw.choice((0, 1, draw.randrange(1, 600))) for _ in range(B)]
    seq_lens = [q + draw.choice((0, 16, draw.randrange(2000))) for q in q_lens]
    chunk_size = draw.choice((0, 1 if sum(q_lens) < 2000 else 100, 33, 64, 128, 512))
    _check(q_lens, seq_lens, chunk_size, draw.choice((16, 64, 128)), device)


def _key_tiles(tiles: torch.Tensor, chunk_size: int, block_n: int) -> int:
    """Key tiles of block_n that the rows of a table walk, from their chunk's start."""
    used = tiles[tiles[:, 0] >= 0].long()
    hi = used[:, 3] + used[:, 2] - used[:, 1]
    lo = used[:, 3] // chunk_size * chunk_size if chunk_size else 0 * hi
    return int((-((lo - hi) // block_n)).sum())


@pytest.mark.parametrize(
    "q_len, seq_len, chunks", [(8192, 8192, 1), (24_576, 24_576, 3), (128 * 8192, 128 * 8192, 128)]
)
def test_local_tiles_are_the_chunk_triangles(device, q_len, seq_len, chunks):
    """64 row tiles of 128 in a chunk, the k-th of which sees k key tiles of 128."""
    cu, lens, T = _make([q_len], [seq_len], device)
    tiles = prefill_schedule(cu, lens, T, chunk_size=CHUNK, block_m=128).tiles
    assert _key_tiles(tiles, CHUNK, 128) == chunks * (64 * 65 // 2)


def test_pieces_of_a_chunked_prefill_are_the_whole(device):
    """Three chunks in steps that straddle their ends: the sum of the steps' triangles."""
    visited = done = 0
    for new in (5120, 8192, 6144, 5120):
        done += new
        cu, lens, T = _make([new], [done], device)
        tiles = prefill_schedule(cu, lens, T, chunk_size=CHUNK, block_m=128).tiles
        visited += _key_tiles(tiles, CHUNK, 128)
    assert done == 3 * CHUNK and visited == 3 * (64 * 65 // 2)


def test_global_tiles_are_the_causal_triangle(device):
    cu, lens, T = _make([16_384], [16_384], device)
    tiles = prefill_schedule(cu, lens, T, chunk_size=0, block_m=128).tiles
    assert _key_tiles(tiles, 0, 128) == 128 * 129 // 2
    cu, lens, T = _make([4096], [16_384], device)
    tiles = prefill_schedule(cu, lens, T, chunk_size=0, block_m=128).tiles
    assert _key_tiles(tiles, 0, 128) == sum(range(97, 129))


@pytest.mark.unsanitized
@pytest.mark.parametrize("chunk_size", [0, CHUNK], ids=["global", "local"])
def test_ten_million_tokens(device, executor, chunk_size):
    """81,920 tiles, each once, in order; on the interpreter a tenth of them."""
    T = TOKENS // 10 if executor == "interpreter" else TOKENS
    cu, lens, _ = _make([T], [T], device)
    got = prefill_schedule(cu, lens, T, chunk_size=chunk_size, block_m=128)
    n = T // 128
    assert got.count.item() == n
    used, unused = got.tiles[:n].cpu(), got.tiles[n:]
    assert (unused == -1).all() and (used[:, 0] == 0).all()
    assert torch.equal(used[:, 3], used[:, 1]) and torch.equal(used[:, 2], used[:, 1] + 128)
    assert torch.equal(used[:, 1].sort().values, torch.arange(0, T, 128, dtype=torch.int32))
    cost = used[:, 1] % chunk_size if chunk_size else used[:, 1]
    key = -cost.long() * T + used[:, 1]  # descending cost, then ascending row
    assert (key.diff() > 0).all()


def test_a_thousand_sequences(device, executor):
    B = 100 if executor == "interpreter" else 1024
    draw = random.Random(0)
    q_lens = [draw.choice((1, 1, 1, 40, 129)) for _ in range(B)]
    _check(q_lens, [q + draw.randrange(20_000) for q in q_lens], CHUNK, 64, device)


@pytest.mark.parametrize("q_lens", [[], [0, 0]], ids=["no-sequences", "no-tokens"])
def test_nothing_to_do(device, q_lens):
    got = _check(q_lens, [0] * len(q_lens), 64, 16, device)
    assert got.tiles.shape == (0, 4)


def test_ten_repeats_are_equal(device):
    cu, lens, T = _make([70, 3, 0, 41], [90, 300, 5, 41], device)
    first = prefill_schedule(cu, lens, T, chunk_size=64, block_m=16)
    for _ in range(9):
        again = prefill_schedule(cu, lens, T, chunk_size=64, block_m=16)
        assert torch.equal(first.tiles, again.tiles)


@pytest.mark.no_kernels
def test_the_capacity_suffices():
    """Against the most tiles that a loop makes, for batches of the worst lengths."""
    draw = random.Random(1)
    for _ in range(400):
        block_m, chunk_size = draw.choice((4, 16)), draw.choice((0, 1, 3, 4, 16, 24, 48))
        q_lens = [draw.randrange(0, 60) for _ in range(draw.randrange(1, 5))]
        seq_lens = [q + draw.randrange(50) for q in q_lens]
        cu, lens, T = _make(q_lens, seq_lens, "cpu")
        capacity = tile_capacity(T, len(q_lens), chunk_size, block_m)
        _, count = reference.prefill_schedule(
            cu, lens, chunk_size=chunk_size, block_m=block_m, capacity=10_000
        )
        assert count.item() <= capacity <= T


@pytest.mark.no_kernels
def test_a_step_is_one_launch():
    def call():
        empty = torch.empty(65, dtype=torch.int32, device="cuda")
        prefill_schedule(empty, empty[1:], 16_384, chunk_size=CHUNK, block_m=128)

    (launch,) = record(call).launches
    assert launch.name == "_prefill_schedule_kernel" and launch.grid == ((128 + 2 * 64) // 32,)


def test_no_host_sync(device):
    from support.no_sync import no_host_sync

    cu, lens, T = _make([70, 3], [90, 300], device)
    with no_host_sync():
        prefill_schedule(cu, lens, T, chunk_size=64, block_m=16)


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD_INPUT = {
    "cu-dtype": (dict(cu_seqlens_q=torch.tensor([0, 4])), TypeError, "cu_seqlens_q must be"),
    "cu-empty": (dict(cu_seqlens_q=_int32()), ValueError, "cu_seqlens_q must have at least one"),
    "lens-shape": (dict(seq_lens=_int32(1, 2)), ValueError, "seq_lens must have shape"),
    "tokens": (dict(num_tokens=-1), ValueError, "num_tokens must be in 0..1073741823, got -1"),
    "tokens-of-nobody": (
        dict(cu_seqlens_q=_int32(0), seq_lens=_int32()), ValueError, "num_tokens must be 0 where",
    ),
    "chunk": (dict(chunk_size=-1), ValueError, "chunk_size must be >= 0 .*got -1"),
    "block": (dict(block_m=0), ValueError, "block_m must be >= 1, got 0"),
    "device": (dict(seq_lens=_int32(4).to("meta")), ValueError, "one device"),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_launch(name):
    changes, error, match = BAD_INPUT[name]
    arguments = dict(
        cu_seqlens_q=_int32(0, 4), seq_lens=_int32(9), num_tokens=4, chunk_size=0, block_m=16
    )
    with pytest.raises(error, match="^prefill_schedule: .*" + match):
        prefill_schedule(**arguments | changes)
