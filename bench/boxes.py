"""Sets of 32-byte sectors that kernels touch in one access, kept small and compared fast.

A box is a set of rows of equal length in one allocation: the start of each row and its bytes.
Tiles of matrices are boxes whose starts are evenly spaced, gathered rows are boxes that list them.
Equal boxes get the same number, so that a trace of a launch is a list of small integers.

`atoms` splits the boxes of an allocation into the largest sets of sectors that are always touched
together: where the boxes are equal or disjoint, the boxes themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

__all__ = ["NOTHING", "SECTOR", "Atoms", "Boxes"]

SECTOR = 32  # bytes: what an NVIDIA L2 transfers
NOTHING = -1  # the number of an empty box
CHUNK = 1 << 22  # sectors expanded at a time


class Atoms(NamedTuple):
    sizes: list[int]  # sectors of each atom
    of_box: dict[int, tuple[int, ...]]  # atoms of each box, in the order of their addresses


@dataclass(slots=True)
class Columns:
    """One entry per box."""

    storage: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)  # byte of the storage
    step: list[int] = field(default_factory=list)  # bytes between rows
    count: list[int] = field(default_factory=list)  # rows
    length: list[int] = field(default_factory=list)  # bytes of each row
    sectors: list[int] = field(default_factory=list)  # distinct ones


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64: sums of mixed values tell sets apart."""
    x = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Boxes:
    """The boxes of one measurement, numbered in the order in which they were first seen."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._columns = Columns()
        self._rows: dict[int, np.ndarray] = {}  # starts that are not evenly spaced

    def __len__(self) -> int:
        return len(self._columns.start)

    def storage(self, number: int) -> int:
        return self._columns.storage[number]

    def add(
        self, storage: int, starts: np.ndarray, active: np.ndarray | None, length: np.ndarray
    ) -> np.ndarray:
        """Return the numbers of the boxes of several programs, NOTHING where nothing is active.

        Args:
            starts: (P or 1, R) bytes from the start of the storage.
            active: (P or 1, R) rows that count, None for all.
            length: (P or 1,) bytes per row; 0: nothing is active.
        """
        programs = max(len(starts), len(length), 1 if active is None else len(active))
        keys = _mixed(starts)
        if active is not None:
            keys = np.where(active, keys, np.uint64(0))
        with np.errstate(over="ignore"):
            keys = keys.sum(axis=1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            keys = keys + _mixed(length * 65_536 + storage)
        empty = length == 0
        if active is not None:
            empty = empty | ~active.any(axis=1)
        empty = np.broadcast_to(empty, (programs,))
        values, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        known = self._known
        numbers = np.array([known.get(key, NOTHING) for key in values.tolist()], np.int32)
        new = np.flatnonzero((numbers == NOTHING) & ~empty[first])
        if new.size:
            numbers[new] = np.arange(len(self), len(self) + new.size)
            known.update(zip(values[new].tolist(), numbers[new].tolist(), strict=True))
            which = first[new]
            rows = starts[which % len(starts)]
            wanted = None if active is None else active[which % len(active)]
            self._append(storage, rows, wanted, length[which % len(length)])
        out = np.empty(programs, np.int32)
        out[:] = numbers[inverse]
        out[empty] = NOTHING
        return out

    def _append(
        self, storage: int, rows: np.ndarray, wanted: np.ndarray | None, length: np.ndarray
    ) -> None:
        boxes, count = rows.shape
        step = rows[:, 1] - rows[:, 0] if count > 1 else np.zeros(boxes, np.int64)
        wide = -(-(rows[:, 0] % SECTOR + length) // SECTOR)
        regular = np.full(boxes, True) if wanted is None else wanted.all(axis=1)
        if count > 1:
            regular &= (step % SECTOR == 0) & (step >= wide * SECTOR)
            regular &= (np.diff(rows, axis=1) == step[:, None]).all(axis=1)
        column = self._columns
        for i in np.flatnonzero(~regular).tolist():
            mine = np.unique(rows[i] if wanted is None else rows[i][wanted[i]])
            self._rows[len(self) + i] = mine
            wide[i] = len(_sectors(mine, int(length[i])))
        column.storage.extend([storage] * boxes)
        column.start.extend(rows[:, 0].tolist())
        column.step.extend(step.tolist())
        column.count.extend([count] * boxes)
        column.length.extend(length.tolist())
        column.sectors.extend((wide * np.where(regular, count, 1)).tolist())

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Sectors of each box; 0 of NOTHING."""
        sectors = self._columns.sectors
        return np.array([sectors[n] if n >= 0 else 0 for n in numbers.tolist()])

    def sectors(self, number: int) -> np.ndarray:
        """The distinct sectors of one box, ascending."""
        column = self._columns
        rows = self._rows.get(number)
        if rows is None:
            rows = column.start[number] + column.step[number] * np.arange(column.count[number])
        return _sectors(rows, column.length[number])

    def covered(self, numbers: Sequence[int]) -> int:
        """Distinct sectors of boxes of one storage."""
        if not numbers:
            return 0
        low, high = self._span(numbers)
        seen = np.zeros(high - low, bool)
        for sectors, _, _ in self._expanded(numbers):
            seen[sectors - low] = True
        return int(np.count_nonzero(seen))

    def atoms(self, numbers: Sequence[int]) -> Atoms:
        """Split boxes of one storage into sets of sectors that occur in the same boxes."""
        sizes = self.sizes(np.array(numbers)).tolist()
        if sum(sizes) == self.covered(numbers):
            return Atoms(sizes, {n: (i,) for i, n in enumerate(numbers)})
        low, high = self._span(numbers)
        labels = np.zeros(high - low, np.uint64)
        marks = _mixed(np.arange(1, len(numbers) + 1))
        with np.errstate(over="ignore"):
            for sectors, which, each in self._expanded(numbers):
                np.add.at(labels, sectors - low, np.repeat(marks[which], each))
        touched = np.flatnonzero(labels)
        _, first, inverse, counts = np.unique(
            labels[touched], return_index=True, return_inverse=True, return_counts=True
        )
        order = np.argsort(first, kind="stable")  # atoms by their first sector
        rank = np.empty(len(first), np.int64)
        rank[order] = np.arange(len(first))
        atom_of = np.zeros(len(labels), np.int32)
        atom_of[touched] = rank[inverse]
        of_box = {n: tuple(np.unique(atom_of[self.sectors(n) - low]).tolist()) for n in numbers}
        return Atoms(counts[order].tolist(), of_box)

    def _span(self, numbers: Sequence[int]) -> tuple[int, int]:
        """The range of sectors in which the boxes lie."""
        column = self._columns
        low, high = 1 << 62, 0
        for n in numbers:
            rows = self._rows.get(n)
            if rows is None:
                first = column.start[n]
                last = first + column.step[n] * (column.count[n] - 1)
            else:
                first, last = int(rows[0]), int(rows[-1])
            low, high = min(low, first), max(high, last + column.length[n])
        return low // SECTOR, -(-high // SECTOR)

    def _expanded(
        self, numbers: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, int | np.ndarray]]:
        """Sectors of some boxes, their indices in `numbers`, and how many each has; in chunks."""
        column = self._columns
        alike: dict[tuple[int, int, int], list[int]] = {}
        for i, n in enumerate(numbers):
            if n in self._rows:
                sectors = self.sectors(n)
                yield sectors, np.array([i]), len(sectors)
            else:
                count = column.count[n]
                key = (count, column.step[n] // SECTOR, column.sectors[n] // count)
                alike.setdefault(key, []).append(i)
        for (count, step, wide), members in alike.items():
            shape = np.add.outer(np.arange(count) * step, np.arange(wide)).ravel()
            per_chunk = max(1, CHUNK // len(shape))
            for i0 in range(0, len(members), per_chunk):
                which = members[i0 : i0 + per_chunk]
                starts = np.array([column.start[numbers[i]] for i in which]) // SECTOR
                sectors = np.add.outer(starts, shape).ravel()
                yield sectors, np.array(which), len(shape)


def _sectors(rows: np.ndarray, length: int) -> np.ndarray:
    first, last = rows // SECTOR, (rows + length - 1) // SECTOR
    wide = int((last - first).max()) + 1
    sectors = np.add.outer(first, np.arange(wide))
    if (last - first + 1 == wide).all() and (first[1:] > last[:-1]).all():
        return sectors.ravel()  # rows as they are in memory, apart from each other
    return np.unique(sectors[sectors <= last[:, None]])
