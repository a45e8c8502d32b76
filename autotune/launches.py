"""Descriptions of kernel launches: what was asked for, without the memory it would work on.

A `Launch` names its kernel by import path and its tensors by dtype, shape, strides and alignment,
so that it can be pickled, compared, compiled in another process and printed. `Launch.binary()` is
the part of it that Triton compiles apart: two launches with equal binaries run the same machine
code. The rules are those of Triton's JIT: a constexpr is part of the code; so are the type of every
argument, the divisibility by 16 of each pointer and each integer, and an integer that equals 1,
unless the kernel lists the argument under do_not_specialize.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from llama4_triton.kernels._launch import DeviceProperties

__all__ = ["DEVICES", "H100", "Binary", "Launch", "TensorSpec", "rebuilt"]

# SMs and bytes per second of the largest GPU of each architecture that is commonly rented; shared
# memory per block from the CUDA C++ programming guide. Source of the rest: NVIDIA's data sheets.
DEVICES = {
    "sm_75": DeviceProperties(  # T4
        sm_count=40, capability=(7, 5), shared_bytes=65_536, bandwidth=320e9
    ),
    "sm_80": DeviceProperties(  # A100 80 GB SXM
        sm_count=108, capability=(8, 0), shared_bytes=166_912, bandwidth=2.04e12
    ),
    "sm_86": DeviceProperties(  # A40
        sm_count=84, capability=(8, 6), shared_bytes=101_376, bandwidth=696e9
    ),
    "sm_89": DeviceProperties(  # L40S
        sm_count=142, capability=(8, 9), shared_bytes=101_376, bandwidth=864e9
    ),
    "sm_90": DeviceProperties(  # H100 80 GB SXM
        sm_count=132, capability=(9, 0), shared_bytes=232_448, bandwidth=3.35e12
    ),
    "sm_100": DeviceProperties(  # B200
        sm_count=148, capability=(10, 0), shared_bytes=232_448, bandwidth=8e12
    ),
    "sm_120": DeviceProperties(  # RTX PRO 6000 Blackwell
        sm_count=188, capability=(12, 0), shared_bytes=101_376, bandwidth=1.79e12
    ),
}
H100 = DEVICES["sm_90"]

NO_CONSTEXPRS = ("num_warps", "num_stages")  # among the keywords of a launch

DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """What a launch needs to know of a tensor that is not there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    offset: int = 0  # bytes from the start of the storage, which allocators align to 512
    storage: int = 0  # equal within one recording for views of one allocation

    @classmethod
    def of(cls, x: torch.Tensor) -> TensorSpec:
        return cls(
            dtype=x.dtype,
            shape=tuple(x.shape),
            strides=tuple(x.stride()),
            offset=int(x.storage_offset()) * x.dtype.itemsize,
            storage=x.untyped_storage()._cdata,
        )

    def data_ptr(self) -> int:
        """An address of the same alignment; Triton's JIT asks for nothing else when it compiles."""
        return self.offset

    def stride(self, dim: int | None = None) -> Any:
        return self.strides if dim is None else self.strides[dim]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the last element."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Binary:
    """What Triton compiles apart, for one architecture."""

    kernel: str  # "package.module:_kernel"
    config: tuple[tuple[str, str], ...]  # constexprs, as text
    signature: tuple[str, ...]  # "*bf16:16", "i32:16", "i32", "1", "fp32" per other argument
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.rpartition(":")[2]

    def __str__(self) -> str:
        config = " ".join(f"{name}={value}" for name, value in self.config)
        return (
            f"{self.name} {config} num_warps={self.num_warps} num_stages={self.num_stages} "
            f"({', '.join(self.signature)})"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One call of `_launch.launch`, described."""

    kernel: str  # "package.module:_kernel"
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # TensorSpec, TensorDescriptor over one, int, float, bool or None
    kwargs: Mapping[str, Any]  # constexprs, num_warps, num_stages

    @classmethod
    def of(
        cls, kernel: Any, grid: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Launch:
        """Describe a launch of a @triton.jit function on real or fake tensors."""
        fn = kernel.fn
        path = f"{fn.__module__}:{fn.__qualname__}"
        _kernels.setdefault(path, kernel)
        return cls(
            kernel=path,
            grid=tuple(grid),
            args=tuple(_described(arg) for arg in args),
            kwargs=dict(kwargs),
        )

    @property
    def name(self) -> str:
        return self.kernel.rpartition(":")[2].rpartition(".")[2]

    @property
    def jit(self) -> Any:
        """The @triton.jit function; imported if this process has not met it yet."""
        return _kernel(self.kernel)

    @property
    def num_warps(self) -> int:
        return self.kwargs.get("num_warps", 4)  # Triton's default

    @property
    def num_stages(self) -> int:
        return self.kwargs.get("num_stages", 3)  # Triton's default on NVIDIA

    @property
    def constexprs(self) -> dict[str, Any]:
        return {k: v for k, v in self.kwargs.items() if k not in NO_CONSTEXPRS}

    def arguments(self) -> dict[str, Any]:
        """Every argument by its name, in the kernel's order."""
        bound = _signature(self.kernel).bind(*self.args, **self.constexprs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def misaligned(self) -> list[str]:
        """Arguments that keep 16-byte accesses away: "x_ptr", "w.stride_n".

        Scales are read one by one, so that their strides do not count.
        """
        found = []
        for parameter, (name, value) in zip(self.jit.params, self.arguments().items(), strict=True):
            if parameter.is_constexpr or name == "strides_scale":
                continue
            free = parameter.do_not_specialize
            free_alignment = parameter.do_not_specialize_on_alignment
            fields = getattr(value, "_fields", None)
            parts = {name: value} if fields is None else {
                f"{name}.{field}": part
                for field, part in zip(fields, value, strict=True)
                if not field.startswith("scale_stride")
            }  # fmt: skip
            for part_name, part in parts.items():
                if "!" in _specialised(part, free, free_alignment):
                    found.append(part_name)
        return found

    def binary(self) -> Binary:
        """What Triton would compile for this launch.

        Raises:
            RuntimeError: the kernel was decorated for Triton's interpreter.
        """
        jit = self.jit
        if not isinstance(jit, triton.runtime.JITFunction):
            raise RuntimeError(
                f"{self.name}: kernel must be a compiled JIT function, got {type(jit).__name__} "
                "(Triton's interpreter is on: use another process)"
            )
        config, signature = [], []
        for parameter, (name, value) in zip(jit.params, self.arguments().items(), strict=True):
            if parameter.is_constexpr:
                config.append((name, str(value)))
            else:
                free = parameter.do_not_specialize
                signature.append(
                    _specialised(value, free, parameter.do_not_specialize_on_alignment)
                )
        return Binary(
            kernel=self.kernel,
            config=tuple(config),
            signature=tuple(signature),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


_kernels: dict[str, Any] = {}


def _kernel(path: str) -> Any:
    if path not in _kernels:
        module, _, name = path.partition(":")
        _kernels[path] = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    return _kernels[path]


@functools.cache
def _signature(path: str) -> inspect.Signature:
    return inspect.signature(_kernel(path).fn)


def _described(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return TensorSpec.of(arg)
    if hasattr(arg, "base") and hasattr(arg, "block_shape"):  # a TensorDescriptor
        return type(arg)(TensorSpec.of(arg.base), arg.shape, arg.strides, arg.block_shape)
    if isinstance(arg, tuple):
        return rebuilt(arg, [_described(part) for part in arg])
    return arg


def rebuilt(like: tuple[Any, ...], parts: list[Any]) -> tuple[Any, ...]:
    """A tuple of the type of `like`, which kernels may read by field names."""
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def _specialised(value: Any, free: bool, free_alignment: bool) -> str:
    """Triton's specialisation of one argument; "!" marks what keeps 16-byte accesses away."""
    if value is None:
        return "None"
    if isinstance(value, tuple):
        return f"({', '.join(_specialised(part, free, free_alignment) for part in value)})"
    if hasattr(value, "block_shape"):
        return f"descriptor<{DTYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, TensorSpec):
        name = "*" + DTYPE_NAMES[value.dtype]
        if free or free_alignment:
            return name
        return f"{name}:16" if value.data_ptr() % 16 == 0 else f"{name}!"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    if free:
        return kind
    if value == 1:
        return "1"
    if free_alignment:
        return kind
    return f"{kind}:16" if value % 16 == 0 else f"{kind}!"
