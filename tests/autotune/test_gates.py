"""Judging reports: what each gate says, what each kernel promises, when registers regress."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import triton
from support.reports import BINARY, FACTS, GOOD, IR_LOOP, LOOP

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
from llama4_triton.autotune.launches import Launch, TensorSpec

pytestmark = pytest.mark.no_kernels

SOURCES = Path(__file__).parents[2] / "kernels"

STRICT = Requirements(
    wgmma=True, pipelined=True, promotion_adds=64, exact_division=True,
    e4m3=True, in_flight=32_768, weight_rows=(64, 128),
)  # fmt: skip


def facts(**changes):
    return {"facts": dataclasses.replace(FACTS, **changes)}


def loop(**changes):
    return facts(main_loops=(LOOP, dataclasses.replace(LOOP, **changes)))


def ir_loop(**changes):
    return facts(ir_loops=(dataclasses.replace(IR_LOOP, **changes),))


# By gate: what breaks it, and what it then says.
BAD = {
    "shared": ({"shared": 232_449}, "232449 B of shared memory, 232448 B is all there is"),
    "fits": (
        {"binary": dataclasses.replace(BINARY, num_warps=16)},
        "no block fits on an SM, because of registers",
    ),
    "stack": (facts(stack=8), "8 B stack"),
    "wgmma": (facts(sass=FACTS.sass | {"wgmma": 0}), "no wgmma"),
    "mma.sync": (facts(sass=FACTS.sass | {"mma.sync": 2}), "2 mma.sync where wgmma is promised"),
    "e4m3": (facts(tensor={"HGMMA.64x128x16.F32.BF16 SS": 4}), "e4m3 is promised, HGMMA.64x128"),
    "in_flight": (
        ir_loop(copies=(("64x32xf8E4M3FN", 2048),)),
        "6144 B of weights in flight per SM, 32768 B are needed",
    ),
    "waits": (loop(waits=2), "2 waits in a main loop with 1 dots"),
    "copies": (loop(copies={}), "no asynchronous copies in a main loop"),
    "loads": (ir_loop(loads=(("513xi32", 2052),)), "2052 B per iteration"),
    "tf32": (facts(ptx=FACTS.ptx | {"tf32": 4}), "4 tf32 instructions"),
    "promotion": (loop(fp32_adds=63), "63 fp32 additions in a main loop, promotion needs 64"),
    "atomics": (facts(ptx=FACTS.ptx | {"float atomic": 1}), "1 float atomics"),
    "scratch": ({"scratch": 128}, "128 B of scratch"),
    "division": (facts(ptx=FACTS.ptx | {"inexact division": 2}), "2 inexact divisions"),
}
MORE = {
    "local memory": ("stack", facts(local=4)),
    "spills without stack": ("stack", facts(spills=3)),
    "tf32 in SASS": ("tf32", facts(sass=FACTS.sass | {"tf32": 1})),
    "nothing copied, says the IR": ("copies", ir_loop(copies=())),
    "no main loop": ("copies", facts(main_loops=())),
    "loads the IR does not show": (
        "loads",
        facts(main_loops=(dataclasses.replace(LOOP, loads={"LDG.128": 1}),), ir_loops=()),
    ),
    "unrolled, not promoted": ("promotion", loop(dots=2.0, waits=2, fp32_adds=64)),
}


def test_a_good_report_passes():
    assert violations(GOOD, STRICT) == []


def test_each_gate_has_a_fault():
    assert set(BAD) == set(GATES)


@pytest.mark.parametrize("gate", BAD)
def test_each_fault_is_named(gate):
    change, said = BAD[gate]
    found = {g: text for g, text in verdicts(dataclasses.replace(GOOD, **change), STRICT).items()}
    assert said in found[gate]
    assert [g for g, text in found.items() if text] == [gate]


@pytest.mark.parametrize("case", MORE)
def test_other_ways_to_fail(case):
    gate, change = MORE[case]
    assert verdicts(dataclasses.replace(GOOD, **change), STRICT)[gate]


def test_small_loads_are_allowed():
    with_load = loop(loads={"LDG.32": 1})
    assert violations(dataclasses.replace(GOOD, **with_load), STRICT) == []


def test_requirements_can_be_lifted():
    spilt = dataclasses.replace(GOOD, **facts(stack=64, spills=3))
    assert violations(spilt, Requirements(max_stack=64)) == []
    assert violations(spilt, Requirements(max_stack=63)) != []
    worse = dataclasses.replace(GOOD, **facts(stack=4000, local=1))
    assert violations(worse, Requirements(max_stack=None)) == []
    tf32 = dataclasses.replace(GOOD, **BAD["tf32"][0])
    assert violations(tf32, Requirements(tf32=True)) == []


def test_registers_may_rise_by_16():
    baseline = {str(BINARY): 152}
    assert regressions([GOOD], baseline) == []
    (fault,) = regressions([GOOD], {str(BINARY): 151})
    assert "168 registers, 151 recorded" in fault
    (fault,) = regressions([GOOD], {})
    assert "no recorded register count" in fault


def spec(dtype, *shape):
    return TensorSpec(dtype=dtype, shape=shape, strides=(*shape[1:], 1))


@pytest.fixture
def fp8(monkeypatch):
    """A launch of the FP8 kernel with a config, as the compiler would see it."""
    from llama4_triton.kernels.fp8_matmul import _fp8_matmul_kernel

    source = getattr(_fp8_matmul_kernel, "fn", _fp8_matmul_kernel)
    free = ["M"]  # what the kernel says in its decorator
    compiled = triton.runtime.JITFunction(source, do_not_specialize=free)
    monkeypatch.setattr(Launch, "jit", property(lambda self: compiled))

    def make(K=5120, **config):
        config = (
            dict(FAST_ACCUM=False, SWAP_AB=False, BLOCK_M=128, BLOCK_N=32, BLOCK_K=128, GROUP_M=8)
            | dict(num_warps=4, num_stages=3)
            | config
        )
        x, w = spec(torch.float8_e4m3fn, 64, K), spec(torch.float8_e4m3fn, 512, K)
        scale, y = spec(torch.float32, 64), spec(torch.bfloat16, 64, 512)
        return Launch(
            kernel="llama4_triton.kernels.fp8_matmul:_fp8_matmul_kernel",
            grid=(1,),
            args=(x, scale, w, scale, y, 64, 512, K, K, K, 512),
            kwargs=config,
        )

    return make


def test_promises_of_the_fp8_kernel(fp8):
    plain = requirements(fp8())
    assert plain == Requirements(wgmma=True, pipelined=True, promotion_adds=32, e4m3=True)
    assert requirements(fp8(FAST_ACCUM=True)).promotion_adds == 0
    # The tensor core's rows are the weights' when operands are swapped.
    assert not requirements(fp8(SWAP_AB=True)).wgmma
    assert requirements(fp8(SWAP_AB=True, BLOCK_N=64, BLOCK_M=16)).wgmma
    assert not requirements(fp8(BLOCK_M=32)).wgmma and requirements(fp8(BLOCK_M=32)).pipelined


def test_ragged_launches_must_only_fit(fp8):
    for K, word in ((5121, "ragged"), (1, "ragged-one")):
        launch = fp8(K=K)
        assert specialisation(launch) == word
        assert requirements(launch) == Requirements(max_stack=64, promotion_adds=32)
    assert specialisation(fp8()) == "aligned"


def test_other_architectures_must_only_fit(fp8):
    assert requirements(fp8(), "sm_89") == Requirements(max_stack=64)


def test_a_kernel_without_a_promise_is_refused(fp8):
    launch = dataclasses.replace(fp8(), kernel="elsewhere:_new_kernel")
    with pytest.raises(ValueError, match="must have a row in KERNELS, got _new_kernel"):
        requirements(launch)


def test_every_kernel_has_a_promise():
    written = {
        name
        for file in SOURCES.glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert set(KERNELS) == written
