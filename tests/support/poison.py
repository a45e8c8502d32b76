"""Poisoned memory: torch.empty that never gives zeros by luck.

Inside `poisoned_empty()` every uninitialised tensor made from Python is filled with a value that
shows: NaN for floats (in fp8 too), the lowest value for signed integers, 0xAA... for unsigned
ones, True for bool. An output element that no program writes, or a scratch element read before it
is written, then spoils the result. Fake and meta tensors are left alone.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator

import torch
import torch.utils._device
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["poison", "poisoned_empty"]

FACTORIES = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill `tensor`, in place, with the poison of its dtype and return it."""
    if type(tensor) is not torch.Tensor or tensor.is_meta or tensor.numel() == 0:
        return tensor  # a subclass (a fake tensor, a parameter being traced) has no bytes of ours
    if tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return tensor
    with torch.no_grad(), _disable_current_modes():  # nobody's work: memory has some value
        _fill(tensor)
    return tensor


def _fill(tensor: torch.Tensor) -> None:
    dtype = tensor.dtype
    if dtype.is_floating_point and dtype.itemsize == 1:
        tensor.view(torch.uint8).fill_(0x7F)  # NaN in e4m3fn and e5m2
    elif dtype.is_floating_point or dtype.is_complex:
        tensor.fill_(float("nan"))
    elif dtype == torch.bool:
        tensor.fill_(True)
    elif dtype.is_signed:
        tensor.fill_(torch.iinfo(dtype).min)
    else:
        tensor.view(getattr(torch, f"int{8 * dtype.itemsize}")).fill_(
            int.from_bytes(b"\xaa" * dtype.itemsize, "little", signed=True)
        )


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Poison what torch's factories of uninitialised tensors return, until the end of the block."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in FACTORIES]
    # `with torch.device(...)` acts on the functions that torch lists at its first use: ours must
    # not be among them, or it would not know torch.empty any more once they are gone.
    torch.utils._device._device_constructors()
    for owner, name, original in originals:
        setattr(owner, name, _poisoning(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        # torch.compile lists torch's functions at its first use, too.
        if "torch._dynamo.trace_rules" in sys.modules:
            sys.modules["torch._dynamo.trace_rules"].clear_lru_cache()


def _poisoning(factory):
    @functools.wraps(factory)
    def poisoned(*args, **kwargs):
        return poison(factory(*args, **kwargs))

    return poisoned
