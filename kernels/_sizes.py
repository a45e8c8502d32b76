"""Arithmetic of sizes on the host: what may be a symbol, and what is done once per size.

    16 + 48 * above(mean, 16)        16 rows up to a mean of 16, 64 from there on

torch.compile traces sizes as symbols. A comparison in Python decides, and a graph of one decision
serves only the sizes that decide alike. An expression stays one, so the graph serves every size.
Most operators need none of this: their tiles are chosen inside the flat operator, from the numbers
of the call. Where a choice is the size of a result, the fake implementation must know it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import lru_cache
from typing import Any

import torch
import triton

__all__ = ["above", "flat", "largest", "power_of_2", "smallest", "tiles"]


def above(size: int, limit: int) -> int:
    """1 where `size` is greater than `limit`, else 0."""
    if type(size) is int and not torch.compiler.is_dynamo_compiling():
        return int(size > limit)
    return torch.sym_min(1, torch.sym_max(0, size - limit))


def smallest(first: int, second: int) -> int:
    """`min`, which does not decide which of two symbols is the smaller one."""
    return torch.sym_min(first, second)


def largest(first: int, second: int) -> int:
    """`max` likewise."""
    return torch.sym_max(first, second)


@lru_cache(maxsize=4096)
def power_of_2(size: int) -> int:
    """The smallest power of two that is not less; of a number, not of a symbol."""
    return int(triton.next_power_of_2(size))


def flat(config: Any) -> list[int]:
    """A configuration as the flat operators take it: its numbers in order."""
    return [int(value) for value in astuple(config)]


def tiles(default_config: Callable[..., Any]) -> Callable[..., tuple[int, ...]]:
    """`default_config` of numbers, types and devices, as `flat` has it, and remembered."""

    @lru_cache(maxsize=4096)
    def remembered(*args: Any, **kwargs: Any) -> tuple[int, ...]:
        return tuple(flat(default_config(*args, **kwargs)))

    return remembered
