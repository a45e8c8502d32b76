"""decode_schedule: every key in one item, splits of at least 512 tokens, even work, errors."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama4_triton.kernels import reference
from llama4_triton.kernels._launch import SM_90, assume_device, device_properties
from llama4_triton.kernels.attention_decode_schedule import (
    DecodeScheduleConfig,
    decode_schedule,
    default_config,
    num_items,
)

CHUNK = 8192
TINY = DecodeScheduleConfig(
    UNIT=16, MIN_SPLIT=32, programs_per_sm=2, BLOCK_B=4, BLOCK_I=8, num_warps=4
)


def _int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def _make(lens, device, *, q_lens=None, chunk_size=0, Hkv=1, page_size=64, capacity=0, **options):
    cu = None
    if q_lens is not None:
        cu = _int32([0, *q_lens], device).cumsum(0).to(torch.int32)
        options["max_q_len"] = max([*q_lens, 1])
    capacity = capacity or -(-max([*lens, 1]) // page_size) * page_size
    return decode_schedule(
        _int32(lens, device), chunk_size=chunk_size, capacity=capacity, num_kv_heads=Hkv,
        page_size=page_size, cu_seqlens_q=cu, **options,
    )  # fmt: skip


def _items(made):
    count = int(made.count)
    assert count <= made.num_items
    return made.items[:count].tolist()


def _check(made, lens, q_lens=None, chunk_size=0, shortest=0):
    """Sequences in order; a sequence's items touch, from its live range's unit to its end."""
    items = _items(made)
    spans = made.spans.tolist()
    assert [first for first, _ in spans] == [sum(n for _, n in spans[:b]) for b in range(len(lens))]
    assert len(items) == sum(n for _, n in spans)
    for b, (n, (first, count)) in enumerate(zip(lens, spans, strict=True)):
        q_len = 1 if q_lens is None else q_lens[b]
        assert count >= 1 if q_len else count == 0
        mine = items[first : first + count]
        lo = max(n - max(q_len, 1), 0) // chunk_size * chunk_size if chunk_size else 0
        bounds = [begin for _, begin, _, _ in mine] + [n]
        assert not mine or bounds[0] == lo // made.unit * made.unit
        for i, (seq, begin, end, slot) in enumerate(mine):
            assert seq == b and end == bounds[i + 1] and begin % made.unit == 0
            assert slot == (first + i if count > 1 else -1)
            assert count == 1 or end - begin >= shortest
    return items


@settings(
    derandomize=True, deadline=None, max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    lens=st.lists(st.sampled_from([0, 1, 15, 16, 17, 31, 33, 64, 127, 128, 500]), max_size=11),
    verify=st.booleans(),
    chunk_size=st.sampled_from([0, 37, 128]),
    Hkv=st.sampled_from([1, 3]),
    split_tokens=st.sampled_from([0, 16, 64]),
)
def test_property_equals_the_reference(device, lens, verify, chunk_size, Hkv, split_tokens):
    q_lens = [min(n, i % 5) for i, n in enumerate(lens)] if verify else None
    made = _make(
        lens, device, q_lens=q_lens, chunk_size=chunk_size, Hkv=Hkv, page_size=16,
        split_tokens=split_tokens, config=TINY,
    )  # fmt: skip
    cu = None if q_lens is None else _int32([0, *q_lens], "cpu").cumsum(0)
    items, spans = reference.decode_schedule(
        _int32(lens, "cpu"), chunk_size=chunk_size, unit=16, shortest=32,
        wanted=TINY.wanted(Hkv, device_properties(device).sm_count), cu_seqlens_q=cu,
        split_tokens=split_tokens,
    )  # fmt: skip
    assert _items(made) == items and made.spans.tolist() == spans
    _check(made, lens, q_lens, chunk_size)


# id: lengths, chunk, KV heads of a rank, items on an H100 and their longest
LARGE = {
    "one-of-10M": ([10_485_760], 0, 1, 264, 39_808),
    "one-of-10M-8-heads": ([10_485_760], 0, 8, 33, 317_824),
    "local": ([10_485_760], CHUNK, 1, 16, 512),
    "local-batch": ([CHUNK] * 64, CHUNK, 1, 256, 2048),
    "1024-of-10M": ([10_485_760] * 1024, 0, 1, 1024, 10_485_760),  # as many as there is room for
    "one-long-many-short": ([1_000_000] + [1000] * 299, 0, 1, 690, 2560),
    "lengths": ([0, 1, 5, 513, 1023, 1024, 1025, 131_072], 0, 1, None, None),
}


@pytest.mark.parametrize("name", LARGE)
def test_work_is_even(device, name):
    lens, chunk_size, Hkv, count, longest = LARGE[name]
    with assume_device(SM_90):
        made = _make(lens, device, chunk_size=chunk_size, Hkv=Hkv)
    items = _check(made, lens, chunk_size=chunk_size, shortest=512)
    assert count is None or len(items) == count
    assert longest is None or max(end - begin for _, begin, end, _ in items) == longest


@pytest.mark.parametrize("chunk_size", [0, CHUNK], ids=["global", "local"])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_every_page_of_ten_million_tokens_is_in_one_item(device, chunk_size, page_size):
    """Whole: 655,360 pages of 16, beside 1023 other sequences, in less than 5 seconds."""
    lens = [10_485_760, *((7919 * b) % 20_000 for b in range(1023))]
    begun = time.process_time()
    with assume_device(SM_90):
        made = _make(lens, device, chunk_size=chunk_size, page_size=page_size)
        items = torch.tensor(_items(made))
    assert time.process_time() - begun < 5.0
    assert made.num_items <= 1024 + 2 * 264
    items = items[items[:, 2] > items[:, 1]]  # a sequence without a key has an empty item
    pages = torch.stack((items[:, 1] // page_size, -(-items[:, 2] // page_size)), 1)
    seen = torch.cat(
        [b * 10**6 + torch.arange(*p) for b, p in zip(items[:, 0], pages.tolist(), strict=True)]
    )
    want = []
    for b, n in enumerate(lens):
        lo = max(n - 1, 0) // chunk_size * chunk_size if chunk_size else 0
        want.append(b * 10**6 + torch.arange(lo // page_size, -(-n // page_size)))
    assert torch.equal(seen, torch.cat(want))


def test_fixed_splits_do_not_depend_on_the_batch(device):
    alone = _make([1000], device, split_tokens=256, config=default_config(64))
    with assume_device(dataclasses.replace(SM_90, sm_count=7)):
        together = _make([20, 1000, 3], device, split_tokens=256)
    strip = [[begin, end] for _, begin, end, _ in _items(alone)]
    assert strip == [[0, 256], [256, 512], [512, 768], [768, 1000]]
    assert [[begin, end] for seq, begin, end, _ in _items(together) if seq == 1] == strip


@pytest.mark.no_kernels
def test_room_follows_from_what_the_host_knows():
    config = default_config(64)
    assert num_items(1, 8, 131_072, 0, 1, 0, 132, config) == 1 + 2 * 33
    assert num_items(1, 8, 131_072, CHUNK, 1, 0, 132, config) == 16
    assert num_items(1, 8, 131_072, CHUNK, 8, 0, 132, config) == 16  # 8199 tokens
    assert num_items(128, 8, 131_072, 0, 1, 0, 132, config) == 128 + 2 * 33
    assert num_items(3, 8, 1023, 0, 1, 0, 132, config) == 3  # too short to split
    assert num_items(1, 1, 10_485_760, 0, 1, 4096, 132, config) == 2560
    assert num_items(0, 1, 1024, 0, 1, 0, 132, config) == 0


@pytest.mark.no_kernels
@pytest.mark.parametrize("page_size, unit", [(1, 128), (16, 128), (128, 128), (256, 256), (5, 128)])
def test_units_are_whole_pages(page_size, unit):
    config = default_config(page_size)
    assert config.UNIT == unit and config.MIN_SPLIT % unit == 0 and config.MIN_SPLIT >= 512


def test_no_host_sync(device):
    from support.no_sync import no_host_sync

    lens = _int32([700, 3], device)
    with no_host_sync():
        decode_schedule(lens, chunk_size=0, capacity=1024, num_kv_heads=1, page_size=64)


BAD_INPUT = {
    "lens-dtype": (dict(seq_lens=torch.zeros(2)), TypeError, "seq_lens must be torch.int32"),
    "cu-rows": (
        dict(cu_seqlens_q=torch.zeros(2, dtype=torch.int32)), ValueError,
        r"cu_seqlens_q must have shape \(3\)",
    ),
    "chunk": (dict(chunk_size=-1), ValueError, "chunk_size must be >= 0"),
    "capacity": (dict(capacity=2**31), ValueError, r"capacity must be in 0..2\*\*31 - 1"),
    "heads": (dict(num_kv_heads=0), ValueError, "num_kv_heads must be >= 1, got 0"),
    "page": (dict(page_size=0), ValueError, "page_size must be >= 1, got 0"),
    "q-len": (dict(max_q_len=9), ValueError, "max_q_len must be in 1..8, got 9"),
    "q-len-alone": (dict(max_q_len=2), ValueError, "max_q_len must be 1 without cu_seqlens_q"),
    "split": (dict(split_tokens=100), ValueError, "split_tokens must be 0 or a positive multiple"),
    "shortest": (
        dict(config=dataclasses.replace(TINY, MIN_SPLIT=24)), ValueError,
        "config.MIN_SPLIT must be a positive multiple of config.UNIT, got",
    ),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_launch(name):
    changes, error, match = BAD_INPUT[name]
    arguments = dict(
        seq_lens=torch.zeros(2, dtype=torch.int32), chunk_size=0, capacity=64, num_kv_heads=1,
        page_size=16,
    )  # fmt: skip
    with pytest.raises(error, match="^decode_schedule: .*" + match):
        decode_schedule(**(arguments | changes))
