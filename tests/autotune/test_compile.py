"""Recording launches, and judging reports: what needs no compiler."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from triton.runtime import driver

from llama4_triton.autotune.compile import (
    CompiledReport,
    Loop,
    Requirements,
    compile_launch,
    compiling_for,
    recorded_launches,
    violations,
)
from llama4_triton.kernels.rms_norm import rms_norm

pytestmark = pytest.mark.no_kernels


def record():
    x, weight = torch.empty(3, 64), torch.empty(64)
    return x, recorded_launches(lambda: rms_norm(x, weight, 1e-5))


def test_launches_are_recorded_and_not_executed():
    x, (launch,) = record()
    assert launch.kernel.__name__ == "_rms_norm_kernel" and launch.grid == (3,)
    assert launch.args[0] is x and launch.args[5] == 64
    assert launch.kwargs == {"HAS_RESIDUAL": False, "BLOCK_H": 128, "num_warps": 1}


def test_an_interpreted_kernel_cannot_be_compiled():
    _, (launch,) = record()
    with pytest.raises(RuntimeError, match=r"must be a compiled JIT function, got InterpretedFunc"):
        compile_launch(launch)


def test_the_driver_is_restored():
    before = driver._active
    with pytest.raises(KeyError), compiling_for("sm_90"):
        assert driver.active.get_current_target().arch == 90
        with compiling_for("sm_80"):
            assert driver.active.get_current_target().arch == 80
        assert driver.active.get_current_target().arch == 90
        raise KeyError
    assert driver._active is before


LOOP = Counter({"wgmma": 4, "wgmma wait": 1, "cp.async": 8})
GOOD = CompiledReport(
    kernel="k",
    arch="sm_90",
    config={},
    num_warps=8,
    num_stages=3,
    registers=168,
    stack=0,
    local=0,
    spills=0,
    shared=232_448,
    scratch=0,
    ptx=Counter({"wgmma": 4, "wgmma commit": 1, "add.f32": 64}),
    sass=Counter({"wgmma": 4, "cp.async": 24, "wgmma wait": 2}),
    main_loops=(Loop(instructions=LOOP, dots=1.0),),
)
STRICT = Requirements(wgmma=True, pipelined=True, promotion_adds=64)


def with_loop(**counts):
    return {"main_loops": (Loop(instructions=LOOP | Counter(counts), dots=1.0),)}


BAD = {
    "232449 B of shared memory": {"shared": 232_449},
    "8 B stack": {"stack": 8},
    "128 B of scratch": {"scratch": 128},
    "0 B stack, 0 spills": {"local": 4},
    "3 spills": {"spills": 3},
    "no wgmma": {"sass": Counter({"cp.async": 24})},
    "2 mma.sync": {"sass": GOOD.sass | Counter({"mma.sync": 2})},
    "serialised": with_loop(**{"wgmma wait": 2}),
    "no asynchronous copies": {"sass": Counter({"wgmma": 4})},
    "5 loads into registers": with_loop(**{"ld.global": 5}),
    "tf32": {"sass": GOOD.sass | Counter({"tf32": 4})},
    "float atomic": {"ptx": GOOD.ptx | Counter({"float atomic": 1})},
    "63 fp32 additions": {"ptx": Counter({"wgmma": 4, "wgmma commit": 1, "add.f32": 63})},
}


def test_a_good_report_passes():
    assert violations(GOOD, STRICT) == []


@pytest.mark.parametrize("said", BAD)
def test_each_fault_is_named(said):
    (fault,) = violations(dataclasses.replace(GOOD, **BAD[said]), STRICT)
    assert said in fault


def test_requirements_can_be_lifted():
    spilt = dataclasses.replace(GOOD, stack=8, spills=3)
    assert violations(spilt, Requirements(spill_free=False)) == []
    tf32 = dataclasses.replace(GOOD, sass=GOOD.sass | Counter({"tf32": 4}))
    assert violations(tf32, Requirements(tf32=True)) == []
