"""Registration of the operators as `torch.ops.llama4_triton.*`, and how they are reached.

Every public operator has two layers: a typed Python function that validates and takes
dataclasses, and below it a flat operator with a schema that torch.compile, CUDA graphs and
exporters understand. `define` registers the second one and returns what the first one calls:

    plain tensors, nobody looks    the implementation itself, without torch's dispatcher
    anything else                  the registered operator

Anything else is code that is traced, compiled or exported, a dispatch or function mode, a
transform of functorch's, a tensor that is fake, on "meta" or of another subclass. Both ways run the
same implementation, or on the reference path that of _reference_path.py. A profiler sees the
kernels of a plain call, but no event of the operator's name.

What the implementation decides depends on layouts and numbers. The third plain call of one layout
therefore runs the program of the second one (_program.py): the same launches, decided once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._check import refuse_grad
from ._launch import assumed_device, interceptor
from ._paths import OPS, features, path
from ._program import Program, recorded
from ._remembered import KEPT, SCALARS, TENSORS

__all__ = ["define", "dispatched", "implementations", "programs"]

# llama4_triton here; a copy of this folder in another package gets that package's name, so that
# several copies live in one process.
NAMESPACE = (__package__ or "").removesuffix(".kernels").replace(".", "_")

# FRAGMENT: one library object for all files, which define their operators one by one.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# By name: what a tool calls that wants an operator's launches rather than its result.
implementations: dict[str, Callable[..., Any]] = {}

# By name: that, or on the reference path the reference.
dispatched: dict[str, Callable[..., Any]] = {}

# By name and layout: True after one call, after two the program, or False where there is none.
programs: dict[str, dict[tuple[Any, ...], Program | bool]] = {}

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `llama4_triton::<schema>` and return the callable operator.

    Args:
        schema: name, arguments and returns; an argument that is written is marked `Tensor(a!)`.
        implementation: called with real tensors on CPU and CUDA.
        fake: called with fake tensors; returns outputs of the right shape, dtype and device.
    The operator takes its arguments by position.

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
    implementations[name] = implementation
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default
    arguments = [argument.name for argument in registered._schema.arguments]

    def on_its_path(*args: Any) -> Any:
        if path(name) == "reference":
            from . import _reference_path

            return _reference_path.call(name, fake, args)
        return implementation(*args)

    def autograd(keys: torch.DispatchKeySet, *args: Any) -> Any:
        _check_grad(name, arguments, args)
        with torch._C._AutoDispatchBelowAutograd():
            return registered.redispatch(keys & torch._C._after_autograd_keyset, *args)

    for key in ("CPU", "CUDA"):
        _library.impl(name, on_its_path, key)
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    dispatched[name] = on_its_path
    return _plain_call(name, registered, implementation)


def _plain_call(name: str, registered: Any, implementation: Callable[..., Any]) -> Any:
    """What a public function calls for the operator `name`; see the module."""
    seen = programs.setdefault(name, {})
    has_features = bool(OPS[name])
    floats = [i for i, a in enumerate(registered._schema.arguments) if "float" in str(a.type)]

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_dynamo_compiling()
            or _dispatch_modes()
            or _function_modes()
            or _tracing_state() is not None
            or _transform() is not None
        ):
            return registered(*args)
        for i in floats:  # an integer given for one is made one, as the dispatcher does
            kind = type(args[i])
            if kind is int:
                args = (*args[:i], float(args[i]), *args[i + 1 :])
            elif kind is list:
                args = (*args[:i], list(map(float, args[i])), *args[i + 1 :])
        grads = torch.is_grad_enabled()
        given: list[torch.Tensor] = []
        key: list[Any] = [assumed_device.get()]
        values = list(args)
        for value in values:  # which grows by the parts of lists
            kind = type(value)
            if kind in TENSORS:
                if (grads and value.requires_grad) or value.is_meta:
                    return registered(*args)
                given.append(value)
                key.append(value.shape)
                key.append(value.stride())
                key.append(value.storage_offset())
                key.append((value.dtype, value.device))
            elif kind in SCALARS:
                key.append(kind)  # 1, 1.0 and True are equal
                key.append(value)
            elif kind is list or kind is tuple:
                key.append(len(value))
                values.extend(value)
            else:
                return registered(*args)
        chosen = path(name)
        if chosen == "reference" or interceptor.get() is not None:
            return dispatched[name](*args)
        key.append(features(name, given[0].device) if has_features else chosen)
        whole = tuple(key)
        program = seen.get(whole)
        if isinstance(program, Program):
            return program.run(given)
        if program is None:
            if len(seen) >= KEPT:
                seen.clear()
            seen[whole] = True
        elif program:  # the second time: there may be more
            recording = recorded(lambda: implementation(*args), given)
            seen[whole] = recording.program or False
            return recording.result
        return implementation(*args)

    return call


def _check_grad(op: str, names: list[str], args: tuple[Any, ...]) -> None:
    """Refuse what autograd would have to follow: the kernels have no derivatives."""
    if not torch.is_grad_enabled():
        return
    for name, arg in zip(names, args, strict=False):
        for part in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(part, torch.Tensor) and part.requires_grad:
                refuse_grad(op, name)
