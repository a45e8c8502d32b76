"""attention_prefill: values, e4m3, visited tiles, cached prefixes, poison, strides, errors."""

from __future__ import annotations

import dataclasses
import functools

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
from support.attention_prefill import E4M3, assert_quantized_close, emulated, quantized

from llama4_triton.autotune.recorder import record
from llama4_triton.kernels.attention_prefill import (
    AttentionPrefillConfig,
    attention_prefill,
    default_config,
)
from llama4_triton.kernels.attention_schedule import PrefillSchedule, prefill_schedule
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.reference import query_temperature
from llama4_triton.kernels.rope import Temperature

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL = AttentionPrefillConfig(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)

# id: (q_lens, seq_lens, Hq, Hkv, D, page_size, chunk_size, dtype)
CASES = {
    "wgmma-128x128": ([130], [201], 2, 1, 128, 64, 0, BF16),
    "wgmma-128x128-page-256": ([70, 90], [301, 90], 2, 1, 128, 256, 128, BF16),
    "wgmma-64x64-ragged-G5": ([30, 0, 41], [47, 0, 41], 5, 1, 128, 64, 64, BF16),
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


def _run_quantized(given, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_prefill(
        given.q, given.kv, given.cu_seqlens, given.seq_lens, chunk_size=given.chunk_size,
        q_scale=given.q_scale, **options,
    )  # fmt: skip


FORMS = [(kind, layout) for kind in ("head", "token") for layout in ("nhd", "transposed_v")]


@pytest.mark.parametrize("kind, layout", FORMS)
def test_e4m3_matches_float64(device, kind, layout):
    """By default in bf16, and with the probabilities' rounding emulated to the last bits of fp32.

    One row tile with the last key of its sequence, so that the largest scale by token of a key
    tile is that of the live keys, as `emulated` takes it.
    """
    problem = _problem(([60, 30], [201, 70], 5, 1, 128, 64, 64, BF16), device)
    given = quantized(problem, kind=kind, layout=layout)
    got = _run_quantized(given)
    assert got[0].dtype == BF16
    assert_quantized_close(got, given)
    out, _ = _run_quantized(given, out_dtype=F32)
    want = emulated(given, 64)
    # A probability at the edge between two e4m3 numbers may fall to either side: 2^-3 of one of
    # thousands. Beside that, exponentials and sums in fp32.
    assert (out.double() - want).norm() <= 1e-4 * want.norm()


def test_e4m3_cache_under_16_bits(device):
    problem = _problem(([30, 7], [70, 7], 4, 2, 64, 16, 0, F16), device)
    for kind, layout in FORMS:
        given = quantized(problem, kind=kind, layout=layout, q=False)
        got = _run_quantized(given)
        assert got[0].dtype == F16
        assert_quantized_close(got, given)


def test_transposed_values_of_16_bits_are_the_same_bits(device, executor):
    """The interpreter's dot is a BLAS call, which rounds by layout: there, to 1e-6."""
    problem = _problem(([30, 7], [70, 7], 4, 2, 64, 16, 32, F16), device)
    config = AttentionPrefillConfig(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=3)
    kv = problem.kv
    v = kv.v_cache.permute(0, 2, 3, 1).contiguous()
    other = dataclasses.replace(kv, v_cache=v, layout="transposed_v")
    want, got = (
        _run(dataclasses.replace(problem, kv=x), config=config, out_dtype=F32) for x in (kv, other)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if executor == "interpreter" else 0.0)


TUNED = Temperature(attn_scale=0.1, floor_scale=8192.0)


@pytest.mark.parametrize(
    "position", [8190, 8191, 8192, 8193, 16_383, 16_384, 1_048_575, 10_485_759]
)
def test_temperature_at_long_positions(device, position):
    """Its relative error, read off scores of about 16 that only it makes differ; <= 1e-6.

    The key at `position` alone is visible (chunk 1): lse = 16 * temp(position), in fp32.
    """
    page_size = 256
    q = torch.full((1, 1, 16), 1.0, device=device)
    cache = torch.full((1, 2, page_size, 1, 16), torch.nan, device=device)
    cache[:, :, position % page_size] = 1.0
    table = torch.full((1, position // page_size + 1), STALE, dtype=torch.int32, device=device)
    table[0, -1] = 0
    _, lse = attention_prefill(
        q,
        PagedKV(k_cache=cache[:, 0], v_cache=cache[:, 1], block_table=table),
        torch.tensor([0, 1], dtype=torch.int32, device=device),
        torch.tensor([position + 1], dtype=torch.int32, device=device),
        chunk_size=1, sm_scale=1.0, temperature=TUNED, config=SMALL,
    )  # fmt: skip
    want = 16.0 * query_temperature(torch.tensor([position]), 0.1, 8192.0).item()
    assert abs(lse.item() - want) <= 1e-6 * want


def test_temperature_is_a_prescaled_q(device):
    problem = _problem(([20, 9], [70, 33], 4, 2, 64, 16, 0, F32), device)
    scale = Temperature(attn_scale=0.7, floor_scale=8.0)
    position = torch.cat([torch.arange(50, 70), torch.arange(24, 33)])
    factor = query_temperature(position, 0.7, 8.0).to(device)[:, None, None]
    tuned = dataclasses.replace(problem, q=(problem.q * factor).float())
    got = _run(problem, temperature=scale, config=SMALL)
    assert_attention_close(got, tuned.expected(), tuned.same_dtype())


@pytest.mark.parametrize("chunk_size", [0, 16], ids=["global", "chunk16"])
def test_a_schedule_made_beforehand_gives_the_same_bits_in_one_launch(device, chunk_size):
    problem = _problem(([40, 0, 5], [90, 7, 5], 2, 1, 16, 16, chunk_size, F32), device)
    schedule = prefill_schedule(
        problem.cu_seqlens, problem.seq_lens, 45, chunk_size=chunk_size, block_m=16
    )
    want = _run(problem, config=SMALL)
    for options in (dict(config=SMALL), {}):
        got = _run(problem, schedule=schedule, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=0 if options else 1e-5)


@pytest.mark.no_kernels
def test_launches():
    def call(**options):
        kv = PagedKV(
            k_cache=torch.empty(4, 64, 1, 128, dtype=BF16, device="cuda"),
            v_cache=torch.empty(4, 64, 1, 128, dtype=BF16, device="cuda"),
            block_table=torch.empty(2, 2, dtype=torch.int32, device="cuda"),
        )
        lengths = torch.empty(3, dtype=torch.int32, device="cuda")
        q = torch.empty(300, 5, 128, dtype=BF16, device="cuda")
        schedule = prefill_schedule(lengths, lengths[1:], 300, chunk_size=64, block_m=128)
        attention_prefill(q, kv, lengths, lengths[1:], chunk_size=64, schedule=schedule)
        attention_prefill(q, kv, lengths, lengths[1:])

    names = [launch.name for launch in record(call).launches]
    assert names == ["_prefill_schedule_kernel", "_attention_prefill_kernel"] * 2


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
        # 40 new after 60, chunks of 64: rows 60..63 see all of theirs; 64..95 and 96..99 the next.
        (([40], [100], 1, 1, 16, 16, 64, F32), 4 + 2 + 3),
        # One chunk of 128; three in steps that straddle: the triangles of 4 row tiles each.
        (([128], [128], 1, 1, 16, 16, 128, F32), 2 + 4 + 6 + 8),
        (([192], [384], 1, 1, 16, 16, 128, F32), (6 + 8) + (2 + 4 + 6 + 8)),
        # 128 chunks of 16 rows: a row tile and a key tile each.
        (([2048], [2048], 1, 1, 16, 16, 16, F32), 128),
    ],
    ids=["global", "chunks", "prefix", "straddled", "one", "three", "chunks-128"],
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
        tiles = prefill_schedule(
            p.cu_seqlens, p.seq_lens, sum(q_lens), chunk_size=chunk_size, block_m=16
        ).tiles
        plain = (p.q, None, p.kv.k_cache, p.kv.v_cache, None, None, p.kv.block_table, "nhd")
        lengths = (p.cu_seqlens, p.seq_lens, tiles, chunk_size)
        for temperature in (None, [0.1, 4.0]):
            rest = (0.3, temperature, dtype, 16, [16, 16, 4, 1])
            torch.library.opcheck(op, (*plain, *lengths, *rest))
    given = quantized(
        _problem(([3], [9], 2, 1, 32, 16, 0, BF16), "cpu"), kind="token", layout="transposed_v"
    )
    kv = given.kv
    caches = (kv.k_cache, kv.v_cache, kv.k_scale, kv.v_scale, kv.block_table, kv.layout)
    tiles = prefill_schedule(given.cu_seqlens, given.seq_lens, 3, chunk_size=0, block_m=16).tiles
    lengths = (given.cu_seqlens, given.seq_lens, tiles, 0)
    rest = (0.3, None, BF16, 16, [16, 32, 4, 1])
    arguments = (given.q, given.q_scale, *caches, *lengths, *rest)
    # The schema's test multiplies its inputs, which PyTorch cannot do in e4m3.
    torch.library.opcheck(op, arguments, test_utils=("test_faketensor",))


@pytest.mark.no_kernels
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("D", [2, 24, 64, 128, 256])
@pytest.mark.parametrize("T, B", [(0, 0), (1, 1), (40, 1), (8192, 1), (8192, 512)])
def test_default_config_fits(T, B, D, dtype):
    config = default_config(T, B, D, dtype)
    assert config.BLOCK_M in (16, 64, 128) and config.BLOCK_N in (16, 32, 64, 128)
    tile = max(16, D) * dtype.itemsize  # q, and as many tiles of K and of V as stages take
    buffers = (config.num_stages + 1) // 2
    assert (config.BLOCK_M + 2 * buffers * config.BLOCK_N) * tile <= 232_448


@pytest.mark.no_kernels
def test_default_config_of_e4m3():
    """Rows that have a tensor-core product, and fewer keys where registers are short."""
    make = functools.partial(default_config, D=128, dtype=E4M3, kv_dtype=E4M3)
    assert make(4096, 1) == AttentionPrefillConfig(
        BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=3
    )
    assert make(4096, 1, by_token=True).BLOCK_N == 64
    assert make(16, 1).BLOCK_M == make(4096, 1, D=256).BLOCK_M == 64
    assert make(4096, 1, block_m=64).BLOCK_M == 64
    over = functools.partial(default_config, 4096, 1, 128, BF16, kv_dtype=E4M3)
    assert (over().BLOCK_N, over(by_token=True).BLOCK_N) == (64, 32)


def _arguments(**changes):
    """Valid arguments of attention_prefill: T=4, B=2, Hq=4, Hkv=2, D=8; then `changes`."""
    cache = torch.zeros(3, 2, 4, 2, 8)
    kv = {
        "k_cache": cache[:, 0],
        "v_cache": cache[:, 1],
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "k_scale": None,
        "v_scale": None,
    }
    arguments = {
        "q": torch.zeros(4, 4, 8),
        "cu_seqlens_q": torch.tensor([0, 1, 4], dtype=torch.int32),
        "seq_lens": torch.tensor([1, 5], dtype=torch.int32),
    }
    for name, value in changes.items():
        (kv if name in kv else arguments)[name] = value
    return arguments | {"kv": arguments.get("kv", PagedKV(**kv))}


def _e4m3_caches():
    cache, scale = torch.zeros(3, 4, 2, 8).to(E4M3), torch.zeros(2)
    return dict(k_cache=cache, v_cache=cache, k_scale=scale, v_scale=scale)


def _schedule(*, chunk_size=0, block_m=16, capacity=2):
    return PrefillSchedule(
        tiles=torch.zeros(capacity, 4, dtype=torch.int32),
        count=torch.zeros(1, dtype=torch.int32),
        block_m=block_m,
        chunk_size=chunk_size,
    )


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
    "temperature": (
        dict(temperature=Temperature(attn_scale=-0.1, floor_scale=8192.0)), ValueError,
        "temperature must have attn_scale >= 0 and floor_scale > 0",
    ),
    "q-scale-missing": (
        dict(q=torch.zeros(4, 4, 8).to(E4M3), **_e4m3_caches()), ValueError,
        "q_scale must be given with an e4m3 q",
    ),
    "q-scale-of-fp32": (dict(q_scale=torch.zeros(4, 4)), ValueError, "q_scale must be given with"),
    "q-scale-shape": (
        dict(q=torch.zeros(4, 4, 8).to(E4M3), q_scale=torch.zeros(4), **_e4m3_caches()),
        ValueError, r"q_scale must have shape \(4, 4\)",
    ),
    "q-scale-strides": (
        dict(q=torch.zeros(4, 4, 8).to(E4M3), q_scale=torch.zeros(4, 8)[:, :4], **_e4m3_caches()),
        ValueError, "q_scale must be contiguous",
    ),
    "q-e4m3-cache-fp32": (
        dict(q=torch.zeros(4, 4, 8).to(E4M3), q_scale=torch.zeros(4, 4)), TypeError,
        "kv.k_cache must have the dtype of q",
    ),
    "scales-missing": (
        dict(_e4m3_caches(), k_scale=None), ValueError, "kv.k_scale must be given for e4m3 caches",
    ),
    "out-dtype": (dict(out_dtype=E4M3), TypeError, "out_dtype must be torch.float32, torch.float1"),
    "schedule-chunk": (
        dict(schedule=_schedule(chunk_size=4)), ValueError,
        r"schedule must have chunk_size == 0 and block_m == 16, got \(4, 16\)",
    ),
    "schedule-block": (
        dict(schedule=_schedule(block_m=64), config=SMALL), ValueError, "schedule must have chunk_",
    ),
    "schedule-capacity": (
        dict(schedule=_schedule(capacity=3)), ValueError,
        r"schedule.tiles must have shape \(2, 4\), got \(3, 4\)",
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
    monkeypatch.setattr(module, "prefill_schedule", lambda *args, **kwargs: _schedule(capacity=4))
    table = torch.tensor([[0, STALE], [STALE, 1]], dtype=torch.int32)
    seq_lens = torch.tensor([1, 7], dtype=torch.int32)
    attention_prefill(
        **_arguments(block_table=table, seq_lens=seq_lens), chunk_size=4, checked=True
    )
    assert launches
