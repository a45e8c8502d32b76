"""LLAMA4_TRITON_NO_JIT=1: a kernel of ours that would have to be compiled is an error.

For servers: what is launched comes from Triton's cache, which `llama4-triton warm` fills, and a
binary that is missing there is reported with its key before anything is compiled. Triton asks a
source for its IR when the binary is neither in memory nor on disk, and at no other time, so that
is where it is stopped, while one of our launches is under way in this thread. Other projects'
kernels, and compiling without launching, go on as before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import triton
from triton.compiler import ASTSource

__all__ = ["compiling_refused"]

_refused: ContextVar[bool] = ContextVar("llama4_triton_no_jit", default=False)


@contextlib.contextmanager
def compiling_refused() -> Iterator[None]:
    """Within the block, in this thread, a kernel that is in no cache raises RuntimeError."""
    _watch()
    token = _refused.set(True)
    try:
        yield
    finally:
        _refused.reset(token)


@functools.cache
def _watch() -> None:
    """Wrap ASTSource.make_ir, once per process and only where it is asked for."""
    original = ASTSource.make_ir

    @functools.wraps(original)
    def make_ir(source: Any, target: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
        if _refused.get():
            raise RuntimeError(
                f"{source.fn.__name__}: the kernel must be in Triton's cache, since "
                f"LLAMA4_TRITON_NO_JIT=1, got a miss for {_key(source, target, options)} "
                f"(cache: {triton.knobs.cache.dir}; fill it with llama4-triton warm)"
            )
        return original(source, target, options, *args, **kwargs)

    ASTSource.make_ir = make_ir


def _key(source: Any, target: Any, options: Any) -> str:
    """Kernel, configuration, specialisation and architecture, in words."""

    def word(path: tuple[int, ...], kind: Any) -> str:
        if isinstance(kind, tuple):
            return f"({', '.join(word((*path, i), part) for i, part in enumerate(kind))})"
        if path in source.constants:  # None, or an integer that is 1
            return str(source.constants[path])
        aligned = any(name == "tt.divisibility" for name, _ in source.attrs.get(path, ()))
        return f"{kind}:16" if aligned else str(kind)

    config, signature = [], []
    for i, parameter in enumerate(source.fn.params):
        if parameter.is_constexpr:
            config.append(f"{parameter.name}={source.constants.get((i,))}")
        else:
            signature.append(word((i,), source.signature[parameter.name]))
    config += [f"num_warps={options.num_warps}", f"num_stages={options.num_stages}"]
    return f"{' '.join(config)} ({', '.join(signature)}) on sm_{target.arch}"
