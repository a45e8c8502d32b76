"""KVCache: slots and tables, what each pool keeps, sizes, errors; random walks against a model."""

from __future__ import annotations

import random

import pytest
import torch

from llama4_triton.model.cache import CacheFull, KVCache, kv_bytes, pages_needed
from llama4_triton.model.config import SCOUT, tiny_scout

pytestmark = pytest.mark.no_kernels

CONFIG = tiny_scout(attention_chunk_size=8)


def _cache(lengths, **options):
    return KVCache.for_lengths(CONFIG, lengths, page_size=4, dtype=torch.float32, **options)


def test_step_tensors_of_a_ragged_batch():
    cache = _cache([9, 4])
    cache.step([[1, 2, 3, 4, 5, 6], [7]])
    step = cache.step([[8, 9, 10], [11, 12]])
    assert step.input_ids.tolist() == [8, 9, 10, 11, 12]
    assert step.positions.tolist() == [6, 7, 8, 1, 2]
    assert step.temperature_positions is step.positions
    assert step.cu_seqlens_q.tolist() == [0, 3, 5]
    assert step.seq_lens.tolist() == [9, 3]
    assert step.max_q_len == 3 and not step.is_decode
    assert step.logits_rows.tolist() == [2, 4]
    for tensor in (step.positions, step.cu_seqlens_q, step.seq_lens, step.local_block_table):
        assert tensor.dtype == torch.int32
    for tensor in (step.input_ids, step.global_slot_mapping, step.local_slot_mapping):
        assert tensor.dtype == torch.int64
    for table, slots in (
        (step.global_block_table, step.global_slot_mapping),
        (step.local_block_table, step.local_slot_mapping),
    ):
        rows = torch.tensor([0, 0, 0, 1, 1])
        assert torch.equal(table[rows, step.positions // 4] * 4 + step.positions % 4, slots)


def test_decode_step_and_all_logits():
    cache = _cache([3, 3])
    assert cache.step([[1, 2], [3, 4]], logits="all").logits_rows is None
    step = cache.step([[5], [6]])
    assert step.is_decode and step.max_q_len == 1
    assert step.logits_rows.tolist() == [0, 1]


def test_rows_select_and_order_the_sequences():
    cache = _cache([4, 4, 4])
    cache.step([[1], [2, 3], [4, 5, 6]])
    step = cache.step([[7], [8]], rows=[2, 0])
    assert step.positions.tolist() == [3, 1]
    assert step.seq_lens.tolist() == [4, 2]
    assert cache.lengths == [2, 2, 4]


def test_slot_offsets_shift_the_temperature_only():
    cache = _cache([3, 2])
    cache.begin(2, slot_offsets=[0, 5])
    step = cache.step([[1, 2, 3], [4, 5]])
    assert step.positions.tolist() == [0, 1, 2, 0, 1]
    assert step.temperature_positions.tolist() == [0, 1, 2, 5, 6]


@pytest.mark.parametrize(
    "chunk, page_size, kept",
    [
        # pages held after a step that ends at each length 1, 2, ...
        (8, 4, [1, 1, 1, 1, 2, 2, 2, 0, 1, 1, 1, 1, 2, 2, 2, 0, 1]),
        # chunk starts 5, 10, 15 lie inside pages 1, 2, 3, which therefore stay
        (5, 4, [1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 2, 2, 1, 1, 2]),
        (8, 16, [1] * 15 + [0, 1]),
    ],
    ids=["aligned", "chunk5-page4", "page-longer-than-chunk"],
)
def test_local_pool_keeps_what_the_next_query_sees(chunk, page_size, kept):
    config = tiny_scout(attention_chunk_size=chunk)
    cache = KVCache.for_lengths(config, [17], step_tokens=1, page_size=page_size)
    got = []
    for _ in range(17):
        cache.step([[1]])
        got.append(cache.used_pages["local"])
    assert got == kept
    assert cache.used_pages["global"] == -(-17 // page_size)


def test_a_step_across_chunks_holds_both_then_drops_the_old():
    cache = _cache([24])
    cache.step([[1] * 6])
    step = cache.step([[1] * 15])  # positions 6..20: chunks 0, 1 and 2
    live = step.local_block_table[0]
    assert (live[:6] >= 0).all() and (live[6:] == -1).all()
    assert len(set(live[:6].tolist())) == 6
    assert cache.used_pages["local"] == 2  # pages of tokens 16..20


def test_freed_pages_are_reused_and_dead_entries_are_not_valid_pages():
    config = tiny_scout(attention_chunk_size=8)
    cache = KVCache(config, num_global_pages=10, num_local_pages=2, page_size=4)
    cache.begin(1)
    for length in range(1, 25):
        table = cache.step([[1]]).local_block_table[0]
        first, last = (length - 1) // 8 * 2, (length - 1) // 4
        assert (table[:first] == -1).all() and (table[last + 1 :] == -1).all()
        assert ((table[first : last + 1] >= 0) & (table[first : last + 1] < 2)).all()


def test_without_a_chunk_the_local_pool_keeps_everything():
    config = tiny_scout(attention_chunk_size=None)
    cache = KVCache.for_lengths(config, [17], page_size=4)
    cache.step([[1] * 16])
    cache.step([[1]])
    assert cache.used_pages == {"global": 5, "local": 5}


@pytest.mark.parametrize("pool", ["global", "local"])
def test_cache_full_names_the_pool_and_changes_nothing(pool):
    pages = {"num_global_pages": 9, "num_local_pages": 9, f"num_{pool}_pages": 3}
    cache = KVCache(CONFIG, page_size=4, **pages)
    cache.begin(2)
    cache.step([[1] * 5, [1]])  # 2 + 1 pages
    before = cache.used_pages
    with pytest.raises(
        CacheFull, match=f"the {pool} pool must have 2 free pages of 4 .* got 0 of 3"
    ):
        cache.step([[1] * 4, [1] * 4])
    assert cache.used_pages == before and cache.lengths == [5, 1]
    cache.release(0)
    assert cache.lengths == [0, 1]
    cache.step([[1] * 4], rows=[1])
    assert cache.lengths == [0, 5]


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda c: c.step([[1]]), r"new_tokens must have one entry per sequence \(2\)"),
        (lambda c: c.step([], rows=[]), "at least one"),
        (lambda c: c.step([[1], []]), "must have a token per sequence"),
        (lambda c: c.step([[1], [1]], rows=[0, 0]), "rows must be different"),
        (lambda c: c.step([[1]], rows=[2]), r"rows must be different and in \[0, 2\)"),
        (lambda c: c.step([[1]], rows=[-1]), "rows must be different"),
        (lambda c: c.step([[1], [512]]), r"token ids must be in \[0, 512\), got 512"),
        (lambda c: c.step([[-1], [1]]), "token ids must be in .* got -1"),
        (lambda c: c.step([[1], [1]], logits="first"), 'logits must be "last" or "all"'),
        (lambda c: c.begin(-1), "batch must be >= 0"),
        (lambda c: c.begin(2, slot_offsets=[1]), "one entry per sequence"),
        (lambda c: KVCache(CONFIG, num_global_pages=-1, num_local_pages=1), "num_global_pages"),
        (
            lambda c: KVCache(CONFIG, num_global_pages=1, num_local_pages=1, page_size=0),
            "page_size must be >= 1",
        ),
    ],
)
def test_bad_arguments(call, match):
    cache = _cache([8, 8])
    with pytest.raises(ValueError, match=match):
        call(cache)
    assert cache.lengths == [0, 0] and cache.used_pages == {"global": 0, "local": 0}


def test_bytes_are_those_of_the_memory_allocated():
    for lengths, step_tokens, page_size in [([70, 3], None, 4), ([70, 3], 5, 16), ([0], None, 4)]:
        arguments = dict(step_tokens=step_tokens, page_size=page_size, dtype=torch.float16)
        cache = KVCache.for_lengths(CONFIG, lengths, **arguments)
        assert cache.nbytes == kv_bytes(CONFIG, lengths, **arguments)


def test_scout_needs_a_chunk_per_local_layer_at_any_length():
    # 4096 B per token and layer; 12 global layers hold 10M tokens, 36 local ones a chunk and a
    # step of 64 tokens.
    tokens = 10_000_000
    num_global, num_local = pages_needed(SCOUT, [tokens], step_tokens=64)
    assert num_local == -(-(8191 + 64) // 64)
    total = kv_bytes(SCOUT, [tokens], step_tokens=64)
    assert total == 4096 * 64 * (12 * num_global + 36 * num_local)
    assert num_global * 64 == tokens


@pytest.mark.parametrize("seed", range(20))
def test_random_walk_against_a_dictionary(seed):
    """Every visible (pool, sequence, token) has a slot of its own, and it stays where it is."""
    rng = random.Random(seed)
    chunk, page_size = rng.choice([3, 5, 8, 16]), rng.choice([1, 2, 4, 7])
    config = tiny_scout(attention_chunk_size=chunk)
    finals = [rng.randrange(1, 40) for _ in range(rng.randrange(1, 4))]
    most = rng.choice([1, 3, 50])
    cache = KVCache.for_lengths(config, finals, step_tokens=most, page_size=page_size)
    slot_of = {"global": {}, "local": {}}
    while True:
        rows = [b for b, final in enumerate(finals) if cache.lengths[b] < final]
        if not rows:
            break
        rows = rng.sample(rows, rng.randrange(1, len(rows) + 1))
        starts = [cache.lengths[b] for b in rows]
        counts = [
            min(rng.randrange(1, most + 1), finals[b] - s)
            for b, s in zip(rows, starts, strict=True)
        ]
        step = cache.step([[1] * count for count in counts], rows=rows)
        new = [(b, s + i) for b, s, n in zip(rows, starts, counts, strict=True) for i in range(n)]
        for name, slots, table in (
            ("global", step.global_slot_mapping, step.global_block_table),
            ("local", step.local_slot_mapping, step.local_block_table),
        ):
            known = slot_of[name]
            if name == "local":  # what no later query of its sequence can see is forgotten
                start_of = {b: s // chunk * chunk for b, s in zip(rows, starts, strict=True)}
                for b, t in list(known):
                    if t < start_of.get(b, cache.lengths[b] // chunk * chunk):
                        del known[b, t]
            for key, slot in zip(new, slots.tolist(), strict=True):
                known[key] = slot
            assert len(set(known.values())) == len(known)
            for (b, t), slot in known.items():
                if b in rows:
                    page = int(table[rows.index(b), t // page_size])
                    assert page * page_size + t % page_size == slot
    assert cache.lengths == finals
