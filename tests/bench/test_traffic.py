"""The traffic counter: by hand, in its two ways of counting, against what is compulsory."""

from __future__ import annotations

import gc
import resource
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.traffic_cases import CASES
from triton.tools.tensor_descriptor import TensorDescriptor

from llama4_triton.autotune.launches import H100
from llama4_triton.bench import cost, cost_experts
from llama4_triton.bench.hollow import hollow
from llama4_triton.bench.l2 import dram_bytes
from llama4_triton.bench.ops import find
from llama4_triton.bench.traffic import counting, measure
from llama4_triton.bench.traffic_gates import (
    LIMITS,
    Limits,
    count,
    count_case,
    faults,
    unique_faults,
)
from llama4_triton.kernels import _launch
from llama4_triton.kernels.expert_weights import Experts
from llama4_triton.kernels.fp8_matmul import fp8_matmul
from llama4_triton.kernels.grouped_gemm import grouped_gemm_swiglu
from llama4_triton.kernels.grouped_gemm_config import default_config
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.routing import sort_by_expert

pytestmark = pytest.mark.interpreter_only

BF16 = torch.bfloat16
BOTH = pytest.mark.parametrize("execute", [True, False], ids=["executed", "batched"])


def equal_counts(a, b):
    """Everything but how it was counted."""
    without = [[replace(launch, classes=0) for launch in t.launches] for t in (a, b)]
    assert without[0] == without[1]
    assert a.tensors == b.tensors
    for capacity in (2**20, 2**14, 2**11):
        for sms in (1, 3):
            assert dram_bytes(a.trace, sms=sms, capacity=capacity) == dram_bytes(
                b.trace, sms=sms, capacity=capacity
            )


# Every operator


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_classes_of_programs_give_the_full_count(case):
    """Programs of one class interpreted together against all of them, one by one."""
    fn = case.make()
    executed, batched = measure(fn, execute=True), measure(fn)
    equal_counts(executed, batched)
    assert unique_faults(batched, case.compulsory) == []
    assert len(batched.launches) == case.launches
    assert batched.flops == case.padded
    assert batched.atomics == 0


def test_whole_sectors_leave_no_slack():
    """Rows of whole sectors and a multiple of 8 scales: unique bytes equal the formula."""
    for id in ("rms_norm", "fp8_matmul", "moe", "attention_prefill", "attention_decode-chunks"):
        (case,) = (c for c in CASES if c.id == id)
        traffic = measure(case.make())
        assert traffic.unique["operand"] == case.compulsory.read, id


# By hand


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= n:
        return
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < n)


@BOTH
def test_a_copy_by_hand(execute):
    """100 floats in blocks of 16: masked lanes are not requested; a foreign launch is counted."""
    x, y = torch.randn(128), torch.zeros(128)
    traffic = measure(lambda: _copy_kernel[(9,)](x, y, 100, BLOCK=16), execute=execute)
    (launch,) = traffic.launches
    assert launch.kernel == "_copy_kernel" and launch.grid == (9, 1, 1)
    assert (launch.programs, launch.idle, launch.flops, launch.atomics) == (9, 2, 0, 0)
    assert (launch.load_bytes, launch.store_bytes) == (400, 400)
    assert (launch.load_sectors, launch.store_sectors) == (13, 13)  # 6 * 2 + 4 of 16 lanes in 1
    assert dict(traffic.unique) == dict(operand=13 * 32, index=0, output=13 * 32, workspace=0)
    assert traffic.requested == 26 * 32 and traffic.requested_bytes == 800
    assert [(t.names, t.role) for t in traffic.tensors] == [
        (("x",), "operand"),
        (("y",), "output"),
    ]
    assert torch.equal(y[:100], x[:100] if execute else torch.zeros(100))


@triton.jit
def _gather_kernel(x_ptr, rows_ptr, y_ptr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    rows = tl.load(rows_ptr + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))
    x = tl.load(x_ptr + rows[:, None] * BLOCK_D + offs_d[None, :])
    tl.store(y_ptr + tl.program_id(0) * BLOCK_D + offs_d, tl.sum(x, axis=0))


@BOTH
def test_repeated_rows_are_requested_but_not_unique(execute):
    """Rows 0 0 0 1 and 1 1 1 1 of 16 floats: 8 rows of lanes, 2 + 1 rows of sectors, 2 unique."""
    x, y = torch.randn(4, 16), torch.empty(2, 16)
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1], dtype=torch.int32)
    traffic = measure(
        lambda: _gather_kernel[(2,)](x, rows, y, BLOCK_R=4, BLOCK_D=16), execute=execute
    )
    by_name = {t.names[0]: t for t in traffic.tensors}
    assert traffic.launches[0].load_bytes == 8 * 64 + 8 * 4
    assert by_name["x"].requested == 3 * 64 and by_name["x"].unique_read == 2 * 64
    assert by_name["rows"].role == "index" and by_name["rows"].unique == 32
    assert traffic.unique["operand"] == 128 and traffic.unique["index"] == 32


@triton.jit
def _holes_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * 2 + tl.arange(0, 2)
    mask = (rows < 3)[:, None] & (offs % 32 < 4)[None, :]
    x = tl.load(x_ptr + rows[:, None] * BLOCK + offs[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + rows[:, None] * BLOCK + offs[None, :], x, mask=mask)


@BOTH
def test_masks_with_holes(execute):
    """Lanes 0-3, 32-35, .. of 128 floats in 3 rows: half of 4 sectors in each."""
    x, y = torch.randn(4, 128), torch.empty(4, 128)
    traffic = measure(lambda: _holes_kernel[(2,)](x, y, BLOCK=128), execute=execute)
    assert traffic.launches[0].load_bytes == 3 * 16 * 4
    assert dict(traffic.unique) == dict(operand=384, index=0, output=384, workspace=0)


def test_roles_workspace_output_and_in_place():
    x, temporary, out = torch.randn(32), torch.empty(32), torch.empty(32)

    def run(returned):
        _copy_kernel[(2,)](x, temporary, 32, BLOCK=16)
        _copy_kernel[(2,)](temporary, out, 32, BLOCK=16)
        _copy_kernel[(2,)](out, x, 32, BLOCK=16)
        return returned

    roles = [t.role for t in measure(lambda: run(None)).tensors]
    assert roles == ["operand", "workspace", "workspace"]
    traffic = measure(lambda: run({"out": (out,)}))
    assert [t.role for t in traffic.tensors] == ["operand", "workspace", "output"]
    # x is an operand, and what was written to it afterwards is a result as well.
    assert dict(traffic.unique) == dict(operand=128, index=0, output=256, workspace=128)


def test_a_dead_temporary_keeps_its_address_until_the_end():
    """Or a later one might get it, and both would be taken for one tensor."""
    x, alive = torch.randn(64), []

    def run():
        memory = np.empty(64, np.float32)
        alive.append(weakref.ref(memory))
        _copy_kernel[(4,)](x, torch.from_numpy(memory), 64, BLOCK=16)

    with counting() as traffic:
        for _ in range(3):
            run()
            gc.collect()
        assert all(memory() is not None for memory in alive)
    gc.collect()
    assert len(traffic.tensors) == 4
    assert all(memory() is None for memory in alive)


@triton.jit
def _atomic_kernel(x_ptr, counter_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(counter_ptr + offs % 4, 1, mask=offs < 6)
    tl.load(x_ptr + offs)


def test_atomics_are_counted_and_make_a_launch_execute():
    counter = torch.zeros(4, dtype=torch.int32)
    traffic = measure(lambda: _atomic_kernel[(3,)](torch.randn(8), counter, BLOCK=8))
    assert traffic.atomics == 18 and traffic.launches[0].classes == 0
    assert counter.tolist() == [6, 6, 3, 3]
    assert traffic.launches[0].idle == 0


@triton.jit
def _descriptor_kernel(x_desc, y_desc, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    y_desc.store([row, 0], x_desc.load([row, 0]))


@BOTH
def test_tensor_descriptors(execute):
    """20 rows in blocks of 16: what lies outside the tensor is not touched."""
    x, y = torch.randn(20, 16), torch.zeros(20, 16)
    descriptors = [TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, y)]
    traffic = measure(lambda: _descriptor_kernel[(2,)](*descriptors, BLOCK=16), execute=execute)
    assert dict(traffic.unique) == dict(operand=1280, index=0, output=1280, workspace=0)
    assert traffic.requested_bytes == 2560
    assert traffic.launches[0].load_sectors == 40


# Programs of different control flow


@triton.jit
def _ragged_kernel(x_ptr, lens_ptr, y_ptr, BLOCK: tl.constexpr, AFTER: tl.constexpr):
    """Sum lens[p] blocks; AFTER: store where the loop's pointer ended."""
    p = tl.program_id(0)
    n = tl.load(lens_ptr + p)
    offs = tl.arange(0, BLOCK)
    ptrs = x_ptr + p * 64 + offs
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    end = 0
    for _ in tl.range(0, n):
        acc += tl.load(ptrs)
        ptrs += BLOCK
        end += BLOCK
        if n > 3:
            acc += tl.load(x_ptr + offs)
    if AFTER:
        tl.store(y_ptr + p * 64 + end + offs, acc)
    else:
        tl.store(y_ptr + p * 64 + offs, acc)


@pytest.mark.parametrize("after", [False, True])
def test_loops_of_different_length(after):
    lens = torch.tensor([0, 3, 1, 4, 3, 0, 2], dtype=torch.int32)
    x, y = torch.randn(7 * 64), torch.zeros(8 * 64)

    def run():
        _ragged_kernel[(7,)](x, lens, y, BLOCK=8, AFTER=after)

    executed, batched = measure(run, execute=True), measure(run)
    equal_counts(executed, batched)
    assert executed.launches[0].load_bytes == 32 * (13 + 4) + 28
    # n > 3 always splits them; the trip count where what the loop left behind is used.
    assert batched.launches[0].classes == (5 if after else 2)


@triton.jit
def _data_dependent_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x, mask=x > 0)


def test_a_mask_made_of_data_makes_a_launch_execute():
    x, y = torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.zeros(4)
    traffic = measure(lambda: _data_dependent_kernel[(1,)](x, y, BLOCK=4))
    assert traffic.launches[0].store_bytes == 8 and traffic.launches[0].classes == 0
    assert y.tolist() == [1.0, 0.0, 2.0, 0.0]


@triton.jit
def _overflow_kernel(x_ptr, n, BLOCK: tl.constexpr):
    tl.load(x_ptr + tl.program_id(0) * n + tl.arange(0, BLOCK))


def test_an_int32_offset_that_overflows_is_refused():
    x = torch.empty(64)
    with pytest.raises(Exception, match="overflows"):
        measure(lambda: _overflow_kernel[(4,)](x, 2**30, BLOCK=4))


def test_an_access_outside_every_argument_is_refused():
    with pytest.raises(Exception, match="must lie in one tensor argument"):
        measure(lambda: _overflow_kernel[(4,)](torch.empty(64), 2**20, BLOCK=4))


def test_counting_is_a_block_and_leaves_the_interpreter_as_it_was():
    x, y = torch.randn(32), torch.zeros(32)
    with counting() as traffic:
        _copy_kernel[(2,)](x, y, 32, BLOCK=16)
    _copy_kernel[(2,)](y, x, 32, BLOCK=16)
    assert len(traffic.launches) == 1 and traffic.unique["output"] == 128
    assert torch.equal(x, y)


def test_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr("llama4_triton.kernels.interpreter.is_installed", lambda: False)
    with pytest.raises(RuntimeError, match="kernels must be interpreted"):
        measure(lambda: None)


# Limits of real shapes

SLOW = ("M-global", "128k", "T16384", "maverick", "uniform-", "B64", "add_rms")  # 3 to 30 s each
SLOW += ("moe-",)  # the routing and what is beside it are executed


@pytest.mark.parametrize(
    "id",
    [
        pytest.param(id, marks=pytest.mark.long if any(part in id for part in SLOW) else ())
        for id in LIMITS
    ],
)
def test_real_shapes_stay_within_their_limits(id):
    row = count_case(find(id))
    assert faults(row, LIMITS[id]) == [], row
    loose = [
        name
        for name, found, limit in (
            ("requested", row.requested_ratio, LIMITS[id].requested),
            ("dram", row.dram_ratio, LIMITS[id].dram),
            ("padded", row.padded_ratio, LIMITS[id].padded),
        )
        if found and limit > 1.05 * found
    ]
    assert not loose, f"{row}: lower {loose}"


# Seeded faults, which must turn the gates red


@triton.jit
def _matmul_kernel(
    x_ptr, w_ptr, y_ptr, K, N,
    PASSES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x @ w in PASSES passes over K; each but the last is thrown away."""
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    for _ in tl.static_range(PASSES):
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in tl.range(0, K, BLOCK_K):
            x = tl.load(x_ptr + offs_m[:, None] * K + k0 + offs_k[None, :])
            w = tl.load(w_ptr + (k0 + offs_k)[:, None] * N + offs_n[None, :])
            acc = tl.dot(x, w, acc)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc)


@pytest.mark.parametrize("passes", [1, 2])
def test_reading_the_weights_twice_is_red(passes):
    M, N, K = 16, 256, 512
    x, w = torch.empty(M, K, dtype=torch.float16), torch.empty(K, N, dtype=torch.float16)
    y = torch.empty(M, N)
    row = count(
        "matmul",
        lambda: _matmul_kernel[(4, 1)](
            x, w, y, K, N, PASSES=passes, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64
        ),
        flops=2 * M * N * K,
        bytes=2 * K * (M + N) + 4 * M * N,
        capacity=64 * 1024,
    )
    limits = Limits(launches=1, requested=1.25, dram=1.01, padded=1.0)
    assert row.unique_ratio == 1.0  # which says nothing
    words = [fault.split()[0] for fault in faults(row, limits)]
    assert words == ([] if passes == 1 else ["requested", "modelled", "padded"])


def routed(counts, H, F, block_m):
    """GEMM 1 on memory that is never touched, and what is compulsory for it."""
    T, E = sum(counts), len(counts)
    ids = torch.repeat_interleave(torch.arange(E), torch.tensor(counts)).to(torch.int32)[:, None]
    routing = sort_by_expert(ids, torch.ones(T, 1), E, block_m=block_m)
    experts = Experts.from_hf(
        torch.empty(E, H, 2 * F, dtype=BF16), torch.empty(E, F, H, dtype=BF16)
    )
    x = torch.empty(T, H, dtype=BF16)
    compulsory = cost_experts.grouped_gemm_swiglu(
        tokens_per_expert=counts, tokens=T, hidden=H, ffn=F, itemsize=2, block_m=block_m
    )
    return compulsory, lambda config=None: grouped_gemm_swiglu(x, experts, routing, config=config)


@pytest.mark.long
def test_an_order_of_programs_without_reuse_is_red():
    """Scout, one expert gets all of 2048 tokens: its 168 MB of weights, 16 row tiles.

    In one group of 16 row tiles the weights come from DRAM once, two row tiles at a time 8 times.
    """
    compulsory, run = routed([2048], 5120, 8192, 128)
    config = default_config("up", 128, BF16)
    limits = Limits(launches=1, requested=50.0, dram=1.3, padded=1.0)
    rows = [
        count("order", lambda c=c: run(c), flops=compulsory.flops, bytes=compulsory.bytes)
        for c in (config, replace(config, GROUP_M=1))
    ]
    assert rows[0].requested == rows[1].requested and rows[0].flops == rows[1].flops
    assert faults(rows[0], limits) == []
    (fault,) = faults(rows[1], limits)
    assert fault.startswith("modelled DRAM bytes")
    assert rows[1].dram.read > 2 * rows[0].dram.read


def test_each_gate_has_a_fault_that_turns_it_red():
    compulsory, run = routed([16, 16], 64, 32, 16)
    row = count("gate", run, flops=compulsory.flops, bytes=compulsory.bytes)
    good = Limits(
        launches=1, requested=row.requested_ratio, dram=row.dram_ratio, padded=row.padded_ratio
    )
    assert faults(row, good) == []
    changes = [
        (replace(good, launches=2), "launches"),
        (replace(good, atomics=1), "atomics"),
        (replace(good, requested=0.9 * good.requested), "requested"),
        (replace(good, dram=0.9 * good.dram), "DRAM"),
        (replace(good, padded=0.9 * good.padded), "padded"),
    ]
    for limits, word in changes:
        (fault,) = faults(row, limits)
        assert word in fault
    (fault,) = faults(replace(row, unique={**row.unique, "operand": 0}), good)
    assert "unique" in fault


def test_unique_bytes_beyond_or_below_the_formula_are_red():
    compulsory, run = routed([16, 0], 64, 32, 16)
    traffic = measure(run)
    assert unique_faults(traffic, compulsory) == []
    (fault,) = unique_faults(traffic, replace(compulsory, read=compulsory.read + 4096))
    assert fault.startswith("operand")
    (fault,) = unique_faults(traffic, replace(compulsory, written=compulsory.written // 2))
    assert fault.startswith("output")
    (fault,) = unique_faults(traffic, replace(compulsory, index=0, index_pieces=0))
    assert fault.startswith("index")


# Padding, at real shapes; nothing is computed


@pytest.mark.parametrize(
    "counts, block_m, padded",
    [
        ((64,) * 16, 64, 1.0),  # uniform
        ((303, 151, 101, 75, 60, 50, 43, 37, 33, 30, 27, 25, 23, 21, 20, 25), 64, 24 * 64 / 1024),
        ((1024,) + (0,) * 15, 64, 1.0),  # one-hot
        ((1,) * 16, 16, 16.0),  # one per expert
    ],
    ids=["uniform", "skewed", "one-hot", "one-per-expert"],
)
def test_padded_flops_by_routing(counts, block_m, padded):
    """Scout's experts, an eighth as wide as at TP 8: tiles of block_m rows, and what is needed."""
    compulsory, run = routed(list(counts), 640, 128, block_m)
    traffic = measure(run)
    assert sum(-(-c // block_m) for c in counts) * block_m / sum(counts) == padded
    assert traffic.flops == padded * compulsory.flops
    assert unique_faults(traffic, compulsory) == []


# Real shapes


def test_fp8_qkv_of_4096_tokens():
    """The compulsory bytes to the byte; the order of programs keeps DRAM reads below 3 times."""
    M, N, K = 4096, 7168, 5120
    e4m3 = torch.float8_e4m3fn
    x, w = torch.empty(M, K, dtype=e4m3), torch.empty(N, K, dtype=e4m3)
    x_scale, w_scale = torch.empty(M), torch.empty(N)
    traffic = measure(lambda: fp8_matmul(x, x_scale, w, w_scale))
    compulsory = cost.fp8_matmul(M=M, N=N, K=K)
    assert traffic.unique["operand"] == compulsory.read
    assert traffic.unique["output"] == compulsory.written
    assert traffic.flops == compulsory.flops
    dram = dram_bytes(traffic.trace)
    assert dram.written == compulsory.written
    assert compulsory.read <= dram.read < 3 * compulsory.read


def test_real_shapes_take_no_memory():
    """Maverick's experts on one of 8 GPUs, 4 GB of weights that nobody touches."""
    T, E, H, F = 256, 128, 5120, 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with hollow(), _launch.assume_device(H100):
        experts = Experts.from_hf(
            torch.randn(E, H, 2 * F, dtype=BF16).mul_(0.1), torch.randn(E, F, H, dtype=BF16)
        )
        logits = torch.zeros(T, E, dtype=BF16)
        logits[torch.arange(T), torch.arange(T) % 4] = 1.0
    traffic = measure(lambda: moe(torch.empty(T, H, dtype=BF16), experts, logits=logits, top_k=1))
    compulsory = cost_experts.moe(
        tokens_per_expert=[T // 4] * 4 + [0] * 124, tokens=T, hidden=H, ffn=F, itemsize=2
    )
    assert traffic.unique["operand"] == compulsory.read
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: 1 GiB


def test_hollow_leaves_integers_and_small_tensors_real():
    with hollow(large=4096):
        ids = torch.arange(10_000)
        small = torch.full((8,), 2.0)
        large = torch.full((10_000,), 2.0)
        assert large.mul_(3) is large
        rows = large.view(100, 100)[3:5]
    assert ids.sum() == 10_000 * 9_999 // 2 and small.sum() == 16.0
    assert large.shape == (10_000,) and rows.shape == (2, 100)
    assert rows.untyped_storage().data_ptr() == large.untyped_storage().data_ptr()
