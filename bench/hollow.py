"""Make the inputs of real shapes without the memory that they would take.

    with hollow():
        inputs = case.make(torch.device("cpu"))      # weights of gigabytes: allocated, not filled
    traffic = measure(lambda: case.run(inputs))

Inside, an operation that makes or changes a large tensor of floats or bytes on the CPU is not
computed: its result is memory that nobody has touched, which the system does not provide until
somebody does. Integers and small tensors are real, since routing, page tables and lengths decide
what is touched. What decides although it is large, such as the x that a router reads, is made in

    with computed(): ...
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["computed", "hollow"]

LARGE = 32 * 2**20  # bytes; the logits of 16,384 tokens to 128 experts are a quarter of it


_computed = False


@contextlib.contextmanager
def computed() -> Iterator[None]:
    """Make everything, also inside of `hollow`."""
    global _computed
    before, _computed = _computed, True
    try:
        yield
    finally:
        _computed = before


class hollow(TorchDispatchMode):  # noqa: N801 (a context manager, used like a function)
    """Leave large floating point tensors uncomputed; see the module."""

    def __init__(self, large: int = LARGE):
        super().__init__()
        self.large = large

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if _computed:
            return func(*args, **kwargs)
        if schema.is_mutable:
            target = args[0] if args else None
            if isinstance(target, torch.Tensor) and self._is_large(target):
                return target
            return func(*args, **kwargs)
        if any(value.alias_info is not None for value in schema.returns):
            return func(*args, **kwargs)  # a view
        shapes = self._shapes(func, args, kwargs)
        if shapes is None or not all(self._is_large(out) for out in shapes):
            return func(*args, **kwargs)
        made = [
            torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="cpu")
            for out in shapes
        ]
        return made[0] if len(made) == 1 else tuple(made)

    def _is_large(self, tensor: torch.Tensor) -> bool:
        size = math.prod(tensor.shape) * tensor.element_size()
        # uint8 is what int4 weights are packed into.
        is_data = tensor.is_floating_point() or tensor.dtype == torch.uint8
        return is_data and size >= self.large

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> list[torch.Tensor] | None:
        """The results as meta tensors, or None where these are no large tensors of the CPU."""

        def to_meta(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="meta"
                )
            return value

        named = dict(kwargs)
        if named.get("device") is not None and torch.device(named["device"]).type != "cpu":
            return None
        if "device" in named or any(a.name == "device" for a in func._schema.arguments):
            named["device"] = torch.device("meta")
        if named.get("generator") is not None:
            named["generator"] = None
        try:
            out = func(*tree_map(to_meta, args), **tree_map(to_meta, named))
        except (RuntimeError, NotImplementedError):
            return None
        outs = list(out) if isinstance(out, tuple | list) else [out]
        return outs if outs and all(isinstance(x, torch.Tensor) for x in outs) else None
