"""Fill a Triton cache with everything a model will ask for, on a machine without a GPU.

    warm(SCOUT, 8, arch="sm_90", cache=Path("cache"))
    TRITON_CACHE_DIR=cache LLAMA4_TRITON_NO_JIT=1 ...       # on the GPU: no compiler is needed

The set is closed: token counts, lengths, batch and cache sizes are arguments that the kernels do
not specialise on, or pad to a few tiles, so what the workloads of shapes.py ask for is all there
is (tests/bench/test_steps.py tries others). A cache serves the versions of Triton and ptxas and the
architecture that it was made with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llama4_triton.autotune.compile import CompiledReport, CompileFailed, compile_all
from llama4_triton.autotune.launches import DEVICES, Binary

from .shapes import TextShape
from .steps import model_launches

__all__ = ["warm"]


def warm(
    shape: TextShape,
    tp: int,
    *,
    cache: Path,
    arch: str = "sm_90",
    fp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    jobs: int = 2,
    on_done: Callable[..., None] | None = None,
) -> dict[Binary, CompiledReport | CompileFailed]:
    """Compile into `cache` every binary that a model asks for on one of `tp` GPUs.

    Args:
        fp8: the dense projections in FP8 as well.
        on_done: called as each binary is done.
    Returns:
        by binary, its report or why it does not compile.
    """
    launches = model_launches(shape, tp, fp8=fp8, dtype=dtype, device=DEVICES[arch])
    cache.mkdir(parents=True, exist_ok=True)
    with _triton_cache(cache):
        return compile_all(launches, arch, jobs=jobs, on_done=on_done)


@contextmanager
def _triton_cache(folder: Path) -> Iterator[None]:
    """Also for the processes that are started meanwhile, which inherit the environment."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = before
