"""Prefixes shared between sequences, long prefills in a small local pool, formats of the pools."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels.paged_kv import E4M3
from llama4_triton.kernels.rope_and_cache import rope_and_cache
from llama4_triton.model.cache import (
    CacheFormat,
    CacheFull,
    KVCache,
    kv_bytes,
    pages_needed,
    prefill_blocks,
)
from llama4_triton.model.cache_size import pool_bytes
from llama4_triton.model.config import SCOUT, tiny_scout

no_kernels = pytest.mark.no_kernels
CONFIG = tiny_scout(attention_chunk_size=8)


def _cache(batch, num_global=20, num_local=20, page_size=4, config=CONFIG):
    cache = KVCache(
        config, num_global_pages=num_global, num_local_pages=num_local, page_size=page_size
    )
    cache.begin(batch)
    return cache


# Prefixes.


@no_kernels
@pytest.mark.parametrize(
    "have, length, shared, local",
    [
        (16, None, 16, 0),  # ends with a chunk: no local page
        (19, None, 16, 0),  # the partial page is not shared, and what is left ends with a chunk
        (14, None, 12, 1),  # tokens 8..11 of the chunk that both stand in
        (14, 13, 12, 1),
        (20, 14, 8, 0),  # the local pages of 8..11 are gone: down to the chunk's end
        (20, 12, 8, 0),
        (20, 7, 0, 0),
        (3, None, 0, 0),
        (0, None, 0, 0),
    ],
)
def test_prefixes_are_whole_pages(have, length, shared, local):
    cache = _cache(2)
    if have:
        cache.step([[1] * have], rows=[0])
    before = cache.used_pages
    assert cache.share_prefix(0, 1, length) == shared
    assert cache.lengths == [have, shared] and cache.used_pages == before  # nothing new is taken
    first = (shared - shared % 8) // 4 if local else shared // 4
    assert cache._pools["local"].live[1] == (first, shared // 4)
    assert shared // 4 - first == local
    if shared:
        tables = cache.step([[1], [2]])
        one, other = tables.global_block_table[:, : shared // 4]
        assert torch.equal(one, other)
        assert tables.positions.tolist() == [have, shared]
        assert len(set(tables.global_slot_mapping.tolist())) == 2
    for row in range(2):
        cache.release(row)
    assert cache.used_pages == {"global": 0, "local": 0}


@no_kernels
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_last_holder_frees(order):
    cache = _cache(3)
    cache.step([[1] * 16], rows=[0])
    cache.share_prefix(0, 1)
    cache.share_prefix(1, 2, 8)
    left = {0: 4, 1: 4, 2: 2}
    assert cache.used_pages["global"] == 4
    for row in order:
        cache.release(row)
        del left[row]
        assert cache.used_pages["global"] == max(left.values(), default=0)


@no_kernels
def test_a_prefix_that_no_page_ends():
    """Pages of 3 in chunks of 8: whole pages end with a chunk every 24 tokens."""
    cache = _cache(3, page_size=3)
    cache.step([[1] * 26], rows=[0])
    assert cache.share_prefix(0, 1) == 24
    assert cache.share_prefix(0, 2, 23) == 0
    cache = _cache(2, page_size=3)
    cache.step([[1] * 14], rows=[0])  # the chunk's first token, 8, is in page 2
    assert cache.share_prefix(0, 1) == 12
    assert cache._pools["local"].live[1] == (2, 4)


@no_kernels
def test_without_a_chunk_all_pages_are_shared():
    cache = _cache(2, config=tiny_scout(attention_chunk_size=None))
    cache.step([[1] * 14], rows=[0])
    assert cache.share_prefix(0, 1) == 12
    assert cache._pools["local"].live[1] == (0, 3)


@no_kernels
@pytest.mark.parametrize(
    "arguments, match",
    [
        ((0, 0), r"source and row must be different and in \[0, 3\), got 0 and 0"),
        ((0, 3), "source and row must be"),
        ((-1, 1), "source and row must be"),
        ((0, 2), "row must be empty, got 1 tokens"),
        ((0, 1, 6), "length must be at most that of source, 5, got 6"),
        ((0, 1, -1), "length must be at most"),
    ],
)
def test_bad_prefixes(arguments, match):
    cache = _cache(3)
    cache.step([[1] * 5, [1]], rows=[0, 2])
    before = cache.used_pages
    with pytest.raises(ValueError, match=match):
        cache.share_prefix(*arguments)
    assert cache.used_pages == before and cache.lengths == [5, 0, 1]


def _check_pools(cache):
    """Each page is free, or held as often as tables name it; nothing outside live ranges."""
    for pool in cache._pools.values():
        named = Counter()
        for row, (first, end) in enumerate(pool.live):
            live = pool.table[row, first:end].tolist()
            assert len(set(live)) == len(live) and all(0 <= page for page in live)
            named.update(live)
            assert (pool.table[row] >= 0).sum() == end - first
        assert [named[page] for page in range(pool.num_pages)] == pool.holders
        assert sorted([*pool.free, *named]) == list(range(pool.num_pages))


@no_kernels
@pytest.mark.parametrize("seed", range(30))
def test_random_operations_leak_no_page_and_use_none_twice(seed):
    """Steps, releases and shared prefixes; every visible token is where it was written, and no
    page is written that another sequence reads."""
    rng = random.Random(seed)
    chunk, page = rng.choice([3, 5, 8, 16]), rng.choice([1, 2, 4, 7])
    cache = _cache(4, 40, 30, page, tiny_scout(attention_chunk_size=chunk))
    content = {"global": {}, "local": {}}  # slot -> the token written there: (id, position)
    text = [[] for _ in range(4)]  # ids of each sequence
    ids = iter(range(10**6))
    full = 0
    for _ in range(120):
        action = rng.random()
        row = rng.randrange(4)
        if action < 0.15:
            cache.release(row)
            text[row] = []
        elif action < 0.35:
            source = rng.randrange(4)
            if source == row or text[row]:
                continue
            length = rng.choice([None, rng.randint(0, len(text[source]))])
            shared = cache.share_prefix(source, row, length)
            assert shared % page == 0 and shared <= len(text[source])
            text[row] = text[source][:shared]
        else:
            rows = rng.sample(range(4), rng.randint(1, 4))
            counts = [rng.randint(1, rng.choice([1, 3, 20])) for _ in rows]
            try:
                step = cache.step([[1] * n for n in counts], rows=rows)
            except CacheFull:
                full += 1
                cache.release(row)
                text[row] = []
                _check_pools(cache)
                continue
            new = [(b, next(ids)) for b, n in zip(rows, counts, strict=True) for _ in range(n)]
            starts = {b: len(text[b]) for b in rows}
            for b, id in new:
                text[b].append(id)
            for name, slots, table in (
                ("global", step.global_slot_mapping, step.global_block_table),
                ("local", step.local_slot_mapping, step.local_block_table),
            ):
                slots = slots.tolist()
                assert len(set(slots)) == len(slots)
                for slot, (_, id) in zip(slots, new, strict=True):
                    content[name][slot] = id
                for i, b in enumerate(rows):
                    first = starts[b] // chunk * chunk if name == "local" else 0
                    for t in range(first, len(text[b])):
                        at = int(table[i, t // page]) * page + t % page
                        assert content[name][at] == text[b][t]
        assert cache.lengths == [len(x) for x in text]
        _check_pools(cache)
    for row in range(4):
        cache.release(row)
    _check_pools(cache)
    assert cache.used_pages == {"global": 0, "local": 0}


# Long prefills.


@no_kernels
@pytest.mark.parametrize("start, tokens, blocks", [
    (0, None, [(0, 8), (8, 16), (16, 21)]),
    (0, 3, [(0, 3), (3, 6), (6, 8), (8, 11), (11, 14), (14, 16), (16, 19), (19, 21)]),
    (0, 20, [(0, 16), (16, 21)]),
    (5, None, [(5, 8), (8, 16), (16, 21)]),
    (5, 12, [(5, 16), (16, 21)]),
    (21, None, []),
])  # fmt: skip
def test_blocks_end_where_chunks_do(start, tokens, blocks):
    assert list(prefill_blocks(CONFIG, 21, start=start, step_tokens=tokens)) == blocks


@no_kernels
def test_blocks_without_a_chunk():
    config = tiny_scout(attention_chunk_size=None)
    assert list(prefill_blocks(config, 9000)) == [(0, 8192), (8192, 9000)]


@no_kernels
@pytest.mark.parametrize("page, chunk", [(4, 8), (3, 8), (8, 8), (16, 8)])
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 16])
def test_ten_chunks_are_prefilled_in_a_local_pool_of_one(page, chunk, tokens):
    """Of one chunk, or one block where that is longer; one page less is not enough."""
    config = tiny_scout(attention_chunk_size=chunk)
    length = 10 * chunk
    num_global, num_local = pages_needed(
        config, [length], step_tokens=tokens, aligned=True, page_size=page
    )
    assert num_local * page < max(chunk, tokens) + 2 * page
    for spare in (0, -1):
        cache = _cache(1, num_global, num_local + spare, page, config)
        blocks = list(prefill_blocks(config, length, step_tokens=tokens))
        assert [b for b, _ in blocks[1:]] + [length] == [e for _, e in blocks]
        try:
            for begin, end in blocks:
                cache.step([[1] * (end - begin)])
                assert cache.used_pages["local"] <= num_local
        except CacheFull:
            assert spare
        else:
            assert not spare or chunk % page  # a chunk may happen to lie in fewer pages
    assert cache.used_pages["local"] <= 1 or spare


@no_kernels
def test_a_step_of_many_chunks_needs_all_their_pages():
    """What prefill_blocks is for: in one step 10 chunks take 20 local pages, in blocks 2."""
    cache = _cache(1, 20, 19)
    with pytest.raises(CacheFull, match="the local pool must have 20 free pages"):
        cache.step([[1] * 80])
    cache = _cache(1, 20, 2)
    for begin, end in prefill_blocks(CONFIG, 80):
        cache.step([[1] * (end - begin)])
    assert cache.lengths == [80] and cache.used_pages == {"global": 20, "local": 0}


# Formats.

FORMATS = {
    "bf16": CacheFormat(),
    "e4m3": CacheFormat(global_dtype=E4M3, local_dtype=E4M3),
    "global-e4m3-head": CacheFormat(global_dtype=E4M3, scales="head"),
    "e4m3-transposed": CacheFormat(global_dtype=E4M3, local_dtype=E4M3, layout="transposed_v"),
    "local-e4m3": CacheFormat(local_dtype=E4M3, scales="head", layout="transposed_v"),
}


@no_kernels
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("aligned", [False, True])
def test_bytes_are_those_of_the_memory_allocated(name, aligned):
    arguments = dict(step_tokens=5, aligned=aligned, page_size=16, format=FORMATS[name])
    cache = KVCache.for_lengths(CONFIG, [70, 3], **arguments)
    assert cache.nbytes == kv_bytes(CONFIG, [70, 3], **arguments)


@no_kernels
def test_bytes_of_a_token():
    """Scout: K and V of 8 heads of 128, in 12 global and 36 local layers, scales of tokens."""
    for format, each in ((CacheFormat(), 4096), (FORMATS["e4m3"], 2048 + 64)):
        pools = pool_bytes(SCOUT, [10 * 8192], step_tokens=8192, aligned=True, format=format)
        assert pools == {"global": each * 12 * 10 * 8192, "local": each * 36 * 8192}


@no_kernels
@pytest.mark.parametrize("name", FORMATS)
def test_layers_have_the_format_of_their_pool(name):
    format = FORMATS[name]
    cache = KVCache.for_lengths(CONFIG, [9], page_size=4, format=format)
    step = cache.step([[1] * 9])
    for index in range(CONFIG.num_hidden_layers):
        kv = cache.layer(index, step)
        pool = "local" if CONFIG.is_rope_layer(index) else "global"
        quantized = format.dtype(pool) == E4M3
        assert kv.k_cache.dtype == format.dtype(pool)
        assert (kv.k_scale is not None) == quantized == kv.paged().is_quantized
        assert kv.layout == (format.layout if quantized else "nhd")
        assert kv.paged().scale_kind == (format.scales if quantized else "none")


@no_kernels
def test_static_scales_are_set_by_layer():
    cache = KVCache.for_lengths(CONFIG, [9], page_size=4, format=FORMATS["global-e4m3-head"])
    k_scale, v_scale = torch.tensor([0.5, 0.25]), torch.tensor([2.0, 3.0])
    layer = next(i for i in range(4) if not CONFIG.is_rope_layer(i))
    cache.set_scales(layer, k_scale, v_scale)
    kv = cache.layer(layer, cache.step([[1]]))
    assert torch.equal(kv.k_scale, k_scale) and torch.equal(kv.v_scale, v_scale)
    with pytest.raises(ValueError, match="layer must be of an e4m3 pool with scales of heads"):
        cache.set_scales(0, k_scale, v_scale)
    for name in ("e4m3", "bf16"):
        with pytest.raises(ValueError, match="layer must be of an e4m3 pool"):
            _of = KVCache.for_lengths(CONFIG, [9], page_size=4, format=FORMATS[name])
            _of.set_scales(layer, k_scale, v_scale)


@no_kernels
def test_bad_formats():
    with pytest.raises(ValueError, match='scales must be "token" or "head", got \'row\''):
        CacheFormat(scales="row")
    with pytest.raises(ValueError, match="format.layout must be one of nhd, transposed_v"):
        KVCache.for_lengths(CONFIG, [1], format=CacheFormat(layout="hnd"))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "bf16"])
def test_appended_tokens_are_read_back_across_chunks(device, name):
    """rope_and_cache into the pools, in blocks, with a shared prefix; within e4m3's rounding."""
    format, Hkv, D = FORMATS[name], CONFIG.num_key_value_heads, CONFIG.head_dim
    cache = KVCache(
        CONFIG, num_global_pages=12, num_local_pages=4, page_size=4, format=format, device=device
    )
    cache.begin(2)
    layers = {"local": 0, "global": 3}
    assert CONFIG.is_rope_layer(0) and not CONFIG.is_rope_layer(3)
    texts = {pool: torch.randn(2, 2, 24, Hkv, D).bfloat16().to(device) for pool in layers}
    for text in texts.values():
        text[:, 1, :16] = text[:, 0, :16]  # (k and v, sequence, token, ...)

    def append(row, begin, end):
        step = cache.step([[1] * (end - begin)], rows=[row])
        for pool, index in layers.items():
            k, v = texts[pool][:, row, begin:end]
            kv = cache.layer(index, step)
            rope_and_cache(
                k, k, v, kv.paged(), step.positions, kv.slot_mapping,
                rope=None, qk_norm_eps=None, temperature=None,
            )  # fmt: skip
        return step

    for begin, end in prefill_blocks(CONFIG, 22):
        append(0, begin, end)
    assert cache.share_prefix(0, 1, 19) == 16
    steps = {1: append(1, 16, 24), 0: append(0, 22, 24)}
    for row, step in steps.items():
        for pool, index in layers.items():
            kv = cache.layer(index, step)
            v_cache = kv.v_cache
            if kv.layout == "transposed_v":
                v_cache = reference.convert_layout(v_cache.float(), "nhd")
            oldest = 16 if pool == "local" else 0
            t = torch.arange(oldest, 24, device=device)
            pages = kv.block_table[0][t // 4].long()
            for part, stored, scale in ((0, kv.k_cache, kv.k_scale), (1, v_cache, kv.v_scale)):
                got, unit = stored.float()[pages, t % 4], torch.ones(())
                if scale is not None:
                    unit = scale[pages, t % 4] if scale.ndim == 3 else scale
                    unit = unit[..., None]
                want = texts[pool][part, row, oldest:].float()
                error = (got * unit - want).abs()
                exact = scale is None
                assert (error <= (0 if exact else want.abs() * 2**-4 + unit * 2**-10)).all()
