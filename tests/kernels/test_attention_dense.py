"""Attention over rows of keys instead of pages, as transformers' caches hold them.

A row of the cache is (Hkv, S, D); token 0 of its sequence may lie behind padding, or in front of
the row where a sliding cache has dropped what no later token sees. All that is not live is NaN.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.attention import Problem, assert_attention_close, make_problem

from llama4_triton.autotune.recorder import record
from llama4_triton.bench.dense_cache import dense_cache
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_decode_schedule import decode_schedule
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.paged_kv import PagedKV

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# id: (q_lens, seq_lens, Hq, Hkv, D, chunk_size, dtype)
PREFILL = {
    "bf16-128-rows-sliding": ([130, 70], [201, 329], 2, 1, 128, 64, BF16),
    "fp16-chunk-33": ([20, 17, 1], [45, 66, 34], 4, 2, 64, 33, F16),
    "fp32-global-D24": ([9, 21, 1], [9, 40, 33], 4, 2, 24, 0, F32),
    "left-padded-global": ([40, 40, 40], [40, 33, 1], 5, 1, 64, 0, BF16),
    "left-padded-chunk-8": ([27, 27, 27, 27], [27, 20, 13, 3], 4, 2, 24, 8, F32),
    "left-padded-chunk-64": ([150, 150], [150, 81], 4, 1, 64, 64, F16),
}
DECODE = {
    "bf16-global": ([1, 1], [601, 33], 5, 1, 128, 0, BF16),
    "fp16-sliding": ([1, 1, 1], [45, 66, 34], 4, 2, 64, 33, F16),
    "fp32-D24": ([1, 1], [9, 40], 4, 2, 24, 8, F32),
    "left-padded-rows": ([4, 4, 4], [70, 3, 1], 4, 1, 64, 64, BF16),
}


def _problem(case, device) -> Problem:
    q_lens, seq_lens, Hq, Hkv, D, chunk_size, dtype = case
    return make_problem(
        q_lens, seq_lens, Hq=Hq, Hkv=Hkv, D=D, page_size=16, chunk_size=chunk_size, dtype=dtype,
        device=device,
    )  # fmt: skip


def _dense(problem: Problem) -> PagedKV:
    q_lens = problem.cu_seqlens.diff().tolist()
    return dense_cache(problem.kv, q_lens, problem.seq_lens.tolist(), problem.chunk_size)


@pytest.mark.parametrize("name", PREFILL)
def test_prefill(device, name):
    problem = _problem(PREFILL[name], device)
    given = problem.cu_seqlens, problem.seq_lens
    options = dict(chunk_size=problem.chunk_size)
    got = attention_prefill(problem.q, _dense(problem), *given, checked=True, **options)
    assert_attention_close(got, problem.expected(), problem.same_dtype())
    paged = attention_prefill(problem.q, problem.kv, *given, **options)
    assert torch.equal(got[0], paged[0]) and torch.equal(got[1], paged[1])


@pytest.mark.parametrize("name", DECODE)
def test_decode(device, name):
    problem = _problem(DECODE[name], device)
    rows = max(problem.cu_seqlens.diff().tolist())
    options = dict(chunk_size=problem.chunk_size)
    if rows > 1:
        options |= dict(cu_seqlens_q=problem.cu_seqlens, max_q_len=rows)
    dense = _dense(problem)
    got = attention_decode(problem.q, dense, problem.seq_lens, checked=True, **options)
    assert_attention_close(got, problem.expected(), problem.same_dtype())
    schedule = decode_schedule(
        problem.seq_lens, capacity=dense.capacity, num_kv_heads=dense.num_kv_heads, page_size=1,
        **options,
    )  # fmt: skip
    paged, again = (
        attention_decode(problem.q, kv, problem.seq_lens, schedule=schedule, **options)
        for kv in (problem.kv, dense)
    )
    assert torch.equal(again[0], paged[0]) and torch.equal(again[1], paged[1])


@pytest.mark.compiled_only
def test_a_growing_cache_compiles_nothing():
    """One binary for every length of the rows, as for every number of pages.

    Only that decode can split the keys at all, from 1024 on, is another.
    """

    def launches(S: int):
        def run():
            empty = lambda *shape, dtype=BF16: torch.empty(*shape, dtype=dtype, device="cuda")  # noqa: E731
            kv = PagedKV(
                k_cache=empty(2, 8, S, 128).transpose(1, 2),
                v_cache=empty(2, 8, S, 128).transpose(1, 2),
                block_table=empty(2, 1, dtype=torch.int32),
                layout="dense",
            )
            lengths, bounds = empty(2, dtype=torch.int32), empty(3, dtype=torch.int32)
            attention_decode(empty(2, 40, 128), kv, lengths)
            attention_prefill(empty(64, 40, 128), kv, bounds, lengths, chunk_size=64)

        return [launch.binary() for launch in record(run).launches]

    assert launches(33) == launches(34) == launches(1008)
    assert launches(1024) == launches(1025) == launches(100_000)


BAD = {
    "rows": (dict(block_table=torch.zeros(1, 1, dtype=torch.int32)), ValueError, "block_table"),
    "columns": (dict(block_table=torch.zeros(2, 2, dtype=torch.int32)), ValueError, "block_table"),
    "strides": (dict(v_cache=torch.zeros(2, 2, 9, 16).transpose(1, 2)), ValueError, "the strides"),
    "sequences": (
        dict(
            k_cache=torch.zeros(3, 9, 2, 16), v_cache=torch.zeros(3, 9, 2, 16),
            block_table=torch.zeros(3, 1, dtype=torch.int32),
        ),
        ValueError, "kv.k_cache must have a row for each of 2 sequences",
    ),
    "e4m3": (
        dict(
            k_cache=torch.zeros(2, 9, 2, 16, dtype=torch.float8_e4m3fn),
            v_cache=torch.zeros(2, 9, 2, 16, dtype=torch.float8_e4m3fn),
            k_scale=torch.ones(1), v_scale=torch.ones(1),
        ),
        TypeError, "kv.k_cache must be",
    ),
    "checked-before": (
        dict(block_table=torch.tensor([[0], [-1]], dtype=torch.int32)),
        IndexError, "live slots of row 1 of kv must be in 0..9, got .-1, 4.",
    ),
    "checked-behind": (
        dict(block_table=torch.tensor([[5], [0]], dtype=torch.int32)),
        IndexError, "live slots of row 0 of kv must be in 0..9, got .5, 10.",
    ),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_launch(name):
    change, error, message = BAD[name]
    kv = PagedKV(
        k_cache=torch.zeros(2, 9, 2, 16), v_cache=torch.zeros(2, 9, 2, 16),
        block_table=torch.zeros(2, 1, dtype=torch.int32), layout="dense",
    )  # fmt: skip
    kv, seq_lens = dataclasses.replace(kv, **change), torch.full((2,), 5, dtype=torch.int32)
    with pytest.raises(error, match=message):
        attention_decode(torch.zeros(2, 4, 16), kv, seq_lens, checked=True)
    with pytest.raises(error, match=message):
        bounds = torch.tensor([0, 1, 2], dtype=torch.int32)
        attention_prefill(torch.zeros(2, 4, 16), kv, bounds, seq_lens, checked=True)
