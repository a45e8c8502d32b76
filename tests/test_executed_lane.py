"""Every machine code that ships, executed: right under every schedule, by the instructions it
promises, without bank conflicts and with whole sectors.

The small cases of bench/ops.py ask for the binaries that full-size Scout and Maverick ask for
(test_the_small_cases_cover_what_ships), on few tokens, experts and keys.
"""

from __future__ import annotations

import pytest
import torch

from llama4_triton.autotune.gates import requirements, specialisation
from llama4_triton.autotune.launches import Launch
from llama4_triton.autotune.recorder import record
from llama4_triton.bench.accuracy import measure_all
from llama4_triton.bench.ops import cases
from llama4_triton.bench.steps import by_binary, shipped_launches
from llama4_triton.kernels import _launch

pytestmark = pytest.mark.compiled_only

CASES = {case.id: case for case in cases("small")}

# When asynchronous copies and tensor-core work take effect, and the order of warps.
SCHEDULES = {
    "late": dict(mode="late"),
    "late-11": dict(mode="late", seed=11),
    "early": dict(mode="early_loads"),
    "early-5": dict(mode="early_loads", seed=5),
    "eager": dict(mode="eager"),
    "eager-9": dict(mode="eager", seed=9),
}
# Their blocks write to tensors that other blocks write or read, so they run with races=True too.
SHARING = (
    "router", "route", "sort_by_expert", "grouped_gemm_swiglu", "grouped_gemm_combine", "moe",
    "attention_decode", "decode_schedule", "merge_attention",
)  # fmt: skip

# Shared-memory wavefronts beyond those that the bytes need, and global sectors beyond the bytes
# used, per kernel: what is allowed above none at all, and why.
CONFLICTS = {
    # Their reductions and scans go through shared memory, once per program, at a few KB.
    "_count_kernel": 0.1,
    "_rope_and_cache_kernel": 0.5,  # V^T of few tokens, and then once per program
    "_route_kernel": 2.2,
    "_scan_kernel": 1.3,
    "_scatter_kernel": 0.1,
    "_sort_kernel": 1.0,
    "_top_k_kernel": 6.0,
}
# The same for GEMM 1 that makes z e4m3: single bytes of a transposed tile, once per program.
BYTES_OF_Z = 0.5
# attention_prefill over e4m3: values that are not stored transposed are, byte by byte, on their way
# to an e4m3 product; keys and values that are converted go through registers; the last key tile's
# transposed values do, to set what is not live to zero.
UNTRANSPOSED, CONVERTED, TRANSPOSED = 3.8, 0.4, 0.1
SECTORS = {
    # int4: 8 bytes per thread of rows of 64.
    "_grouped_gemm_swiglu_kernel": 1.25,
    "_grouped_gemm_scatter_kernel": 1.25,
    # Rows to e4m3: 16 elements per thread are two loads of half sectors each; V^T of few tokens.
    "_rope_and_cache_kernel": 2.0,
    "_sum_slots_kernel": 1.7,  # 8 fp32 per thread are two accesses to half sectors each
    "_attention_decode_kernel": 1.4,  # V^T where a sequence ends: element by element
    # Tables of a few KB, read as single words.
    "_attention_decode_schedule_kernel": 3.2,
    "_count_kernel": 1.5,
    "_prefill_schedule_kernel": 2.0,
    "_scan_kernel": 2.0,
    "_route_kernel": 2.0,
    "_scatter_kernel": 2.0,
    "_sort_kernel": 2.0,
    "_top_k_kernel": 1.5,
}
WHOLE = 1.1  # the rest: rows are whole sectors, but for edges
EDGES = 512  # bytes: parts of sectors at the ends of a launch's tensors, whatever their size


@pytest.fixture
def run(executor):
    """Run a case under a schedule: (its outputs, its launches, what ptxrun counted of each)."""
    if executor != "ptx":
        pytest.skip("needs an executor of compiled code on the CPU (--executor ptx)")
    from ptxrun import Options, ptx_device
    from support.poison import poisoned_empty
    from support.proxy_fence import fence_before_barrier

    def run_case(case, **options):
        launches = []

        def observe(kernel, grid, *args, **kwargs):
            launches.append(Launch.of(kernel, grid, args, kwargs))
            with _launch.intercept(None):
                _launch.launch(kernel, grid, *args, **kwargs)

        inputs = case.make(torch.device("cpu"))
        device = ptx_device(Options(strict=True, **options), on_launch=fence_before_barrier)
        with poisoned_empty(), device as results, _launch.intercept(observe):
            outputs = case.run(inputs)
        return inputs, outputs, launches, results

    return run_case


@pytest.mark.parametrize("id", CASES)
def test_right_under_every_schedule(run, id):
    case = CASES[id]
    schedules = dict(SCHEDULES)
    if case.op in SHARING:
        schedules["races"] = dict(mode="late", races=True)
    first = None
    for name, options in schedules.items():
        inputs, outputs, launches, results = run(case, **options)
        if first is None:
            first = outputs
            for errors in measure_all(outputs, case.reference(inputs), case.bounds):
                assert not errors.broken, f"{name}: {errors}"
            for launch, result in zip(launches, results, strict=True):
                faults = instruction_faults(launch, set(result.by_class()))
                faults += memory_faults(launch, *counted(result))
                assert not faults, f"{launch.binary()}: {faults}"
        for output, expected in zip(outputs, first, strict=True):
            same = torch.equal(output.view(torch.uint8), expected.view(torch.uint8))
            assert same, f"{name}: other bits than under {next(iter(schedules))}"


def counted(result):
    """(wavefronts beyond the ideal, ideal wavefronts, bytes used, bytes of the sectors touched)"""
    bank, used = result.bank_conflicts(), result.global_load_bytes + result.global_store_bytes
    sectors = 32 * result.sectors_per_request()["sectors"]
    return bank["excess"], bank["ideal"], used + result.cp_async_bytes, sectors


def instruction_faults(launch, opcodes):
    """What was executed against what gates.py promises of the machine code."""
    required = requirements(launch)
    wgmma = any(op.startswith("wgmma.mma_async") for op in opcodes)
    mma = any(op.startswith("mma.sync") for op in opcodes)
    copies = any(op.startswith(("cp.async.", "cp.async.bulk")) for op in opcodes)
    return [
        *(["no wgmma was executed"] if required.wgmma and not wgmma else []),
        *(["mma.sync was executed"] if required.wgmma and mma else []),
        *(["no asynchronous copy was executed"] if required.pipelined and not copies else []),
    ]


def memory_faults(launch, excess, ideal, used, sectors):
    """fp32 and ragged code may be slow; the rest has the limits above."""
    matrices = [x.dtype for x in tensors_in(launch.args) if len(x.shape) > 1]
    if torch.float32 in matrices[:2] or specialisation(launch) != "aligned":
        return []
    conflicts = excess / max(ideal, 1)
    allowed = SECTORS.get(launch.name, WHOLE) * used + EDGES
    slow = conflicts > _allowed_conflicts(launch)
    return [
        *([f"{excess} bank conflicts in {ideal} wavefronts"] if slow else []),
        *([f"{sectors} B of sectors for {used} B"] if sectors > allowed else []),
    ]


def _allowed_conflicts(launch):
    if launch.name == "_grouped_gemm_swiglu_kernel" and launch.arguments()["z"].scale_ptr:
        return BYTES_OF_Z
    if launch.name == "_attention_prefill_kernel":
        given = launch.arguments()
        q_is_e4m3, cache_is_e4m3 = (
            given[name].dtype == torch.float8_e4m3fn for name in ("q_ptr", "k_ptr")
        )
        if q_is_e4m3:
            return UNTRANSPOSED if given["strides_v"] is None else TRANSPOSED
        return CONVERTED if cache_is_e4m3 else 0.0
    return CONFLICTS.get(launch.name, 0.0)


def tensors_in(args):
    """TensorSpecs, those within named tuples too."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from tensors_in(arg)
        elif hasattr(arg, "dtype"):
            yield arg


def test_the_small_cases_cover_what_ships():
    """Recorded, not run: each binary of full-size models is one that a small case asks for."""
    shipped = by_binary(shipped_launches())
    small = by_binary(
        launch
        for case in CASES.values()
        for launch in record(
            case.run, make=lambda case=case: case.make(torch.device("cuda"))
        ).launches
    )
    missing = shipped.keys() - small.keys()
    assert not missing, "\n".join(map(str, missing))
    assert small.keys() - missing  # and some more: other dtypes, top_k = 2


def _launch_of(name):
    """One with wgmma, whose limits are the strictest that its kernel has."""
    found = [x for x in shipped_launches() if x.name == name and requirements(x).wgmma]
    return min(found, key=_allowed_conflicts)


def test_the_instruction_gate_turns_red():
    launch = _launch_of("_fp8_matmul_kernel")
    good = {"wgmma.mma_async.sync.aligned", "cp.async.cg.shared.global"}
    assert instruction_faults(launch, good) == []
    assert instruction_faults(launch, {"cp.async.cg"}) == ["no wgmma was executed"]
    assert instruction_faults(launch, good | {"mma.sync.aligned"}) == ["mma.sync was executed"]
    assert "no asynchronous copy" in instruction_faults(launch, {"wgmma.mma_async"})[0]


def test_the_memory_gate_turns_red():
    launch = _launch_of("_grouped_gemm_swiglu_kernel")
    assert memory_faults(launch, 0, 512, 4096, 4096) == []
    assert memory_faults(launch, 64, 512, 4096, 4096) == ["64 bank conflicts in 512 wavefronts"]
    assert memory_faults(launch, 0, 512, 4096, 8192) == ["8192 B of sectors for 4096 B"]


def test_a_wrong_result_turns_red(run):
    """The comparison is not vacuous: one element off by its bound times four is seen."""
    case = CASES["swiglu-small-bf16"]
    inputs, (output,), _, _ = run(case)
    output.view(-1)[7] += 0.25 * output.abs().max()
    (errors,) = measure_all((output,), case.reference(inputs), case.bounds)
    assert errors.broken
