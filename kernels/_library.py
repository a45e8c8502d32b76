"""Registration of the operators as `torch.ops.llama4_triton.*`.

Every public operator has two layers: a typed Python function that validates and takes
dataclasses, and below it a flat operator with a schema that torch.compile, CUDA graphs and
exporters understand. `define` registers the second one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ._paths import OPS, path

__all__ = ["define", "implementations"]

# llama4_triton here; a copy of this folder in another package gets that package's name, so that
# several copies live in one process.
NAMESPACE = (__package__ or "").removesuffix(".kernels").replace(".", "_")

# FRAGMENT: one library object for all files, which define their operators one by one.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# By name: what a tool calls that wants an operator's launches rather than its result.
implementations: dict[str, Callable[..., Any]] = {}


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `llama4_triton::<schema>` and return the callable operator.

    Args:
        schema: name, arguments and returns; an argument that is written is marked `Tensor(a!)`.
        implementation: called with real tensors on CPU and CUDA.
        fake: called with fake tensors; returns outputs of the right shape, dtype and device.
    The operator calls `implementation`, or on the reference path that of _reference_path.py.

    Raises:
        RuntimeError: another copy of the kernels in this process registered the name, or
            _paths.py does not list it.
    """
    name = schema[: schema.index("(")]
    if name not in OPS:
        raise RuntimeError(f"{NAMESPACE}::{name} must be listed in kernels/_paths.py")
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        raise RuntimeError(
            f"{NAMESPACE}::{name} is already registered by another copy of these kernels in this "
            "process; import one copy, or give the other's package a name of its own"
        )
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    @functools.wraps(implementation)
    def dispatched(*args: Any) -> Any:
        if path(name) == "reference":
            from . import _reference_path

            return _reference_path.call(name, fake, args)
        return implementation(*args)

    for key in ("CPU", "CUDA"):
        _library.impl(name, dispatched, key)
    implementations[name] = implementation
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
