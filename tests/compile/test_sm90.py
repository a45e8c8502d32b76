"""Every operator's default configurations compile for sm_90 into the machine code they should.

Needs no GPU. Two processes compile; Triton's cache makes the second run short.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from support.compile_cases import CASES, FAULTY_CASES, reports_of

from llama4_triton.autotune.compile import violations

pytestmark = pytest.mark.compiled_only

KERNELS = Path(__file__).parents[2] / "kernels"
BY_ID = {case.id: case for case in (*CASES, *FAULTY_CASES.values())}


@pytest.fixture(scope="module")
def reports(request):
    """Function from a case's id to its reports; what this run needs is compiled in parallel."""
    needed = list(BY_ID)
    if all("case_id" in getattr(item, "fixturenames", ()) for item in request.session.items):
        needed = [item.callspec.params["case_id"] for item in request.session.items]
    if len(needed) < 3 or "PYTEST_XDIST_WORKER" in os.environ:
        yield functools.cache(reports_of)
        return
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {case_id: pool.submit(reports_of, case_id) for case_id in needed}
        try:
            yield lambda case_id: futures[case_id].result()
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case_id", [case.id for case in CASES])
def test_default_configurations(reports, case_id):
    for report in reports(case_id):
        required = BY_ID[case_id].requirements(report.kernel)
        assert not violations(report, required), str(report)


@pytest.mark.parametrize("case_id", [case.id for case in FAULTY_CASES.values()])
def test_the_gate_turns_red(reports, case_id):
    """Each faulty configuration is refused, for the reason it is here for."""
    (expected,) = [said for said, case in FAULTY_CASES.items() if case.id == case_id]
    for report in reports(case_id):
        faults = violations(report, BY_ID[case_id].requirements(report.kernel))
        assert any(expected in fault for fault in faults), f"{faults} {report}"


def test_every_kernel_has_a_case(reports):
    compiled = {report.kernel for case in CASES for report in reports(case.id)}
    written = {
        name
        for file in KERNELS.glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert compiled == written


def test_promotion_is_visible_in_the_machine_code(reports):
    """One fp32 addition per accumulator element and 128 of K, in the loop, outside the MMA."""
    (promoted,) = set(map(str, reports("fp8_matmul-T4096")))
    report = reports("fp8_matmul-T4096")[0]
    elements = 128 * 128 // (32 * 8)
    assert report.ptx["add.f32"] == elements, promoted
    assert [loop.instructions["fp32 add"] for loop in report.main_loops] == [elements]
    fast = reports("fp8_matmul-fast_accum")[0]
    assert fast.ptx["add.f32"] == 0
    assert [loop.instructions["fp32 add"] for loop in fast.main_loops] == [0]


def test_ragged_sizes_are_compiled_apart(reports):
    """The specialisation comes from the arguments: no 16-byte copies where K is odd."""
    assert all(report.sass["cp.async"] > 0 for report in reports("fp8_matmul-T64"))
    assert all(report.sass["cp.async"] == 0 for report in reports("fp8_matmul-ragged"))


def test_quantisation_divides_exactly(reports):
    """Equal to the reference in every bit only with rounded divisions, which no executor shows."""
    for name in ("aligned", "ragged"):
        for report in reports(f"quantize_rowwise-{name}"):
            assert report.ptx["inexact division"] == 0, str(report)
