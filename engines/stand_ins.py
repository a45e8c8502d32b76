"""What an extracted file has instead of paths, selftest records, debugging and launch hooks.

extract.py copies these definitions, as text, for those with the same names in
kernels/_launch.py, _paths.py and _debug.py. They keep what a lone file needs: the device of the
launch, the compiler's options and the refusal to compute wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from llama4_triton.kernels._launch import (
    _CPU_EXECUTOR,
    OPTIONS,
    DeviceProperties,
    _first_device,
    _read_properties,
)

__all__ = ["FEATURES", "device_properties", "features", "is_checked", "launch", "path"]

# What an operator may use beyond pointers and cp.async. Nothing that runs without a GPU models
# "last_arriver" and "warp_specialisation": name them here once they have been right on yours.
FEATURES: frozenset[str] = frozenset()

WRONG_WHEN_INTERPRETED = (torch.bfloat16, torch.float8_e4m3fn)


def features(op: str, device: torch.device) -> frozenset[str]:
    """What `op` may use on `device` beyond pointers and cp.async."""
    return FEATURES


def path(op: str) -> str:
    """The only path there is here; a reference path would do without the architecture."""
    return "fast"


def is_checked(checked: bool, x: torch.Tensor) -> bool:
    """Whether an operator called with `checked` should read values back."""
    return checked


def device_properties(device: torch.device) -> DeviceProperties:
    """Return the properties of `device`, read once per device index at first use."""
    if device.type != "cuda":
        return _CPU_EXECUTOR
    return _read_properties(torch.cuda.current_device() if device.index is None else device.index)


def launch(kernel: Any, grid: tuple[int, ...], /, *args: Any, **kwargs: Any) -> None:
    """Launch `kernel` over `grid` on the device and current stream of its first tensor.

    Raises:
        ValueError: Triton's interpreter, which computes bf16 and fp8 wrongly, was given them.
    """
    if 0 in grid:
        return
    device = _first_device(kernel.__name__, args)
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **OPTIONS, **kwargs)
        return
    if triton.knobs.runtime.interpret:
        parts = [part for arg in args for part in (arg if isinstance(arg, tuple) else (arg,))]
        wrong = [x.dtype for x in parts if getattr(x, "dtype", None) in WRONG_WHEN_INTERPRETED]
        if wrong:
            raise ValueError(f"{kernel.__name__}: tensors must be fp32 or fp16, got {wrong[0]}")
    kernel[grid](*args, **OPTIONS, **kwargs)
