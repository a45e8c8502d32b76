"""The MoE kernels of other engines, taken from their wheels as they are.

    pip download --no-deps vllm==0.33.0 sglang==0.5.23          # 375 MB
    unzip vllm-*.whl 'vllm/model_executor/layers/fused_moe/fused_moe.py' -d SITE
    unzip sglang-*.whl 'sglang/kernels/ops/moe/fused_moe_triton_kernels.py' -d SITE
    LLAMA4_TRITON_PEERS=SITE pytest --long tests/peers

One file of each is needed; an installed engine's site-packages does as well. What that file imports
from its own engine is replaced by stubs, which are false and whose functions say False, so that the
jit function and the wrapper that launches it are theirs and everything around is absent: on the
bf16 path that means no FP8, no tensor descriptors and no programmatic dependent launch.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

__all__ = ["PEERS", "align", "launches_of", "load"]

FILES = {
    "vllm": "vllm/model_executor/layers/fused_moe/fused_moe.py",
    "sglang": "sglang/kernels/ops/moe/fused_moe_triton_kernels.py",
}
PEERS = tuple(FILES)


class Stub(types.ModuleType):
    """Anything an engine's file may want of its engine."""

    def __init__(self, name="stub"):
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return dict(triton=triton, tl=tl).get(name) or Stub(name)

    def __call__(self, *args, **kwargs):
        return False

    def __bool__(self):
        return False

    def __or__(self, other):
        return self

    __ror__ = __or__


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FILES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _stubs():
    kept = {name: m for name, m in sys.modules.items() if name.split(".")[0] in FILES}
    for name in kept:
        del sys.modules[name]
    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in FILES]:
            del sys.modules[name]
        sys.modules.update(kept)


def load(peer: str) -> types.ModuleType:
    """The engine's file as a module; skips the test where it is not there."""
    folder = os.environ.get("LLAMA4_TRITON_PEERS")
    path = Path(folder or "", FILES[peer])
    if not folder or not path.is_file():
        pytest.skip(f"LLAMA4_TRITON_PEERS names no folder with {FILES[peer]} (support/peers.py)")
    name = f"peer_{peer}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        with _stubs():
            spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def align(ids: torch.Tensor, experts: int, block_m: int):
    """What the engines' CUDA kernel moe_align_block_size makes of (T, 1) ids, in plain torch."""
    slots = ids.numel()
    capacity = slots + experts * (block_m - 1)
    sorted_ids = torch.full((capacity,), slots, dtype=torch.int32)
    expert_ids = torch.zeros(-(-capacity // block_m), dtype=torch.int32)
    at = 0
    for expert in range(experts):
        mine = (ids.flatten() == expert).nonzero().flatten().to(torch.int32)
        sorted_ids[at : at + len(mine)] = mine
        blocks = -(-len(mine) // block_m)
        expert_ids[at // block_m : at // block_m + blocks] = expert
        at += blocks * block_m
    return sorted_ids, expert_ids, torch.tensor([at], dtype=torch.int32)


def _gemm(peer, module, a, w, c, ids, weights, table, config, mul, dtype):
    flags = dict(
        use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False,
        per_channel_quant=False,
    )  # fmt: skip
    if peer == "vllm":
        module.invoke_fused_moe_triton_kernel(
            a, w, c, None, None, weights, *table, mul, 1, config, dtype, **flags
        )
    else:
        module.invoke_fused_moe_kernel(
            a, w, None, c, None, None, None, weights, ids, *table, mul, 1, config, dtype, **flags
        )


def launches_of(
    peer: str, x, w13, w2, ids, weights, config: dict[str, int]
) -> Callable[[], torch.Tensor]:
    """Both GEMMs of one MoE layer as `peer` launches them; the activation between is left out.

    x (T, H), w13 (E, 2F, H), w2 (E, H, F), ids (T, 1) int32, weights (T, 1) fp32.
    """
    module = load(peer)
    T, (E, two_f, _) = len(x), w13.shape
    table = align(ids, E, config["BLOCK_SIZE_M"])
    up, z = torch.empty(T, 1, two_f, dtype=x.dtype), torch.empty(T, two_f // 2, dtype=x.dtype)
    out = torch.empty(T, 1, x.shape[1], dtype=x.dtype)
    dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]

    def run():
        _gemm(peer, module, x, w13, up, ids, weights, table, config, True, dtype)
        _gemm(peer, module, z, w2, out, ids, weights, table, config, False, dtype)
        return out

    return run
