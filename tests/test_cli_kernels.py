"""The commands warm and evidence: what they print, their exit codes, one-line errors."""

from __future__ import annotations

import json

import pytest

from llama4_triton.bench import evidence, warm
from llama4_triton.bench.shapes import SCOUT
from llama4_triton.bench.steps import model_launches

typer_testing = pytest.importorskip("typer.testing", reason="the command line is an extra")


@pytest.fixture
def cli(monkeypatch):
    from rich.console import Console

    from llama4_triton import cli_kernels
    from llama4_triton.cli import app

    monkeypatch.setattr(cli_kernels, "out", Console(width=200))
    runner = typer_testing.CliRunner()
    return lambda *args: runner.invoke(app, [str(arg) for arg in args])


@pytest.mark.compiled_only
def test_warm_fills_a_folder(cli, tmp_path, monkeypatch):
    few = [x for x in model_launches(SCOUT, 8) if x.name == "_gather_rows_kernel"]
    monkeypatch.setattr(warm, "model_launches", lambda *args, **kwargs: few)
    result = cli("warm", "--cache", tmp_path / "cache", "--tp", 8, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert "1 binaries for sm_90" in result.output
    assert list((tmp_path / "cache").rglob("*.cubin"))


@pytest.mark.interpreter_only
def test_commands_that_compile_refuse_the_interpreter(cli, tmp_path):
    for command in (("warm", "--cache", tmp_path), ("evidence",), ("compile", "--out", tmp_path)):
        result = cli(*command)
        assert result.exit_code == 2
        assert f"{command[0]}: TRITON_INTERPRET must be unset" in result.output


CODE = dict(
    name="k", registers=40, spills=0, shared=1024, occupancy=8, limiter="warps",
    tensor_core={"HGMMA.64x128x16 SS": 4}, waits=1, dots=1, faults=[],
)  # fmt: skip
WORK = dict(
    id="w", kernels=["a", "b"], programs=9, idle=1, compulsory=10**6, unique_ratio=1.0,
    requested_ratio=2.5, dram_ratio=1.25, padded_ratio=0.0, faults=[],
)  # fmt: skip


@pytest.mark.compiled_only
@pytest.mark.parametrize("red", [None, "code", "work"])
def test_evidence_judges_every_row(cli, tmp_path, monkeypatch, red):
    code = CODE | (dict(faults=["stack: 8 B"]) if red == "code" else {})
    work = WORK | (dict(faults=["9 atomics, not 0"]) if red == "work" else {})
    monkeypatch.setattr(evidence, "machine_code", lambda arch, jobs: [code])
    monkeypatch.setattr(evidence, "work_in_child", lambda: [work])
    monkeypatch.setattr(evidence, "steps", list)
    result = cli("evidence", "--json", tmp_path / "rows.json")
    assert result.exit_code == (1 if red else 0), result.output
    assert ("FAIL" in result.output) == (red is not None)
    assert f"2 rows judged, {1 if red else 0} with a red gate" in result.output
    for word in ("HGMMA.64x128x16 SS x4", "8 (warps)", "1/1", "9 (1)", "2.50", "1.25", "modelled"):
        assert word in result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows["code"][0]["name"] == "k" and rows["work"][0]["id"] == "w"


@pytest.mark.interpreter_only
def test_work_is_counted_and_judged_in_a_child():
    (row,) = evidence.work_in_child(["rms_norm-T16384"])
    assert row["id"] == "rms_norm-T16384" and row["faults"] == []
    assert row["kernels"] == ["_rms_norm_kernel"] and row["programs"] == 16_384
    # Per row: x twice, the weight once, y once, of which x and y are compulsory.
    assert row["unique_ratio"] == pytest.approx(1.0, abs=0.005)
    assert row["requested_ratio"] == pytest.approx(2.0, abs=0.1)


@pytest.mark.interpreter_only
def test_a_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"work: .*nothing"):
        evidence.work_in_child(["nothing"])


@pytest.mark.no_kernels
def test_steps_are_recorded():
    (row,) = evidence.steps(["scout-tp8-decode-B1-T1-8k"])
    assert row["layers"] == 48 and row["gemms"] == 193 and sum(row["launches"].values()) == 390
