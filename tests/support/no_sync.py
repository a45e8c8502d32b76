"""A guard against host synchronisation.

An op that waits for the GPU cannot be captured into a CUDA graph and stalls the launch queue.
Inside `no_host_sync()` a call that would wait, or copy between host and device, raises
`HostSyncError`. The call is judged, not the device: CPU executors have nothing to wait for, and
the same test must fail there. Kernel launches are let through, whatever executes them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HostSyncError", "no_host_sync"]

# Operators whose result, or whose shape, depends on values which the host must wait for.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy",
    "argwhere", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "histogramdd",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
OWN_KEYS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}

_launching = threading.local()


class HostSyncError(AssertionError):
    """A call that synchronises the host with the device."""


def _refuse(call: str) -> None:
    if not getattr(_launching, "depth", 0):
        raise HostSyncError(f"{call} synchronises the host with the device")


class _Guard(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in WAITING or (name, func._overloadname) in (
            ("repeat_interleave", "Tensor"),
            ("repeat_interleave", "self_Tensor"),
            ("where", "default"),
        ):
            _refuse(f"aten.{name}")
        elif name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            _refuse(f"aten.{name} with a boolean mask")
        if func.namespace not in ("aten", "prim", "prims"):
            # A custom operator: its Python body is what we are here for, so the mode stays on.
            tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
            key = OWN_KEYS.get(tensors[0].device.type) if tensors else None
            if key is not None and not any(type(tensor) is not torch.Tensor for tensor in tensors):
                with self:
                    return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        return func(*args, **kwargs)


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _to_cpu(*args: Any, **kwargs: Any) -> bool:
    def is_cpu(value):
        return isinstance(value, str | torch.device) and torch.device(value).type == "cpu"

    return any(is_cpu(value) for value in (*args[1:], *kwargs.values()))


def _on_a_device(*args: Any, **kwargs: Any) -> bool:
    return kwargs.get("device") is not None


def _of_data_on_a_device(data: Any, *args: Any, **kwargs: Any) -> bool:
    return not isinstance(data, torch.Tensor) and _on_a_device(**kwargs)


# What torch answers for a CPU tensor without asking its dispatcher.
FUNCTIONS = (
    (torch.Tensor, "tolist", _always),
    (torch.Tensor, "numpy", _always),
    (torch.Tensor, "cpu", _always),
    (torch.Tensor, "to", _to_cpu),
    (torch, "tensor", _on_a_device),
    (torch, "as_tensor", _of_data_on_a_device),
    (torch, "asarray", _of_data_on_a_device),
    (torch.cuda, "synchronize", _always),
)


def _guarded(function: Callable[..., Any], call: str, waits: Callable[..., Any]):
    @functools.wraps(function)
    def guarded(*args, **kwargs):
        if waits(*args, **kwargs):
            _refuse(call)
        return function(*args, **kwargs)

    return guarded


def _launch(function: Callable[..., Any]):
    @functools.wraps(function)
    def launch(*args, **kwargs):
        _launching.depth = getattr(_launching, "depth", 0) + 1
        try:
            return function(*args, **kwargs)
        finally:
            _launching.depth -= 1

    return launch


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Raise HostSyncError on any call in the block that waits for the device."""
    patches = [
        (owner, name, _guarded(getattr(owner, name), f"{owner.__name__}.{name}", waits))
        for owner, name, waits in FUNCTIONS
    ]
    for module, owner, name in (
        ("triton.runtime.interpreter", "GridExecutor", "__call__"),
        ("triton.runtime.jit", "JITFunction", "run"),
    ):
        if module in sys.modules:
            executor = getattr(sys.modules[module], owner)
            patches.append((executor, name, _launch(getattr(executor, name))))
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.callback(_restore, owner, name, vars(owner).get(name))
            setattr(owner, name, replacement)
        stack.enter_context(_Guard())
        yield


def _restore(owner: Any, name: str, original: Any) -> None:
    if original is None:
        delattr(owner, name)  # inherited before, as Tensor's methods are from its C base
    else:
        setattr(owner, name, original)
