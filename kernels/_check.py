"""Argument checks shared by the operators; one message format: `op: argument must ..., got ...`.

Checks look at shapes, strides, dtypes and devices only. They never read a tensor's values, so
they cost no synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from ._launch import device_properties
from ._paths import path

__all__ = [
    "FLOATS",
    "UnsupportedArchitectureError",
    "check_architecture",
    "check_devices",
    "check_index",
    "check_tensor",
    "check_writable",
    "has_aligned_strides",
    "is_aligned",
    "refuse_grad",
    "require",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# The oldest GPUs that have a type, and what to use before.
_NEEDED = {
    torch.bfloat16: ((8, 0), "use float16"),
    torch.float8_e4m3fn: ((8, 9), "keep the weights in bfloat16 and use torch.matmul"),
}


class UnsupportedArchitectureError(RuntimeError):
    """The GPU lacks what an operator needs; the message names both and what to use instead."""


def require(
    condition: bool, op: str, must: str, got: object, error: type[Exception] = ValueError
) -> None:
    """Raise `error("op: must, got ...")` unless `condition` holds; `must` names the argument."""
    if not condition:
        raise error(f"{op}: {must}, got {got}")


def check_tensor(
    op: str,
    name: str,
    x: torch.Tensor,
    shape: Sequence[int | str | None],
    dtypes: Sequence[torch.dtype],
    *,
    unit_last_stride: bool = True,
) -> None:
    """Check that `x` is a tensor of `shape`, one of `dtypes`, and dense in its last dimension.

    Args:
        shape: one entry per dimension: an int is required, a str or None only names a free one.
    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another rank, shape or last stride.
        NotImplementedError: `x` takes part in autograd; the kernels are for inference only.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {allowed}, got {x.dtype}")
    if x.ndim != len(shape) or any(
        isinstance(want, int) and want != have for want, have in zip(shape, x.shape, strict=True)
    ):
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{op}: {name} must have shape ({wanted}), got {tuple(x.shape)}")
    if unit_last_stride and x.ndim and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} must be contiguous in its last dimension, got strides {x.stride()}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        refuse_grad(op, name)


def refuse_grad(op: str, name: str) -> NoReturn:
    """Raise NotImplementedError for the argument `name`, which takes part in autograd."""
    raise NotImplementedError(
        f"{op}: {name} must not require grad, got requires_grad=True (inference only: call under "
        "torch.no_grad())"
    )


def check_index(op: str, name: str, x: torch.Tensor, shape: Sequence[int | str | None]) -> None:
    """Check an int32 index tensor."""
    check_tensor(op, name, x, shape, (torch.int32,))


def check_writable(op: str, name: str, x: torch.Tensor) -> None:
    """Check that no two indices of `x` share memory, so that each write has one meaning."""
    steps = list(zip(x.stride(), x.shape, strict=True))
    for i, (stride, size) in enumerate(steps):
        reach = 1  # of the smaller steps; compared, not sorted, which symbols cannot be
        for j, (other, length) in enumerate(steps):
            if other < stride or (other == stride and j < i):
                reach += other * (length - 1)
        if size > 1 and stride < reach:
            raise ValueError(f"{op}: {name} must not overlap itself, got strides {x.stride()}")


def check_devices(op: str, **tensors: torch.Tensor | None) -> None:
    """Check that all tensors given are on one device."""
    present = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(present.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {got}")


def check_architecture(op: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Check that the GPU of `x` has `dtype`, by default x's; the reference path does without.

    Raises:
        UnsupportedArchitectureError: bfloat16 before sm_80, float8_e4m3fn before sm_89.
    """
    dtype = dtype or x.dtype
    if dtype not in _NEEDED:
        return
    oldest, instead = _NEEDED[dtype]
    capability = device_properties(x.device).capability
    if capability < oldest and path(op) != "reference":
        name = str(dtype).removeprefix("torch.")
        raise UnsupportedArchitectureError(
            f"{op}: the device must be sm_{oldest[0]}{oldest[1]} or newer for {name}, got "
            f"sm_{capability[0]}{capability[1]} ({instead})"
        )


def is_aligned(sizes: Sequence[int], *tensors: torch.Tensor) -> bool:
    """Whether a kernel on these is compiled to move 16 bytes at a time.

    Triton knows of an integer whether it is a multiple of 16, and of an address likewise. Storages
    are taken to start at one, as every allocator of torch's makes them; torch.compile cannot trace
    an offset into one, so code that it compiles takes that as even too.
    """
    if not has_aligned_strides(sizes, *tensors):
        return False
    if torch.compiler.is_dynamo_compiling():
        return True
    return not any(x.storage_offset() * x.element_size() % 16 for x in tensors)


def has_aligned_strides(sizes: Sequence[int], *tensors: torch.Tensor) -> bool:
    """`is_aligned` as far as sizes and strides go: the same in code that torch.compile traces."""
    strides = [step for x in tensors for step in x.stride() if step != 1]
    return not any(number % 16 for number in (*sizes, *strides))
