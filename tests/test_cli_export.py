"""The commands export-hf-kernel and extract: what they write, exit codes, one-line errors."""

from __future__ import annotations

import pytest

typer_testing = pytest.importorskip("typer.testing", reason="the command line is an extra")
pytestmark = pytest.mark.no_kernels


@pytest.fixture
def cli():
    from llama4_triton.cli import app

    runner = typer_testing.CliRunner()
    return lambda *args: runner.invoke(app, [str(arg) for arg in args])


def test_export_writes_a_repository_and_names_its_operators(cli, tmp_path):
    out = tmp_path / "new" / "repository"
    result = cli("export-hf-kernel", "--out", out, "--name", "llama4-odd", "--version", 7)
    assert result.exit_code == 0, result.output
    assert "version 7 of llama4-odd" in result.output and "torch.ops.llama4_odd_" in result.output
    assert (out / "build" / "torch-cuda" / "metadata.json").is_file()
    assert cli("export-hf-kernel", "--out", out).exit_code == 2


def test_extract_writes_to_the_terminal_or_a_file(cli, tmp_path):
    shown = cli("extract", "swiglu")
    assert shown.exit_code == 0 and "def _swiglu_kernel(" in shown.output
    assert cli("extract", "swiglu", "--out", tmp_path / "swiglu.py").output == ""
    assert (tmp_path / "swiglu.py").read_text() == shown.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("extract", "swish"), "extract: OP must be one of add_rms_norm, "),
        (("extract", "swiglu", "--out", "/nowhere/swiglu.py"), "/nowhere/swiglu.py"),
        (("export-hf-kernel", "--out", "x", "--name", "A"), "name must be lower case"),
    ],
    ids=["no-such-op", "no-such-folder", "name"],
)
def test_what_is_refused_is_one_line(cli, arguments, message):
    result = cli(*arguments)
    assert result.exit_code == 2 and message in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1
