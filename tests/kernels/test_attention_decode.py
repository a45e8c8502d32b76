"""attention_decode: values, splits and their merge, agreement with prefill, poison, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention import (
    FAR,
    Problem,
    assert_attention_close,
    far_memory,
    make_problem,
)

from llama4_triton.kernels._launch import device_properties
from llama4_triton.kernels.attention_decode import (
    AttentionDecodeConfig,
    attention_decode,
    decode_num_splits,
    decode_workspace_numel,
    default_config,
)
from llama4_triton.kernels.attention_prefill import AttentionPrefillConfig, attention_prefill
from llama4_triton.kernels.paged_kv import PagedKV

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SPLIT = AttentionDecodeConfig(
    BLOCK_N=16, MIN_SPLIT=16, programs_per_sm=8, num_warps=4, num_stages=1
)
SPLIT_BF16 = dataclasses.replace(SPLIT, BLOCK_N=64, MIN_SPLIT=64, num_stages=5)

# id: (seq_lens, Hq, Hkv, D, page_size, chunk_size, dtype, config)
CASES = {
    "G5-D128-page64": ([100, 1, 0, 64], 5, 1, 128, 64, 0, BF16, None),
    "G5-two-splits": ([600], 5, 1, 128, 64, 0, BF16, None),
    "G5-chunk-splits": ([180, 129, 65], 5, 1, 128, 256, 128, BF16, SPLIT_BF16),
    "fp16-page-16": ([90, 33], 4, 2, 64, 16, 0, F16, SPLIT_BF16),
    "fp32-D24-page-5-chunk-37": ([70, 33, 38, 1], 4, 2, 24, 5, 37, F32, SPLIT),
    # Four splits on the CPU of 38 keys, rounded up to whole tiles.
    "fp32-uneven-splits": (
        [150], 1, 1, 16, 16, 0, F32, dataclasses.replace(SPLIT, programs_per_sm=1)
    ),
    "fp32-D128": ([45], 3, 1, 128, 16, 0, F32, None),
    "fp32-D256-page-1": ([20], 2, 1, 256, 1, 0, F32, None),
    "fp32-G16-D2-chunk-1": ([9, 40], 16, 1, 2, 16, 1, F32, None),
}  # fmt: skip


def _problem(seq_lens, Hq, Hkv, D, page_size, chunk_size, dtype, device, **options) -> Problem:
    return make_problem(
        [min(n, 1) for n in seq_lens], seq_lens, Hq=Hq, Hkv=Hkv, D=D, page_size=page_size,
        chunk_size=chunk_size, dtype=dtype, device=device, **options,
    )  # fmt: skip


def _run(problem: Problem, q: torch.Tensor | None = None, **options):
    """Decode every sequence; those without a token get a NaN query."""
    rows = problem.seq_lens.long() > 0
    if q is None:
        shape = (len(rows), *problem.q.shape[1:])
        q = problem.q.new_full(shape, torch.nan)
        q[rows] = problem.q
    return attention_decode(
        q, problem.kv, problem.seq_lens, chunk_size=problem.chunk_size, **options
    )


def _in_use(problem: Problem, got):
    rows = problem.seq_lens.long() > 0
    out, lse = got
    assert not out[~rows].any() and (lse[~rows] == -torch.inf).all()
    return out[rows], lse[rows]


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(device, name):
    *case, config = CASES[name]
    problem = _problem(*case, device)
    got = _in_use(problem, _run(problem, config=config, checked=True))
    assert_attention_close(got, problem.expected(), problem.same_dtype())


@settings(
    derandomize=True,
    deadline=None,
    max_examples=14,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seq_lens=st.lists(st.integers(0, 80), min_size=1, max_size=4),
    chunk_size=st.sampled_from([0, 1, 5, 16, 33, 64, 1000]),
    MIN_SPLIT=st.sampled_from([16, 40]),
    spread=st.sampled_from([1e-2, 1.0, 8.0]),
)
def test_property_matches_float64(device, seq_lens, chunk_size, MIN_SPLIT, spread):
    problem = _problem(seq_lens, 2, 1, 16, 16, chunk_size, F32, device, spread=spread)
    config = dataclasses.replace(SPLIT, MIN_SPLIT=MIN_SPLIT)
    got = _in_use(problem, _run(problem, config=config))
    assert_attention_close(got, problem.expected(), problem.same_dtype())


@pytest.mark.parametrize("chunk_size", [0, 24], ids=["global", "chunk24"])
def test_is_the_last_row_of_prefill(device, chunk_size):
    problem = make_problem(
        [5, 30], [41, 30], Hq=2, Hkv=1, D=16, page_size=16, chunk_size=chunk_size, dtype=F32,
        device=device,
    )  # fmt: skip
    out, lse = attention_prefill(
        problem.q, problem.kv, problem.cu_seqlens, problem.seq_lens, chunk_size=chunk_size,
        config=AttentionPrefillConfig(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    )  # fmt: skip
    last = problem.cu_seqlens[1:].long() - 1
    got = _run(problem, q=problem.last_rows(), config=SPLIT)
    torch.testing.assert_close(got, (out[last], lse[last]), rtol=0, atol=4e-6)


def test_splits_hold_at_least_min_split_keys_and_empty_ones_merge(device):
    """The partial results as they lie in the workspace: keys 0..31, 32..39, then nothing."""
    problem = _problem([40], 2, 1, 16, 16, 0, F32, device)
    table = problem.kv.block_table.repeat(1, 8)  # a capacity of 512
    problem = dataclasses.replace(problem, kv=dataclasses.replace(problem.kv, block_table=table))
    config = dataclasses.replace(SPLIT, MIN_SPLIT=32)
    sm_count = device_properties(device).sm_count
    splits = decode_num_splits(1, 1, problem.kv.capacity, 0, sm_count, config)
    assert splits >= 3
    numel = decode_workspace_numel(1, 2, 16, splits)
    workspace = torch.full((numel,), torch.nan, device=device)
    got = _run(problem, config=config, workspace=workspace)
    assert_attention_close(got, problem.expected(), problem.same_dtype())

    part_out, part_lse = workspace.split([2 * splits * 16, 2 * splits])
    part_out, part_lse = part_out.view(2, splits, 16), part_lse.view(2, splits)
    short = dataclasses.replace(problem, seq_lens=torch.full_like(problem.seq_lens, 32))
    first_out, first_lse = short.expected()
    torch.testing.assert_close(part_out[:, 0].double(), first_out[0], rtol=0, atol=4e-6)
    torch.testing.assert_close(part_lse[:, 0].double(), first_lse[0], rtol=0, atol=1e-5)
    assert part_lse[:, 1].isfinite().all()
    assert (part_lse[:, 2:] == -torch.inf).all() and not part_out[:, 2:].any()


def test_all_splits_empty_stay_empty(device):
    problem = _problem([0, 40], 2, 1, 16, 16, 0, F32, device)
    empty = dataclasses.replace(problem, seq_lens=torch.zeros_like(problem.seq_lens))
    out, lse = _run(empty, config=SPLIT)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.no_kernels
@pytest.mark.parametrize(
    "B, Hkv, capacity, chunk_size, splits",
    [
        (1, 8, 131_072, 0, 33),  # two programs on each of 132 SMs
        (1, 8, 131_072, 8192, 16),  # a chunk has 16 splits of 512 tokens
        (1, 1, 10_485_760, 0, 264),
        (128, 8, 131_072, 0, 1),
        (1, 8, 512, 0, 1),
        (1, 8, 513, 0, 2),
        (0, 8, 0, 0, 1),
    ],
)
def test_number_of_splits(B, Hkv, capacity, chunk_size, splits):
    config = default_config(128, BF16)
    assert decode_num_splits(B, Hkv, capacity, chunk_size, 132, config) == splits
    numel = decode_workspace_numel(B, 5 * Hkv, 128, splits)
    assert numel == (B * 5 * Hkv * splits * 129 if splits > 1 else 0)


def test_strided_q_and_scale(device):
    problem = _problem([20, 9], 2, 1, 16, 16, 0, F32, device)
    fused = torch.randn(2, 4 * 16, device=device)
    fused[:, :32] = problem.q.flatten(1)
    want = _run(problem, q=problem.q * 0.5, config=SPLIT)
    got = _run(problem, q=fused[:, :32].unflatten(1, (2, 16)), sm_scale=0.125, config=SPLIT)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_offsets_are_int64(device):
    """Masked heads compute addresses too; in 32 bits the interpreter reports their overflow."""
    problem = _problem([5], 1, 1, 16, 16, 0, F32, device)
    want = _run(problem, config=SPLIT)
    page = int(problem.kv.block_table[0, 0])
    k, v = (
        x[page : page + 1].as_strided((1, 16, 1, 16), (2**31 - 16, x.stride(1), 2**30, 1))
        for x in (problem.kv.k_cache, problem.kv.v_cache)
    )
    far = dataclasses.replace(
        problem,
        kv=PagedKV(k_cache=k, v_cache=v, block_table=torch.zeros_like(problem.kv.block_table)),
    )
    q = problem.q.as_strided((1, 1, 16), (2**31 - 16, 2**30, 1))
    got = _run(far, q=q, config=SPLIT)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_reads_pages_beyond_two_to_the_31(request, device):
    memory = far_memory(request, device)
    problem = _problem([40], 1, 1, 16, 16, 0, BF16, device)
    k = memory.as_strided((3, 16, 1, 16), (FAR, 16, 16, 1))
    v = memory.as_strided((3, 16, 1, 16), (FAR, 16, 16, 1), 256)
    for i, page in enumerate(problem.kv.block_table[0, :3].tolist()):
        k[i], v[i] = problem.kv.k_cache[page], problem.kv.v_cache[page]
    table = torch.arange(3, dtype=torch.int32, device=device)[None]
    far = dataclasses.replace(problem, kv=PagedKV(k_cache=k, v_cache=v, block_table=table))
    assert all(torch.equal(a, b) for a, b in zip(_run(far), _run(problem), strict=True))


def test_ten_repeats_are_bitwise_equal(device):
    problem = _problem([40], 1, 1, 16, 16, 0, F32, device)
    first = _run(problem, config=SPLIT)
    for _ in range(9):
        again = _run(problem, config=SPLIT)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_host_sync(device):
    from support.no_sync import no_host_sync

    problem = _problem([40, 9], 2, 1, 16, 16, 0, F32, device)
    with no_host_sync():
        attention_decode(problem.q, problem.kv, problem.seq_lens, config=SPLIT)


@pytest.mark.interpreter_only
def test_opcheck():
    op = torch.ops.llama4_triton.attention_decode.default
    config = list(dataclasses.astuple(SPLIT))
    for dtype, chunk_size, seq_lens, D, splits in [
        (F32, 0, [9], 16, 1), (F32, 5, [2, 0, 4], 24, 2), (F32, 0, [0], 16, 3),
        (BF16, 0, [20], 16, 2), (BF16, 8, [9, 2], 16, 1), (F16, 3, [3], 2, 2),
    ]:  # fmt: skip
        p = _problem(seq_lens, 1, 1, D, 4, chunk_size, dtype, "cpu")
        q = torch.zeros(len(seq_lens), 1, D, dtype=dtype)
        workspace = torch.zeros(decode_workspace_numel(len(seq_lens), 1, D, splits))
        tensors = (q, p.kv.k_cache, p.kv.v_cache, p.kv.block_table, p.seq_lens, workspace)
        torch.library.opcheck(op, (*tensors, chunk_size, 0.3, splits, config))


def _arguments(**changes):
    """Valid arguments of attention_decode: B=2, Hq=4, Hkv=2, D=8, two splits; then `changes`."""
    kv = {
        "k_cache": torch.zeros(3, 4, 2, 8),
        "v_cache": torch.zeros(3, 4, 2, 8),
        "block_table": torch.zeros(2, 8, dtype=torch.int32),
    }
    arguments = {
        "q": torch.zeros(2, 4, 8),
        "seq_lens": torch.tensor([1, 5], dtype=torch.int32),
        "config": SPLIT,
    }
    for name, value in changes.items():
        (kv if name in kv else arguments)[name] = value
    return arguments | {"kv": arguments.get("kv", PagedKV(**kv))}


BAD_INPUT = {
    "kv-type": (dict(kv=(1, 2)), TypeError, "kv must be a PagedKV, got tuple"),
    "q-rows": (dict(q=torch.zeros(3, 4, 8)), ValueError, r"q must have shape \(2, Hq, D\)"),
    "q-dtype": (dict(q=torch.zeros(2, 4, 8).int()), TypeError, "q must be torch.float32"),
    "heads": (dict(q=torch.zeros(2, 5, 8)), ValueError, "q must have a multiple of Hkv == 2 heads"),
    "no-heads": (dict(q=torch.zeros(2, 0, 8)), ValueError, "q must have a multiple of Hkv"),
    "D-odd": (dict(q=torch.zeros(2, 4, 9)), ValueError, "q must have an even head_dim in 2..256"),
    "cache-dtype": (
        dict(q=torch.zeros(2, 4, 8).bfloat16()), TypeError, "kv.k_cache must have the dtype of q",
    ),
    "page-size": (
        dict(k_cache=torch.zeros(3, 0, 2, 8), v_cache=torch.zeros(3, 0, 2, 8)), ValueError,
        "kv.k_cache must have at least one slot per page",
    ),
    "table-dtype": (
        dict(block_table=torch.zeros(2, 2)), TypeError, "kv.block_table must be torch.int32",
    ),
    "table-rank": (
        dict(block_table=torch.zeros(2, dtype=torch.int32)), ValueError, "block_table must have sh",
    ),
    "lens-type": (dict(seq_lens=[1, 5]), TypeError, "seq_lens must be a torch.Tensor, got list"),
    "lens-dtype": (dict(seq_lens=torch.tensor([1, 5])), TypeError, "seq_lens must be torch.int32"),
    "chunk": (dict(chunk_size=-8192), ValueError, "chunk_size must be >= 0 .*got -8192"),
    "scale": (dict(sm_scale=float("inf")), ValueError, "sm_scale must be finite and > 0, got inf"),
    "split": (
        dict(config=dataclasses.replace(SPLIT, MIN_SPLIT=0)), ValueError, "MIN_SPLIT must be >= 1",
    ),
    "workspace-size": (
        dict(workspace=torch.zeros(8)), ValueError, "workspace must be contiguous with at least",
    ),
    "workspace-dtype": (
        dict(workspace=torch.zeros(9999).half()), TypeError, "workspace must be torch.float32",
    ),
    "checked-length": (
        dict(seq_lens=torch.tensor([1, 33], dtype=torch.int32), checked=True), IndexError,
        r"seq_lens\[1\] must be in 1..32 .*got 33",
    ),
    "checked-negative": (
        dict(seq_lens=torch.tensor([1, -1], dtype=torch.int32), checked=True), IndexError,
        r"seq_lens\[1\] must be in .*got -1",
    ),
    "checked-page": (
        dict(block_table=torch.full((2, 8), -1, dtype=torch.int32), checked=True),
        IndexError, r"kv.block_table\[0, 0\] must be in 0..2, got -1",
    ),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_launch(name):
    changes, error, match = BAD_INPUT[name]
    with pytest.raises(error, match="^attention_decode: .*" + match):
        attention_decode(**_arguments(**changes))


@pytest.mark.no_kernels
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("D", [2, 24, 64, 128, 256])
def test_default_config_fits(D, dtype):
    config = default_config(D, dtype)
    assert config.MIN_SPLIT == 512 and config.BLOCK_N in (16, 32, 64)
    tile = max(16, D) * dtype.itemsize
    assert (16 + 6 * config.BLOCK_N) * tile <= 232_448
