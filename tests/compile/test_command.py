"""`llama4-triton compile`: files, manifest, exit codes. On a few launches instead of all."""

from __future__ import annotations

import json

import pytest
import torch
from support.compile_cases import FAULTS

from llama4_triton.autotune.gates import KERNELS, Promise
from llama4_triton.autotune.recorder import record
from llama4_triton.bench import variants
from llama4_triton.kernels.swiglu import swiglu

typer_testing = pytest.importorskip("typer.testing", reason="the command line is an extra")
pytestmark = pytest.mark.compiled_only


@pytest.fixture
def compile_command(monkeypatch, tmp_path):
    """Function from launches and what was refused to the result of the command."""
    from llama4_triton.cli import app

    monkeypatch.setenv("COLUMNS", "200")

    def run(launches, refused=(), *args):
        monkeypatch.setattr(variants, "all_launches", lambda arch: (launches, list(refused)))
        arguments = ["compile", "--out", str(tmp_path / "out"), "--jobs", "1", *args]
        result = typer_testing.CliRunner().invoke(app, arguments)
        manifest = tmp_path / "out" / "manifest.json"
        rows = json.loads(manifest.read_text()) if manifest.is_file() else None
        return result, rows

    return run


def good():
    x = lambda: torch.empty(4, 1024, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    return record(lambda: swiglu(x(), x())).launches


def test_all_gates_green(compile_command, tmp_path):
    result, rows = compile_command(good(), ["fp8_matmul: needs sm_89"])
    assert result.exit_code == 0, result.output
    assert "refused: fp8_matmul: needs sm_89" in result.output
    assert "1 binaries for sm_90, 0 with a red gate" in result.output
    required = {
        "name", "cubin", "kernel", "config", "dtypes", "specialisation", "arch", "num_warps",
        "num_stages", "registers", "stack", "spills", "shared", "tensor_core", "gate",
    }  # fmt: skip
    assert required <= set(rows[0]) and rows[0]["gate"] == "pass"
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {
        ".cubin", ".ptx", ".ttgir", ".json"
    }  # fmt: skip


def test_a_red_gate_is_exit_code_1(compile_command, monkeypatch):
    (fault,) = (fault for fault in FAULTS if fault.id == "scratch")
    monkeypatch.setitem(KERNELS, "faulty_gemm_kernel", Promise(why="made to fail", rows="BLOCK_M"))
    result, rows = compile_command([*good(), fault.launch()])
    assert result.exit_code == 1, result.output
    assert [row["gate"] for row in rows] == ["pass", "fail"]
    (line,) = (line for line in result.output.splitlines() if line.startswith("FAIL"))
    assert "of scratch from Triton's allocator" in line and "faulty_gemm" in line


def test_what_does_not_compile_is_a_row_and_exit_code_1(compile_command):
    launch = next(
        launch
        for variant in variants.variants()
        if variant.op == "quantize_rowwise"
        for launch in variants.launches_of(variant)
    )
    result, rows = compile_command([launch], (), "--arch", "sm_80")
    assert result.exit_code == 1, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("FAIL"))
    assert "fp8e4nv not supported" in line
    assert rows[0]["cubin"] is None and rows[0]["gate"] == "fail"


def test_errors_are_one_line_and_exit_code_2(compile_command, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result, _ = compile_command([])
    assert result.exit_code == 2 and "TRITON_INTERPRET must be unset" in result.output
    monkeypatch.delenv("TRITON_INTERPRET")
    (tmp_path / "out").write_text("a file")
    result, _ = compile_command([])
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    assert compile_command([], (), "--arch", "sm_70")[0].exit_code == 2
