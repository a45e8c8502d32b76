"""The command line: the demo and its exit codes, run, logits, one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_configs import CASES, build, make_tokens, packed

from llama4_triton.model.reference import Llama4 as Reference
from llama4_triton.model.tiny import save_tiny_checkpoint

typer_testing = pytest.importorskip("typer.testing", reason="the command line is an extra")
pytestmark = pytest.mark.interpreter_only  # the commands choose the executor themselves

CONFIG = CASES["scout"]


@pytest.fixture
def cli(monkeypatch):
    from llama4_triton.cli import app

    monkeypatch.setenv("COLUMNS", "200")
    runner = typer_testing.CliRunner()
    return lambda *args: runner.invoke(app, [str(arg) for arg in args])


@pytest.fixture
def small_demo(monkeypatch):
    """The demo at a small vocabulary: same code, less to write and read."""
    from llama4_triton.model import demo, tokenizer

    class Letters:
        def encode(self, text, *, bos=False):
            return [1] * bos + [3 + ord(c) % 90 for c in text]

        def decode(self, ids):
            return "".join(chr(33 + i % 90) for i in ids)

    configs = {"tiny": replace(CONFIG, num_hidden_layers=2, no_rope_layers=(1, 0))}
    monkeypatch.setattr(demo, "demo_configs", lambda: configs)
    monkeypatch.setattr(demo, "PROMPT", "22 tokens with the bos")
    monkeypatch.setattr(demo, "NEW_TOKENS", 3)  # the boundary lies after two
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda directory: Letters())
    return demo


def test_demo_prints_parity_per_layer_and_succeeds(cli, small_demo):
    result = cli("demo")
    assert result.exit_code == 0, result.output
    for what in ("layer 0", "layer 1", "logits", "2e-04", "all rows ok"):
        assert what in result.output
    assert "across a boundary of chunks of 8" in result.output


def test_demo_fails_if_the_reference_differs(cli, small_demo, monkeypatch):
    """One corrupted weight of the reference turns a row red and the exit code to 1."""
    load = small_demo.load_model

    def corrupting(directory, model_class, **options):
        model = load(directory, model_class, **options)
        if model_class is Reference:
            weight = model.get_parameter("model.layers.1.self_attn.o_proj.weight")
            weight[3, 5] += 0.05
        return model

    monkeypatch.setattr(small_demo, "load_model", corrupting)
    result = cli("demo")
    assert result.exit_code == 1, result.output
    rows = [line for line in result.output.splitlines() if "layer" in line and "│" in line]
    assert "ok" in rows[0] and "FAIL" in rows[1], result.output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), CONFIG)


def test_logits_of_blocks_equal_the_reference(cli, checkpoint, tmp_path):
    tokens = make_tokens(CONFIG, [17, 9])
    ids = np.zeros((2, 17), dtype=np.int64)
    mask = np.zeros((2, 17), dtype=np.int64)
    for row, sequence in enumerate(tokens):
        ids[row, 17 - len(sequence) :] = sequence
        mask[row, 17 - len(sequence) :] = 1
    np.savez(tmp_path / "in.npz", input_ids=ids, attention_mask=mask)
    result = cli(
        "logits", "--checkpoint", checkpoint, "--input", tmp_path / "in.npz",
        "--output", tmp_path / "out.npz", "--blocks", "7,9,1",
        "--parity", "hf",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    got = np.load(tmp_path / "out.npz")["logits"]
    assert got.shape == (2, 17, CONFIG.vocab_size) and got.dtype == np.float32
    # A temperature that counts the padding, which says that --parity is followed.
    want = packed(build(Reference, CONFIG, parity="hf"), tokens, slot_offsets=[0, 8])
    assert float((want[1] - packed(build(Reference, CONFIG), tokens)[1]).abs().max()) > 2e-3
    for row in range(2):
        part = torch.from_numpy(got[row][mask[row] == 1])
        assert float((part - want[row]).abs().max()) <= 2e-4


def test_run_continues_a_prompt(cli, checkpoint, monkeypatch):
    from llama4_triton.model import tokenizer

    class Letters:
        def encode(self, text, *, bos=False):
            return [1] * bos + [ord(c) % 97 for c in text]

        def decode(self, ids):
            return "".join(chr(65 + i % 26) for i in ids)

    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda directory: Letters())
    result = cli(
        "run", "--checkpoint", checkpoint, "--prompt", "Hi [b]", "--max-new-tokens", 3,
        "--dtype", "float32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Hi [b]" in result.output  # markup of the prompt is not eaten


def _arrays(tmp_path, **arrays):
    np.savez(tmp_path / "in.npz", **arrays)
    return tmp_path / "in.npz"


def test_errors_are_one_line_and_exit_code_2(cli, checkpoint, tmp_path):
    ids = np.ones((1, 4), dtype=np.int64)
    good = _arrays(tmp_path, input_ids=ids)
    pixels = tmp_path / "pixels"
    pixels.mkdir()
    empty = tmp_path / "empty"
    empty.mkdir()
    output = ["--output", tmp_path / "out.npz"]
    base = ["logits", "--checkpoint", checkpoint]
    cases = [
        (
            [*base, "--input", _arrays(pixels, input_ids=ids, pixel_values=ids), *output],
            "pixel_values need the vision encoder",
        ),
        ([*base, "--input", tmp_path / "none.npz", *output], "No such file"),
        ([*base, "--input", good, *output, "--blocks", "1,x"], "blocks must be integers"),
        ([*base, "--input", good, *output, "--blocks", "3"], "blocks must be .* sum to S = 4"),
        ([*base, "--input", good, *output, "--parity", "trt"], "parity: must be one of default"),
        (["logits", "--checkpoint", empty, "--input", good, *output], "config.json"),
        (["run", "--checkpoint", tmp_path / "no", "--prompt", "x"], "directory must exist"),
    ]
    import re

    for arguments, match in cases:
        result = cli(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        lines = [line for line in result.output.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: "), result.output
        assert re.search(match, lines[0]), lines[0]
    assert not (tmp_path / "out.npz").exists()


def test_run_says_what_would_fit_before_loading(cli, tmp_path, monkeypatch):
    from llama4_triton.model import checkpoint as loading
    from llama4_triton.model import plan, tokenizer

    directory = save_tiny_checkpoint(tmp_path / "c", CONFIG)
    monkeypatch.setattr(plan, "available_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(
        tokenizer, "load_tokenizer",
        lambda d: type("T", (), {"encode": lambda self, t, bos=False: [1] * 5})(),
    )  # fmt: skip
    result = cli("run", "--checkpoint", directory, "--prompt", "x", "--max-new-tokens", 1_000_000)
    assert result.exit_code == 2, result.output
    assert "must fit into the 0.00 GB available" in result.output
    assert "a context of" in result.output and "would fit" in result.output
    monkeypatch.setattr(plan, "available_bytes", lambda device: 100_000)
    result = cli("run", "--checkpoint", directory, "--prompt", "x")
    assert result.exit_code == 2 and "no context fits" in result.output


def _python(code, *args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *code, *args], capture_output=True, text=True, cwd="/", env=env
    )


def test_module_and_missing_dependency():
    result = _python(["-m", "llama4_triton", "--help"])
    assert result.returncode == 0 and "demo" in result.stdout
    code = (
        "import sys; sys.modules['typer'] = None\nfrom llama4_triton.__main__ import main; main()"
    )
    result = _python(["-c", code])
    assert result.returncode == 2
    assert result.stderr == (
        "llama4-triton: the command line needs typer: pip install 'llama4-triton[cli]'\n"
    )


def test_config_json_of_the_demo_checkpoints_is_read_by_transformers(tmp_path):
    from transformers import Llama4TextConfig

    from llama4_triton.model.demo import demo_configs

    for config in demo_configs().values():
        hf = Llama4TextConfig(**json.loads(json.dumps(config.to_hf())))
        assert hf.vocab_size == 202048 and hf.num_hidden_layers == config.num_hidden_layers
