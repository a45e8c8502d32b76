"""Values of many programs of one launch at once, as small as their structure allows.

A block of addresses is mostly a column plus a row: base[p] + m * stride + n. A `Lanes` keeps such
a sum apart, as arrays with a first axis for the programs and one axis per dimension of the block,
each of its full size or 1:

    value[p, i, j] = sum over terms of term[p or 0, i or 0, j or 0]

so that a thousand programs' tiles of weights cost a few thousand numbers instead of millions. A
mask is kept the same way, as a conjunction. What depends on the contents of a floating point
tensor has no terms: it is unknown, and using it where a value is needed raises `NeedsValues`.
Integers are held as int64, and int32 sums and products that would overflow are refused.

Programs that leave a loop sooner than others of their batch stay in it, inactive. What was made in
such a loop says nothing about them, so using it after the loop raises `Diverged`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

__all__ = [
    "Diverged",
    "Lanes",
    "NeedsValues",
    "activity",
    "add",
    "apply",
    "conjunction",
    "multiply",
]

Pattern = frozenset[int]  # the axes along which a term varies; axis 0 is the program


class NeedsValues(BaseException):
    """The course of the launch depends on floating point data: it must be executed."""


class Diverged(BaseException):
    """The programs of a batch disagree on a branch or a trip count: one value per program."""

    def __init__(self, values: np.ndarray):
        super().__init__()
        self.values = values


class Activity:
    """Which programs of the current batch are active, and in which loops others are not."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.active: np.ndarray | None = None  # (P,), None: all
        self.loops: list[int] = []  # numbers of the uneven loops around
        self.trips: list[np.ndarray] = []  # of every uneven loop so far, by program

    def steps(self, trips: np.ndarray) -> Iterator[int]:
        """Go through a loop whose trip counts differ."""
        outer, number = self.active, len(self.trips)
        self.trips.append(trips)
        self.loops.append(number)
        for i in range(int(trips.max())):
            live = trips > i if outer is None else (trips > i) & outer
            if not live.any():
                break
            self.active = None if live.all() else live
            yield i
        self.active = outer
        self.loops.pop()


activity = Activity()


class Lanes:
    """One value per program and lane. `shape` is the block's; a scalar's is (1,)."""

    __slots__ = ("_terms", "conjoined", "dtype", "loop", "shape")

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        terms: Iterable[np.ndarray] | None,
        conjoined: bool = False,
    ):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self._terms = None if terms is None else tuple(terms)
        self.conjoined = conjoined  # the terms of a mask: all must hold
        self.loop = activity.loops[-1] if activity.loops else None

    @classmethod
    def of(cls, data: Any) -> Lanes:
        """From what Triton's interpreter keeps in a handle: an array equal in all programs."""
        if isinstance(data, Lanes):
            return data
        array = np.asarray(data)
        array = array.reshape(array.shape or (1,))
        return cls(array.shape, array.dtype, (_stored(array)[None],))

    @classmethod
    def unknown(cls, shape: Sequence[int], dtype: Any) -> Lanes:
        return cls(shape, dtype, None)

    @property
    def terms(self) -> tuple[np.ndarray, ...] | None:
        if self._terms is not None and self.loop is not None and self.loop not in activity.loops:
            raise Diverged(activity.trips[self.loop])
        return self._terms

    @property
    def known(self) -> bool:
        return self._terms is not None

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def needed(self) -> tuple[np.ndarray, ...]:
        if self.terms is None:
            raise NeedsValues
        return self.terms

    def dense(self) -> np.ndarray:
        """One array of all terms; axes along which nothing varies stay of size 1."""
        terms = self.needed()
        out = terms[0]
        for term in terms[1:]:
            out = (out & term) if self.conjoined else (out + term)
        return out

    def full(self, programs: int) -> np.ndarray:
        return np.broadcast_to(self.dense(), (programs, *self.shape))

    def mapped(self, change: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]) -> Lanes:
        """The same values, moved: `change` is applied to each term."""
        terms = None if self.terms is None else tuple(change(term) for term in self.terms)
        return Lanes(shape, self.dtype, terms, self.conjoined)

    def per_program(self) -> np.ndarray:
        """The values of a scalar, one per program, or one for all."""
        dense: np.ndarray = self.dense()
        return dense.reshape(dense.shape[0], -1)[:, 0]

    def uniform(self) -> Any:
        """The one value of a scalar in all programs of the batch."""
        values = self.per_program()
        live = values
        if activity.active is not None and len(values) > 1:
            live = values[activity.active]
        if (live != live[0]).any():
            raise Diverged(values)
        return live[0]

    # What the interpreter does with a scalar's data:

    def __bool__(self) -> bool:
        return bool(self.uniform())

    def __int__(self) -> int:
        return int(self.uniform())

    __index__ = __int__

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.uniform(), dtype=dtype)

    def squeeze(self) -> Lanes:
        return self

    def item(self) -> Any:
        return self.uniform()

    def transpose(self, *axes: Any) -> Lanes:
        order = axes[0] if len(axes) == 1 else axes or None
        order = tuple(reversed(range(self.ndim))) if order is None else tuple(order)
        shape = [self.shape[axis] for axis in order]
        return self.mapped(lambda t: t.transpose(0, *(axis + 1 for axis in order)), shape)


def _stored(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int64) if array.dtype.kind in "iu" else array


def _pattern(term: np.ndarray) -> Pattern:
    return frozenset(axis for axis, size in enumerate(term.shape) if size > 1)


def _merged(
    terms: Iterable[np.ndarray], join: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Join terms wherever that makes none larger."""
    kept: list[tuple[Pattern, np.ndarray]] = []
    for term in sorted(terms, key=lambda t: -t.size):
        pattern = _pattern(term)
        for i, (other, value) in enumerate(kept):
            if pattern <= other:
                kept[i] = other, join(value, term)
                break
        else:
            kept.append((pattern, term))
    return tuple(value for _, value in kept)


def _checked(terms: tuple[np.ndarray, ...], dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """Refuse sums beyond a signed integer type, which would wrap."""
    if dtype.kind == "i" and dtype.itemsize < 8:
        info = np.iinfo(dtype)
        low = sum(int(term.min()) for term in terms)
        high = sum(int(term.max()) for term in terms)
        if low < info.min or high > info.max:
            lows = sum(term.reshape(len(term), -1).min(axis=1) for term in terms)
            highs = sum(term.reshape(len(term), -1).max(axis=1) for term in terms)
            if np.min(lows) < info.min or np.max(highs) > info.max:
                raise OverflowError(f"traffic: an {dtype} sum or product in a kernel overflows")
    return terms


def _wider(x: Lanes, y: Lanes) -> tuple[int, ...]:
    return x.shape if x.size >= y.size else y.shape


def add(x: Lanes, y: Lanes, dtype: Any, sign: int = 1) -> Lanes:
    """x + sign * y of integers."""
    if x.terms is None or y.terms is None:
        return Lanes.unknown(_wider(x, y), dtype)
    addends = y.terms if sign == 1 else tuple(sign * term for term in y.terms)
    terms = _merged((*x.terms, *addends), np.add)
    return Lanes(_wider(x, y), dtype, _checked(terms, np.dtype(dtype)))


def multiply(x: Lanes, y: Lanes, dtype: Any) -> Lanes:
    """x * y of integers; a factor without lanes is multiplied into each term of the other."""
    if x.terms is None or y.terms is None:
        return Lanes.unknown(_wider(x, y), dtype)
    for sums, factor in ((x.terms, y), (y.terms, x)):
        scale = factor.dense()
        if _pattern(scale) <= {0}:
            terms = tuple(term * scale for term in sums)
            break
    else:
        terms = (x.dense() * y.dense(),)
    return Lanes(_wider(x, y), dtype, _checked(terms, np.dtype(dtype)))


def conjunction(x: Lanes, y: Lanes) -> Lanes:
    """x & y of masks."""
    if x.terms is None or y.terms is None:
        return Lanes.unknown(_wider(x, y), bool)
    terms = _merged((*x.terms, *y.terms), np.logical_and)
    return Lanes(_wider(x, y), bool, terms, conjoined=True)


def apply(op: Callable[..., np.ndarray], dtype: Any, *operands: Lanes) -> Lanes:
    """Any operation lane by lane; `dtype` None: what numpy makes of it."""
    shape = max((x.shape for x in operands), key=math.prod)
    if not all(x.known for x in operands):
        return Lanes.unknown(shape, bool if dtype is None else dtype)
    with np.errstate(all="ignore"):
        out = op(*(x.dense() for x in operands))
    dtype = np.dtype(out.dtype if dtype is None else dtype)
    if dtype.kind in "iu":
        if dtype.itemsize < 8 and out.dtype.kind in "iu":
            info = np.iinfo(dtype)
            if out.size and (out.min() < info.min or out.max() > info.max):
                out = out.astype(dtype)  # wraps
        out = out.astype(np.int64)
    else:
        out = out.astype(dtype, copy=False)
    return Lanes(shape, dtype, (out,))
