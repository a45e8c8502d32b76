"""The sanitizer of interpreted launches finds what it says it finds, and nothing else."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from support.sanitizer import SanitizerError, sanitize
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.interpreter_only


@triton.jit
def _copy_kernel(x_ptr, y_ptr, LIMIT, SHIFT, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + SHIFT, mask=offs < LIMIT, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < N)


def copy(x, y, limit, shift=0, n=100):
    _copy_kernel[(4,)](x, y, limit, shift, n, 32)


# Bounds.


def test_a_correct_copy_passes():
    memory = torch.randn(2, 100)
    with sanitize():
        copy(memory[0], memory[1], 100)
    assert torch.equal(*memory)


@pytest.mark.parametrize(
    ("limit", "shift", "n", "message"),
    [
        (128, 0, 100, r"program \(3, 0, 0\): load of 28 lanes .* byte \+400 of argument 'x_ptr'"),
        (101, 0, 100, r"program \(3, 0, 0\): load of 1 lanes .* byte \+400 of argument 'x_ptr'"),
        (100, -2, 100, r"program \(0, 0, 0\): load of 2 lanes .* byte -8 of argument 'x_ptr'"),
        (100, 0, 104, r"store of 4 lanes .* byte \+400 of argument 'y_ptr' of 400 bytes"),
    ],
    ids=["no-mask", "off-by-one", "before-the-start", "store"],
)
def test_out_of_bounds_is_found(limit, shift, n, message):
    """The arguments lie in one storage with room around them: nothing crashes or changes."""
    memory = torch.zeros(1000)
    with sanitize(), pytest.raises(SanitizerError, match=f"out of bounds: .*{message}"):
        copy(memory[100:200], memory[500:600], limit, shift, n)


@triton.jit
def _rows_kernel(x_ptr, y_ptr, stride_x_m, WIDTH, BLOCK: tl.constexpr):
    m, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + m[:, None] * stride_x_m + n[None, :], mask=n[None, :] < WIDTH, other=0.0)
    tl.store(y_ptr + m[:, None] * BLOCK + n[None, :], x)


def test_the_gap_between_rows_of_a_view_is_out_of_bounds():
    x, y = torch.randn(8, 64)[:, 10:15], torch.empty(8, 8)
    with sanitize():
        _rows_kernel[(1,)](x, y, 64, 5, 8)
        assert torch.equal(y[:, :5], x)
        _rows_kernel[(1,)](x.t().contiguous().t()[:, :1].expand(8, 8), y, 1, 1, 8)  # stride 0
        with pytest.raises(SanitizerError, match="load of 8 lanes"):
            _rows_kernel[(1,)](x, y, 64, 6, 8)


def test_a_view_that_overlaps_itself_has_no_gaps():
    x = torch.arange(16.0).as_strided((8, 8), (1, 1))
    y = torch.empty(8, 8)
    with sanitize():
        _rows_kernel[(1,)](x, y, 1, 8, 8)
    assert torch.equal(y, x)


@triton.jit
def _count_kernel(count_ptr, out_ptr, SLOT):
    ticket = tl.atomic_add(count_ptr + SLOT, 1)
    tl.store(out_ptr + tl.program_id(0), ticket)


def test_atomics_have_bounds():
    count, out = torch.zeros(4, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    with sanitize(), pytest.raises(SanitizerError, match="atomic of 1 lanes .* 'count_ptr'"):
        _count_kernel[(1,)](count[:2], out, 2)


@triton.jit
def _tuple_kernel(pair, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(pair[0] + offs) + tl.load(pair[1] + offs))


@triton.jit
def _descriptor_kernel(desc, y_ptr, ROW, BLOCK: tl.constexpr):
    m, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    tl.store(y_ptr + m[:, None] * BLOCK + n[None, :], desc.load([ROW, 0]))


def test_tuples_and_descriptors_are_arguments_too():
    x, y = torch.randn(16), torch.empty(16)
    tile, out = torch.randn(20, 16), torch.empty(16, 16)
    with sanitize():
        _tuple_kernel[(1,)]((x, x.clone()), y, 16)
        _descriptor_kernel[(1,)](TensorDescriptor.from_tensor(tile, [16, 16]), out, 8, 16)
    assert torch.equal(y, 2 * x)
    assert torch.equal(out[:12], tile[8:]) and (out[12:] == 0).all()
    with sanitize(), pytest.raises(SanitizerError, match=r"argument 'pair\[1\]'"):
        _tuple_kernel[(1,)]((x, torch.randn(32)[:8]), y, 16)


# Races.


@triton.jit
def _sum_kernel(x_ptr, out_ptr, SLOTS):
    pid = tl.program_id(0)
    tl.store(out_ptr + pid % SLOTS, tl.load(x_ptr + pid))


@triton.jit
def _neighbour_kernel(x_ptr, out_ptr, N):
    pid = tl.program_id(0)
    tl.store(out_ptr + pid, tl.load(x_ptr + (pid + 1) % N))


@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
def test_two_programs_that_write_one_address_race(order):
    x, out = torch.randn(8), torch.zeros(8)
    with sanitize(order):
        _sum_kernel[(8,)](x, out, 8)
        with pytest.raises(SanitizerError, match="stores what program .* writes: .* 'out_ptr' at"):
            _sum_kernel[(8,)](x, out, 7)
    with sanitize(order, races=False):
        _sum_kernel[(8,)](x, out, 7)


def test_reading_what_another_program_writes_races():
    x, out = torch.randn(8), torch.empty(8)
    with sanitize():
        _neighbour_kernel[(8,)](x, out, 8)
        with pytest.raises(SanitizerError, match="race: .* 'x_ptr' at byte 4 = 'out_ptr' at byte"):
            _neighbour_kernel[(8,)](x, x, 8)
        _neighbour_kernel[(1,)](x, x, 8)  # one program alone may do what it likes
        _neighbour_kernel[(1,)](x, x, 8)  # and launches are ordered


@triton.jit
def _scatter_kernel(x_ptr, slot_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.load(slot_ptr + offs), tl.load(x_ptr + offs))


def test_lanes_of_one_store_that_disagree_race():
    x, out = torch.arange(8.0), torch.zeros(8)
    slot = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
    with sanitize():
        with pytest.raises(SanitizerError, match="1 lanes of one store lost their value"):
            _scatter_kernel[(1,)](x, slot, out, 8)
        x[6:] = float("nan")
        _scatter_kernel[(1,)](x, slot, out, 8)  # the same bits


@triton.jit
def _last_arriver_kernel(x_ptr, part_ptr, count_ptr, out_ptr, N: tl.constexpr, SEM: tl.constexpr):
    pid, offs = tl.program_id(0), tl.arange(0, N)
    tl.store(part_ptr + pid, tl.load(x_ptr + pid) * 2)
    arrived = tl.atomic_add(count_ptr, 1, sem=SEM)
    if arrived == N - 1:
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + offs)))


@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
def test_atomics_order_programs(order):
    x, part, out = torch.ones(4), torch.empty(4), torch.empty(1)
    with sanitize(order):
        _last_arriver_kernel[(4,)](x, part, torch.zeros(1, dtype=torch.int32), out, 4, "acq_rel")
        assert out.item() == 8
        for semantic in ("relaxed", "release", "acquire"):
            with pytest.raises(SanitizerError, match="loads what program .* writes"):
                zero = torch.zeros(1, dtype=torch.int32)
                _last_arriver_kernel[(4,)](x, part, zero, out, 4, semantic)


@triton.jit
def _mixed_kernel(count_ptr):
    if tl.program_id(0) == 0:
        tl.atomic_add(count_ptr, 1)
    else:
        tl.store(count_ptr, 1)


def test_an_atomic_and_a_plain_access_race():
    for order in ("forward", "reversed"):
        with sanitize(order), pytest.raises(SanitizerError, match="race: .* 'count_ptr'"):
            _mixed_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


def test_unequal_widths_share_bytes():
    memory = torch.zeros(4, dtype=torch.int32)
    x = torch.ones(4, dtype=torch.int8)
    with sanitize(), pytest.raises(SanitizerError, match="race"):
        _sum_kernel[(2,)](memory, memory.view(torch.int8)[4:6], 2)  # byte 4 is in word 1
    with sanitize():
        _sum_kernel[(2,)](x, memory.view(torch.int8)[3:5], 2)


# Order.


@pytest.mark.parametrize(
    ("order", "seed", "expected"),
    [
        ("forward", 0, [0, 1, 2, 3, 4, 5]),
        ("reversed", 0, [5, 4, 3, 2, 1, 0]),
        ("random", 1, None),
    ],
    ids=["forward", "reversed", "random"],
)
def test_program_order(order, seed, expected):
    tickets = []
    for _ in range(2):
        count, out = torch.zeros(1, dtype=torch.int32), torch.empty(6, dtype=torch.int32)
        with sanitize(order, seed=seed):
            _count_kernel[(6,)](count, out, 0)
        tickets.append(out.tolist())
    assert tickets[0] == tickets[1] and sorted(tickets[0]) == list(range(6))
    if expected is None:
        assert tickets[0] not in (list(range(6)), list(range(5, -1, -1)))
    else:
        assert tickets[0] == expected


@triton.jit
def _grid_kernel(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(out_ptr + (x * 3 + y) * 4 + z, x * 100 + y * 10 + z)


@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
def test_every_program_of_a_three_dimensional_grid_runs_once(order):
    out = torch.full((2, 3, 4), -1, dtype=torch.int32)
    with sanitize(order):
        _grid_kernel[(2, 3, 4)](out)
    x, y, z = torch.meshgrid(*(torch.arange(n) for n in out.shape), indexing="ij")
    assert torch.equal(out.long(), x * 100 + y * 10 + z)


def test_nesting_and_removal():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = dict(vars(GridExecutor)), dict(vars(InterpreterBuilder))
    count, out = torch.zeros(1, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    with sanitize("reversed"):
        inside = dict(vars(GridExecutor))
        with sanitize("forward", races=False), pytest.raises(SanitizerError):
            _count_kernel[(1,)](count, out, 7)
        _count_kernel[(3,)](count, out, 0)
    assert out.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="sanitize: order must be .*, got 'sideways'"):
        with sanitize("sideways"):
            pass
    nested = vars(GridExecutor), vars(InterpreterBuilder)
    if inside != before[0]:  # not so where the whole test already runs inside of one
        assert all(dict(now) == then for now, then in zip(nested, before, strict=True))
