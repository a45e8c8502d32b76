"""What a profiler shows of a launch: a name with operator, dtype and tile, its bytes and FLOPs.

    @triton.jit(..., **named("grouped_gemm_swiglu", "x_ptr", _cost))
    def _grouped_gemm_swiglu_kernel(...)

names the binary `grouped_gemm_swiglu_bf16_128x128x64`: the element type of x_ptr, then the BLOCK_*
constexprs in the kernel's order. The Python name of the kernel stays as it is.

`_cost(args)` takes the launch's arguments by name and returns (bytes, FLOPs). Bytes are what must
move at least: each operand and result once. Nothing is read from the device, so where only the
device knows a size, the figure is an upper bound: every expert has a row if there are as many
rows, no row is dropped, every sequence fills what its row of the block table can address. It is
called only for a launch hook, such as Proton's, whose keys these are: name, bytes, flops16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

__all__ = ["describe_to_hooks", "named", "nbytes"]

Cost = Callable[[Mapping[str, Any]], tuple[int, int]]

_metadata: dict[str, Callable[..., dict[str, Any]]] = {}  # by the kernel's Python name


def named(op: str, operand: str, cost: Cost) -> dict[str, Any]:
    """Return the arguments of @triton.jit that name the binaries of `_<op>_kernel`.

    Args:
        operand: the argument, a pointer or a tuple that begins with one, whose element type is in
            the name and is what FLOPs are of.
        cost: (bytes, FLOPs) from the arguments by name.
    """

    def name(specialisation: Any) -> str:
        dtype = re.search(r"(bf|fp|[iu])\d\w*", str(specialisation.signature[operand]))
        constants = specialisation.constants
        tile = "x".join(str(constants[key]) for key in constants if key.startswith("BLOCK_"))
        return "_".join(filter(None, (op, dtype and dtype.group(), tile)))

    def metadata(grid: Any, compiled: Any, args: Mapping[str, Any]) -> dict[str, Any]:
        moved, flops = cost(args)
        bits = 8 * getattr(args[operand], "ptr", args[operand]).element_size()
        return {"name": compiled.name, "bytes": moved, f"flops{bits}": flops}

    _metadata[f"_{op}_kernel"] = metadata
    return {"repr": name}


def describe_to_hooks(kernel: Any) -> None:
    """Give `kernel` its `launch_metadata` if a launch hook is installed.

    Not before: with it Triton collects the arguments of every launch by name, hook or none.
    """
    if triton.knobs.runtime.launch_enter_hook.calls:
        kernel.launch_metadata = _metadata.get(kernel.__name__)


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements of `tensors`; None has none."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
