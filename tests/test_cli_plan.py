"""The command plan: its tables, the launches of a step, exit codes, one-line errors."""

from __future__ import annotations

import json

import pytest

from llama4_triton.model.config import tiny_scout

typer_testing = pytest.importorskip("typer.testing", reason="the command line is an extra")
pytestmark = pytest.mark.no_kernels


@pytest.fixture
def cli(monkeypatch):
    from rich.console import Console

    from llama4_triton import cli_plan
    from llama4_triton.cli import app

    monkeypatch.setattr(cli_plan, "out", Console(width=200))
    runner = typer_testing.CliRunner()
    return lambda *args: runner.invoke(app, [str(arg) for arg in args])


def _cells(output):
    rows = [line.strip("│ ").split("│") for line in output.splitlines() if line.startswith("│")]
    return {row[0].strip(): row[1].strip() for row in rows}


@pytest.mark.parametrize(
    "arguments, cells, lines",
    [
        (
            ("--kv", "fp8"),
            {"global pool": "257.7", "local pool": "0.6", "KV cache": "258.3"},
            ["8 GPUs, 60.8 of 80.0 GB on each", "8-way tensor parallelism", "10.84 ms"],
        ),
        (
            (),
            {"global pool": "515.4", "local pool": "1.2", "KV cache": "516.6"},
            ["16 GPUs, 48.8 of 80.0 GB on each", "experts and context over 2 groups"],
        ),
        (
            ("--kv-global", "fp8", "--kv-scales", "token"),
            {"global pool": "265.8", "local pool": "1.2"},
            ["8 GPUs"],
        ),
        (("--kv", "fp8", "--kv-local", "bf16"), {"local pool": "1.2", "KV cache": "258.9"}, []),
        (("--weights", "fp8", "--kv", "fp8", "--gpus", 8), {"weights": "112.9"}, ["enough: "]),
    ],
    ids=["fp8", "bf16", "global-token", "local-bf16", "fp8-experts"],
)
def test_scout_at_ten_million_tokens(cli, arguments, cells, lines):
    result = cli("plan", "--context", 10_485_760, *arguments)
    assert result.exit_code == 0, result.output
    found = _cells(result.output)
    assert found["uniform bf16"] == "2,061.6" and found["uniform fp8"] == "1,030.8"
    assert found | cells == found
    for text in (*lines, "modelled, not measured"):
        assert text in result.output


def test_too_few_gpus_are_an_exit_code(cli):
    result = cli("plan", "--gpus", 2)
    assert result.exit_code == 1
    assert "2 GPUs, not enough: 110.1 of 80.0 GB on each" in result.output


def test_a_checkpoint_says_what_its_config_needs(cli, tmp_path):
    config = tiny_scout()
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    result = cli("plan", "--checkpoint", tmp_path, "--context", 4096, "--gpu-memory", 1)
    assert result.exit_code == 0, result.output
    assert "1 layers, every token, bf16" in result.output and "1 GPUs" in result.output
    assert "a chunk of 16 at most" in result.output


def test_plan_lists_the_launches_of_a_step(cli):
    result = cli("plan", "--model", "scout", "--tp", 8, "--batch", 4, "--launches")
    assert result.exit_code == 0, result.output
    assert "one of 8 GPUs" in result.output and "KV cache" in result.output
    assert "390 Triton launches and 193 cuBLAS GEMMs in 48 layers" in result.output
    for word in ("_few_up_kernel", "4x5120, 5120x640", "no synchronisation"):
        assert word in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--launches", "--tp", 3), "--tp must be one of 1, 2, 4, 8, got 3"),
        (
            ("--launches", "--new-tokens", 9, "--context", 8),
            "new-tokens must be at most context (8), got 9",
        ),
        (("--tp", 8), "--tp and --new-tokens must come with --launches"),
        (("--launches", "--checkpoint", "x"), "--launches must be of a released model"),
        (("--gpus", 3), "gpus must be one of 1, 2, 4, 8 or a multiple of 8, the KV heads, got 3"),
        (("--gpus", 0), "gpus must be one of 1, 2, 4, 8 or a multiple of 8"),
        (("--gpu-memory", 0), "gpu-memory must be in (0, 1e6) GB, got 0.0"),
        (("--gpu-memory", "nan"), "gpu-memory must be in (0, 1e6) GB, got nan"),
        (("--gpu-memory", 4), "memory must hold what 8-way tensor parallelism leaves on each GPU"),
        (("--checkpoint", "/nowhere"), "/nowhere"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_plan_refuses(cli, arguments, message):
    result = cli("plan", *arguments)
    assert result.exit_code == 2 and message in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1
