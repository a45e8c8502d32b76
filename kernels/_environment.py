"""The project's environment variables: what they are, read here and nowhere else.

    LLAMA4_TRITON_PATH     which path operators take: "safe", or "moe=safe,rms_norm=reference"
    LLAMA4_TRITON_DEBUG    1: checked arguments, synchronous launches, the last launches on failure
    LLAMA4_TRITON_NO_JIT   1: a kernel that would have to be compiled is an error
    LLAMA4_TRITON_HOME     folder of the selftest's records; default ~/.cache/llama4-triton

They are read at first use, once per process: no operator waits for the environment.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Environment", "environment"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    path: str  # as it was given; _paths.py understands it
    debug: bool
    no_jit: bool
    home: Path


@functools.cache
def environment() -> Environment:
    """Return what the environment said when it was first asked; `cache_clear()` asks again.

    Raises:
        ValueError: a switch is neither 0 nor 1.
    """
    home = os.environ.get("LLAMA4_TRITON_HOME") or Path("~/.cache/llama4-triton").expanduser()
    return Environment(
        path=os.environ.get("LLAMA4_TRITON_PATH", ""),
        debug=_switch("LLAMA4_TRITON_DEBUG"),
        no_jit=_switch("LLAMA4_TRITON_NO_JIT"),
        home=Path(home),
    )


def _switch(name: str) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"environment: {name} must be 0 or 1, got {value!r}")
    return value == "1"
