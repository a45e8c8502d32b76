"""attention_decode: values, splits and their merge, agreement with prefill, poison, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention import FAR, far_memory, make_problem
from support.decode import SMALL, SPLIT, SPLITS, make_decode

from llama4_triton.kernels.attention_decode import (
    attention_decode,
    decode_workspace_numel,
    default_config,
)
from llama4_triton.kernels.attention_decode_schedule import decode_schedule
from llama4_triton.kernels.attention_prefill import AttentionPrefillConfig, attention_prefill
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.rope import Temperature

F32, F16, BF16, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
SCOUT = Temperature(attn_scale=0.1, floor_scale=8192.0)
SHORT = Temperature(attn_scale=0.1, floor_scale=16.0)  # with steps where the tests are

# id: (seq_lens, problem, how it runs)
CASES = {
    "G5-D128-page64": ([100, 1, 0, 64], {}, {}),
    "G5-two-splits": ([1100], {}, {}),
    "G5-chunk-splits": ([180, 129, 65], dict(page_size=256, chunk_size=128), dict(splits=SPLIT)),
    "fp16-page-16": (
        [90, 33], dict(Hq=4, Hkv=2, D=64, page_size=16, dtype=F16), dict(splits=SPLIT),
    ),
    "fp32-D24-page-5-chunk-37": (
        [70, 33, 38, 1], dict(Hq=4, Hkv=2, D=24, page_size=5, chunk_size=37, dtype=F32),
        dict(splits=SPLITS, config=SMALL),
    ),
    "fp32-uneven-splits": (
        [150], dict(Hq=1, D=16, page_size=16, dtype=F32), dict(splits=SPLITS, config=SMALL),
    ),
    "fp32-D128": ([45], dict(Hq=3, page_size=16, dtype=F32), {}),
    "fp32-D256-page-1": ([20], dict(Hq=2, D=256, page_size=1, dtype=F32), {}),
    "fp32-G16-D2-chunk-1": (
        [9, 40], dict(Hq=16, D=2, page_size=16, chunk_size=1, dtype=F32),
        dict(splits=SPLITS, config=SMALL),
    ),
    "fixed-splits": ([300, 20], {}, dict(split_tokens=128)),
    "temperature": ([40, 15, 16], dict(temperature=SHORT), {}),
    "temperature-fp32-out": ([40], dict(temperature=SHORT, dtype=F32, D=32), {}),
    "verify-2": ([70, 1], dict(q_lens=[2, 1]), {}),
    "verify-4-splits": ([200, 66, 64], dict(q_lens=[4, 3, 0]), dict(splits=SPLIT)),
    "verify-8-across-chunks": (
        [132, 128, 129], dict(q_lens=[8, 8, 2], chunk_size=128, temperature=SHORT),
        dict(splits=SPLIT),
    ),
    "verify-8-G16": ([70, 9], dict(q_lens=[8, 7], Hq=16, page_size=16), {}),
    "verify-fp32": (
        [39, 4], dict(q_lens=[3, 4], Hq=2, D=16, page_size=16, chunk_size=16, dtype=F32),
        dict(splits=SPLITS, config=SMALL),
    ),
    "verify-from-the-start": ([3, 8], dict(q_lens=[3, 8]), {}),
    "transposed": ([130, 64, 0], dict(layout="transposed_v"), dict(splits=SPLIT)),
    "transposed-page-16": ([130, 5], dict(layout="transposed_v", page_size=16), {}),
    "transposed-fp32": (
        [70, 33], dict(Hq=2, D=24, layout="transposed_v", page_size=5, dtype=F32),
        dict(splits=SPLITS, config=SMALL),
    ),
    "e4m3-nhd-head": ([150, 3], dict(Hq=8, Hkv=2, scales="head"), dict(splits=SPLIT)),
    "e4m3-nhd-token": ([150, 3], dict(Hq=8, Hkv=2, scales="token"), dict(splits=SPLIT)),
    "e4m3-nhd-verify": ([150, 9], dict(q_lens=[8, 5], Hq=8, scales="token", page_size=16), {}),
    "e4m3-nhd-fp32": (
        [40], dict(Hq=2, D=32, scales="token", dtype=F32, page_size=16), {},
    ),
    "e4m3-head": (
        [200, 0, 64], dict(Hq=8, Hkv=2, scales="head", layout="transposed_v", temperature=SHORT),
        dict(splits=SPLIT),
    ),
    "e4m3-token": (
        [200, 1, 63], dict(scales="token", layout="transposed_v"), dict(splits=SPLIT),
    ),
    "e4m3-page-16": ([100], dict(scales="token", layout="transposed_v", page_size=16, D=64), {}),
    "e4m3-D256": ([70], dict(scales="head", layout="transposed_v", D=256, Hq=2), {}),
    "e4m3-verify": (
        [300, 257, 5], dict(q_lens=[4, 3, 5], scales="head", layout="transposed_v",
                            chunk_size=256), dict(splits=SPLIT),
    ),
    "e4m3-verify-G16": (
        [150], dict(q_lens=[8], Hq=16, scales="token", layout="transposed_v"), {},
    ),
    "e4m3-fp32": (
        [40], dict(Hq=2, D=32, scales="head", layout="transposed_v", dtype=F32), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(device, name):
    seq_lens, problem, how = CASES[name]
    problem = make_decode(seq_lens, device=device, **problem)
    problem.check(problem.run(**how))


@settings(
    derandomize=True,
    deadline=None,
    max_examples=14,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seq_lens=st.lists(st.integers(0, 80), min_size=1, max_size=4),
    chunk_size=st.sampled_from([0, 1, 5, 16, 33, 64, 1000]),
    MIN_SPLIT=st.sampled_from([16, 48]),
    spread=st.sampled_from([1e-2, 1.0, 8.0]),
)
def test_property_matches_float64(device, seq_lens, chunk_size, MIN_SPLIT, spread):
    problem = make_decode(
        seq_lens, Hq=2, D=16, page_size=16, chunk_size=chunk_size, dtype=F32, spread=spread,
        device=device,
    )  # fmt: skip
    splits = dataclasses.replace(SPLITS, MIN_SPLIT=MIN_SPLIT)
    problem.check(problem.run(splits=splits, config=SMALL))


@pytest.mark.parametrize("chunk_size", [0, 24], ids=["global", "chunk24"])
def test_is_the_last_rows_of_prefill(device, chunk_size):
    problem = make_problem(
        [5, 30], [41, 30], Hq=2, Hkv=1, D=16, page_size=16, chunk_size=chunk_size, dtype=F32,
        device=device,
    )  # fmt: skip
    out, lse = attention_prefill(
        problem.q, problem.kv, problem.cu_seqlens, problem.seq_lens, chunk_size=chunk_size,
        config=AttentionPrefillConfig(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    )  # fmt: skip
    for q_len in (1, 4):
        rows = torch.cat([problem.cu_seqlens[1:].long() - q_len + i for i in range(q_len)])
        rows = rows.view(q_len, 2).T.flatten()
        cu = torch.arange(3, dtype=torch.int32, device=device) * q_len
        got = attention_decode(
            problem.q[rows], problem.kv, problem.seq_lens, cu_seqlens_q=cu, max_q_len=q_len,
            chunk_size=chunk_size, config=SMALL,
        )  # fmt: skip
        torch.testing.assert_close(got, (out[rows], lse[rows]), rtol=0, atol=4e-6)


def test_partial_results_lie_in_the_workspace(device):
    """Two splits, of keys 0..31 and 32..39, as the schedule says."""
    problem = make_decode([40, 9], Hq=2, D=16, page_size=16, dtype=F32, device=device)
    schedule = problem.schedule(SPLITS, split_tokens=32)
    assert schedule.spans.tolist() == [[0, 2], [2, 1]] and schedule.may_split
    numel = decode_workspace_numel(2, 16, schedule)
    workspace = torch.full((numel,), torch.nan, device=device)
    problem.check(problem.run(schedule=schedule, config=SMALL, workspace=workspace))

    room = schedule.num_items
    part_out, part_lse = workspace.split([room * 2 * 16, room * 2])
    part_out, part_lse = part_out.view(room, 2, 16), part_lse.view(room, 2)
    first_lens = torch.tensor([32, 0], dtype=torch.int32, device=device)
    short = dataclasses.replace(problem, seq_lens=first_lens)
    first_out, first_lse = short.expected()
    torch.testing.assert_close(part_out[0].double(), first_out[0], rtol=0, atol=4e-6)
    torch.testing.assert_close(part_lse[0].double(), first_lse[0], rtol=0, atol=1e-5)
    assert part_lse[1].isfinite().all()
    assert part_lse[2:].isnan().all() and part_out[2:].isnan().all()  # the only split is final


def test_a_row_that_a_split_does_not_see_stays_empty_there(device):
    """Chunks of 16: row 0 sees 0..15, row 1 sees 16 only, so each split is empty for a row."""
    problem = make_decode(
        [17], [2], Hq=2, D=16, page_size=16, chunk_size=16, dtype=F32, device=device
    )
    problem.check(problem.run(splits=SPLITS, split_tokens=16, config=SMALL))


def test_no_key_at_all(device):
    problem = make_decode([0, 0], Hq=2, D=16, page_size=16, dtype=F32, device=device)
    out, lse = problem.run(splits=SPLITS, config=SMALL)
    assert not out.any() and (lse == -torch.inf).all()


def test_every_number_of_splits_gives_the_result(device):
    problem = make_decode([1000], Hq=2, D=32, page_size=16, dtype=F32, device=device)
    counts = set()
    for split_tokens in (16, 64, 80, 512, 1008):
        schedule = problem.schedule(SPLITS, split_tokens)
        counts.add(int(schedule.count))
        problem.check(problem.run(schedule=schedule, config=SMALL))
    assert counts == {63, 16, 13, 2, 1}


def test_fixed_splits_do_not_depend_on_the_batch(device):
    """A sequence's bits are those it has alone, whatever runs beside it."""
    problem = make_decode([150, 33, 90], Hq=2, D=32, page_size=16, dtype=BF16, device=device)
    together = problem.run(splits=SPLIT, split_tokens=64)
    for b in range(3):
        kv = dataclasses.replace(problem.kv, block_table=problem.kv.block_table[b : b + 1])
        alone = dataclasses.replace(
            problem, q=problem.q[b : b + 1], kv=kv, seq_lens=problem.seq_lens[b : b + 1]
        )
        got = alone.run(splits=SPLIT, split_tokens=64)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(got, together, strict=True))


def test_strided_q_and_scale(device):
    problem = make_decode([20, 9], Hq=2, D=16, page_size=16, dtype=F32, device=device)
    fused = torch.randn(2, 4 * 16, device=device)
    fused[:, :32] = problem.q.flatten(1)
    want = dataclasses.replace(problem, q=problem.q * 0.5).run(config=SMALL)
    strided = dataclasses.replace(problem, q=fused[:, :32].unflatten(1, (2, 16)))
    got = strided.run(sm_scale=0.125, config=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_out_dtype(device, dtype):
    problem = make_decode([100], device=device)
    wide, lse = problem.run(out_dtype=F32)
    out, _ = problem.run(out_dtype=dtype)
    assert out.dtype == dtype and torch.equal(out, wide.to(dtype))


@pytest.mark.parametrize("position", [8190, 8191, 16_382, 16_383, 1_048_574, 10_485_759])
def test_temperature_of_a_position(device, position):
    """One visible key, so the lse is the scaled score: the factor to 1e-6 of float64's.

    A chunk of one token makes any position cheap; every page is page 0.
    """
    cache = torch.randn(1, 64, 1, 16, device=device)
    table = torch.zeros((1, position // 64 + 1), dtype=torch.int32, device=device)
    kv = PagedKV(k_cache=cache, v_cache=cache, block_table=table)
    q = torch.full((1, 1, 16), 3.0, device=device)
    lens = torch.tensor([position + 1], dtype=torch.int32, device=device)
    _, lse = attention_decode(q, kv, lens, chunk_size=1, temperature=SCOUT, config=SMALL)
    score = (q.double() * cache[0, position % 64].double()).sum() / 4
    steps = torch.tensor((position + 1) // 8192 + 1, dtype=torch.float64)
    want = score * (1 + 0.1 * steps.log())
    assert abs(lse.double().item() / want.item() - 1) <= 1e-6


def test_offsets_are_int64(device):
    """Masked heads compute addresses too; in 32 bits the interpreter reports their overflow."""
    problem = make_decode([5], Hq=1, D=16, page_size=16, dtype=F32, device=device)
    want = problem.run(config=SMALL)
    page = int(problem.kv.block_table[0, 0])
    k, v = (
        x[page : page + 1].as_strided((1, 16, 1, 16), (2**31 - 16, x.stride(1), 2**30, 1))
        for x in (problem.kv.k_cache, problem.kv.v_cache)
    )
    far = dataclasses.replace(
        problem,
        q=problem.q.as_strided((1, 1, 16), (2**31 - 16, 2**30, 1)),
        kv=PagedKV(k_cache=k, v_cache=v, block_table=torch.zeros_like(problem.kv.block_table)),
    )
    got = far.run(config=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_reads_pages_beyond_two_to_the_31(request, device):
    memory = far_memory(request, device)
    problem = make_decode([40], Hq=1, D=16, page_size=16, dtype=BF16, device=device)
    k = memory.as_strided((3, 16, 1, 16), (FAR, 16, 16, 1))
    v = memory.as_strided((3, 16, 1, 16), (FAR, 16, 16, 1), 256)
    for i, page in enumerate(problem.kv.block_table[0, :3].tolist()):
        k[i], v[i] = problem.kv.k_cache[page], problem.kv.v_cache[page]
    table = torch.arange(3, dtype=torch.int32, device=device)[None]
    far = dataclasses.replace(problem, kv=PagedKV(k_cache=k, v_cache=v, block_table=table))
    assert all(torch.equal(a, b) for a, b in zip(far.run(), problem.run(), strict=True))


def test_ten_repeats_are_bitwise_equal(device):
    problem = make_decode([40], Hq=1, D=16, page_size=16, dtype=F32, device=device)
    first = problem.run(splits=SPLITS, config=SMALL)
    for _ in range(9):
        again = problem.run(splits=SPLITS, config=SMALL)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_host_sync(device):
    from support.no_sync import no_host_sync

    problem = make_decode([40, 9], [2, 1], Hq=2, D=16, page_size=16, dtype=F32, device=device)
    with no_host_sync():
        problem.run(splits=SPLITS, config=SMALL, checked=False)


@pytest.mark.interpreter_only
def test_opcheck():
    op = torch.ops.llama4_triton.attention_decode.default
    for seq_lens, q_lens, chunk, dtype, layout in [
        ([9], None, 0, F32, "nhd"), ([40, 0, 4], None, 5, F32, "nhd"),
        ([20, 5], [2, 1], 8, BF16, "nhd"), ([20], None, 0, F16, "transposed_v"),
    ]:  # fmt: skip
        p = make_decode(
            seq_lens, q_lens, Hq=1, D=16, page_size=4, chunk_size=chunk, dtype=dtype,
            layout=layout, device=torch.device("cpu"),
        )  # fmt: skip
        s, kv, q = p.schedule(SPLITS), p.kv, torch.zeros_like(p.q)
        workspace = torch.zeros(decode_workspace_numel(1, 16, s))
        arguments = (
            q, kv.k_cache, kv.v_cache, kv.k_scale, kv.v_scale, kv.block_table, p.seq_lens,
            p.cu_seqlens_q, s.items, s.spans, s.count, workspace, kv.layout, p.max_q_len, chunk,
            0.3, [0.1, 8.0], F32, [16, 4, 1],
        )  # fmt: skip
        torch.library.opcheck(op, arguments)


def _arguments(**changes):
    """Valid arguments of attention_decode: B=2, Hq=4, Hkv=2, D=8; then `changes`."""
    kv = {
        "k_cache": torch.zeros(3, 4, 2, 8),
        "v_cache": torch.zeros(3, 4, 2, 8),
        "block_table": torch.zeros(2, 8, dtype=torch.int32),
        "layout": "nhd",
        "k_scale": None,
        "v_scale": None,
    }
    arguments = {
        "q": torch.zeros(2, 4, 8),
        "seq_lens": torch.tensor([1, 5], dtype=torch.int32),
        "config": SMALL,
    }
    for name, value in changes.items():
        (kv if name in kv else arguments)[name] = value
    return arguments | {"kv": arguments.get("kv", PagedKV(**kv))}


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


VERIFY = dict(q=torch.zeros(3, 4, 8), cu_seqlens_q=_int32(0, 2, 3), max_q_len=2)
TRANSPOSED = dict(v_cache=torch.zeros(3, 2, 8, 4), layout="transposed_v")
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
    "chunk-transposed": (
        dict(chunk_size=64, **TRANSPOSED), ValueError, "chunk_size must be a multiple of 128 .*64",
    ),
    "scale": (dict(sm_scale=float("inf")), ValueError, "sm_scale must be finite and > 0, got inf"),
    "temperature": (
        dict(temperature=Temperature(attn_scale=0.1, floor_scale=0.0)), ValueError,
        "temperature.floor_scale must be finite and > 0, got 0.0",
    ),
    "out-dtype": (dict(out_dtype=torch.int8), TypeError, "out_dtype must be None, .*int8"),
    "cu-rows": (
        dict(VERIFY, cu_seqlens_q=_int32(0, 2)), ValueError, r"cu_seqlens_q must have shape \(3\)",
    ),
    "cu-missing": (dict(max_q_len=2), ValueError, "max_q_len must be 1 without cu_seqlens_q"),
    "q-len": (dict(VERIFY, max_q_len=9), ValueError, "max_q_len must be in 1..8, got 9"),
    "rows": (
        dict(VERIFY, q=torch.zeros(3, 64, 8), max_q_len=8), ValueError,
        "max_q_len times the 32 q heads of a KV head must be <= 128, got 256",
    ),
    "workspace-size": (
        dict(workspace=torch.zeros(8), schedule="split"), ValueError,
        "workspace must be contiguous with at least",
    ),
    "workspace-dtype": (
        dict(workspace=torch.zeros(9999).half()), TypeError, "workspace must be torch.float32",
    ),
    "schedule-chunk": (
        dict(schedule="split", chunk_size=8), ValueError,
        r"schedule must be for .* == \(8, 1, 2, False\), got \(0, 1, 2, False\)",
    ),
    "schedule-batch": (
        dict(schedule="split", q=torch.zeros(3, 4, 8), seq_lens=_int32(1, 2, 3),
             block_table=torch.zeros(3, 8, dtype=torch.int32)),
        ValueError, "schedule must be for 3 sequences",
    ),
    "schedule-unit": (
        dict(schedule="split", config=dataclasses.replace(SMALL, BLOCK_N=32)), ValueError,
        "schedule must have splits of whole tiles, a multiple of 32 tokens, got 16",
    ),
    "e4m3-tile": (
        dict(
            q=torch.zeros(2, 4, 8).half(), k_cache=torch.zeros(3, 4, 2, 8).to(E4M3),
            v_cache=torch.zeros(3, 2, 8, 4).to(E4M3), layout="transposed_v",
            k_scale=torch.ones(2), v_scale=torch.ones(2),
        ),
        ValueError, "config.BLOCK_N must be >= 32 where e4m3 is multiplied, got 16",
    ),
    "checked-length": (
        dict(seq_lens=_int32(1, 33), checked=True), IndexError,
        r"seq_lens\[1\] must be in 1..32 .*got 33",
    ),
    "checked-negative": (
        dict(seq_lens=_int32(1, -1), checked=True), IndexError,
        r"seq_lens\[1\] must be in .*got -1",
    ),
    "checked-cu": (
        dict(VERIFY, cu_seqlens_q=_int32(0, 3, 3), checked=True), IndexError,
        r"cu_seqlens_q must ascend from 0 to at most T == 3 in steps of 0..2, got \[0, 3, 3\]",
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
    changes = dict(changes)
    if changes.get("schedule") == "split":
        made = decode_schedule(
            _int32(1, 5), chunk_size=0, capacity=32, num_kv_heads=2, page_size=4, split_tokens=16,
            config=SPLITS,
        )  # fmt: skip
        changes["schedule"] = made
    with pytest.raises(error, match="^attention_decode: .*" + match):
        attention_decode(**_arguments(**changes))


@pytest.mark.no_kernels
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("D", [2, 24, 64, 128, 256])
def test_default_config_fits(D, dtype):
    for cache_dtype in (dtype, E4M3):
        config = default_config(D, dtype, cache_dtype)
        assert config.BLOCK_N in (16, 32, 64)
        tile = max(16, D) * cache_dtype.itemsize
        assert (16 + 6 * config.BLOCK_N) * tile <= 232_448
