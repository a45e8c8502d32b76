"""Interpret many programs of a launch at once, for the addresses they touch.

Triton's interpreter runs a kernel's Python once per program. Here its builder works on `Lanes`,
which hold the values of a whole batch of programs, so that programs with the same control flow are
interpreted together, once, however many they are. Where they disagree on a branch the batch is
split by the value in question and its parts start over; where they disagree on a trip count, those
that have finished wait for the others. So the classes of programs are found, not declared, and
every program's own addresses are exact.

No floating point data is read, written or computed. Integers are read from memory, since they
decide what is touched (tables of tiles and pages, lengths, offsets). A launch that needs more than
that, because it stores integers, uses atomics, or lets floating point data decide a branch, a mask
or an address, raises `NeedsValues` and must be executed.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .lanes import Diverged, Lanes, NeedsValues, activity, add, apply, conjunction, multiply

__all__ = ["Batch", "batch_hooks", "is_index", "run_in_batches"]

BATCH = 1024  # programs

Record = Callable[[str, Lanes, Lanes | None, int, bool], None]


class Batch:
    """The programs that are being interpreted, and what they do."""

    def __init__(self, programs: np.ndarray, grid: tuple[int, ...], record: Record):
        self.programs, self.grid, self.record = programs, grid, record
        self.flops = np.zeros(len(programs), np.int64)
        self.worked = np.zeros(len(programs), bool)
        ny, nz = grid[1], grid[2]
        self.index = (programs // (ny * nz), programs // nz % ny, programs % nz)

    def access(self, kind: str, pointers: Any, mask: Any) -> None:
        data = Lanes.of(pointers.data)
        lanes = _masked_by_activity(mask, data.shape)
        data.needed()
        if lanes is not None:
            lanes.needed()
        if kind != "load":
            self.works()
        element = pointers.get_element_ty()
        self.record(kind, data, lanes, _width(element), is_index(element))

    def works(self, flops: int = 0) -> None:
        """The active programs do something that counts as work."""
        live = slice(None) if activity.active is None else activity.active
        self.worked[live] = True
        self.flops[live] += flops


def _masked_by_activity(mask: Any, shape: tuple[int, ...]) -> Lanes | None:
    lanes = None if mask is None else Lanes.of(getattr(mask, "data", mask))
    if activity.active is None:
        return lanes
    live = activity.active.reshape(-1, *(1 for _ in shape))
    inactive = Lanes(shape, bool, (live,), conjoined=True)
    return inactive if lanes is None else conjunction(lanes, inactive)


_batches: list[Batch] = []


def run_in_batches(
    programs: int, grid: tuple[int, ...], run: Callable[[], object], begin: Callable[..., Record]
) -> Iterator[Batch]:
    """Call `run`, the kernel, for batches of programs until each has been interpreted once.

    `begin(programs)` returns what records the accesses of an attempt; those of a finished batch
    are yielded with it, those of one that diverged are dropped.
    """
    waiting = [np.arange(i, min(i + BATCH, programs)) for i in range(0, programs, BATCH)][::-1]
    while waiting:
        ids = waiting.pop()
        batch = Batch(ids, grid, begin(ids))
        _batches.append(batch)
        activity.reset()
        try:
            run()
        except Diverged as split:
            for value in np.unique(split.values)[::-1]:
                waiting.append(ids[split.values == value])
            continue
        finally:
            _batches.pop()
            activity.reset()
        yield batch


@functools.cache
def _interpreter() -> Any:
    return importlib.import_module("triton.runtime.interpreter")


@functools.cache
def _tl() -> Any:
    return importlib.import_module("triton.language")


def is_index(element: Any) -> bool:
    """Whether such a value can say where things are; bytes are weights in some format."""
    return not element.is_floating() and int(element.primitive_bitwidth) != 8


def _width(element: Any) -> int:
    return max(1, int(element.primitive_bitwidth) // 8)


def _numpy_dtype(dtype: Any) -> np.dtype:
    out: np.dtype = np.dtype(_interpreter()._get_np_dtype(dtype))
    return out


def _handle(lanes: Lanes, dtype: Any) -> Any:
    return _interpreter().TensorHandle(lanes, dtype)


def _like_data(shape: Any, dtype: Any) -> Any:
    """Floating point contents: unknown."""
    return _handle(Lanes.unknown(shape, _numpy_dtype(dtype)), dtype)


def _opaque(dtype: Any) -> bool:
    """bf16 and fp8 are bit patterns here, which nothing needs to compute with."""
    return bool(dtype.is_floating() and dtype.scalar.name not in ("fp16", "fp32", "fp64"))


# Builder methods, in place of their namesakes. `self` is the InterpreterBuilder.


def _get_program_id(self: Any, axis: int) -> Any:
    index = _batches[-1].index[axis]
    return _handle(Lanes((1,), np.int32, (index.reshape(-1, 1),)), _tl().int32)


def _get_num_programs(self: Any, axis: int) -> Any:
    size = np.array([[_batches[-1].grid[axis]]])
    return _handle(Lanes((1,), np.int32, (size,)), _tl().int32)


def _load(self: Any, pointers: Any, *args: Any) -> Any:
    return _masked_load(self, pointers, None, None)


def _masked_load(self: Any, pointers: Any, mask: Any, other: Any, *args: Any) -> Any:
    batch = _batches[-1]
    batch.access("load", pointers, mask)
    element = pointers.get_element_ty()
    data = Lanes.of(pointers.data)
    if not is_index(element):
        return _like_data(data.shape, element)
    dtype = _numpy_dtype(element)
    address = data.dense()
    lanes = _masked_by_activity(mask, data.shape)
    active = np.ones((1,) * address.ndim, bool) if lanes is None else lanes.dense()
    address, active = np.broadcast_arrays(address, active)
    default = np.zeros((1,) * address.ndim, dtype)
    if other is not None:
        default = Lanes.of(other.data).dense().astype(dtype)
    default = np.ascontiguousarray(np.broadcast_to(default, address.shape))
    found = _interpreter()._interpreter.load(
        np.ascontiguousarray(address.astype(np.uint64)),
        np.ascontiguousarray(active),
        default,
        dtype,
    )
    found = found.astype(np.int64) if dtype.kind in "iu" else found
    return _handle(Lanes(data.shape, dtype, (found,)), element)


def _store(self: Any, pointers: Any, value: Any, *args: Any) -> Any:
    return _masked_store(self, pointers, value, None)


def _masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> None:
    if not pointers.get_element_ty().is_floating():
        raise NeedsValues  # a later load may ask for them
    _batches[-1].access("store", pointers, mask)


def _needs_values(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise NeedsValues


def _cast(self: Any, source: Any, dst_type: Any) -> Any:
    data, dtype = Lanes.of(source.data), dst_type.scalar
    if _opaque(dtype) or _opaque(source.dtype.scalar):
        return _like_data(data.shape, dtype)
    to = _numpy_dtype(dtype)
    integers = data.dtype.kind in "iu" and to.kind in "iu"
    if data.terms is not None and integers and to.itemsize >= data.dtype.itemsize:
        return _handle(Lanes(data.shape, to, data.terms), dtype)
    return _handle(apply(lambda x: x.astype(to), to, data), dtype)


def _fp_to_fp(self: Any, source: Any, dst_type: Any, *args: Any) -> Any:
    return _cast(self, source, dst_type)


def _bitcast(self: Any, source: Any, dst_type: Any) -> Any:
    data, to = Lanes.of(source.data), _numpy_dtype(dst_type)
    if data.terms is not None and {data.dtype.kind, to.kind} <= {"i", "u"}:
        return _cast(self, source, dst_type)
    return _handle(Lanes.unknown(data.shape, to), dst_type.scalar)


def _binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    x, y, dtype = Lanes.of(lhs.data), Lanes.of(rhs.data), lhs.dtype.scalar
    kind = x.dtype.kind
    if kind in "iu" and op in (np.add, np.subtract):
        return _handle(add(x, y, x.dtype, 1 if op is np.add else -1), dtype)
    if kind in "iu" and op is np.multiply:
        return _handle(multiply(x, y, x.dtype), dtype)
    if kind == "b" and op is np.bitwise_and:
        return _handle(conjunction(x, y), dtype)
    compares = op in _COMPARISONS
    if _opaque(dtype):
        shape = x.shape if x.size >= y.size else y.shape
        lanes = Lanes.unknown(shape, bool if compares else x.dtype)
    else:
        lanes = apply(op, bool if compares else x.dtype, x, y)
    return _handle(lanes, _tl().int1 if compares else dtype)


_COMPARISONS = (
    np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal
)  # fmt: skip


def _idiv(self: Any, lhs: Any, rhs: Any) -> Any:
    def divided(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        quotient: np.ndarray = (x - np.fmod(x, y)) // y
        return quotient

    x = Lanes.of(lhs.data)
    return _handle(apply(divided, x.dtype, x, Lanes.of(rhs.data)), lhs.dtype.scalar)


def _ashr(self: Any, lhs: Any, rhs: Any) -> Any:
    return _binary(self, lhs, rhs, np.right_shift)


def _ternary(self: Any, first: Any, second: Any, third: Any, op: Any) -> Any:
    operands = [Lanes.of(handle.data) for handle in (first, second, third)]
    dtype = third.dtype.scalar
    if _opaque(dtype):
        return _like_data(max((x.shape for x in operands), key=np.prod), dtype)
    return _handle(apply(op, operands[2].dtype, *operands), third.dtype)


def _unary(self: Any, arg: Any, op: Any) -> Any:
    data = Lanes.of(arg.data)
    if _opaque(arg.dtype.scalar):
        return _like_data(data.shape, arg.dtype.scalar)
    return _handle(apply(op, data.dtype, data), arg.dtype.scalar)


def _pointwise_unknown(self: Any, *args: Any) -> Any:
    """Functions of floating point data with builder methods of their own."""
    last = [arg for arg in args if hasattr(arg, "data")][-1]
    return _like_data(Lanes.of(last.data).shape, last.dtype.scalar)


def _reshape(self: Any, arg: Any, shape: Any, *args: Any) -> Any:
    data, shape = Lanes.of(arg.data), tuple(shape)
    terms = None
    if data.terms is not None:
        dense = data.dense()
        if dense[0].size == 1:
            terms = (dense.reshape(-1, *(1 for _ in shape)),)
        else:
            whole = np.broadcast_to(dense, (len(dense), *data.shape))
            terms = (whole.reshape(-1, *shape),)
    return _handle(Lanes(shape, data.dtype, terms), arg.dtype.scalar)


def _trans(self: Any, arg: Any, perm: Any) -> Any:
    return _handle(Lanes.of(arg.data).transpose(tuple(perm)), arg.dtype.scalar)


def _expand_dims(self: Any, arg: Any, axis: int) -> Any:
    data = Lanes.of(arg.data)
    shape = list(data.shape)
    axis = axis % (len(shape) + 1)
    shape.insert(axis, 1)
    return _handle(data.mapped(lambda t: np.expand_dims(t, axis + 1), shape), arg.dtype.scalar)


def _broadcast(self: Any, arg: Any, shape: Any) -> Any:
    data = Lanes.of(arg.data)
    return _handle(data.mapped(lambda t: t, tuple(shape)), arg.dtype.scalar)


def _splat(self: Any, ret_ty: Any, arg: Any) -> Any:
    data, shape = Lanes.of(arg.data), tuple(ret_ty.shape)
    ones = (1,) * len(shape)
    return _handle(data.mapped(lambda t: t.reshape(len(t), *ones), shape), arg.dtype.scalar)


def _unsplat(self: Any, arg: Any) -> Any:
    data = Lanes.of(arg.data)
    return _handle(
        data.mapped(lambda t: t.reshape(len(t), -1)[:, :1], (1,)), arg.dtype.scalar
    )  # fmt: skip


def _joined(shape: Callable[..., Any], join: Callable[..., np.ndarray], lhs: Any, rhs: Any) -> Any:
    x, y = Lanes.of(lhs.data), Lanes.of(rhs.data)
    out = shape(x.shape, y.shape)
    if not (x.known and y.known):
        return _handle(Lanes.unknown(out, x.dtype), lhs.dtype.scalar)
    programs = max(len(x.dense()), len(y.dense()))
    term = join(x.full(programs), y.full(programs))
    return _handle(Lanes(out, x.dtype, (term,)), lhs.dtype.scalar)


def _cat(self: Any, lhs: Any, rhs: Any) -> Any:
    return _joined(
        lambda x, y: (x[0] + y[0], *x[1:]), lambda x, y: np.concatenate([x, y], axis=1), lhs, rhs
    )


def _join(self: Any, lhs: Any, rhs: Any) -> Any:
    return _joined(lambda x, y: (*x, 2), lambda x, y: np.stack([x, y], axis=-1), lhs, rhs)


def _split(self: Any, val: Any) -> Any:
    data = Lanes.of(val.data)

    def half(i: int) -> Any:
        terms = None
        if data.terms is not None:
            dense = data.dense()
            terms = (dense[..., min(i, dense.shape[-1] - 1)],)
        return _handle(Lanes(data.shape[:-1], data.dtype, terms), val.dtype.scalar)

    return half(0), half(1)


def _addptr(self: Any, pointer: Any, offset: Any) -> Any:
    width = np.array([_width(pointer.get_element_ty())])
    moved = multiply(Lanes.of(offset.data), Lanes.of(width), np.int64)
    return _handle(add(Lanes.of(pointer.data), moved, np.int64), pointer.dtype)


def _dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
    rows, columns = Lanes.of(a.data).shape, Lanes.of(b.data).shape
    _batches[-1].works(2 * int(np.prod(rows)) * columns[-1])
    return _like_data(Lanes.of(d.data).shape, d.dtype.scalar)


def _descriptor(
    self: Any, base: Any, shape: Any, strides: Any, block: Any, *args: Any, **kwargs: Any
) -> Any:
    return types.SimpleNamespace(
        base=base, shape=shape, strides=strides, block_shape=list(block), ndim=len(block)
    )


def _descriptor_pointers(desc: Any, offsets: Any) -> tuple[Any, Any]:
    """As TensorDescHandle.materialize_pointers: what lies outside the tensor is masked."""
    base = desc.base
    itemsize = np.array([_width(base.dtype.element_ty)])
    pointers = Lanes.of(base.data).mapped(
        lambda t: t.reshape(len(t), *(1 for _ in desc.block_shape)), desc.block_shape
    )
    mask = Lanes(desc.block_shape, bool, (np.ones((1,) * (desc.ndim + 1), bool),), True)
    for dim, size in enumerate(desc.block_shape):
        ones = [1] * desc.ndim
        lanes_shape = [*ones]
        lanes_shape[dim] = size

        def spread(x: Any) -> Lanes:
            return Lanes.of(x.data).mapped(
                lambda t: t.reshape(len(t), *(1 for _ in desc.block_shape)), desc.block_shape
            )

        lane = Lanes(desc.block_shape, np.int64, (np.arange(size).reshape(1, *lanes_shape),))
        index = add(spread(offsets[dim]), lane, np.int64)
        step = multiply(spread(desc.strides[dim]), Lanes.of(itemsize), np.int64)
        pointers = add(pointers, multiply(index, step, np.int64), np.int64)
        bound = spread(desc.shape[dim])
        inside = apply(lambda i, n: (i >= 0) & (i < n), bool, index, bound)
        mask = conjunction(mask, inside)
    pointers.shape = mask.shape = tuple(desc.block_shape)
    return _handle(pointers, base.dtype.scalar), _handle(mask, _tl().int1)


def _descriptor_load(self: Any, desc: Any, offsets: Any, *args: Any) -> Any:
    pointers, mask = _descriptor_pointers(desc, offsets)
    return _masked_load(self, pointers, mask, None)


def _descriptor_store(self: Any, desc: Any, value: Any, offsets: Any) -> Any:
    pointers, mask = _descriptor_pointers(desc, offsets)
    return _masked_store(self, pointers, value, mask)


def _assert(self: Any, condition: Any, *args: Any) -> None:
    data = Lanes.of(condition.data)
    if data.known and not data.dense().all():
        raise AssertionError(str(args[0]) if args else "tl.assume does not hold")


def _ignored(self: Any, *args: Any, **kwargs: Any) -> None:
    """Says nothing about traffic."""


# Reductions and scans.


def _result(lanes: Lanes, shape: tuple[int, ...], dtype: Any) -> Any:
    tl = _tl()
    handle = _handle(lanes, dtype.scalar)
    return tl.tensor(handle, tl.block_type(dtype.scalar, list(shape)) if shape else dtype.scalar)


def _reduce(self: Any, original: Any, inputs: Any) -> Any:
    data = [Lanes.of(arg.handle.data) for arg in inputs]
    rank = data[0].ndim
    axes = tuple(range(rank)) if self.axis is None else (self.axis % rank,)
    kept = [1 if i in axes else n for i, n in enumerate(data[0].shape)]
    shape = tuple(kept) if self.keep_dims else tuple(
        n for i, n in enumerate(kept) if i not in axes
    )  # fmt: skip
    name = getattr(self.combine_fn, "__name__", "")
    reduction: Any = next((op for part, op in _REDUCTIONS.items() if part in name), None)
    known = len(data) == 1 and data[0].known and not _opaque(inputs[0].dtype.scalar)
    if known and reduction is None:
        raise NeedsValues
    out = []
    for arg, lanes in zip(inputs, data, strict=True):
        terms = None
        if known and reduction is not None:
            dense = lanes.dense()
            whole = np.broadcast_to(dense, (len(dense), *lanes.shape))
            reduced = reduction(whole, axis=tuple(axis + 1 for axis in axes))
            terms = (reduced.reshape(len(dense), *(shape or (1,))),)
        out.append(_result(Lanes(shape or (1,), lanes.dtype, terms), shape, arg.dtype))
    return out


_REDUCTIONS = {"_sum_combine": np.sum, "elementwise_max": np.max, "elementwise_min": np.min}


def _scan(self: Any, original: Any, inputs: Any) -> Any:
    if any(Lanes.of(arg.handle.data).known for arg in inputs):
        raise NeedsValues
    return [
        _result(Lanes.unknown(arg.shape, arg.handle.data.dtype), tuple(arg.shape), arg.dtype)
        for arg in inputs
    ]


def _no_overflow_check(self: Any, original: Any, lhs: Any, rhs: Any, op: Any) -> None:
    """`lanes.add` and `lanes.multiply` check."""


def _range(start: Any, stop: Any = None, step: Any = None, **kwargs: Any) -> Any:
    """tl.range; where programs begin at different values, of a variable that differs too."""
    tl = _tl()
    step = 1 if step is None else step
    start, stop = (0, start) if stop is None else (start, stop)

    def values(bound: Any) -> np.ndarray:
        bound = getattr(bound, "value", bound)  # of a constexpr
        if isinstance(bound, tl.tensor):
            return Lanes.of(bound.handle.data).per_program()
        return np.array([int(bound)])

    first, last, by = values(start), values(stop), values(step)
    if (by != by[0]).any():
        raise Diverged(by)
    trips = np.maximum(0, -((first - last) // by[0]))
    even = (trips == trips[0]).all()
    if even and (first == first[0]).all():
        begin = int(first[0])
        return range(begin, begin + int(trips[0]) * int(by[0]), int(by[0]))

    def tensors() -> Iterator[Any]:
        for i in range(int(trips[0])) if even else activity.steps(trips):
            value = (first + i * by[0]).reshape(-1, 1)
            yield tl.tensor(_handle(Lanes((1,), np.int32, (value,)), tl.int32), tl.int32)

    return tensors()


def _patch_lang_core(original: Any, lang: Any, scope: Any) -> None:
    original(lang, scope)
    scope.set_attr(lang, "range", _range)


def batch_hooks() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) of everything that a batch needs."""
    interpreter = _interpreter()
    builder = interpreter.InterpreterBuilder
    semantic = importlib.import_module("triton.language.semantic").TritonSemantic
    methods: dict[str, Any] = {
        "create_get_program_id": _get_program_id, "create_get_num_programs": _get_num_programs,
        "create_load": _load, "create_masked_load": _masked_load,
        "create_store": _store, "create_masked_store": _masked_store,
        "cast_impl": _cast, "create_fp_to_fp": _fp_to_fp, "create_bitcast": _bitcast,
        "create_int_to_ptr": _bitcast, "create_ptr_to_int": _bitcast,
        "binary_op": _binary, "ternary_op": _ternary, "unary_op": _unary,
        "create_idiv": _idiv, "create_ashr": _ashr,
        "create_fma": _pointwise_unknown, "create_fabs": _pointwise_unknown,
        "create_erf": _pointwise_unknown, "create_rsqrt": _pointwise_unknown,
        "create_reshape": _reshape, "create_trans": _trans, "create_expand_dims": _expand_dims,
        "create_broadcast": _broadcast, "create_splat": _splat, "create_unsplat": _unsplat,
        "create_cat": _cat, "create_join": _join, "create_split": _split,
        "create_addptr": _addptr, "create_dot": _dot,
        "create_make_tensor_descriptor": _descriptor,
        "create_descriptor_load": _descriptor_load, "create_descriptor_store": _descriptor_store,
        "create_assert": _assert, "create_assume": _assert, "create_print": _ignored,
    }  # fmt: skip
    unsupported = (
        "create_atomic_rmw", "create_atomic_cas", "create_umulhi", "create_histogram",
        "create_gather", "create_tensor_pointer_load", "create_tensor_pointer_store",
        "create_make_block_ptr", "create_advance", "create_dot_scaled", "create_inline_asm",
        "create_extern_elementwise", "create_descriptor_gather", "create_descriptor_scatter",
    )  # fmt: skip
    methods |= {name: _needs_values for name in unsupported}
    hooks: list[tuple[Any, str, Any]] = [
        (builder, name, method) for name, method in methods.items() if hasattr(builder, name)
    ]
    for owner, name, wrapper in (
        (interpreter.ReduceOps, "apply_impl", _reduce),
        (interpreter.ScanOps, "apply_impl", _scan),
        (semantic, "binary_op_sanitize_overflow_impl", _no_overflow_check),
    ):
        hooks.append((owner, name, functools.partialmethod(wrapper, vars(owner)[name])))
    hooks.append(
        (
            interpreter,
            "_patch_lang_core",
            functools.partial(_patch_lang_core, interpreter._patch_lang_core),
        )
    )
    return hooks
