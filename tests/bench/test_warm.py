"""warm: a cache made without a GPU serves a process that must not compile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llama4_triton.autotune.compile import CompiledReport
from llama4_triton.bench import warm as module
from llama4_triton.bench.shapes import SCOUT
from llama4_triton.bench.steps import model_launches

pytestmark = pytest.mark.compiled_only

# In a fresh process, under a driver that knows an sm_90 and launches nothing.
CHILD = """
import sys
from llama4_triton.autotune.compile import compiling_for
from llama4_triton.bench.steps import model_launches
from llama4_triton.bench.shapes import SCOUT
from llama4_triton.kernels._launch import OPTIONS
from llama4_triton.kernels._no_jit import compiling_refused

launches = [x for x in model_launches(SCOUT, 8) if x.name in sys.argv[1:]]
with compiling_for("sm_90"), compiling_refused():
    for x in launches:
        x.jit.warmup(*x.args, grid=x.grid, **OPTIONS, **x.kwargs)
print(len(launches), "found")
"""


def child(cache, *kernels):
    return subprocess.run(
        [sys.executable, "-c", CHILD, *kernels],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_ALWAYS_COMPILE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_warm_cache_needs_no_compiler(tmp_path, monkeypatch):
    """Three kernels stand for the 30 that `warm` compiles."""
    few = [
        x
        for x in model_launches(SCOUT, 8)
        if x.name in ("_rms_norm_kernel", "_swiglu_kernel", "_scan_kernel")
    ]
    monkeypatch.setattr(module, "model_launches", lambda *args, **kwargs: few)
    before = os.environ.get("TRITON_CACHE_DIR")
    done = []
    results = module.warm(SCOUT, 8, cache=tmp_path, jobs=1, on_done=lambda *_: done.append(1))
    assert os.environ.get("TRITON_CACHE_DIR") == before
    assert len(results) == len(few) == len(done)
    assert all(isinstance(report, CompiledReport) for report in results.values())

    result = child(tmp_path, "_rms_norm_kernel", "_swiglu_kernel", "_scan_kernel")
    assert result.returncode == 0, result.stderr
    assert f"{len(few)} found" in result.stdout

    missing = child(tmp_path, "_gather_rows_kernel")
    assert missing.returncode == 1
    assert "LLAMA4_TRITON_NO_JIT" in missing.stderr and "_gather_rows_kernel" in missing.stderr
