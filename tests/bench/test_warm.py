"""warm: a cache made without a GPU serves a process that must not compile."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch

from llama4_triton.autotune.compile import CompiledReport
from llama4_triton.autotune.recorder import record
from llama4_triton.bench import warm as module
from llama4_triton.bench.shapes import SCOUT
from llama4_triton.kernels.gather_rows import gather_rows
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.swiglu import swiglu

pytestmark = pytest.mark.compiled_only

# In a fresh process, under a driver that knows an sm_90 and launches nothing.
CHILD = """
import pickle, sys
from llama4_triton.autotune.compile import compiling_for
from llama4_triton.kernels._launch import OPTIONS
from llama4_triton.kernels._no_jit import compiling_refused

launches = pickle.load(open(sys.argv[1], "rb"))
with compiling_for("sm_90"), compiling_refused():
    for x in launches:
        x.jit.warmup(*x.args, grid=x.grid, **OPTIONS, **x.kwargs)
print(len(launches), "found")
"""


def child(cache, launches):
    wanted = cache / "wanted.pickle"
    wanted.write_bytes(pickle.dumps(launches))
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(wanted)],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_ALWAYS_COMPILE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def cuda(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def some_ops():
    x, weight = cuda(16, 5120), cuda(5120)
    rms_norm(x, weight, 1e-5)
    add_rms_norm(x, x, weight, 1e-5)
    swiglu(x, x)


def test_a_warm_cache_needs_no_compiler(tmp_path, monkeypatch):
    """Three binaries stand for the 30 that `warm` compiles."""
    few = record(some_ops).launches
    other = record(lambda: gather_rows(cuda(16, 5120), cuda(4, dtype=torch.int64))).launches
    monkeypatch.setattr(module, "model_launches", lambda *args, **kwargs: few)
    before = os.environ.get("TRITON_CACHE_DIR")
    done = []
    results = module.warm(SCOUT, 8, cache=tmp_path, jobs=1, on_done=lambda *_: done.append(1))
    assert os.environ.get("TRITON_CACHE_DIR") == before
    assert len(results) == len(few) == len(done) == 3
    assert all(isinstance(report, CompiledReport) for report in results.values())

    again = tmp_path / "again"  # what this process has compiled before is written all the same
    module.warm(SCOUT, 8, cache=again, jobs=1)
    assert len(list(again.rglob("*.cubin"))) == len(few)

    result = child(tmp_path, few)
    assert result.returncode == 0, result.stderr
    assert "3 found" in result.stdout

    missing = child(tmp_path, other)
    assert missing.returncode == 1
    assert "LLAMA4_TRITON_NO_JIT" in missing.stderr and "_gather_rows_kernel" in missing.stderr
