"""LLAMA4_TRITON_NO_JIT=1: what was compiled without a GPU is launched, what was not is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_kernels

CALLS = """
import os, sys
import torch, triton
import triton.language as tl
from llama4_triton import PagedKV, quantize_rowwise, rms_norm, rope_and_cache

def norm(T=3, H=48, dtype=torch.bfloat16):
    x = torch.empty(T, H, dtype=dtype)
    rms_norm(x, torch.empty(H, dtype=dtype), 1e-5)

def rope():
    x, i = torch.empty(1, 2, 48), torch.empty(1, dtype=torch.int32)
    cache = torch.empty(2, 1, 2, 48)
    kv = PagedKV(k_cache=cache, v_cache=torch.empty_like(cache), block_table=i[None])
    off = dict(rope=None, qk_norm_eps=None, temperature=None)
    rope_and_cache(x, x, x, kv, i, i.long(), **off)

def quantize(M=2):
    quantize_rowwise(torch.empty(M, 64, dtype=torch.bfloat16))
"""

WARM = """
from llama4_triton.autotune.compile import compile_launch
from llama4_triton.autotune.recorder import recorded_launches
for call in (norm, quantize):
    for launch in recorded_launches(call):
        compile_launch(launch, "sm_90")
"""

LAUNCH = """
from llama4_triton.kernels._environment import environment
from support.fake_driver import fake_driver

@triton.jit
def foreign_kernel(x_ptr):
    tl.store(x_ptr, 1.0)

def show(call, *args):
    try:
        call(*args)
        print("launched", len(gpu.launches))
    except Exception as error:
        print(type(error).__name__, error)
    gpu.launches.clear()

with fake_driver() as gpu:
    show(norm)
    show(norm, 4096)  # another number of tokens is the same binary
    show(quantize)
    show(norm, 3, 40)  # rows that are no multiple of 16
    show(norm, 3, 48, torch.float32)
    show(foreign_kernel[(1,)], torch.empty(1))
    show(rope)
    show(norm, 3, 40)  # still refused after another's kernel was compiled
with fake_driver(capability=89) as gpu:
    show(norm)
del os.environ["LLAMA4_TRITON_NO_JIT"]
environment.cache_clear()
with fake_driver() as gpu:
    show(norm, 3, 40)
"""


def _run(code, folder):
    """Run `code` in a new process that may not compile, with Triton's cache in `folder`."""
    script = folder / "script.py"
    script.write_text(CALLS + code)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "LLAMA4_TRITON_NO_JIT": "1",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _binaries(folder):
    return len(list(folder.rglob("*.cubin")))


def test_what_is_in_the_cache_is_launched_and_nothing_else(tmp_path):
    _run(WARM, tmp_path)  # compiling without launching goes on
    assert _binaries(tmp_path) == 2
    said = _run(LAUNCH, tmp_path)
    assert said[:3] == ["launched 1"] * 3
    missing = (
        "RuntimeError _rms_norm_kernel: the kernel must be in Triton's cache, since "
        "LLAMA4_TRITON_NO_JIT=1, got a miss for HAS_RESIDUAL=False BLOCK_H=128 num_warps=1 "
    )
    assert said[3].startswith(missing) and said[4].startswith(missing)
    unaligned = "(*bf16:16, None, *bf16:16, None, *bf16:16, i32, i32, i32:16, i32:16, i32, fp32)"
    assert f"{unaligned} on sm_90 (cache: {tmp_path / 'cache'};" in said[3]
    assert "(*fp32:16, None, *fp32:16, None, *fp32:16, i32:16, i32:16," in said[4]
    assert said[5] == "launched 1"
    assert "i32:16, i32:16, i32:16, 1), i32, i32, i32, i32, None, None)" in said[6]
    assert said[7] == said[3]
    assert said[8].startswith(missing) and " on sm_89 (cache: " in said[8]
    assert said[9] == "launched 1"
    assert _binaries(tmp_path) == 2 + 2  # the foreign one, and the last one
