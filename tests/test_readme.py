"""What the README shows is true: its example runs, its files exist, its operators are exported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import llama4_triton

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(device):
    code, *_ = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    small = code.replace("64, 16, 5120, 1024", "5, 3, 32, 16").replace('"cuda"', f'"{device}"')
    assert "5, 3, 32, 16" in small
    names: dict[str, torch.Tensor] = {}
    exec(small, names)
    out = names["out"]
    assert out.shape == (5, 32) and out.dtype == torch.bfloat16
    assert out.float().isfinite().all() and out.any()


@pytest.mark.no_kernels
def test_every_file_named_exists():
    named = set(re.findall(r"`((?:kernels|model|tests|bench|autotune|engines)/\w+\.py)`", TEXT))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.no_kernels
def test_every_operator_is_in_the_table():
    table = TEXT[TEXT.index("| operator |") : TEXT.index("## Evidence")]
    operators = {
        name for name in llama4_triton.__all__ if name[0].islower() and not name.startswith("_")
    } - {"use", "prepare"}
    assert operators == set(re.findall(r"`(\w+)`", table)) & operators
    assert set(re.findall(r"^\| (.*?) \| ", table, re.MULTILINE)) >= {"`route`, `sort_by_expert`"}


@pytest.mark.no_kernels
def test_the_line_that_patches_transformers_runs(capsys):
    from support.tiny_hf import text_model

    (code,) = (c for c in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "patch(" in c)
    names = dict(model=text_model("scout"))
    exec(code, names)
    assert "Llama4TextMoe by moe" in capsys.readouterr().out
    names["unpatch"](names["model"])
