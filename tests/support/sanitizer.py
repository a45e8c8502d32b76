"""Bounds, races and program order of interpreted launches.

Inside `sanitize()` every launch in Triton's interpreter is watched:

* bounds: each active lane of a load, store or atomic must touch an element of a tensor that was
  passed to the kernel, of the view as passed: not the rest of its storage, nor a gap between rows;
* races: two programs of one launch touch a byte and at least one writes it, unless both accesses
  are atomic, or the first is ordered before the second by atomics (release in one program, then
  acquire of the same address in the other; a chain of these counts); and two lanes of one store
  that write different values to one address;
* order: programs run forward, in reverse, or in a random order of a given seed. The interpreter
  runs one after the other, so a race is invisible in the values of any one order.

Found: `SanitizerError`, raised where it happens. Of many concurrent readers of a byte only "many"
is remembered, so a write that atomics order after every one of them is reported all the same.
"""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

__all__ = ["SanitizerError", "sanitize"]

NOBODY, MANY = 0, 1  # segment ids which stand for no program and for several


class SanitizerError(AssertionError):
    """A launch broke a rule that the GPU does not enforce."""


@dataclass(frozen=True, slots=True)
class Settings:
    order: str
    seed: int
    races: bool


class View:
    """The bytes of one tensor argument."""

    def __init__(self, name, tensor):
        self.name, self.itemsize = name, tensor.element_size()
        self.start = tensor.data_ptr()
        dims = [
            (stride * self.itemsize, size)
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
            if size > 1 and stride > 0
        ]
        self.dims = sorted(dims, reverse=True)
        spans = [self.itemsize]  # of the innermost 0, 1, 2.. dimensions
        for stride, size in reversed(self.dims):
            spans.append(spans[-1] + (size - 1) * stride)
        self.end = self.start + spans[-1] if tensor.numel() else self.start
        count = math.prod(size for _, size in self.dims)
        overlapping = any(
            s < span for (s, _), span in zip(reversed(self.dims), spans, strict=False)
        )
        # A dense view fills its span; one that overlaps itself has no gaps to speak of.
        self.dense = overlapping or count * self.itemsize == spans[-1]

    def contains(self, addresses, width):
        offset = addresses - self.start
        inside = (offset >= 0) & (offset + width <= self.end - self.start)
        if not self.dense and width <= self.itemsize:
            for stride, size in self.dims:
                index = offset // stride
                inside &= index < size
                offset = offset - index * stride
            inside &= offset + width <= self.itemsize
        return inside


class Region:
    """Overlapping views as one range of bytes, and who touched each of its units."""

    def __init__(self, views):
        self.start, self.end = min(v.start for v in views), max(v.end for v in views)
        self.unit = math.gcd(*(v.itemsize for v in views), *(v.start - self.start for v in views))
        # Segment ids, 0 for nobody: np.zeros takes no memory before it is touched.
        units = (self.end - self.start) // self.unit
        self.writer, self.reader, self.atomic = (np.zeros(units, np.int32) for _ in range(3))
        self.written = False

    def units(self, addresses, width):
        first = (addresses - self.start) // self.unit
        per_access = max(1, width // self.unit)
        return first if per_access == 1 else (first[:, None] + np.arange(per_access)).ravel()


@dataclass
class Launch:
    """What one launch may touch, and what it has touched so far."""

    settings: Settings
    views: list[View] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of the regions
    order: range | np.ndarray = range(0)
    program: tuple[int, int, int] = (0, 0, 0)
    segment: int = NOBODY
    # A segment is a stretch of one program that no release interrupts; `visible[s]`: what segment
    # s did is ordered before what happens now.
    program_of: list = field(default_factory=lambda: [None, None])
    visible: np.ndarray = field(default_factory=lambda: np.array([True, False]))
    published: dict[int, np.ndarray] = field(default_factory=dict)

    def register(self, name, arg):
        if isinstance(arg, tuple):
            for i, item in enumerate(arg):
                self.register(f"{name}[{i}]", item)
            return
        tensor = getattr(arg, "base", arg)  # of a TensorDescriptor or a reinterpreted tensor
        if hasattr(tensor, "data_ptr") and hasattr(tensor, "stride"):
            self.views.append(View(name, tensor))

    def make_regions(self):
        groups: list[list[View]] = []
        end = -1
        for view in sorted((v for v in self.views if v.end > v.start), key=lambda v: v.start):
            if view.start >= end:
                groups.append([])
            groups[-1].append(view)
            end = max(end, view.end)
        self.regions = [Region(group) for group in groups]
        self.starts = [region.start for region in self.regions]

    def begin(self, program):
        self.program = program
        self.visible = np.zeros(len(self.program_of), bool)
        self.visible[NOBODY] = True
        self.begin_segment()

    def begin_segment(self):
        self.segment = len(self.program_of)
        self.program_of.append(self.program)
        self.visible = np.append(self.visible, True)

    def access(self, kind, pointers, mask, width):
        """Check one access and return its active addresses."""
        mask = np.broadcast_to(np.asarray(mask), pointers.shape)
        addresses = (pointers.ravel() if mask.all() else pointers[mask]).astype(np.int64)
        if addresses.size:
            low, high = int(addresses.min()), int(addresses.max()) + width
            if not any(v.dense and v.start <= low and high <= v.end for v in self.views):
                self.check_lanes(kind, addresses, width)
            if self.settings.races:
                self.check_races(kind, addresses, low, high, width)
        return addresses

    def check_lanes(self, kind, addresses, width):
        inside = np.zeros(addresses.shape, bool)
        for view in self.views:
            inside |= view.contains(addresses, width)
        if inside.all():
            return
        outside = addresses[~inside]
        first = int(outside[0])

        def distance(view):
            return max(view.start - first, first + width - view.end, 0)

        nearest = min(self.views, key=distance, default=None)
        where = "no tensor argument"
        if nearest is not None:
            where = f"argument {nearest.name!r} of {nearest.end - nearest.start} bytes"
            where = f"byte {first - nearest.start:+d} of {where}, the nearest"
        raise SanitizerError(
            f"out of bounds: program {self.program}: {kind} of {outside.size} lanes outside every "
            f"argument; the first touches {where}"
        )

    def check_races(self, kind, addresses, low, high, width):
        region = self.regions[bisect.bisect_right(self.starts, low) - 1]
        if high > region.end:
            left = addresses < region.end
            self.check_races(kind, addresses[left], low, region.end, width)
            rest = addresses[~left]
            self.check_races(kind, rest, int(rest.min()), high, width)
            return
        units, visible = region.units(addresses, width), self.visible
        against = [("writes", region.writer)] if region.written else []
        against += [("reads", region.reader)] if kind != "load" else []
        against += [("changes atomically", region.atomic)] if kind != "atomic" else []
        for verb, shadow in against:
            ordered = visible[shadow[units]]
            if not ordered.all():
                self.raise_race(kind, region, units[~ordered][0], verb, shadow)
        if kind == "store":
            region.writer[units] = self.segment
            region.written = True
        else:
            shadow = region.reader if kind == "load" else region.atomic
            shadow[units] = np.where(visible[shadow[units]], self.segment, MANY)

    def raise_race(self, kind, region, unit, verb, shadow):
        address = region.start + int(unit) * region.unit
        segment = int(shadow[unit])
        other = "another" if segment == MANY else self.program_of[segment]
        places = [f"{v.name!r} at byte {address - v.start}" for v in self.views
                  if v.start <= address < v.end]  # fmt: skip
        raise SanitizerError(
            f"race: program {self.program} {kind}s what program {other} {verb}: address "
            f"{address:#x}, argument {' = '.join(places)}"
        )

    def synchronize(self, addresses, semantic, scope):
        """Order this program after earlier releases of `addresses`, and release in its turn."""
        if scope == "CTA":
            return
        for address in {int(a) for a in addresses}:
            known = self.published.get(address, np.zeros(1, bool))
            if semantic.startswith("ACQUIRE"):
                self.visible[: known.size] |= known
            if semantic.endswith("RELEASE"):
                published = self.visible.copy()
                published[: known.size] |= known
                self.published[address] = published
        if semantic.endswith("RELEASE"):
            self.begin_segment()


_settings: list[Settings] = []
_launches: list[Launch] = []


@contextlib.contextmanager
def sanitize(order: str = "forward", *, seed: int = 0, races: bool = True) -> Iterator[None]:
    """Watch every interpreted launch in the block; the innermost of nested blocks decides."""
    if order not in ("forward", "reversed", "random"):
        raise ValueError(f"sanitize: order must be forward, reversed or random, got {order!r}")
    _settings.append(Settings(order, seed, races))
    try:
        with _hooked() if len(_settings) == 1 else contextlib.nullcontext():
            yield
    finally:
        _settings.pop()


@contextlib.contextmanager
def _hooked():
    import triton.runtime.interpreter as interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    replacements = [
        (executor, "__call__", _call),
        (executor, "_init_args_hst", _init_args),
        (builder, "set_grid_dim", _set_grid_dim),
        (builder, "set_grid_idx", _set_grid_idx),
        (builder, "create_masked_load", _load),
        (builder, "create_masked_store", _store),
        (builder, "create_atomic_rmw", _atomic_rmw),
        (builder, "create_atomic_cas", _atomic_cas),
    ]
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in replacements]
    for (owner, name, hook), (_, _, original) in zip(replacements, originals, strict=True):
        setattr(owner, name, _method(hook, original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _method(hook, original):
    def method(self, *args, **kwargs):
        return hook(self, original, *args, **kwargs)

    return method


def _call(self, original, *args, **kwargs):
    _launches.append(Launch(_settings[-1]))
    try:
        return original(self, *args, **kwargs)
    except Exception as error:
        cause = error
        while cause is not None and not isinstance(cause, SanitizerError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause.with_traceback(error.__traceback__) from None
    finally:
        _launches.pop()


def _init_args(self, original, args, kwargs):
    hosts, host_kwargs = original(self, args, kwargs)
    launch = _launches[-1]
    for name, arg in [*zip(self.arg_names, hosts, strict=False), *host_kwargs.items()]:
        launch.register(name, arg)
    launch.make_regions()
    return hosts, host_kwargs


def _set_grid_dim(self, original, *dims):
    original(self, *dims)
    launch, total = _launches[-1], math.prod(dims)
    launch.order = range(total)
    if launch.settings.order == "reversed":
        launch.order = range(total - 1, -1, -1)
    elif launch.settings.order == "random":
        launch.order = np.random.default_rng(launch.settings.seed).permutation(total)


def _set_grid_idx(self, original, x, y, z):
    launch, (_, ny, nz) = _launches[-1], self.grid_dim
    place = int(launch.order[(x * ny + y) * nz + z])
    program = (place // (ny * nz), place // nz % ny, place % nz)
    launch.begin(program)
    original(self, *program)


def _data(mask):
    return getattr(mask, "data", mask)  # of a handle; descriptors before Triton 3.9 pass an array


def _width(pointers):
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _load(self, original, pointers, mask, *args, **kwargs):
    _launches[-1].access("load", pointers.data, _data(mask), _width(pointers))
    return original(self, pointers, mask, *args, **kwargs)


def _store(self, original, pointers, value, mask, *args, **kwargs):
    launch = _launches[-1]
    addresses = launch.access("store", pointers.data, _data(mask), _width(pointers))
    out = original(self, pointers, value, mask, *args, **kwargs)
    if launch.settings.races and addresses.size > 1:
        _check_lanes_agree(launch, pointers.data, value.data, np.asarray(_data(mask)))
    return out


def _check_lanes_agree(launch, pointers, value, mask):
    """Read the stored lanes back: one that differs was overwritten by another lane."""
    from triton.runtime.interpreter import _interpreter

    stored = np.ascontiguousarray(np.broadcast_to(value, pointers.shape))
    mask = np.ascontiguousarray(np.broadcast_to(mask, pointers.shape))
    found = _interpreter.load(pointers, mask, stored, stored.dtype)
    bits = f"u{stored.itemsize}"
    lost = stored.view(bits) != found.view(bits)
    if lost.any():
        raise SanitizerError(
            f"race: program {launch.program}: {int(lost.sum())} lanes of one store lost their "
            f"value to another lane at the same address, the first {int(pointers[lost][0]):#x}"
        )


def _atomic_rmw(self, original, op, pointers, value, mask, semantic, scope):
    launch = _launches[-1]
    addresses = launch.access("atomic", pointers.data, _data(mask), _width(pointers))
    launch.synchronize(addresses, semantic.name, scope.name)
    return original(self, op, pointers, value, mask, semantic, scope)


def _atomic_cas(self, original, pointers, compare, value, semantic, scope):
    launch = _launches[-1]
    everywhere = np.ones(pointers.data.shape, bool)
    addresses = launch.access("atomic", pointers.data, everywhere, _width(pointers))
    launch.synchronize(addresses, semantic.name, scope.name)
    return original(self, pointers, compare, value, semantic, scope)
