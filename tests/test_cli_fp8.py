"""The commands that read a checkpoint, on one with e4m3 experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.fp8_checkpoints import fp8_state, save_fp8_checkpoint
from support.tiny_configs import make_tokens, packed

from llama4_triton.model.checkpoint import load_model, scan
from llama4_triton.model.config import tiny_maverick
from llama4_triton.model.fp8_checkpoint import loaded_bytes
from llama4_triton.model.llama4 import Llama4

typer_testing = pytest.importorskip("typer.testing", reason="the command line is an extra")
pytestmark = [pytest.mark.interpreter_only, pytest.mark.unsanitized]

CONFIG = tiny_maverick(
    vocab_size=97, hidden_size=48, intermediate_size=33, num_hidden_layers=2, num_local_experts=3
)


@pytest.fixture
def directory(tmp_path):
    return save_fp8_checkpoint(tmp_path / "c", CONFIG, fp8_state(CONFIG))


@pytest.fixture
def cli(monkeypatch, directory):
    from llama4_triton.cli import app
    from llama4_triton.model import tokenizer

    class Letters:
        def encode(self, text, *, bos=False):
            return [1] * bos + [ord(c) % 97 for c in text]

        def decode(self, ids):
            return f" and {len(ids)} more"

    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda directory: Letters())
    monkeypatch.setenv("COLUMNS", "200")
    runner = typer_testing.CliRunner()
    return lambda command, *arguments: runner.invoke(
        app, [command, "--checkpoint", str(directory), *map(str, arguments)]
    )


def test_logits_are_the_loaded_model_s(cli, directory, tmp_path):
    (tokens,) = make_tokens(CONFIG, [9])
    np.savez(tmp_path / "in.npz", input_ids=np.array([tokens]))
    files = "--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz"
    result = cli("logits", *files, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    want = packed(load_model(directory, Llama4), [tokens])[0].float()
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "out.npz")["logits"][0]), want)
    result = cli("logits", *files)
    assert result.exit_code == 2
    assert "error: logits: --dtype must be bfloat16 or float16 for a checkpoint" in result.output


def test_run_continues_a_prompt(cli):
    result = cli("run", "--prompt", "Hi", "--max-new-tokens", 3)
    assert result.exit_code == 0 and "Hi and 3 more" in result.output, result.output


def test_e4m3_experts_count_as_such_when_memory_is_checked(cli, directory, monkeypatch):
    from llama4_triton.model import plan

    size = loaded_bytes(scan(directory, CONFIG), torch.bfloat16)
    needs = plan.memory_plan(CONFIG, [6], dtype=torch.bfloat16, weights_bytes=size).total_bytes
    assert needs < plan.memory_plan(CONFIG, [6], dtype=torch.bfloat16).total_bytes
    monkeypatch.setattr(plan, "available_bytes", lambda device: needs)
    result = cli("run", "--prompt", "Hi", "--max-new-tokens", 3)  # and its first token
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(plan, "available_bytes", lambda device: size - 1)
    result = cli("run", "--prompt", "Hi", "--max-new-tokens", 3)
    assert result.exit_code == 2 and "no context fits; the weights alone" in result.output


def test_plan_takes_the_type_of_experts_from_its_option(cli):
    result = cli("plan", "--weights", "fp8", "--context", 64)
    assert result.exit_code == 0 and "fp8 experts" in result.output, result.output


def test_diff_refuses(cli):
    result = cli("diff", "--prompt", "Hi")
    assert result.exit_code == 2, result.output
    assert "error: diff: checkpoint must have 16-bit or fp32 weights, got e4m3" in result.output
