"""Record what code launches on a GPU that is not there: kernels, ATen calls and allocations.

    recording = record(lambda x: rms_norm(x, weight_of(x), 1e-5), make=lambda: torch.empty(
        4096, 5120, dtype=torch.bfloat16, device="cuda"))
    recording.launches[0].grid, recording.aten, recording.allocated_bytes

Tensors are torch's fake ones, on "cuda": shapes, dtypes and strides without memory, which works on
a CPU-only torch and at any size. The operators' own implementations run, down to
`_launch.launch`, which records instead of launching. Because there are no values, whatever is
recorded cannot depend on data, and code that asks for a value raises: a recording that succeeds
proves that the code does not synchronise with the device.

Of ATen calls, those that launch nothing are left out: views, `empty*` and metadata. Each of the
rest is one launch or more (a GEMM is one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama4_triton.kernels import _launch, _library, _paths
from llama4_triton.kernels._launch import DeviceProperties

from .launches import H100, Launch, TensorSpec, rebuilt

__all__ = ["GEMMS", "Allocation", "AtenCall", "Recording", "record", "recorded_launches"]

GEMMS = frozenset({"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"})  # cuBLAS on a GPU
NO_LAUNCH = frozenset({"aten.detach", "aten.alias", "aten.lift_fresh", "aten.set_", "prim.device"})


@dataclass(frozen=True, kw_only=True, slots=True)
class AtenCall:
    """One call into PyTorch that puts work on the device."""

    name: str  # "aten.mm"
    tensors: tuple[TensorSpec, ...]  # inputs

    def __str__(self) -> str:
        return f"{self.name}({', '.join('x'.join(map(str, t.shape)) for t in self.tensors)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """Device memory that was asked for."""

    by: str  # the ATen call that returned it
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(kw_only=True, slots=True)
class Recording:
    """What ran, in order."""

    calls: list[Launch | AtenCall] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)

    @property
    def launches(self) -> list[Launch]:
        """Launches of Triton kernels."""
        return [call for call in self.calls if isinstance(call, Launch)]

    @property
    def aten(self) -> list[AtenCall]:
        return [call for call in self.calls if isinstance(call, AtenCall)]

    @property
    def allocated_bytes(self) -> int:
        return sum(allocation.nbytes for allocation in self.allocations)


def record(
    fn: Callable[..., object],
    *,
    make: Callable[[], Any] | None = None,
    device: DeviceProperties = H100,
    covered: Iterable[str] = (),
) -> Recording:
    """Return what `fn(make())`, or `fn()`, would run on a GPU like `device`.

    Args:
        fn: makes or takes tensors on "cuda"; its work is recorded.
        make: builds what `fn` takes (a model, its inputs); not recorded.
        covered: features that a selftest of that GPU has passed; by default there was none.
    Raises:
        RuntimeError: `fn` copies from the device to the host, that is, waits for it.
        torch's DataDependentOutputException: `fn` asks for a value, as `.item()` does.
    """
    recording = Recording()
    gpu = _launch.assume_device(device)
    with FakeTensorMode(), _NoGuard(), gpu, _covering(frozenset(covered)), torch.no_grad():
        inputs = () if make is None else (make(),)
        mode = _Recorder(recording)
        with _recording_launches(recording), mode:
            fn(*inputs)
    recording.calls = _numbered(recording.calls)
    return recording


def recorded_launches(fn: Callable[[], object]) -> list[Launch]:
    """Call `fn`, on tensors of any device, and return the launches it makes, none of them run."""
    recording = Recording()
    with _recording_launches(recording):
        fn()
    return _numbered(recording.calls)


@contextmanager
def _covering(features: frozenset[str]) -> Iterator[None]:
    """Answer for the selftest's records of a GPU that is not there."""
    before = _paths.covered_features
    _paths.covered_features = lambda device: features
    try:
        yield
    finally:
        _paths.covered_features = before


@contextmanager
def _recording_launches(recording: Recording) -> Iterator[None]:
    def on_launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        recording.calls.append(Launch.of(kernel, grid, args, kwargs))

    with _launch.intercept(on_launch):
        yield


class _Recorder(TorchDispatchMode):
    """Sits above the fake mode, which computes shapes, and writes down what passes."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording
        self.kept: list[torch.Tensor] = []  # so that no storage's identity is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == _library.NAMESPACE:
            with self:  # a mode is off inside its own handler
                return _library.implementations[func._schema.name.split("::")[1]](*args, **kwargs)
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        name = f"{func.namespace}.{func._schema.name.split('::')[1]}"
        on_device = [x for x in (*inputs, *outputs) if x.device.type == "cuda"]
        if not on_device:
            return out
        if any(x.device.type == "cpu" for x in outputs) and any(
            x.device.type == "cuda" for x in inputs
        ):
            raise RuntimeError(f"record: fn must not wait for the device, got {name} to the CPU")
        self.kept.extend(outputs)
        known = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in known]
        for x in fresh:
            self.recording.allocations.append(
                Allocation(
                    by=name,
                    dtype=x.dtype,
                    shape=tuple(x.shape),
                    nbytes=x.untyped_storage().nbytes(),
                )
            )
        is_view = not fresh and not func._schema.is_mutable
        is_empty = "empty" in name
        if not (is_view or is_empty or name in NO_LAUNCH):
            specs = tuple(TensorSpec.of(x) for x in inputs)
            self.recording.calls.append(AtenCall(name=name, tensors=specs))
        return out


class _NoGuard(TorchFunctionMode):
    """Two methods of Tensor by ATen's operators: as methods they ask for CUDA's device guard,
    which a CPU-only torch does not have."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and args[0].device.type == "cuda":
            return _indexed(*args)
        if func is torch.Tensor.to and args[0].device.type != "cuda":
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type == "cuda":
                return torch.ops.aten._to_copy(args[0], device=device, dtype=dtype)
        return func(*args, **kwargs)


def _indexed(x: torch.Tensor, index: Any) -> torch.Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (x.ndim - taken)
    dim = 0
    tensors: list[torch.Tensor | None] = []
    for part in parts:
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            if part != slice(None):
                x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        else:
            tensors += [None] * (dim - len(tensors)) + [part]
        dim += 1
    return torch.ops.aten.index(x, tensors) if tensors else x


def _numbered(calls: list[Any]) -> list[Any]:
    """The calls with storages numbered in order of appearance, so that recordings compare."""
    numbers: dict[int, int] = {}

    def spec(x: Any) -> Any:
        if isinstance(x, TensorSpec):
            return replace(x, storage=numbers.setdefault(x.storage, len(numbers)))
        if hasattr(x, "block_shape"):
            return type(x)(spec(x.base), x.shape, x.strides, x.block_shape)
        return rebuilt(x, list(map(spec, x))) if isinstance(x, tuple) else x

    return [
        replace(call, args=tuple(map(spec, call.args)))
        if isinstance(call, Launch)
        else replace(call, tensors=tuple(map(spec, call.tensors)))
        for call in calls
    ]
