"""What one call costs the host, counted: Python function calls and torch dispatches.

    with gpu_like():
        print(python_calls(lambda: rms_norm(x, weight, 1e-5)))

Counts are the same on every machine, where times are not. `gpu_like` is the launch path of a GPU
on CPU tensors: Triton's own JIT function, cache and CUDA launcher in Python; only the last call,
which enters the driver's C code, does nothing. A GPU asks torch for the current device where this
asks itself, three functions deep in both.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton.backends.nvidia.driver as nvidia
from support.fake_driver import FakeDriver, fake_driver

from llama4_triton.kernels import _launch

__all__ = ["Cost", "dispatches", "gpu_like", "python_calls"]

NOTHING = "".format  # C code that takes any arguments


# In the place of the C module that only a GPU has; Triton 3.6 compiles one per kernel.
LAUNCHER = (
    {"PyKernelArg": dict}
    if hasattr(nvidia, "PyKernelArg")
    else {
        "compile_module_from_src": lambda **kwargs: SimpleNamespace(launch=NOTHING),
        "library_dirs": list,
    }
)


class _Gpu(FakeDriver):
    def __init__(self, **options: Any):
        super().__init__(**options)
        self.utils.launch = self.utils.build_signature_metadata = NOTHING
        self.launcher_cls = nvidia.CudaLauncher
        # C code on a GPU.
        self.get_current_stream = NOTHING

    # As deep as torch.cuda.current_device.
    def get_current_device(self) -> Any:
        return self._lazy_init()

    def _lazy_init(self) -> Any:
        return self._is_initialized()

    def _is_initialized(self) -> Any:
        return self


@contextlib.contextmanager
def gpu_like() -> Iterator[None]:
    """Launch as on an H100, down to the driver."""
    with (
        patch.multiple(nvidia, **LAUNCHER),
        patch.object(_launch, "_CPU_EXECUTOR", _launch.SM_90),
        fake_driver(kind=_Gpu),
        patch.object(_launch, "_require_cpu_executor", NOTHING),  # which no GPU is asked for
    ):
        yield


@dataclass(frozen=True, slots=True)
class Cost:
    """Calls of Python functions, in order, as file:function; and of them Triton's, per launch."""

    calls: list[str]
    launches: list[int]

    @property
    def total(self) -> int:
        return len(self.calls)

    def __str__(self) -> str:
        names = [call.rsplit("/", 1)[-1] for call in self.calls]
        return f"{self.total} calls, in launches {self.launches}: {' '.join(names)}"


def python_calls(run: Callable[[], object]) -> Cost:
    """What `run` calls, itself left out. Triton's share is all within `kernel[grid](...)`."""
    calls: list[str] = []
    launches: list[int] = []
    stack: list[bool] = []  # whether a frame belongs to a launch

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            name = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
            begins = name.endswith("triton/runtime/jit.py:__getitem__")
            if begins:
                launches.append(0)
            # What __getitem__ returns is a function of its own, of the same file.
            is_triton = begins or (bool(stack) and stack[-1]) or name.endswith("jit.py:<lambda>")
            launches[-1:] = [launches[-1] + is_triton] if launches else []
            calls.append(name)
            stack.append(is_triton)
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return Cost(calls[1:], launches)


def dispatches(run: Callable[[], object]) -> list[str]:
    """The operators that torch's dispatcher enters for `run`, nested ones as well.

    By torch's profiler, which the dispatcher itself tells: a dispatch mode would change the way
    that a call takes.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return [event.name for event in profile.events() if "::" in event.name]
