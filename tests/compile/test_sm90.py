"""Every binary that ships compiles for sm_90 into the machine code it should; no GPU is needed.

Two processes compile what Triton's cache does not have yet; reports are kept there as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import triton
from support.compile_cases import FAULTS, good_gemm

from llama4_triton.autotune.compile import CompileFailed
from llama4_triton.autotune.gates import (
    GATES,
    KERNELS,
    Requirements,
    regressions,
    requirements,
    specialisation,
    verdicts,
    violations,
)

pytestmark = pytest.mark.compiled_only

REGISTERS = json.loads((Path(__file__).parent / "registers.json").read_text())


def faults_of(pairs):
    """What is wrong with which binary, one line each."""
    lines = []
    for launch, report in pairs:
        if isinstance(report, CompileFailed):
            lines.append(str(report))
        else:
            faults = violations(report, requirements(launch))
            lines += [f"{fault} -- {report}" for fault in faults]
    return lines


def test_shipped_binaries_pass_every_gate(shipped):
    assert not faults_of(shipped)


def test_main_loops_pass_every_gate(main_loops):
    assert len(main_loops) >= 15
    assert not faults_of(main_loops)


def test_models_ask_for_aligned_specialisations_only(shipped):
    ragged = [str(x.binary()) for x, _ in shipped if specialisation(x) != "aligned"]
    assert not ragged


def test_the_number_of_binaries(shipped, variants):
    every = {x.binary() for pairs in (shipped, variants("ragged"), variants("float32"))
             for x, _ in pairs}  # fmt: skip
    assert len(every) + len(FAULTS) <= 200  # compiled by the default tests
    assert len(every) + 60 <= 400  # and about as many again in fp16, and in bf16 by name


def test_fp32_passes_every_gate(variants):
    pairs = variants("float32")
    assert not faults_of(pairs)
    assert not any(r.facts.tensor for x, r in pairs if "fp8" not in x.name)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_pass_every_gate(variants, dtype):
    assert not faults_of(variants(dtype))


def test_ragged_binaries_fit(variants):
    """Odd sizes, strides and offsets, and sizes of 1, may be slow; they must fit and not spill."""
    pairs = variants("ragged")
    assert {specialisation(x) for x, _ in pairs} == {"aligned", "ragged", "ragged-one"}
    assert not faults_of(pairs)


def test_every_kernel_is_compiled(shipped, variants):
    pairs = [*shipped, *variants("float32"), *variants("ragged")]
    off = {name for name in KERNELS if "_ws_" in name}  # tests/kernels/test_grouped_gemm_ws.py
    assert {launch.name for launch, _ in pairs} == set(KERNELS) - off


def test_registers_do_not_rise(shipped):
    _check_registers(shipped)


def test_registers_of_main_loops_do_not_rise(main_loops):
    _check_registers(main_loops)


def _check_registers(pairs):
    """`python tests/compile/record_registers.py` writes the counts, after a look at the diff."""
    baseline = REGISTERS.get(triton.__version__)
    if baseline is None:
        pytest.skip(f"no registers are recorded for Triton {triton.__version__}")
    reports = [report for _, report in pairs]
    assert not regressions(reports, baseline)
    lowered = {name: count - 17 for name, count in baseline.items()}
    assert len(regressions(reports, lowered)) == len(reports), "the gate must turn red"


@pytest.fixture(scope="session")
def faulty(compile_lane):
    """Report of each seeded fault, by id."""
    launches = {fault.id: fault.launch() for fault in FAULTS}
    results = compile_lane([*launches.values(), good_gemm()])
    return {name: results[launch.binary()] for name, launch in launches.items()}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_the_gate_turns_red(faulty, fault):
    """Each faulty kernel is refused by its gate and no other."""
    found = verdicts(faulty[fault.id], fault.required)
    assert {gate for gate, said in found.items() if said} == fault.gates, found


def test_the_kernel_without_a_fault_passes(faulty, compile_lane):
    (report,) = compile_lane([good_gemm()]).values()
    assert violations(report, Requirements(wgmma=True, pipelined=True)) == []


def test_every_gate_has_a_seeded_fault():
    """The assembler keeps a block within the register file: only a report can break `fits`."""
    seeded = frozenset().union(*(fault.gates for fault in FAULTS))
    assert seeded == set(GATES) - {"fits"}


def test_promotion_is_visible_in_the_machine_code(shipped):
    """One fp32 addition per accumulator element and 128 of K, in the loop, outside the MMA."""
    by_flag = {"True": [], "False": []}
    for launch, report in shipped:
        if launch.name == "_fp8_matmul_kernel":
            by_flag[report.config["FAST_ACCUM"]].append(report)
    assert by_flag["True"] and by_flag["False"]
    for report in by_flag["False"]:
        tile = int(report.config["BLOCK_M"]) * int(report.config["BLOCK_N"])
        adds = [loop.fp32_adds for loop in report.facts.main_loops]
        assert adds == [tile // (32 * report.num_warps)], str(report)
    for report in by_flag["True"]:
        assert [loop.fp32_adds for loop in report.facts.main_loops] == [0], str(report)


def test_ragged_sizes_are_compiled_apart(shipped, variants):
    """The specialisation comes from the arguments: no 16-byte copies where K is odd."""
    aligned = [r for x, r in shipped if x.name == "_fp8_matmul_kernel"]
    ragged = [r for x, r in variants("ragged") if x.name == "_fp8_matmul_kernel"]
    assert aligned and ragged
    assert all(report.facts.sass["cp.async"] > 0 for report in aligned)
    assert all(report.facts.sass["cp.async"] == 0 for report in ragged)


def test_bytes_in_flight(shipped):
    """All stages but one of the FP8 tiles; in attention 128 keys and values, and their page ids."""
    seen = set()
    for launch, report in shipped:
        config = {k: int(v) for k, v in report.config.items() if v.isdigit()}
        if launch.name == "_fp8_matmul_kernel":
            tiles = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"]
            assert report.bytes_in_flight == tiles * (report.num_stages - 1)
        elif launch.name == "_attention_prefill_kernel":
            page_ids = 4 * (config["BLOCK_N"] if config["BLOCK_N"] > config["PAGE_SIZE"] else 1)
            tiles = 2 * config["BLOCK_N"] * config["D"] * 2
            ahead = 128 // config["BLOCK_N"]
            assert report.bytes_in_flight == ahead * (tiles + page_ids)
        else:
            continue
        seen.add(launch.name)
    assert len(seen) == 2
