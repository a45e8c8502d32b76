"""attention_prefill: values, visited tiles, cached prefixes, poison, strides, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention import (
    FAR,
    STALE,
    Problem,
    assert_attention_close,
    far_memory,
    make_problem,
)

from llama4_triton.kernels.attention_prefill import (
    AttentionPrefillConfig,
    attention_prefill,
    default_config,
)
from llama4_triton.kernels.paged_kv import PagedKV

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL = AttentionPrefillConfig(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)

# id: (q_lens, seq_lens, Hq, Hkv, D, page_size, chunk_size, dtype)
CASES = {
    "wgmma-128x64": ([130], [201], 2, 1, 128, 64, 0, BF16),
    "wgmma-64x32-ragged-G5": ([30, 0, 41], [47, 0, 41], 5, 1, 128, 64, 64, BF16),
    "16x64-G5-chunk-straddled": ([7, 1, 5], [70, 64, 5], 5, 1, 128, 256, 64, BF16),
    "page-16-chunk-33": ([20, 17], [45, 66], 4, 2, 64, 16, 33, F16),
    "fp32-D24-page-5": ([9, 21, 1], [9, 40, 33], 4, 4, 24, 5, 7, F32),
    "fp32-D128-global": ([3, 18], [3, 40], 3, 1, 128, 16, 0, F32),
    "fp16-D40-page-1-chunk-5": ([12, 2], [12, 9], 2, 1, 40, 1, 5, F16),
    "D256": ([10], [50], 2, 1, 256, 64, 0, BF16),
    "fp32-D2-G16-chunk-1": ([5], [9], 16, 1, 2, 16, 1, F32),
    "chunk-beyond-length": ([6, 6], [6, 13], 2, 2, 24, 5, 8192, F32),
}


def _problem(case, device, **options) -> Problem:
    q_lens, seq_lens, Hq, Hkv, D, page_size, chunk_size, dtype = case
    return make_problem(
        q_lens, seq_lens, Hq=Hq, Hkv=Hkv, D=D, page_size=page_size, chunk_size=chunk_size,
        dtype=dtype, device=device, **options,
    )  # fmt: skip


def _run(problem: Problem, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_prefill(
        problem.q,
        problem.kv,
        problem.cu_seqlens,
        problem.seq_lens,
        chunk_size=problem.chunk_size,
        **options,
    )


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(device, name):
    problem = _problem(CASES[name], device)
    assert_attention_close(_run(problem), problem.expected(), problem.same_dtype())


@settings(
    derandomize=True,
    deadline=None,
    max_examples=14,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 40)), min_size=1, max_size=4),
    chunk_size=st.sampled_from([0, 1, 5, 16, 17, 32]),
    heads=st.sampled_from([(1, 1), (2, 1)]),
    spread=st.sampled_from([1e-2, 1.0, 8.0]),
)
def test_property_matches_float64(device, lengths, chunk_size, heads, spread):
    q_lens = [new for new, _ in lengths]
    seq_lens = [new + cached for new, cached in lengths]
    Hq, Hkv = heads
    case = (q_lens, seq_lens, Hq, Hkv, 16, 16, chunk_size, F32)
    problem = _problem(case, device, spread=spread)
    got = _run(problem, config=SMALL, checked=True)
    assert_attention_close(got, problem.expected(), problem.same_dtype())


@pytest.mark.parametrize("chunk_size", [0, 24], ids=["global", "chunk24"])
def test_pieces_over_a_cached_prefix_are_the_whole_bit_for_bit(device, executor, chunk_size):
    """A row's bits depend on its sequence only: not on the split, the batch, or its tile row.

    The interpreter's dot is a BLAS call, which rounds by row position: there, to 1e-6.
    """
    atol = 1e-6 if executor == "interpreter" else 0.0
    problem = _problem(([43], [43], 2, 1, 16, 16, chunk_size, F32), device)
    whole = _run(problem, config=SMALL)
    for pieces in ([17, 26], [1, 42]):
        done = 0
        for new in pieces:
            rows = slice(done, done + new)
            done += new
            got = _run(
                dataclasses.replace(
                    problem,
                    q=problem.q[rows],
                    cu_seqlens=torch.tensor([0, new], dtype=torch.int32, device=device),
                    seq_lens=torch.tensor([done], dtype=torch.int32, device=device),
                ),
                config=SMALL,
            )
            want = tuple(x[rows] for x in whole)
            torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.interpreter_only
@pytest.mark.parametrize(
    "case, tiles",
    [
        # 100 rows: row tiles of 32 end at keys 32, 64, 96, 100.
        (([100], [100], 1, 1, 16, 16, 0, F32), 2 + 4 + 6 + 7),
        # Chunks of 32 over 96 rows: three triangles of two row tiles' worth, 2 key tiles each.
        (([96], [96], 1, 1, 16, 16, 32, F32), 2 + 2 + 2),
        # 40 new after 50, chunks of 48: rows 50..81 start at 48 and end at 82; rows 82..89 at 90.
        (([40], [90], 2, 1, 16, 16, 48, F32), 2 * (3 + 3)),
    ],
    ids=["global", "chunks", "prefix"],
)
def test_visits_only_the_tiles_of_the_triangles(device, monkeypatch, case, tiles):
    from triton.runtime.interpreter import interpreter_builder

    dots = []
    create_dot = interpreter_builder.create_dot
    monkeypatch.setattr(
        interpreter_builder, "create_dot", lambda *args: dots.append(1) or create_dot(*args)
    )
    config = dataclasses.replace(SMALL, BLOCK_M=32)
    _run(_problem(case, device), config=config)
    assert len(dots) == 2 * tiles  # q @ k and p @ v


def test_rows_without_a_visible_key_are_empty(device):
    """A length shorter than the new rows is invalid; what it gives is defined all the same."""
    problem = _problem(([6], [6], 2, 1, 16, 16, 0, F32), device)
    short = dataclasses.replace(problem, seq_lens=problem.seq_lens - 4)
    out, lse = _run(short, config=SMALL)
    assert not out[:4].any() and (lse[:4] == -torch.inf).all()
    assert out[4:].all() and lse[4:].isfinite().all()


@pytest.mark.parametrize("q_lens", [[], [0, 0]], ids=["no-sequences", "no-tokens"])
def test_nothing_to_do(device, q_lens):
    problem = _problem((q_lens, [0] * len(q_lens), 2, 1, 16, 16, 0, F32), device)
    out, lse = _run(problem)
    assert out.shape == (0, 2, 16) and lse.shape == (0, 2)


def test_sm_scale_and_strided_q(device):
    problem = _problem(([5, 9], [5, 20], 2, 1, 16, 16, 0, F32), device)
    fused = torch.randn(14, 4 * 16, device=device)
    fused[:, :32] = problem.q.flatten(1)
    view = fused[:, :32].unflatten(1, (2, 16))
    by_head = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    want = _run(dataclasses.replace(problem, q=problem.q * 0.5), config=SMALL)
    for q in (view, by_head):
        got = _run(dataclasses.replace(problem, q=q), sm_scale=0.125, config=SMALL)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_offsets_are_int64(device):
    """One token, one page, one sequence, at strides whose multiples leave int32.

    Masked lanes compute addresses too: in 32 bits the interpreter reports their overflow, and no
    memory is needed to see it.
    """
    problem = _problem(([1], [1], 2, 1, 16, 16, 0, F32), device)
    want = _run(problem, config=SMALL)
    k, v = (x.as_strided(x.shape, (2**31 - 16, *x.stride()[1:])) for x in _one_page(problem))
    far = dataclasses.replace(
        problem,
        q=problem.q.as_strided(problem.q.shape, (2**30, 16, 1)),
        kv=PagedKV(k_cache=k, v_cache=v, block_table=torch.zeros_like(problem.kv.block_table)),
    )
    assert all(torch.equal(a, b) for a, b in zip(_run(far, config=SMALL), want, strict=True))


def _one_page(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    page = int(problem.kv.block_table[0, 0])
    return problem.kv.k_cache[page : page + 1], problem.kv.v_cache[page : page + 1]


def test_reads_pages_and_rows_beyond_two_to_the_31(request, device):
    memory = far_memory(request, device)
    problem = _problem(([3], [40], 1, 1, 16, 16, 0, BF16), device)
    k = memory.as_strided((3, 16, 1, 16), (FAR, 16, 16, 1))
    v = memory.as_strided((3, 16, 1, 16), (FAR, 16, 16, 1), 256)
    q = memory.as_strided((3, 1, 16), (FAR, 16, 1), 1024)
    for i, page in enumerate(problem.kv.block_table[0, :3].tolist()):
        k[i], v[i] = problem.kv.k_cache[page], problem.kv.v_cache[page]
    q.copy_(problem.q)
    table = torch.arange(3, dtype=torch.int32, device=device)[None]
    far = dataclasses.replace(problem, q=q, kv=PagedKV(k_cache=k, v_cache=v, block_table=table))
    assert all(torch.equal(a, b) for a, b in zip(_run(far), _run(problem), strict=True))


def test_ten_repeats_are_bitwise_equal(device):
    problem = _problem(([9], [20], 1, 1, 16, 16, 5, F32), device)
    first = _run(problem, config=SMALL)
    for _ in range(9):
        again = _run(problem, config=SMALL)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_host_sync(device):
    from support.no_sync import no_host_sync

    problem = _problem(([3], [20], 2, 1, 16, 16, 5, F32), device)
    with no_host_sync():
        _run(problem, config=SMALL)


@pytest.mark.interpreter_only
def test_opcheck():
    op = torch.ops.llama4_triton.attention_prefill.default
    for dtype, chunk_size, q_lens, D in [
        (F32, 0, [3], 16), (F32, 5, [2, 0, 4], 24), (F32, 0, [0], 16),
        (BF16, 0, [3], 16), (BF16, 8, [1, 2], 16), (F16, 3, [3], 2),
    ]:  # fmt: skip
        case = (q_lens, [n + 6 * bool(n) for n in q_lens], 1, 1, D, 4, chunk_size, dtype)
        p = _problem(case, "cpu")
        tensors = (p.q, p.kv.k_cache, p.kv.v_cache, p.kv.block_table, p.cu_seqlens, p.seq_lens)
        torch.library.opcheck(op, (*tensors, chunk_size, 0.3, [16, 16, 4, 1]))


@pytest.mark.no_kernels
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("D", [2, 24, 64, 128, 256])
@pytest.mark.parametrize("T, B", [(0, 0), (1, 1), (40, 1), (8192, 1), (8192, 512)])
def test_default_config_fits(T, B, D, dtype):
    config = default_config(T, B, D, dtype)
    assert config.BLOCK_M in (16, 64, 128) and config.BLOCK_N in (16, 32, 64)
    tile = max(16, D) * dtype.itemsize  # three tiles of K and of V, and q
    assert (config.BLOCK_M + 6 * config.BLOCK_N) * tile <= 232_448


def _arguments(**changes):
    """Valid arguments of attention_prefill: T=4, B=2, Hq=4, Hkv=2, D=8; then `changes`."""
    cache = torch.zeros(3, 2, 4, 2, 8)
    kv = {
        "k_cache": cache[:, 0],
        "v_cache": cache[:, 1],
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
    }
    arguments = {
        "q": torch.zeros(4, 4, 8),
        "cu_seqlens_q": torch.tensor([0, 1, 4], dtype=torch.int32),
        "seq_lens": torch.tensor([1, 5], dtype=torch.int32),
    }
    for name, value in changes.items():
        (kv if name in kv else arguments)[name] = value
    return arguments | {"kv": arguments.get("kv", PagedKV(**kv))}


BAD_INPUT = {
    "kv-type": (dict(kv=None), TypeError, "kv must be a PagedKV, got NoneType"),
    "q-type": (dict(q=3), TypeError, "q must be a torch.Tensor, got int"),
    "q-dtype": (dict(q=torch.zeros(4, 4, 8).double()), TypeError, "q must be .*float32.*float64"),
    "q-rank": (dict(q=torch.zeros(4, 32)), ValueError, r"q must have shape \(T, Hq, D\)"),
    "q-strides": (
        dict(q=torch.zeros(4, 8, 4).transpose(1, 2)), ValueError, "q must be contiguous in its la",
    ),
    "q-grad": (
        dict(q=torch.zeros(4, 4, 8, requires_grad=True)), NotImplementedError, "q must not require",
    ),
    "heads": (dict(q=torch.zeros(4, 3, 8)), ValueError, "q must have a multiple of Hkv == 2 heads"),
    "D-odd": (dict(q=torch.zeros(4, 4, 7)), ValueError, "q must have an even head_dim in 2..256"),
    "D-large": (dict(q=torch.zeros(4, 4, 258)), ValueError, "q must have an even head_dim"),
    "D-cache": (
        dict(q=torch.zeros(4, 4, 6)), ValueError, r"kv.k_cache must have shape .*6\), got .*8\)",
    ),
    "cache-dtype": (
        dict(q=torch.zeros(4, 4, 8).half()), TypeError, "kv.k_cache must have the dtype of q",
    ),
    "v-shape": (dict(v_cache=torch.zeros(2, 4, 2, 8)), ValueError, "kv.v_cache must have shape"),
    "v-strides": (dict(v_cache=torch.zeros(3, 4, 2, 8)), ValueError, "kv.v_cache must have the st"),
    "table-dtype": (
        dict(block_table=torch.zeros(2, 2).long()), TypeError, "block_table must be torch.int32",
    ),
    "table-rows": (
        dict(block_table=torch.zeros(3, 2, dtype=torch.int32)), ValueError, "block_table must have",
    ),
    "cu-dtype": (
        dict(cu_seqlens_q=torch.tensor([0, 1, 4])), TypeError, "cu_seqlens_q must be torch.int32",
    ),
    "cu-empty": (
        dict(cu_seqlens_q=torch.zeros(0, dtype=torch.int32)), ValueError, "at least one element",
    ),
    "lens-shape": (
        dict(seq_lens=torch.zeros(3, dtype=torch.int32)), ValueError, r"seq_lens must have shape",
    ),
    "chunk": (dict(chunk_size=-1), ValueError, "chunk_size must be >= 0 .*got -1"),
    "scale-nan": (dict(sm_scale=float("nan")), ValueError, "sm_scale must be finite and > 0"),
    "scale-zero": (dict(sm_scale=0.0), ValueError, "sm_scale must be finite and > 0, got 0.0"),
    "device": (
        dict(seq_lens=torch.zeros(2, dtype=torch.int32, device="meta")), ValueError, "one device",
    ),
    "checked-length": (
        dict(seq_lens=torch.tensor([1, 9], dtype=torch.int32), checked=True), IndexError,
        r"seq_lens\[1\] must be in 3..8 .*got 9",
    ),
    "checked-new": (
        dict(seq_lens=torch.tensor([1, 2], dtype=torch.int32), checked=True), IndexError,
        r"seq_lens\[1\] must be in 3..8 .*got 2",
    ),
    "checked-page": (
        dict(block_table=torch.tensor([[2, 0], [0, 3]], dtype=torch.int32), checked=True),
        IndexError, r"kv.block_table\[1, 1\] must be in 0..2, got 3",
    ),
    "checked-cu": (
        dict(cu_seqlens_q=torch.tensor([0, 5, 4], dtype=torch.int32), checked=True), IndexError,
        "cu_seqlens_q must ascend from 0 to T == 4",
    ),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_launch(name):
    changes, error, match = BAD_INPUT[name]
    with pytest.raises(error, match="^attention_prefill: .*" + match):
        attention_prefill(**_arguments(**changes))


@pytest.mark.no_kernels
def test_checked_ignores_stale_entries_outside_the_live_range(monkeypatch):
    from llama4_triton.kernels import attention_prefill as module

    launches = []
    monkeypatch.setattr(module, "launch", lambda *args, **kwargs: launches.append(1))
    table = torch.tensor([[0, STALE], [STALE, 1]], dtype=torch.int32)
    seq_lens = torch.tensor([1, 7], dtype=torch.int32)
    attention_prefill(
        **_arguments(block_table=table, seq_lens=seq_lens), chunk_size=4, checked=True
    )
    assert launches
