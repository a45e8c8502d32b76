"""The commands selftest and doctor: exit codes and one-line errors. tests/bench has the rest."""

from __future__ import annotations

import json

import pytest
import torch

typer_testing = pytest.importorskip("typer.testing", reason="the command line is an extra")
pytestmark = pytest.mark.interpreter_only  # the commands choose the executor themselves


@pytest.fixture
def cli(monkeypatch):
    from llama4_triton.cli import app

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runner = typer_testing.CliRunner()
    return lambda *args: runner.invoke(app, [str(arg) for arg in args])


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.long
def test_an_installation_is_checked_on_the_interpreter(cli, tmp_path):
    file = tmp_path / "report.json"
    result = cli("selftest", "--only", "*rms_norm-small-bf16", "--out", file)
    assert result.exit_code == 0, result.output
    assert "2 cases on Triton's interpreter on the CPU (says nothing about a GPU)" in result.output
    assert "passed: 2 ok" in result.output
    data = json.loads(file.read_text())
    assert data["verdict"] == "passed" and data["environment"]["gpu"] is None
    assert [case["op"] for case in data["cases"]] == ["rms_norm", "add_rms_norm"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu"], f"selftest --gpu: torch {torch.__version__} must see a GPU, got none"),
        (["--only", "nothing"], "selftest: only must match a case, got 'nothing'"),
        (["--checkpoint", "x"], "selftest: --checkpoint must come with --bisect"),
        (["--out", "/nowhere/report.json"], "selftest: --out must be in a folder that exists"),
        (["--bisect", "--checkpoint", "/nowhere"], "/nowhere"),
    ],
    ids=["no-gpu", "no-case", "checkpoint", "folder", "no-checkpoint"],
)
def test_what_the_user_can_put_right_is_one_line(cli, no_gpu, arguments, message):
    result = cli("selftest", *arguments)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]


def test_an_interpreter_is_no_gpu(cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = cli("selftest", "--gpu")
    assert result.exit_code == 2 and "TRITON_INTERPRET must be unset" in result.output


@pytest.mark.long
def test_a_child_that_does_not_start_is_one_line(cli):
    result = cli("selftest", "--backend", "nothing:here", "--only", "rms_norm-small-bf16")
    assert result.exit_code == 2
    assert "selftest: the child process must start, got" in result.output
    assert "No module named 'nothing'" in result.output
