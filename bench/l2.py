"""A model of an L2 cache that turns a trace of launches into bytes of DRAM. Modelled, not measured.

* 50 MiB (H100), 32-byte sectors, fully associative, least recently used out first, write-back.
* A store puts its sectors in without reading them, also those it writes in part (the cache keeps
  byte masks); a load that misses reads them. Atomics do both. At the end dirty sectors go out.
* Programs start in launch order, SMs x occupancy of them at a time, and take turns access by
  access (one load or store of a block); when one ends, the next one takes its place.
* A launch begins when the one before has ended, with the cache as that left it. The first finds
  an empty cache.

Not modelled: L1 (every access counts here), sets and hashing of addresses, the two halves of the
H100's L2 and the copies between them, 128-byte lines, prefetch, eviction hints, compression,
programs of unequal speed, what other streams do. So the figure compares orders of programs and
shows reuse that is lost for want of capacity; it is no forecast of a profiler's reading.

Exactness: sectors that always occur together (`boxes.Atoms`) are moved as one. An atom of which a
part has been evicted is a full miss when it is touched again, as it is sector by sector: the first
missing sector evicts the oldest one left, which is the atom's own, and so on to its end.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .boxes import SECTOR, Boxes

__all__ = ["H100_L2_BYTES", "H100_SMS", "Dram", "Trace", "dram_bytes", "interleaved", "simulate"]

H100_L2_BYTES = 50 * 2**20
H100_SMS = 132

LOAD, STORE, ATOMIC = 0, 1, 2  # the low two bits of a step; the rest is the number of a box

Steps = Sequence[int] | np.ndarray
Occupancy = int | Mapping[str, int] | Callable[["LaunchTrace"], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchTrace:
    """What each program of a launch touched, in order."""

    kernel: str
    programs: Sequence[Steps]  # steps 4 * box + kind, by program; negative: nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    launches: tuple[LaunchTrace, ...]
    boxes: Boxes


@dataclass(frozen=True, kw_only=True, slots=True)
class Dram:
    """Bytes between DRAM and the modelled L2, in total and by launch."""

    read: int
    written: int
    launches: tuple[tuple[str, int, int], ...]  # kernel, read, written; the last flush is apart

    @property
    def total(self) -> int:
        return self.read + self.written


def dram_bytes(
    trace: Trace,
    *,
    occupancy: Occupancy = 1,
    sms: int = H100_SMS,
    capacity: int = H100_L2_BYTES,
) -> Dram:
    """Run `trace` through the model.

    Args:
        occupancy: programs per SM: one number, by kernel name, or a function of a LaunchTrace.
        sms: streaming multiprocessors.
        capacity: bytes of the cache, a multiple of 32.
    """
    if capacity % SECTOR or capacity <= 0 or sms <= 0:
        raise ValueError(
            f"dram_bytes: capacity must be a positive multiple of {SECTOR} and sms positive, "
            f"got {capacity}, {sms}"
        )
    sizes, atoms_of = _atoms(trace)
    cache = Cache(capacity // SECTOR, sizes)
    launches = []
    for launch in trace.launches:
        before = cache.read, cache.written
        resident = sms * _occupancy(launch, occupancy)
        touch = cache.touch
        for step in interleaved(launch.programs, resident):
            kind = step & 3
            for atom in atoms_of[step >> 2]:
                touch(atom, kind)
        read, written = cache.read - before[0], cache.written - before[1]
        launches.append((launch.kernel, SECTOR * read, SECTOR * written))
    cache.flush()
    return Dram(read=SECTOR * cache.read, written=SECTOR * cache.written, launches=tuple(launches))


def _occupancy(launch: LaunchTrace, occupancy: Occupancy) -> int:
    if isinstance(occupancy, Mapping):
        return occupancy.get(launch.kernel, 1)
    return occupancy(launch) if callable(occupancy) else occupancy


def interleaved(programs: Sequence[Steps], resident: int) -> Iterator[int]:
    """The steps of a launch in the model's order."""
    waiting = iter(programs)
    running: deque[Iterator[int]] = deque()

    def fill() -> None:
        while len(running) < resident:
            program = next(waiting, None)
            if program is None:
                return
            running.append(_steps(program))

    fill()
    while running:
        program = running.popleft()
        for step in program:
            if step >= 0:
                yield step
                running.append(program)
                break
        else:
            # The slot's next program takes this turn.
            following = next(waiting, None)
            if following is not None:
                running.appendleft(_steps(following))


def _steps(program: Steps) -> Iterator[int]:
    return iter(program.tolist() if isinstance(program, np.ndarray) else program)


class Cache:
    """The LRU cache over atoms; counts in sectors."""

    def __init__(self, capacity: int, sizes: Sequence[int]):
        self.capacity, self.sizes = capacity, sizes
        self.held: OrderedDict[int, int] = OrderedDict()  # atom: sectors left, oldest first
        self.dirty: set[int] = set()
        self.used = self.read = self.written = 0

    def touch(self, atom: int, kind: int) -> None:
        held, size = self.held, self.sizes[atom]
        left = held.get(atom, 0)
        if left == size:
            held.move_to_end(atom)
            if kind != LOAD:
                self.dirty.add(atom)
            return
        if left:  # partly evicted: the rest goes too, before it would be reached
            del held[atom]
            self.used -= left
            if atom in self.dirty:
                self.dirty.discard(atom)
                self.written += left
        held[atom] = size
        self.used += size
        if kind != STORE:
            self.read += size
        if kind != LOAD:
            self.dirty.add(atom)
        if self.used > self.capacity:
            self.evict()

    def evict(self) -> None:
        excess = self.used - self.capacity
        while excess:
            atom, left = next(iter(self.held.items()))
            gone = min(left, excess)
            if gone == left:
                del self.held[atom]
            else:
                self.held[atom] = left - gone
            if atom in self.dirty:
                self.written += gone
                if gone == left:
                    self.dirty.discard(atom)
            excess -= gone
        self.used = self.capacity

    def flush(self) -> None:
        self.written += sum(self.held[atom] for atom in self.dirty)
        self.dirty.clear()


def _atoms(trace: Trace) -> tuple[list[int], dict[int, tuple[int, ...]]]:
    by_storage: dict[int, list[int]] = {}
    for number in range(len(trace.boxes)):
        by_storage.setdefault(trace.boxes.storage(number), []).append(number)
    sizes: list[int] = []
    atoms_of: dict[int, tuple[int, ...]] = {}
    for numbers in by_storage.values():
        atoms = trace.boxes.atoms(numbers)
        base = len(sizes)
        sizes += atoms.sizes
        for number, members in atoms.of_box.items():
            atoms_of[number] = tuple(base + atom for atom in members)
    return sizes, atoms_of


def simulate(steps: Iterable[tuple[int, int]], capacity: int) -> tuple[int, int]:
    """The model sector by sector: (sector, kind) in order; returns sectors read and written.

    The plain statement of what `dram_bytes` computes faster; tests compare the two.
    """
    held: OrderedDict[int, bool] = OrderedDict()  # sector: dirty
    read = written = 0
    for sector, kind in steps:
        if sector in held:
            held.move_to_end(sector)
        else:
            read += kind != STORE
            if len(held) == capacity:
                _, dirty = held.popitem(last=False)
                written += dirty
            held[sector] = False
        held[sector] |= kind != LOAD
    return read, written + sum(held.values())
