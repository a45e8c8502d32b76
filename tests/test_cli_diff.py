"""The command `diff`: exit codes 0, 1 and 2, and what is printed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.tiny_configs import CASES

from llama4_triton.model.tiny import save_tiny_checkpoint

typer_testing = pytest.importorskip("typer.testing", reason="the command line is an extra")
pytestmark = [pytest.mark.interpreter_only, pytest.mark.unsanitized]

CONFIG = replace(
    CASES["maverick"], num_hidden_layers=2, no_rope_layers=(1, 0), hidden_size=32,
    num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
)  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path):
    from llama4_triton.cli import app
    from llama4_triton.model import tokenizer

    class Letters:
        def encode(self, text, *, bos=False):
            return [1] * bos + [ord(c) % 97 for c in text]

    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda directory: Letters())
    monkeypatch.setenv("COLUMNS", "200")
    checkpoint = save_tiny_checkpoint(tmp_path, CONFIG)
    runner = typer_testing.CliRunner()
    base = ["diff", "--checkpoint", str(checkpoint), "--prompt", "nine of it"]
    return lambda *args: runner.invoke(app, [*base, *args])


def test_agreement_is_exit_code_0(run):
    result = run("--engine", "transformers", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "the engines agree" in result.output and "11 prompt tokens, 1 steps" in result.output
    assert "departs" not in result.output and result.output.count(" ok ") == 14 + 1


def test_a_departure_is_exit_code_1_and_one_reason(run):
    result = run("--steps", "0", "--parity", "hf,temperature=off")
    assert result.exit_code == 1, result.output
    lines = result.output.splitlines()
    assert lines[-2] == (
        "first departure: layer 1 (NoPE, global), attention: queries, in the prefill"
    )
    assert lines[-1].startswith("likely reason: parity field temperature: with temperature=config")


def test_errors_are_exit_code_2_and_one_line(run):
    for arguments, match in (
        (("--engine", "vllm"), "error: diff: --engine must be one of transformers, got 'vllm'"),
        (("--parity", "trt"), "error: parity: must be one of default, hf, vllm, sglang, meta"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        (line,) = [line for line in result.output.splitlines() if line.strip()]
        assert line.startswith(match)
