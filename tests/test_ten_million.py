"""Ten million tokens without the memory: items of the shipped kernel on a pool that is not there.

The pool has more than 2^31 elements; of 21.5 GB only the pages that a test writes exist. Page ids
are the highest ones, so an offset that is computed in 32 bits leaves the pool or meets a wrong
page. What the schedule lists is shown whole in kernels/test_attention_decode_schedule.py.
"""

from __future__ import annotations

import mmap
import random
import time
from dataclasses import replace

import pytest
import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels._launch import SM_90, assume_device
from llama4_triton.kernels.attention_decode import attention_decode, decode_workspace_numel
from llama4_triton.kernels.attention_decode_schedule import decode_schedule
from llama4_triton.kernels.paged_kv import PagedKV

BF16 = torch.bfloat16
TOKENS, CHUNK, PAGE, D, Hq = 10_485_760, 8192, 64, 128, 5
PAGES = TOKENS // PAGE
NEEDLE = 7_340_111  # in the middle of a page, of a tile and of an item
SPLIT = 4096  # tokens of an item here, where it is what a test costs


@pytest.fixture
def pool(request, device):
    """One K and V pool of 10,485,760 tokens, 2.7e9 elements; untouched pages take no memory."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("device") == "races":
        pytest.skip("the race shadow of the pool would take 172 GB")
    shape = (PAGES + 3, 2, PAGE, 1, D)
    numel = 2 * (PAGES + 3) * PAGE * D
    assert numel > 2**31
    if device.type == "cuda":
        return torch.empty(shape, dtype=BF16, device=device)
    return torch.frombuffer(mmap.mmap(-1, 2 * numel), dtype=BF16).view(shape)


class Sequence:
    """Ten million tokens whose pages are drawn when they are first asked for."""

    def __init__(self, pool, device, q):
        self.pool, self.q, self.device = pool, q, device
        # Logical page i lies at the pool's end, backwards.
        self.table = torch.arange(PAGES + 2, 2, -1, dtype=torch.int32, device=device)[None]
        self.kv = PagedKV(k_cache=pool[:, 0], v_cache=pool[:, 1], block_table=self.table)
        self.lens = torch.tensor([TOKENS], dtype=torch.int32, device=device)
        self.filled = set()

    def fill(self, begin, end):
        for i in range(begin // PAGE, -(-end // PAGE)):
            if i in self.filled:
                continue
            self.filled.add(i)
            page = torch.randn(2, PAGE, 1, D, generator=torch.Generator().manual_seed(i)).to(BF16)
            if NEEDLE // PAGE == i:
                page[0, NEEDLE % PAGE, 0] = self.q[0, 0].cpu() * 4  # a score far above all others
                page[1, NEEDLE % PAGE, 0] = 7.0
            self.pool[int(self.table[0, i])] = page.to(self.device)

    def schedule(self, chunk_size=0):
        with assume_device(SM_90):
            return decode_schedule(
                self.lens, chunk_size=chunk_size, capacity=TOKENS, num_kv_heads=1, page_size=PAGE,
                split_tokens=SPLIT,
            )  # fmt: skip

    def run(self, items, chunk_size=0):
        """(out, lse) in fp32 of each of `items`, rows of the whole schedule, run on their own."""
        made = self.schedule(chunk_size)
        chosen = made.items.clone()
        chosen[: len(items)] = made.items[items]
        chosen[: len(items), 3] = torch.arange(len(items))
        count = torch.full_like(made.count, len(items))
        workspace = torch.zeros(decode_workspace_numel(Hq, D, made), device=self.device)
        schedule = replace(made, items=chosen, count=count, spans=torch.zeros_like(made.spans))
        attention_decode(
            self.q, self.kv, self.lens, chunk_size=chunk_size, schedule=schedule,
            workspace=workspace,
        )  # fmt: skip
        out, lse = workspace.split([made.num_items * Hq * D, made.num_items * Hq])
        n = len(items)
        return out.view(-1, Hq, D)[:n], lse.view(-1, Hq)[:n], made.items[items].tolist()

    def expected(self, begin, end):
        k, v = reference.cached(self.kv, 0, begin, end, torch.float64)
        scores = torch.einsum("hd,td->ht", self.q[0].double(), k[:, 0]) * D**-0.5
        return scores.softmax(1) @ v[:, 0], scores.logsumexp(1)


@pytest.fixture
def sequence(pool, device):
    return Sequence(pool, device, torch.randn(1, Hq, D).to(BF16).to(device))


def _close(got, want):
    out, lse = got
    # bf16 probabilities: 2^-9 relative each, of values of unit size
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=1e-5)


def _chosen():
    """The items with the first and the last page, the needle, those across 2^31 elements and 32
    seeded ones."""
    items = TOKENS // SPLIT
    element = 2**31 // (2 * PAGE * D) * PAGE  # logical token whose page, from the end, is there
    straddling = (TOKENS - element) // SPLIT
    some = random.Random(5).sample(range(items), 32)
    return sorted({0, items - 1, NEEDLE // SPLIT, straddling, straddling - 1, *some})


@pytest.mark.compiled_only
def test_items_of_ten_million_tokens(executor, sequence):
    """At the shipped tiles, against float64, item by item."""
    if executor != "ptx":
        pytest.skip("shipped tiles need an executor of compiled code (--executor ptx)")
    _check_items(sequence, _chosen())


def test_a_few_items_interpreted(sequence):
    _check_items(sequence, [0, NEEDLE // SPLIT, TOKENS // SPLIT - 1])


def _check_items(sequence, chosen):
    begun = time.process_time()
    for i in chosen:
        sequence.fill(i * SPLIT, (i + 1) * SPLIT)
    out, lse, items = sequence.run(chosen)
    for n, (_, begin, end, _) in enumerate(items):
        assert (begin, end) == (chosen[n] * SPLIT, (chosen[n] + 1) * SPLIT)
        _close((out[n], lse[n]), sequence.expected(begin, end))
    needle = chosen.index(NEEDLE // SPLIT)
    assert (out[needle, 0] > 6.9).all()  # found by the head that looks for it
    assert time.process_time() - begun < 20


def test_the_needle_in_its_chunk(sequence):
    """A local layer whose last token follows the needle, 7 million tokens behind the start."""
    length = NEEDLE + 500
    sequence.lens.fill_(length)
    sequence.fill(NEEDLE // CHUNK * CHUNK, length)
    out, lse = attention_decode(sequence.q, sequence.kv, sequence.lens, chunk_size=CHUNK)
    assert (out[0, 0] > 6.9).all()
    want = sequence.expected(NEEDLE // CHUNK * CHUNK, length)
    torch.testing.assert_close(out[0].double(), want[0], rtol=2**-8, atol=2e-3)
    torch.testing.assert_close(lse[0].double(), want[1], rtol=0, atol=1e-5)


@pytest.mark.compiled_only
def test_offsets_in_32_bits_are_found(executor, sequence):
    """The same items by a kernel whose page offsets are int32: an address outside of the pool."""
    if executor != "ptx":
        pytest.skip("needs an executor of compiled code (--executor ptx)")
    from ptxrun import PtxFault
    from support.faulty_decode import faulty

    chosen = [0, TOKENS // SPLIT - 1]
    for i in chosen:
        sequence.fill(i * SPLIT, (i + 1) * SPLIT)
    with faulty("int32-pages"), pytest.raises((PtxFault, AssertionError)):
        _check_items_alone(sequence, chosen)


def _check_items_alone(sequence, chosen):
    out, lse, items = sequence.run(chosen)
    for n, (_, begin, end, _) in enumerate(items):
        _close((out[n], lse[n]), sequence.expected(begin, end))


@pytest.mark.long
@pytest.mark.compiled_only
@pytest.mark.parametrize("chunk_size", [0, CHUNK], ids=["global", "local"])
def test_a_whole_head_at_a_million(device, chunk_size):
    """Every key of 1,048,576 tokens, by the default schedule, and its merge."""
    tokens = 1_048_576
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(tokens // PAGE, 2, PAGE, 1, D, generator=generator).to(BF16).to(device)
    table = torch.randperm(tokens // PAGE, generator=generator).int()[None].to(device)
    kv = PagedKV(k_cache=cache[:, 0], v_cache=cache[:, 1], block_table=table)
    q = torch.randn(1, Hq, D, generator=generator).to(BF16).to(device)
    lens = torch.tensor([tokens], dtype=torch.int32, device=device)
    with assume_device(SM_90):
        out, lse = attention_decode(q, kv, lens, chunk_size=chunk_size, out_dtype=torch.float32)
    begin = tokens - chunk_size if chunk_size else 0
    k, v = (reference.cached(kv, 0, begin, tokens, torch.float64)[i][:, 0] for i in (0, 1))
    scores = q[0].double() @ k.T * D**-0.5
    _close((out[0], lse[0]), (scores.softmax(1) @ v, scores.logsumexp(1)))
