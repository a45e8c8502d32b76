"""The L2 model: against the same thing sector by sector, and by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llama4_triton.bench.boxes import NOTHING, SECTOR, Boxes
from llama4_triton.bench.l2 import (
    ATOMIC,
    LOAD,
    STORE,
    LaunchTrace,
    Trace,
    dram_bytes,
    interleaved,
    simulate,
)

pytestmark = pytest.mark.no_kernels

MIB = 2**20


def box(boxes, *rows, length=SECTOR, storage=0):
    """The number of a box with these row starts."""
    (number,) = boxes.add(storage, np.array([rows]), None, np.array([length])).tolist()
    return number


def trace(boxes, *launches):
    """Launches as lists of programs, which are lists of (box, kind)."""
    return Trace(
        launches=tuple(
            LaunchTrace(
                kernel=f"k{i}", programs=[[4 * b + kind for b, kind in p] for p in programs]
            )
            for i, programs in enumerate(launches)
        ),
        boxes=boxes,
    )


def by_sectors(boxes, launches, resident, capacity):
    """What `dram_bytes` must give: every step taken apart, atoms in the order of the model."""
    by_storage: dict[int, list[int]] = {}
    for n in range(len(boxes)):
        by_storage.setdefault(boxes.storage(n), []).append(n)
    members: dict[int, list[list[tuple[int, int]]]] = {}
    for storage, numbers in by_storage.items():
        held_by: dict[int, list[int]] = {}  # sector: the boxes that hold it
        for n in numbers:
            for sector in boxes.sectors(n).tolist():
                held_by.setdefault(sector, []).append(n)
        atoms: dict[tuple[int, ...], list[int]] = {}
        for sector in sorted(held_by):
            atoms.setdefault(tuple(held_by[sector]), []).append(sector)
        for n in numbers:
            mine = [[(storage, s) for s in atom] for held, atom in atoms.items() if n in held]
            members[n] = sorted(mine)
    steps = [
        (sector, step & 3)
        for launch in launches
        for step in interleaved(launch.programs, resident)
        for atom in members[step >> 2]
        for sector in atom
    ]
    read, written = simulate(steps, capacity // SECTOR)
    return SECTOR * read, SECTOR * written


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_model_sector_by_sector(seed):
    draw = random.Random(seed)
    boxes = Boxes()
    numbers = []
    for _ in range(draw.randrange(2, 25)):
        start, rows = draw.randrange(0, 4000), draw.randrange(1, 9)
        step = draw.choice([32, 64, 96, 200, 0]) if draw.random() < 0.7 else None
        starts = (
            [draw.randrange(0, 4000) for _ in range(rows)]
            if step is None
            else [start + i * step for i in range(rows)]
        )
        length = draw.choice([4, 32, 64, 100])
        numbers.append(box(boxes, *starts, length=length, storage=draw.randrange(2)))
    launches = [
        [
            [(draw.choice(numbers), draw.choice([LOAD, LOAD, STORE, ATOMIC])) for _ in range(n)]
            for n in (draw.randrange(0, 12) for _ in range(draw.randrange(1, 9)))
        ]
        for _ in range(3)
    ]
    recorded = trace(boxes, *launches)
    for capacity in (SECTOR, 5 * SECTOR, 40 * SECTOR, 4000 * SECTOR):
        for resident in (1, 3):
            got = dram_bytes(recorded, sms=resident, capacity=capacity)
            want = by_sectors(boxes, recorded.launches, resident, capacity)
            assert (got.read, got.written) == want, (capacity, resident)


def test_programs_take_turns_and_the_next_one_takes_a_free_place():
    programs = [[1, 2, 3], [10], [], [20, 21], [30]]
    assert list(interleaved(programs, 2)) == [1, 10, 2, 20, 3, 21, 30]
    assert list(interleaved(programs, 1)) == [1, 2, 3, 10, 20, 21, 30]
    assert list(interleaved(programs, 9)) == [1, 10, 20, 30, 2, 21, 3]
    assert list(interleaved([[4, -1, 8], [-1]], 2)) == [4, 8]
    assert list(interleaved([np.array([4, 8])], 1)) == [4, 8]


def test_a_load_is_read_once_while_it_is_held():
    boxes = Boxes()
    a, b = box(boxes, 0, length=64), box(boxes, 64, length=64)
    again = trace(boxes, [[(a, LOAD), (b, LOAD), (a, LOAD)]])
    assert dram_bytes(again, sms=1, capacity=128).read == 128
    assert dram_bytes(again, sms=1, capacity=96).read == 192  # a partly gone is read whole
    assert dram_bytes(again, sms=1, capacity=64).read == 192


def test_a_store_is_written_back_once_and_not_read():
    boxes = Boxes()
    a = box(boxes, 0, length=64)
    twice = dram_bytes(trace(boxes, [[(a, STORE), (a, STORE)]]), sms=1, capacity=64)
    assert (twice.read, twice.written) == (0, 64)
    atomic = dram_bytes(trace(boxes, [[(a, ATOMIC)]]), sms=1, capacity=64)
    assert (atomic.read, atomic.written) == (64, 64)


def test_dirty_sectors_are_written_when_they_go():
    boxes = Boxes()
    a, b = box(boxes, 0, length=64), box(boxes, 64, length=64)
    pressed = trace(boxes, [[(a, STORE), (b, LOAD), (a, STORE)]])
    got = dram_bytes(pressed, sms=1, capacity=64)
    assert (got.read, got.written) == (64, 128)
    assert got.total == 192


def test_the_cache_stays_warm_between_launches_and_is_flushed_at_the_end():
    boxes = Boxes()
    a = box(boxes, 0, length=64)
    two = dram_bytes(trace(boxes, [[(a, STORE)]], [[(a, LOAD)]]), sms=1, capacity=64)
    assert two.launches == (("k0", 0, 0), ("k1", 0, 0))
    assert (two.read, two.written) == (0, 64)


def test_occupancy_by_kernel_and_by_function():
    """Two rows of tiles that share a column: with one program at a time the column is lost."""
    boxes = Boxes()
    column = [box(boxes, 320 * i, length=32) for i in range(8)]
    launch = [[(tile, LOAD) for tile in column] for _ in range(2)]
    recorded = trace(boxes, launch)
    for occupancy in (2, {"k0": 2}, lambda launch: len(launch.programs)):
        got = dram_bytes(recorded, occupancy=occupancy, sms=1, capacity=64)
        assert got.read == 8 * 32
    assert dram_bytes(recorded, occupancy=1, sms=1, capacity=64).read == 16 * 32
    assert dram_bytes(recorded, occupancy={"other": 2}, sms=1, capacity=64).read == 16 * 32


@pytest.mark.parametrize("capacity, sms", [(0, 1), (33, 1), (64, 0)])
def test_impossible_caches_are_refused(capacity, sms):
    with pytest.raises(ValueError, match="multiple of 32 and sms positive"):
        dram_bytes(trace(Boxes()), capacity=capacity, sms=sms)


# Boxes


def test_equal_boxes_get_one_number():
    boxes = Boxes()
    a = box(boxes, 0, 128, 256, length=64)
    assert box(boxes, 0, 128, 256, length=64) == a
    assert box(boxes, 0, 128, 256, length=32) != a
    assert box(boxes, 0, 128, 257, length=64) != a
    assert box(boxes, 0, 128, 256, length=64, storage=1) != a


def test_several_programs_at_once():
    boxes = Boxes()
    starts = np.array([[0, 64], [0, 64], [128, 192]])
    numbers = boxes.add(0, starts, None, np.array([32]))
    assert numbers[0] == numbers[1] != numbers[2]
    active = np.array([[True, True], [False, False], [True, False]])
    masked = boxes.add(0, starts, active, np.array([32]))
    assert masked[0] == numbers[0] and masked[1] == NOTHING
    assert boxes.sizes(masked).tolist() == [2, 0, 1]
    assert boxes.sectors(int(masked[2])).tolist() == [4]
    none = boxes.add(0, starts, None, np.array([32, 0, 32]))
    assert none.tolist() == [numbers[0], NOTHING, numbers[2]]


@pytest.mark.parametrize("seed", range(5))
def test_sectors_and_coverage_against_sets(seed):
    draw = random.Random(seed)
    boxes, sets = Boxes(), {}
    for _ in range(30):
        rows, length = draw.randrange(1, 6), draw.choice([2, 31, 32, 33, 256])
        start, step = draw.randrange(0, 999), draw.choice([0, 3, 32, 64, 320, -32])
        start += 4 * 320
        starts = [start + i * step for i in range(rows)]
        want = {b // 32 for s in starts for b in range(s, s + length)}
        n = box(boxes, *starts, length=length)
        sets[n] = want
        assert boxes.sectors(n).tolist() == sorted(want)
        assert boxes.sizes(np.array([n])).tolist() == [len(want)]
    numbers = sorted(sets)
    assert boxes.covered(numbers) == len(set().union(*sets.values()))
    atoms = boxes.atoms(numbers)
    assert sum(atoms.sizes) == boxes.covered(numbers)
    for n in numbers:
        assert sum(atoms.sizes[a] for a in atoms.of_box[n]) == len(sets[n])


def test_a_large_tensor_of_disjoint_tiles_keeps_its_tiles():
    boxes = Boxes()
    tiles = np.add.outer(np.arange(64) * 64, np.arange(512) * 8192)  # of an 8 KiB wide matrix
    numbers = np.concatenate(
        [boxes.add(0, row[None], None, np.array([64])) for row in tiles]
    ).tolist()
    atoms = boxes.atoms(numbers)
    assert atoms.sizes == [1024] * 64
    assert boxes.covered(numbers) * SECTOR == 2 * MIB
