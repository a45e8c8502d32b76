"""Checks whose answer is known: a layout of arguments that has passed is not looked at again.

    @remembered
    def _check(op, x, weight, eps): ...      raises, or returns numbers, names and types

A step calls an operator with the same shapes as the step before. What a check may depend on is the
key, so an answer cannot go stale: of tensors everything but values and identity; the operator's
path; the GPU that `assume_device` names; whether gradients are on. Anything else than tensors,
dataclasses of them, numbers, names and types is checked every time, and so is code that is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from torch.nn import Parameter

from ._launch import assumed_device
from ._paths import path

__all__ = ["KEPT", "SCALARS", "TENSORS", "remembered"]

KEPT = 4096  # layouts of one function
TENSORS = frozenset({torch.Tensor, Parameter})
SCALARS = frozenset({type(None), bool, int, float, str, torch.dtype})
UNKNOWN = object()

# Of each dataclass met, what reads its fields; None where it is none of ours.
_readers: dict[type, Callable[[Any], tuple[Any, ...]] | None] = {}

Check = TypeVar("Check", bound=Callable[..., Any])


def remembered(check: Check) -> Check:
    """`check(op, *args)`, called once for all arguments of one layout; see the module."""
    passed: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(check)
    def checked(op: str, *args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return check(op, *args)
        key: list[Any] = [op, path(op), assumed_device.get(), torch.is_grad_enabled()]
        values = list(args)
        for value in values:  # which grows by the fields of what is met
            kind = type(value)
            if kind in TENSORS:
                key.append(value.shape)
                key.append(value.stride())
                key.append(value.storage_offset())
                key.append((value.dtype, value.device, value.requires_grad))
            elif kind in SCALARS:
                key.append(kind)  # 1, 1.0 and True are equal
                key.append(value)
            elif kind is tuple:
                key.append(len(value))
                values.extend(value)
            else:
                read = _readers.get(kind, UNKNOWN)
                if read is UNKNOWN:
                    read = _readers[kind] = _reader(kind)
                if read is None:
                    return check(op, *args)
                key.append(kind)
                values.extend(read(value))  # type: ignore[operator]
        whole = tuple(key)
        answer = passed.get(whole, UNKNOWN)
        if answer is UNKNOWN:
            answer = check(op, *args)
            if len(passed) >= KEPT:
                passed.clear()
            passed[whole] = answer
        return answer

    return cast(Check, checked)


def _reader(kind: type) -> Callable[[Any], tuple[Any, ...]] | None:
    names = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    return attrgetter(*names) if len(names) > 1 else None  # of one name it returns no tuple
