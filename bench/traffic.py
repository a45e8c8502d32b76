"""What the launches of an operator touch, counted in Triton's interpreter without a GPU.

    with counting() as traffic:                       # any Triton kernel, launched by anyone
        out = moe(x, logits, experts, top_k=1)
    traffic = measure(lambda: moe(...))               # the same, and knows what is returned

Per launch: programs, those that exit without work, FLOPs of tl.dot (2*M*N*K of the tiles, padding
included), atomics, and the bytes requested. Per tensor: the distinct 32-byte sectors touched.

* requested: every active lane of every load, store and atomic, masked lanes left out; as plain
  bytes (a lane that repeats another's address counts again) and as sectors (distinct ones within
  one access, summed over accesses). L1 and L2 hits are in it.
* unique: distinct sectors over all launches, times 32. With a cache that never forgets, this is
  what DRAM moves, workspace apart. l2.py puts a cache that forgets in its place.

A tensor (all views of one allocation) is an

    operand     read before anything is written to it; `index` if it holds integers
    output      written, and returned by `measure`'s function or read by no later launch
    workspace   written, read by a later launch, and not returned

Two ways to count. `execute=True` runs the kernels in the interpreter, program by program, as they
are. `execute=False` computes no floating point number and interprets programs of equal control
flow together (batch.py), which is exact and fast enough for real shapes: tensors of gigabytes are
neither read nor written, so `torch.empty` will do. Launches that need values (routing) are
executed all the same; their inputs must be real. Results of the others are not there afterwards.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from llama4_triton.kernels import interpreter as shim

from .batch import Batch, batch_hooks, is_index, run_in_batches
from .boxes import NOTHING, SECTOR, Boxes
from .l2 import ATOMIC, LOAD, STORE, LaunchTrace, Trace
from .lanes import Lanes, NeedsValues

__all__ = ["LaunchTraffic", "TensorTraffic", "Traffic", "counting", "measure"]

# Computed always: what a routing that comes after reads.
DECIDING = ("_router_kernel",)
KINDS = {"load": LOAD, "store": STORE, "atomic": ATOMIC}
Grid = tuple[int, int, int]
ROLES = ("operand", "index", "output", "workspace")


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchTraffic:
    """One launch."""

    kernel: str
    grid: Grid
    programs: int
    idle: int  # programs that neither multiplied nor wrote anything
    flops: int  # of tl.dot, padding included
    atomics: int  # active lanes
    load_bytes: int  # requested
    store_bytes: int
    load_sectors: int  # requested; in sectors, not bytes
    store_sectors: int
    classes: int  # batches of programs of equal control flow; 0: executed one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorTraffic:
    """One allocation, over all launches. Bytes of distinct sectors, unless they are requested."""

    names: tuple[str, ...]  # of the arguments that are views of it
    nbytes: int
    role: str
    is_index: bool
    unique_read: int
    unique_written: int
    unique: int  # read or written
    requested: int  # in whole sectors


@dataclass(kw_only=True)
class Traffic:
    """The counts of one operator; complete when the block of `counting` has ended."""

    launches: list[LaunchTraffic] = field(default_factory=list)
    tensors: list[TensorTraffic] = field(default_factory=list)
    trace: Trace | None = None  # for l2.dram_bytes

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def atomics(self) -> int:
        return sum(launch.atomics for launch in self.launches)

    @property
    def programs(self) -> int:
        return sum(launch.programs for launch in self.launches)

    @property
    def idle(self) -> int:
        return sum(launch.idle for launch in self.launches)

    @property
    def requested_bytes(self) -> int:
        """Plain bytes of all active lanes."""
        return sum(launch.load_bytes + launch.store_bytes for launch in self.launches)

    @property
    def requested(self) -> int:
        """Bytes of all requested sectors."""
        sectors = sum(launch.load_sectors + launch.store_sectors for launch in self.launches)
        return SECTOR * sectors

    @property
    def unique(self) -> Mapping[str, int]:
        """Bytes of distinct sectors by role: operands as read, outputs as written."""
        out = dict.fromkeys(ROLES, 0)
        for tensor in self.tensors:
            if tensor.role == "workspace":
                out["workspace"] += tensor.unique
                continue
            out["index" if tensor.role == "index" else "operand"] += (
                tensor.unique_read if tensor.role in ("operand", "index") else 0
            )
            out["output"] += tensor.unique_written
        return out


def measure(fn: Callable[[], object], *, execute: bool = False) -> Traffic:
    """Count what `fn` launches; what it returns are outputs even where a later launch reads them.

    Args:
        fn: called once.
        execute: compute as well; see the module.
    """
    with _recording(execute) as recorder:
        result = fn()
    recorder.finish(_tensors(result))
    return recorder.traffic


@contextlib.contextmanager
def counting(*, execute: bool = True) -> Iterator[Traffic]:
    """Count what is launched in the block; the result is complete after it."""
    with _recording(execute) as recorder:
        yield recorder.traffic
    recorder.finish([])


def _tensors(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [x for part in result.values() for x in _tensors(part)]
    if isinstance(result, tuple | list):
        return [x for part in result for x in _tensors(part)]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        parts = (getattr(result, item.name) for item in dataclasses.fields(result))
        return [x for part in parts for x in _tensors(part)]
    return []


@dataclass
class Storage:
    """One allocation that some launch was given."""

    start: int
    nbytes: int
    keep: Any  # alive, or a later allocation might take its address
    names: list[str] = field(default_factory=list)
    first: str = ""  # kind of the first access
    is_index: bool = True
    written_in: int = -1  # the first launch that wrote to it
    read_later: bool = False  # by a launch after that
    read_boxes: set[int] = field(default_factory=set)
    written_boxes: set[int] = field(default_factory=set)
    requested: int = 0  # sectors


@dataclass
class Access:
    """One access of each program of a batch."""

    kind: str
    storage: int
    is_index: bool
    boxes: np.ndarray  # one number per program, or one for all
    lanes: np.ndarray  # bytes of active lanes, likewise


class Segment(NamedTuple):
    """Programs that were interpreted together."""

    programs: np.ndarray
    accesses: list[Access]
    flops: np.ndarray  # of each
    worked: np.ndarray  # which of them multiplied or wrote


class Recorder:
    """Everything that is known while the block runs."""

    def __init__(self, execute: bool):
        self.execute = execute
        self.boxes = Boxes()
        self.storages: list[Storage] = []
        self.starts: list[int] = []  # ascending
        self.by_start: list[int] = []  # index into storages
        self.traffic = Traffic()
        self.traces: list[LaunchTrace] = []

    # Tensors

    def register(self, name: str, arg: Any) -> None:
        if isinstance(arg, tuple | list):
            for i, item in enumerate(arg):
                self.register(f"{name}[{i}]", item)
            return
        tensor = getattr(arg, "base", arg)  # of a TensorDescriptor or a reinterpreted tensor
        if not isinstance(tensor, torch.Tensor):
            tensor = getattr(tensor, "base", tensor)
        if not isinstance(tensor, torch.Tensor):
            return
        memory = tensor.untyped_storage()
        start = memory.data_ptr()
        if memory.nbytes() == 0:
            return
        at = bisect.bisect_left(self.starts, start)
        if at == len(self.starts) or self.starts[at] != start:
            self.starts.insert(at, start)
            self.by_start.insert(at, len(self.storages))
            self.storages.append(Storage(start, memory.nbytes(), memory))
        names = self.storages[self.by_start[at]].names
        if name.removesuffix("_ptr") not in names:
            names.append(name.removesuffix("_ptr"))

    def split(self, starts: np.ndarray) -> list[np.ndarray]:
        """Masks of the addresses in each allocation, where they are in more than one.

        A tile may have rows of several matrices: gate and up of an expert are one operand.
        """
        at = np.searchsorted(self.starts, starts, side="right")
        return [at == k for k in np.unique(at)] if (at != at.flat[0]).any() else []

    def storage_at(self, low: int, high: int) -> int:
        at = bisect.bisect_right(self.starts, low) - 1
        if at >= 0:
            number = self.by_start[at]
            storage = self.storages[number]
            if high <= storage.start + storage.nbytes:
                return number
        raise ValueError(
            f"traffic: an access must lie in one tensor argument, got addresses {low:#x}..{high:#x}"
        )

    # Accesses

    def concrete(self, kind: str, pointers: Any, mask: Any) -> list[Access]:
        """One access of one program, from its addresses; by allocation."""
        element = pointers.get_element_ty()
        width = max(1, int(element.primitive_bitwidth) // 8)
        addresses = np.asarray(pointers.data)
        if mask is not None:
            active = np.broadcast_to(np.asarray(getattr(mask, "data", mask)), addresses.shape)
            addresses = addresses[active.astype(bool)]
        addresses = addresses.ravel().astype(np.int64)
        if not addresses.size:
            return []
        parts = [addresses[where] for where in self.split(addresses)] or [addresses]
        return [self._concrete_in_one(kind, part, width, is_index(element)) for part in parts]

    def _concrete_in_one(self, kind: str, addresses: np.ndarray, width: int, index: bool) -> Access:
        number = self.storage_at(int(addresses.min()), int(addresses.max()) + width)
        sectors = np.unique((addresses - self.storages[number].start) // SECTOR)
        boxes = self.boxes.add(number, sectors[None] * SECTOR, None, np.array([SECTOR]))
        lanes = np.array([addresses.size * width])
        return Access(kind, number, index, boxes, lanes)

    def batched(
        self, programs: int, kind: str, pointers: Lanes, mask: Lanes | None, width: int,
        is_index: bool,
    ) -> list[Access]:  # fmt: skip
        """One access of a batch of programs, from the structure of its addresses; by allocation."""
        starts, active, length = _rows(pointers, mask, width)
        lanes = width * _active_lanes(pointers.shape, mask)
        if not lanes.any():
            return []
        parts = []
        rows = starts.shape[1] if active is None else np.maximum(1, active.sum(axis=1))
        for where in self.split(starts):
            live = where if active is None else where & active
            share = live.sum(axis=1) / rows
            if (live & (length > 0)[:, None]).any():
                part = (lanes * share).astype(np.int64)
                parts.append(self._batched_in_one(kind, starts, live, length, part, is_index))
        if parts:
            return parts
        return [self._batched_in_one(kind, starts, active, length, lanes, is_index)]

    def _batched_in_one(
        self,
        kind: str,
        starts: np.ndarray,
        active: np.ndarray | None,
        length: np.ndarray,
        lanes: np.ndarray,
        is_index: bool,
    ) -> Access:
        whole = active is None and length.all()
        low, high = int(starts.min()), int((starts + length[:, None]).max())
        if not whole:
            live = np.ones((1, 1), bool) if active is None else active
            live = np.broadcast_to(live & (length > 0)[:, None], _joint(starts, live, length))
            where = np.broadcast_to(starts, live.shape)[live]
            ends = np.broadcast_to(starts + length[:, None], live.shape)[live]
            low, high = int(where.min()), int(ends.max())
        number = self.storage_at(low, high)
        boxes = self.boxes.add(number, starts - self.storages[number].start, active, length)
        return Access(kind, number, is_index, boxes, lanes)

    # Launches

    def finish_launch(
        self,
        kernel: str,
        grid: Grid,
        segments: list[Segment],
        atomics: int,
        classes: int,
    ) -> None:
        """Add up a launch."""
        number = len(self.traces)
        count = int(np.prod(grid))
        steps: list[np.ndarray] = [np.zeros(0, np.int64)] * count
        totals = dict.fromkeys(("load_bytes", "store_bytes", "load_sectors", "store_sectors"), 0)
        flops = idle = 0
        for programs, accesses, each, worked in segments:
            flops += int(each.sum())
            idle += int((~worked).sum())
            columns = np.empty((len(programs), len(accesses)), np.int64)
            for i, access in enumerate(accesses):
                repeat = len(programs) if len(access.boxes) == 1 else 1
                sectors = repeat * int(self.boxes.sizes(access.boxes).sum())
                repeat = len(programs) if len(access.lanes) == 1 else 1
                nbytes = repeat * int(access.lanes.sum())
                storage = self.storages[access.storage]
                touched = set(access.boxes.tolist()) - {NOTHING}
                storage.first = storage.first or access.kind
                storage.is_index &= access.is_index
                storage.requested += sectors
                if access.kind != "store":
                    totals["load_bytes"] += nbytes
                    totals["load_sectors"] += sectors
                    storage.read_boxes |= touched
                    storage.read_later |= 0 <= storage.written_in < number
                if access.kind != "load":
                    totals["store_bytes"] += nbytes
                    totals["store_sectors"] += sectors
                    storage.written_boxes |= touched
                    if storage.written_in < 0:
                        storage.written_in = number
                columns[:, i] = np.where(
                    access.boxes < 0,
                    NOTHING,
                    4 * access.boxes.astype(np.int64) + KINDS[access.kind],
                )
            for program, row in zip(programs.tolist(), columns, strict=True):
                steps[program] = row
        self.traces.append(LaunchTrace(kernel=kernel, programs=steps))
        self.traffic.launches.append(
            LaunchTraffic(
                kernel=kernel, grid=grid, programs=count, idle=idle, flops=flops,
                atomics=atomics, classes=classes, **totals,
            )
        )  # fmt: skip

    def finish(self, returned: list[torch.Tensor]) -> None:
        outputs = {tensor.untyped_storage().data_ptr() for tensor in returned}
        for storage in self.storages:
            if not storage.first:
                continue  # an argument that was never touched
            read, written = sorted(storage.read_boxes), sorted(storage.written_boxes)
            if storage.first == "load":
                role = "index" if storage.is_index else "operand"
            elif storage.read_later and storage.start not in outputs:
                role = "workspace"
            else:
                role = "output"
            self.traffic.tensors.append(
                TensorTraffic(
                    names=tuple(storage.names),
                    nbytes=storage.nbytes,
                    role=role,
                    is_index=storage.is_index,
                    unique_read=SECTOR * self.boxes.covered(read),
                    unique_written=SECTOR * self.boxes.covered(written),
                    unique=SECTOR * self.boxes.covered(sorted({*read, *written})),
                    requested=SECTOR * storage.requested,
                )
            )
        self.traffic.trace = Trace(launches=tuple(self.traces), boxes=self.boxes)


def _joint(*arrays: np.ndarray) -> tuple[int, int]:
    rows = max(array.shape[1] if array.ndim > 1 else 1 for array in arrays)
    return max(len(array) for array in arrays), rows


def _rows(
    pointers: Lanes, mask: Lanes | None, width: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Starts (P or 1, R), active rows or None, and bytes per row (P or 1,) of an access.

    A dimension along which one term of the addresses steps by the width of an element, and which
    the mask cuts to one run, is what rows are made of; failing that, elements are the rows.
    """
    terms = pointers.needed()
    masks = () if mask is None else mask.needed()
    for axis in range(pointers.ndim, 0, -1):
        size = pointers.shape[axis - 1]
        along = [term for term in terms if term.shape[axis] > 1]
        cuts = [m for m in masks if m.shape[axis] > 1]
        simple = all(
            m.size == m.shape[0] * m.shape[axis] for m in cuts
        )  # varies by program and along this axis only
        if len(along) != 1 or not simple:
            continue
        steps = np.diff(along[0], axis=axis)
        if not (steps == width).all():
            continue
        length = np.array([size * width])
        first = np.zeros(1, np.int64)
        if cuts:
            run = cuts[0].reshape(len(cuts[0]), size)
            for cut in cuts[1:]:
                run = run & cut.reshape(len(cut), size)
            count = run.sum(axis=1)
            first = run.argmax(axis=1)
            last = size - 1 - run[:, ::-1].argmax(axis=1)
            if ((last - first + 1 != count) & (count > 0)).any():
                continue
            length = count * width
        rest = [term for term in terms if term is not along[0]]
        start = np.take(along[0], [0], axis=axis)
        start = start + (first * width).reshape(-1, *(1 for _ in pointers.shape))
        for term in rest:
            start = start + term
        others = [m for m in masks if m.shape[axis] == 1]
        return *_flattened(start, others), length
    start = terms[0]
    for term in terms[1:]:
        start = start + term
    return *_flattened(start, list(masks)), np.array([width])


def _flattened(start: np.ndarray, masks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    if not masks:
        return start.reshape(len(start), -1), None
    active = masks[0]
    for m in masks[1:]:
        active = active & m
    shape = np.broadcast_shapes(start.shape[1:], active.shape[1:])
    start = np.broadcast_to(start, (len(start), *shape)).reshape(len(start), -1)
    active = np.broadcast_to(active, (len(active), *shape)).reshape(len(active), -1)
    return start, None if active.all() else active


def _active_lanes(shape: tuple[int, ...], mask: Lanes | None) -> np.ndarray:
    """Active lanes (P or 1,)."""
    if mask is None:
        return np.array([int(np.prod(shape))])
    masks = mask.needed()
    varying = [{axis for axis, size in enumerate(m.shape) if axis and size > 1} for m in masks]
    if sum(map(len, varying)) > len(set().union(*varying)):
        masks = (mask.dense(),)
        varying = [{axis for axis, size in enumerate(masks[0].shape) if axis and size > 1}]
    count = np.ones(1, np.int64)
    for m in masks:
        count = count * m.reshape(len(m), -1).sum(axis=1)
    covered = set().union(*varying)
    free = [size for axis, size in enumerate(shape, 1) if axis not in covered]
    return count * int(np.prod(free, dtype=np.int64))


# Hooks into Triton's interpreter


_recorders: list[Recorder] = []


@contextlib.contextmanager
def _recording(execute: bool) -> Iterator[Recorder]:
    if not shim.is_installed():
        raise RuntimeError(
            "traffic: kernels must be interpreted; call "
            "llama4_triton.kernels.interpreter.install() before any kernel is imported"
        )
    recorder = Recorder(execute)
    _recorders.append(recorder)
    interpreter = importlib.import_module("triton.runtime.interpreter")
    try:
        with _replaced([(interpreter.GridExecutor, "__call__", _hooked(_call, interpreter))]):
            yield recorder
    finally:
        _recorders.pop()


def _hooked(hook: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    original = vars(interpreter.GridExecutor)["__call__"]

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(self, original, *args, **kwargs)

    return method


@contextlib.contextmanager
def _replaced(replacements: list[tuple[Any, str, Any]]) -> Iterator[None]:
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(originals):
            setattr(owner, name, value)


class _Kernel:
    """Stands for the kernel's function in the interpreter's loop over the grid."""

    def __init__(self, fn: Any, run: Callable[..., None]):
        language = importlib.import_module("triton.language")
        self.__globals__ = {"tl": language, "core": language.core}  # what gets patched
        self.__name__ = fn.__name__
        self.__signature__ = inspect.signature(fn)
        self.__annotations__ = fn.__annotations__
        self.run = run

    def __call__(self, **args: Any) -> None:
        self.run(**args)


def _call(executor: Any, original: Any, *args: Any, **kwargs: Any) -> None:
    """Interpret one launch and count."""
    recorder = _recorders[-1]
    names = executor.arg_names
    for name, arg in [*zip(names, args, strict=False), *kwargs.items()]:
        if name in names:
            recorder.register(name, arg)
    if not recorder.execute and executor.fn.__name__ not in DECIDING:
        try:
            _batched_launch(recorder, executor, original, args, kwargs)
            return
        except NeedsValues:
            pass
    _executed_launch(recorder, executor, original, args, kwargs)


def _grid(sizes: Any) -> Grid:
    x, y, z = (*(int(size) for size in sizes), 1, 1)[:3]
    return x, y, z


def _batched_launch(
    recorder: Recorder, executor: Any, original: Any, args: Any, kwargs: Any
) -> None:
    fn, grid = executor.fn, executor.grid
    real_grid: list[Grid] = []
    segments: list[Segment] = []
    attempt: list[Access] = []

    def one_program(values: Any) -> tuple[int]:
        sizes = _grid(grid(values) if callable(grid) else grid)
        real_grid.append(sizes)
        return (1,) if np.prod(sizes) else (0,)

    def begin(programs: np.ndarray) -> Callable[..., None]:
        attempt.clear()

        def record(kind: str, pointers: Lanes, mask: Lanes | None, width: int, index: bool) -> None:
            attempt.extend(recorder.batched(len(programs), kind, pointers, mask, width, index))

        return record

    def run(**values: Any) -> None:
        sizes = real_grid[-1]

        def kernel() -> None:
            fn(**values)

        batch: Batch
        for batch in run_in_batches(int(np.prod(sizes)), sizes, kernel, begin):
            segments.append(Segment(batch.programs, list(attempt), batch.flops, batch.worked))

    executor.fn, executor.grid = _Kernel(fn, run), one_program
    try:
        with _replaced(batch_hooks()):
            original(executor, *args, **kwargs)
    finally:
        executor.fn, executor.grid = fn, grid
    recorder.finish_launch(fn.__name__, real_grid[-1], segments, 0, len(segments))


def _executed_launch(
    recorder: Recorder, executor: Any, original: Any, args: Any, kwargs: Any
) -> None:
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    fn = executor.fn
    segments: list[Segment] = []
    grid = (0, 0, 0)
    here = types.SimpleNamespace(accesses=[], flops=0, worked=False, atomics=0)
    originals = {name: vars(builder)[name] for name in _EXECUTED}

    def touch(kind: str, pointers: Any, mask: Any) -> None:
        here.worked |= kind != "load"
        here.accesses.extend(recorder.concrete(kind, pointers, mask))

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch("load", pointers, mask)
        return originals["create_masked_load"](self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch("store", pointers, mask)
        return originals["create_masked_store"](self, pointers, value, mask, *rest, **named)

    def rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch("atomic", pointers, mask)
        here.atomics += int(np.broadcast_to(mask.data, pointers.data.shape).sum())
        return originals["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    def cas(self: Any, pointers: Any, *rest: Any) -> Any:
        touch("atomic", pointers, None)
        here.atomics += pointers.data.size
        return originals["create_atomic_cas"](self, pointers, *rest)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        here.flops += 2 * a.data.size * b.data.shape[-1]
        here.worked = True
        return originals["create_dot"](self, a, b, *rest)

    def run(**values: Any) -> None:
        nonlocal grid
        current = interpreter.interpreter_builder
        grid = _grid(current.grid_dim)
        x, y, z = (int(i) for i in current.grid_idx)
        here.accesses, here.flops, here.worked = [], 0, False
        fn(**values)
        program = np.array([(x * grid[1] + y) * grid[2] + z])
        flops, worked = np.array([here.flops]), np.array([here.worked])
        segments.append(Segment(program, here.accesses, flops, worked))

    executor.fn = _Kernel(fn, run)
    hooks = dict(zip(_EXECUTED, (load, store, rmw, cas, dot), strict=True))
    try:
        with _replaced([(builder, name, hook) for name, hook in hooks.items()]):
            original(executor, *args, **kwargs)
    finally:
        executor.fn = fn
    recorder.finish_launch(fn.__name__, grid, segments, here.atomics, 0)


_EXECUTED = (
    "create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas",
    "create_dot",
)  # fmt: skip
