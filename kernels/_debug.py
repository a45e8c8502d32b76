"""LLAMA4_TRITON_DEBUG=1: checked arguments, synchronous launches, and a trace when one fails.

Operators read back what they would otherwise trust (their `checked=`), every launch waits for the
device, so that a fault belongs to the launch that is reported, and the last launches are printed:

    llama4-triton: the last 2 launches, the failed one last
      1  _rms_norm_kernel grid (4,)
         x_ptr bf16 (4, 5120):(5120, 1)  ...  eps 1e-05  BLOCK_H=2048 num_warps=8

A CUDA graph that is being captured and code that is being traced cannot wait: they do not.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from ._environment import environment

__all__ = ["is_checked", "launch_and_wait"]

KEPT = 20
_history: deque[str] = deque(maxlen=KEPT)  # text: no tensor is kept alive


def is_checked(checked: bool, x: torch.Tensor) -> bool:
    """Whether an operator called with `checked` on `x` and its like should read values back."""
    if checked or torch.compiler.is_dynamo_compiling() or not environment().debug:
        return checked
    return not is_fake(x) and not _is_captured(x.device)


def launch_and_wait(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    run: Callable[[], Any],
) -> Any:
    """Call `run`, which launches `kernel`, wait for the device, and say what failed.

    Raises:
        RuntimeError: from whatever the launch or the device raised, naming the launch.
    """
    name = kernel.__name__
    _history.append(_described(kernel, grid, args, kwargs))
    try:
        launched = run()
        if device.type == "cuda" and not _is_captured(device):
            torch.cuda.synchronize(device)
        return launched
    except BaseException as error:  # an interrupt too: it may be what ends a hang
        print(_trace(), file=sys.stderr, flush=True)
        if not isinstance(error, Exception):
            raise
        raise RuntimeError(
            f"{name}: the launch must succeed, got {type(error).__name__}: {error} "
            "(LLAMA4_TRITON_DEBUG: the last launches are on stderr)"
        ) from error


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _trace() -> str:
    launches = list(_history)  # at once: other threads may be launching
    lines = [f"llama4-triton: the last {len(launches)} launches, the failed one last"]
    lines += [f"  {i:2} {text}" for i, text in enumerate(launches, 1)]
    return "\n".join(lines)


def _described(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    names = getattr(kernel, "arg_names", ())
    named = [*names[: len(args)], *("" for _ in range(len(args) - len(names)))]
    values = [f"{name} {_value(arg)}".strip() for name, arg in zip(named, args, strict=False)]
    config = " ".join(f"{name}={value}" for name, value in kwargs.items())
    return f"{kernel.__name__} grid {grid}\n       {'  '.join(values)}\n       {config}"


def _value(arg: Any) -> str:
    tensor = getattr(arg, "base", arg)
    if isinstance(tensor, torch.Tensor):
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"{kind} {tuple(tensor.shape)}:{tuple(tensor.stride())}"
    return str(arg)
