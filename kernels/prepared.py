"""Prepared calls: an operator's checks, choices and memory made once, its launches many times.

    step = prepare(rms_norm, x, weight, 1e-5)     calls it once; step.result is what it returned
    step()                                        again, into the same result
    step(x=y)                                     on y from here on, which has the layout of x

As with CUDA graphs, results and scratch are the same memory every time, the path that `use` chose
and the sizes are those of the first call, and new values reach the kernels by being written into
the tensors given, or by another tensor in the place of one. A tensor within an argument is named
by its way there: step(**{"kv.k_cache": cache}). Views that an operator makes of a tensor follow it.

Several operators can be one step, if a function of tensors calls them: prepare(layer, x, cache).
Tensors that it has from elsewhere, such as a module's weights, stay as they are. What it does on
the device beside launching kernels (a copy, a matmul) would not be repeated, and is refused. A step
is of one thread at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import triton
from triton.runtime import driver

from ._environment import environment
from ._launch import current_device, interceptor, launch
from ._program import Program, Recording, Step, recorded

__all__ = ["Prepared", "prepare"]

ALIGNMENT = 16  # of addresses, for which Triton specialises kernels


def prepare(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Prepared:
    """Call `function` and keep what it launches.

    Args:
        function: an operator, or a function of tensors that calls operators only.
        args, kwargs: its arguments; their tensors can be replaced later, by name.
    Raises:
        ValueError: `function` does something else on the device than launch kernels, or is given
            one tensor twice; and what it raises itself.
    Cost: of a later call, one launch of Triton's per launch, without its cache's look-up.
    """
    tensors = dict(_named(_arguments(function, args, kwargs)))
    if not tensors:
        raise ValueError("prepare: args must hold a tensor, got none")
    given = list(tensors.values())
    recording = recorded(lambda: function(*args, **kwargs), given, with_results=False)
    if recording.program is None:
        name = getattr(function, "__name__", function)
        raise ValueError(f"prepare: {name} must launch kernels only, got {recording.why}")
    return Prepared(tensors, recording, recording.program)


class Prepared:
    """What `prepare` returns.

    Attributes:
        result: what the function returned; every call writes it again.
        names: of the tensors that can be replaced, which are those that are no result.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], recording: Recording, program: Program):
        self.result = recording.result
        self.program = program
        self._made = recording.made
        self._given = list(tensors.values())
        self._numbers = {name: number for number, name in enumerate(tensors)}
        self._layouts = [_layout(x) for x in self._given]
        returned = {x.untyped_storage()._cdata for _, x in _named({"": self.result})}
        self.names = tuple(
            name for name, x in tensors.items() if x.untyped_storage()._cdata not in returned
        )
        self._device = self._given[0].device
        launchers = [_launcher(step) for step in program.steps]
        self._launchers = [launcher for launcher in launchers if launcher is not None]
        self._is_interpreted = len(self._launchers) < len(launchers)
        self._rebuild()

    def __call__(self, **tensors: torch.Tensor) -> Any:
        """Launch again, with `tensors` from here on in the place of those of their names.

        Raises:
            ValueError: there is no such name, or the tensor has another shape, strides, dtype,
                device or alignment than the one it replaces; nothing is launched.
            TypeError: not a tensor.
        """
        if tensors:
            self._replace(tensors)
        index = self._device.index
        if index is None or index == current_device():
            self._launch()
        else:
            with torch.cuda.device(self._device):
                self._launch()
        return self.result

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name that the next call works on."""
        return self._given[self._numbers[name]]

    def _launch(self) -> None:
        runtime = triton.knobs.runtime
        if (
            self._is_interpreted
            or environment().debug
            or interceptor.get() is not None
            or runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
        ):
            for (kernel, grid, _, options, _, _), args in zip(
                self.program.steps, self._arguments, strict=True
            ):
                launch(kernel, grid, *args, **options)
            return
        for (run, grid, stream_of, function, metadata, tail), args in zip(
            self._launchers, self._arguments, strict=True
        ):
            stream = stream_of(self._device.index)
            run(*grid, stream, function, metadata, None, None, None, *args, *tail)

    def _replace(self, tensors: dict[str, torch.Tensor]) -> None:
        given = list(self._given)
        for name, x in tensors.items():
            if name not in self.names:
                known = ", ".join(self.names)
                raise ValueError(f"prepare: tensors must be named {known}, got {name}")
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"prepare: {name} must be a torch.Tensor, got {type(x).__name__}")
            number = self._numbers[name]
            wanted = self._layouts[number]
            got = x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % ALIGNMENT
            if got != wanted:
                what = "(shape, strides, dtype, device, address % 16)"
                raise ValueError(f"prepare: {name} must have {what} {wanted}, got {got}")
            given[number] = x
        self._given = given
        self._rebuild()

    def _rebuild(self) -> None:
        things = self.program.things(self._given, self._made)
        arguments = []
        for step in self.program.steps:
            arguments.append(step.take(things))
        self._arguments = arguments


def _arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """By name; those of *args by number."""
    signature = inspect.signature(function)
    arguments: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return arguments


def _layout(x: torch.Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % ALIGNMENT


def _launcher(step: Step) -> tuple[Any, ...] | None:
    """What JITFunction.run calls at the end, with all that does not change; None: interpreted."""
    compiled = step.compiled
    if compiled is None:
        return None
    tail = tuple(
        step.options[parameter.name] if parameter.name in step.options else parameter.default
        for parameter in step.kernel.params[step.positional :]
    )
    grid = (*step.grid, 1, 1)[:3]
    stream_of = driver.active.get_current_stream
    return compiled.run, grid, stream_of, compiled.function, compiled.packed_metadata, tail


def _named(values: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in arguments, by its way there: "x", "experts.gate.weight", "x_quantized[0]"."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif is_dataclass(value):
            parts = [field.name for field in fields(value)]
            yield from _named({f"{name}.{part}": getattr(value, part) for part in parts})
        elif isinstance(value, dict):
            yield from _named({f"{name}[{key!r}]": part for key, part in value.items()})
        elif isinstance(value, list | tuple):
            yield from _named({f"{name}[{i}]": part for i, part in enumerate(value)})
