"""extract: one file per operator, the same kernels as the package's, run by a bare Python."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.installs import bare_python

from llama4_triton.engines._sources import Source, references
from llama4_triton.engines.extract import extract
from llama4_triton.kernels import _launch
from llama4_triton.kernels import fp8_matmul as fp8_matmul_file
from llama4_triton.kernels import grouped_gemm as grouped_gemm_file
from llama4_triton.kernels import rms_norm as rms_norm_file
from llama4_triton.kernels._paths import OPS
from llama4_triton.kernels.expert_weights import Experts
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.routing import sort_by_expert

ROOT = Path(__file__).resolve().parents[2]
E4M3 = torch.float8_e4m3fn


def _jit_functions(text):
    """Kernels and their helpers by name."""
    return {
        node.name: node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)
    }


@functools.cache
def _of_the_package():
    files = sorted((ROOT / "kernels").glob("*.py"))
    return [entry for path in files for entry in _jit_functions(path.read_text()).items()]


def _is_same(ours, theirs, names):
    """Whether two trees are equal but for names, which must map to one another in `names`."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, ast.Name):
        return names.setdefault(ours.id, theirs.id) == theirs.id
    if isinstance(ours, list):
        same = [_is_same(a, b, names) for a, b in zip(ours, theirs, strict=False)]
        return len(ours) == len(theirs) and all(same)
    if isinstance(ours, ast.FunctionDef):
        parts = ((ours.args, theirs.args), (ours.body, theirs.body))
        return all(_is_same(a, b, names) for a, b in parts)
    if isinstance(ours, ast.AST):
        return all(
            _is_same(getattr(ours, field), getattr(theirs, field), names) for field in ours._fields
        )
    return ours == theirs


@pytest.mark.no_kernels
@pytest.mark.parametrize("op", OPS)
def test_kernels_are_those_of_the_package(op):
    """The trees of all jit functions, up to names; no two names become one."""
    found = _jit_functions(extract(op))
    assert any(name.endswith("_kernel") for name in found)
    for name, function in found.items():
        for theirs in (theirs for n, theirs in _of_the_package() if name.endswith(n.strip("_"))):
            names = {}
            if _is_same(theirs, function, names) and len(set(names.values())) == len(names):
                break
        else:
            raise AssertionError(f"{name} is not the package's")


@pytest.mark.no_kernels
def test_files_are_clean_and_run_in_a_bare_python(tmp_path):
    folder = tmp_path / "lone"
    folder.mkdir()
    for op in OPS:
        (folder / f"{op}.py").write_text(extract(op))
    # Undefined, unused and redefined names, among others.
    lint = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "E9,F"]
    result = subprocess.run([*lint, folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    script = shutil.copy(ROOT / "tests" / "support" / "use_extracted.py", tmp_path)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LLAMA4_TRITON"))}
    result = subprocess.run(
        [bare_python(tmp_path), script, folder],
        cwd=tmp_path, env={**clean, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(len(OPS))]


@pytest.mark.no_kernels
def test_nothing_of_the_project_is_imported_and_comments_stay():
    text = extract("fp8_matmul")
    imported = {alias.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import)
                for alias in n.names}  # fmt: skip
    assert imported == {"functools", "torch", "triton", "triton.language"}
    assert "from ." not in text and "import llama4_triton" not in text
    for kept in ("# most products that may be summed", "Layout: x_q (M, K)", "Numerics: "):
        assert kept in text
    for left_out in ("define(", "named(", "torch.ops", "_cost"):
        assert left_out not in text


@pytest.mark.no_kernels
def test_references_are_the_names_of_the_module(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(
        "from .near import thing as other\n"
        "import torch as t\n"
        "LIMIT = [1]\n"
        "LIMIT += [2]\n"
        "# Said of it.\n"
        "def f(a: Kind, b=LIMIT, *c):\n"
        "    d = [a for a in other.x if a]\n"
        "    class Inner:\n"
        "        other = d\n"
        "        def g(self): return other, self, later\n"
        "    later = lambda e: e + t.one\n"
        "    return d, b, c, Inner, later, len\n"
    )
    source = Source.read(path)
    assert [len(found) for found in source.definitions.values()] == [2, 1]
    assert source.neighbours == {"other": ("near", "thing")}
    (function,) = source.definitions["f"]
    assert source.first_line(function) == 5
    names = [reference.name for reference in references(function)]
    assert names == ["Kind", "LIMIT", "other", "other", "t", "len"]


@pytest.mark.no_kernels
def test_an_unknown_operator_is_refused():
    with pytest.raises(ValueError, match="extract: OP must be one of .*, got 'rope'"):
        extract("rope")


@pytest.fixture
def lone(tmp_path, monkeypatch):
    """The module of an extracted operator."""

    def load(op):
        name = f"lone_{op}"
        path = tmp_path / f"{name}.py"
        path.write_text(extract(op))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_executed_bits_are_those_of_the_package(device, executor, lone):
    if executor == "interpreter":  # whose fp8 a lone file refuses
        x, weight = torch.randn(3, 37, device=device), torch.randn(37, device=device)
        result = lone("rms_norm").rms_norm(x, weight, 1e-5)
        assert torch.equal(result, rms_norm_file.rms_norm(x, weight, 1e-5))
        return
    x, w = (torch.randn(n, 144, device=device, dtype=torch.bfloat16) for n in (5, 70))
    quantised = [quantize_rowwise(y) for y in (x, w)]
    for (q, scale), y in zip(quantised, (x, w), strict=True):
        q_lone, scale_lone = lone("quantize_rowwise").quantize_rowwise(y)
        assert torch.equal(q.view(torch.uint8), q_lone.view(torch.uint8))
        assert torch.equal(scale, scale_lone)
    args = [*quantised[0], *quantised[1]]
    result = lone("fp8_matmul").fp8_matmul(*args)
    assert torch.equal(result, fp8_matmul_file.fp8_matmul(*args))


def _norm():
    x = torch.empty(3, 48, dtype=torch.bfloat16)
    rms_norm_file.rms_norm(x, x[0], 1e-5)


def _fp8():
    x, scale = torch.empty(16, 256, dtype=E4M3), torch.empty(16)
    fp8_matmul_file.fp8_matmul(x, scale, x, scale)


def _experts():
    x = torch.empty(16, 256, dtype=torch.bfloat16)
    experts = Experts.from_hf(x.new_empty(2, 256, 64), x.new_empty(2, 32, 256))
    ids = torch.zeros(16, 1, dtype=torch.int32)
    grouped_gemm_file.grouped_gemm_swiglu(x, experts, sort_by_expert(ids, ids.float(), 2))


@pytest.mark.compiled_only
@pytest.mark.parametrize(
    "op, call, kernel",
    [
        ("rms_norm", _norm, "_rms_norm_kernel"),
        ("fp8_matmul", _fp8, "_fp8_matmul_kernel"),
        ("grouped_gemm_swiglu", _experts, "_grouped_gemm_swiglu_kernel"),
    ],
    ids=["rms_norm", "fp8_matmul", "grouped_gemm_swiglu"],
)
def test_the_ptx_is_that_of_the_package(op, call, kernel, lone):
    from llama4_triton.autotune.compile import compiling_for
    from llama4_triton.autotune.recorder import recorded_launches

    (launch,) = [found for found in recorded_launches(call) if found.name == kernel]
    with compiling_for("sm_90"):
        ptx = [
            jit.warmup(*launch.args, grid=launch.grid, **_launch.OPTIONS, **launch.kwargs)
            for jit in (launch.jit, getattr(lone(op), kernel))
        ]
    ours, theirs = (_instructions(compiled.asm["ptx"]) for compiled in ptx)
    assert len(ours) > 20 and ours == theirs


def _instructions(ptx):
    """The lines of `ptx` without the kernel's name, comments and positions in the source."""
    (name,) = re.findall(r"\.entry (\w+)\(", ptx)
    code = re.sub(r"//.*", "", ptx[: ptx.index(".section")]).replace(name, "kernel")
    lines = [line.strip() for line in code.splitlines()]
    return [line for line in lines if line and not line.startswith((".loc", ".file", "$L__tmp"))]
