"""Compiling for an absent GPU: what needs no compiler."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict

import pytest
import torch
from support.reports import GOOD
from triton.runtime import driver

from llama4_triton.autotune.compile import (
    ARCHITECTURES,
    CompileFailed,
    _reason,
    _report_from,
    compile_all,
    compile_launch,
    compiling_for,
)
from llama4_triton.autotune.recorder import recorded_launches
from llama4_triton.cli_kernels import Architecture
from llama4_triton.kernels.rms_norm import rms_norm

pytestmark = pytest.mark.no_kernels


def test_an_interpreted_kernel_cannot_be_compiled():
    x, weight = torch.empty(3, 64), torch.empty(64)
    launches = recorded_launches(lambda: rms_norm(x, weight, 1e-5))
    for compile_them in (lambda: compile_launch(launches[0]), lambda: compile_all(launches)):
        with pytest.raises(RuntimeError, match=r"must be a compiled JIT function, got Interpreted"):
            compile_them()


def test_the_driver_is_restored():
    before = driver._active
    with pytest.raises(KeyError), compiling_for("sm_90"):
        assert driver.active.get_current_target().arch == 90
        with compiling_for("sm_120"):
            assert driver.active.get_current_target().arch == 120
        assert driver.active.get_current_target().arch == 90
        raise KeyError
    assert driver._active is before


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="arch must be one of sm_75, .*got 'sm_90a'"):
        with compiling_for("sm_90a"):
            pass
    assert [arch.value for arch in Architecture] == list(ARCHITECTURES)


def test_the_reason_is_one_line():
    error = RuntimeError("at 1:0:\ndef f(\n^\nValueError('no fp8 here')\nRepro command: x error\n")
    assert _reason(error) == "RuntimeError: ValueError('no fp8 here')"
    assert _reason(KeyError()) == "KeyError: no message"


def test_failures_cross_processes():
    assert str(pickle.loads(pickle.dumps(CompileFailed("k on sm_75: no")))) == "k on sm_75: no"


def test_a_report_survives_being_kept():
    again = _report_from(json.loads(json.dumps(asdict(GOOD))))
    assert again == GOOD and hash(again.binary) == hash(GOOD.binary)
    assert again.facts.ir_loops[0].copies == GOOD.facts.ir_loops[0].copies
