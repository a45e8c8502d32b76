"""The one function through which every kernel launch goes, and what it needs to know of a device.

(A prepared call, prepared.py, launches again what went through here once.)

Contract of `launch`, held by tests/kernels/test_launch.py:

* the first tensor's device is made current for the launch and the previous one restored after it;
* Triton takes the current stream of that device, so a launch is ordered like any PyTorch op and
  can be captured into a CUDA graph;
* nothing is kept between launches: scratch comes from `empty_workspace`, that is from torch or
  from the caller;
* a CPU tensor is launched only where something can execute it: under Triton's interpreter with
  the shim of interpreter.py in place, or under a driver whose own device is the CPU;
* the compiler's options that all kernels share are stated in `OPTIONS`;
* with LLAMA4_TRITON_DEBUG=1 a launch waits for the device (_debug.py), with
  LLAMA4_TRITON_NO_JIT=1 it never compiles (_no_jit.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.runtime import driver

from ._debug import launch_and_wait
from ._environment import environment
from ._names import describe_to_hooks
from ._no_jit import compiling_refused

__all__ = [
    "SM_90",
    "DeviceProperties",
    "assume_device",
    "assumed_device",
    "current_device",
    "device_properties",
    "empty_workspace",
    "intercept",
    "interceptor",
    "launch",
]

# Stated because the default changes in Triton 3.10, and with it the last bits of every kernel.
OPTIONS = {"enable_fp_fusion": True}

MAX_GRID = 2**31 - 1
MAX_GRID_YZ = 65_535

TURN_ON_INTERPRETER = (
    f"set TRITON_INTERPRET=1, or call {__package__}.interpreter.install() before any kernel is "
    "imported, to run on the CPU"
)

Interceptor = Callable[..., None]
interceptor: ContextVar[Interceptor | None] = ContextVar("llama4_triton_interceptor", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProperties:
    """What a default configuration may depend on; read from the device, never assumed."""

    sm_count: int
    capability: tuple[int, int]
    shared_bytes: int  # per thread block, opt-in maximum
    bandwidth: float  # bytes per second of device memory; 0.0 where unknown

    @property
    def has_mma(self) -> bool:
        """Whether Triton computes tl.dot of 16-bit types on tensor cores."""
        return self.capability >= (8, 0)

    @property
    def has_wide_mma(self) -> bool:
        """Whether tensor cores read shared memory: wgmma, tcgen05. mma.sync reads registers."""
        return 9 <= self.capability[0] < 12


# The GPU that the kernels are written for first, an H100.
SM_90 = DeviceProperties(sm_count=132, capability=(9, 0), shared_bytes=232_448, bandwidth=3.35e12)
# Under a CPU executor there is no device to read. Few SMs keep grids that grow with the SM count
# (split-KV) cheap to interpret.
_CPU_EXECUTOR = replace(SM_90, sm_count=4, bandwidth=0.0)


# What operators of this thread take for their GPU instead of what there is; see `assume_device`.
assumed_device: ContextVar[DeviceProperties | None] = ContextVar(
    "llama4_triton_device", default=None
)


@contextlib.contextmanager
def assume_device(properties: DeviceProperties) -> Iterator[None]:
    """Let operators of this thread choose as on a GPU with `properties`, whatever there is."""
    token = assumed_device.set(properties)
    try:
        yield
    finally:
        assumed_device.reset(token)


def device_properties(device: torch.device) -> DeviceProperties:
    """Return the properties of `device`, read once per device index at first use."""
    if not torch.compiler.is_dynamo_compiling():  # which cannot trace a ContextVar
        assumed = assumed_device.get()
        if assumed is not None:
            return assumed
    if device.type != "cuda":
        return _CPU_EXECUTOR
    return _read_properties(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _read_properties(index: int) -> DeviceProperties:
    properties = torch.cuda.get_device_properties(index)
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    bus_bits = getattr(properties, "memory_bus_width", 0)
    return DeviceProperties(
        sm_count=properties.multi_processor_count,
        capability=(properties.major, properties.minor),
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", 0) or 49_152,
        bandwidth=2.0 * clock_khz * 1e3 * bus_bits / 8,  # double data rate
    )


def launch(kernel: Any, grid: tuple[int, ...], /, *args: Any, **kwargs: Any) -> Any:
    """Launch `kernel` over `grid` on the device and current stream of its first tensor.

    Args:
        kernel: a `@triton.jit` function.
        grid: up to three non-negative sizes; a zero launches nothing.
        args, kwargs: the kernel's arguments, constexprs and num_warps / num_stages.
    Returns:
        what Triton launched, a CompiledKernel; None where nothing was, or not by it.
    Raises:
        ValueError: the grid exceeds what CUDA launches (Triton would skip a product that wraps
            to a non-positive int32 in silence), or the tensors are on the CPU and nothing here
            executes kernels there.
    """
    name = kernel.__name__
    product = 1
    for size in grid:
        product *= size
    if product > MAX_GRID or max(grid[1:], default=0) > MAX_GRID_YZ:
        raise ValueError(
            f"{name}: grid must have a product of at most {MAX_GRID} and y, z of at most "
            f"{MAX_GRID_YZ}, got {grid}"
        )
    if product == 0:
        return None
    intercepted = interceptor.get()
    if intercepted is not None:
        intercepted(kernel, grid, *args, **kwargs)
        return None
    if triton.knobs.runtime.launch_enter_hook.calls:
        describe_to_hooks(kernel)
    first = args[0] if args else None
    while isinstance(first, tuple) and first:
        first = first[0]
    device = first.device if isinstance(first, torch.Tensor) else _first_device(name, args)
    if device.type == "cpu":
        _require_cpu_executor(name)
    elif device.index != current_device():
        with torch.cuda.device(device):
            return _launch_here(kernel, grid, args, kwargs, device)
    settings = environment()
    if settings.debug or settings.no_jit:
        return _launch_here(kernel, grid, args, kwargs, device)
    return kernel[grid](*args, **OPTIONS, **kwargs)


# Not torch.cuda's own, which asks each time whether CUDA is initialised: a tensor on it says so.
current_device: Callable[[], int] = getattr(
    torch._C, "_cuda_getDevice", lambda: torch.cuda.current_device()
)


def _launch_here(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
) -> Any:
    """On the current device, as LLAMA4_TRITON_DEBUG and LLAMA4_TRITON_NO_JIT want it."""

    def run() -> Any:
        return kernel[grid](*args, **OPTIONS, **kwargs)

    settings = environment()
    with compiling_refused() if settings.no_jit else contextlib.nullcontext():
        if settings.debug:
            return launch_and_wait(kernel, grid, args, kwargs, device, run)
        return run()


@contextlib.contextmanager
def intercept(taker: Interceptor | None) -> Iterator[None]:
    """Hand every launch of this thread to `taker(kernel, grid, *args, **kwargs)` instead.

    None: launch as usual, which is what a taker uses to launch itself.
    """
    token = interceptor.set(taker)
    try:
        yield
    finally:
        interceptor.reset(token)


def empty_workspace(
    op: str, numel: int, workspace: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return `numel` uninitialised fp32 elements: the caller's `workspace`, or new memory.

    Raises:
        ValueError: `workspace` is too small, on another device or not contiguous.
        TypeError: `workspace` is not float32.
    """
    if workspace is None:
        return torch.empty(numel, dtype=torch.float32, device=device)
    if workspace.dtype != torch.float32:
        raise TypeError(f"{op}: workspace must be torch.float32, got {workspace.dtype}")
    if workspace.device != device or not workspace.is_contiguous() or workspace.numel() < numel:
        raise ValueError(
            f"{op}: workspace must be contiguous with at least {numel} elements on device "
            f"{device}, got {tuple(workspace.shape)} on {workspace.device}"
        )
    return workspace.view(-1)[:numel]


def _first_device(name: str, args: tuple[Any, ...]) -> torch.device:
    for arg in args:
        first = arg[0] if isinstance(arg, tuple) and arg else arg
        tensor = getattr(first, "base", first)  # a TensorDescriptor holds its tensor in .base
        if isinstance(tensor, torch.Tensor):
            return tensor.device
    raise ValueError(f"{name}: a launch needs at least one tensor argument, got none")


def _require_cpu_executor(name: str) -> None:
    if triton.knobs.runtime.interpret:
        from triton.runtime.interpreter import interpreter_builder

        if not getattr(interpreter_builder, "llama4_triton_shim", False):
            raise ValueError(
                f"{name}: Triton's interpreter computes bf16 and fp8 wrongly without its shim; "
                f"call {__package__}.interpreter.install() before any kernel is imported"
            )
        return
    try:
        on_cpu = driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # Triton: 0 active drivers
        on_cpu = False
    if not on_cpu:
        raise ValueError(
            f"{name}: tensors must be on a CUDA device, got cpu ({TURN_ON_INTERPRETER})"
        )
