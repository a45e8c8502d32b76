"""LLAMA4_TRITON_DEBUG=1: launches wait, a failure names its launch, operators check values."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llama4_triton.kernels import _debug, _environment, _launch
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.fp8_matmul import fp8_matmul
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.rope_and_cache import rope_and_cache
from llama4_triton.kernels.routing import sort_by_expert

pytestmark = pytest.mark.no_kernels


class Gpu:
    """What torch.cuda says of a GPU that runs launches late, and may fail then."""

    def __init__(self):
        self.error = None
        self.synchronised = 0
        self.capturing = False

    def synchronize(self, device):
        assert device.type == "cuda"
        self.synchronised += 1
        if self.error is not None:
            raise self.error


class Kernel:
    arg_names = ("x_ptr", "residual_ptr", "N", "eps")

    def __init__(self, name, error=None):
        self.__name__ = name
        self.error = error

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, **kwargs):
        if self.error is not None:
            raise self.error


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(_debug, "_history", _debug.deque(maxlen=_debug.KEPT))
    return gpu


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("LLAMA4_TRITON_DEBUG", "1")
    _environment.environment.cache_clear()
    yield
    _environment.environment.cache_clear()


@pytest.fixture
def x():
    with FakeTensorMode():
        return torch.empty(4, 6, dtype=torch.bfloat16, device="cuda").t()


def _launch_one(name, x, error=None, n=24):
    _launch.launch(Kernel(name, error), (n, 2), x, None, n, 1e-5, BLOCK_N=64, num_warps=8)


def test_every_launch_waits(debug, gpu, x):
    _launch_one("_a_kernel", x)
    _launch_one("_b_kernel", x)
    assert gpu.synchronised == 2


def test_nothing_waits_or_is_kept_without_the_variable(gpu, x):
    _launch_one("_a_kernel", x)
    assert gpu.synchronised == 0
    assert not _debug._history


def test_a_capture_is_left_alone(debug, gpu, x):
    gpu.capturing = True
    _launch_one("_a_kernel", x)
    assert gpu.synchronised == 0
    assert not _debug.is_checked(False, x)


def test_a_fault_of_the_device_belongs_to_its_launch(debug, gpu, x, capsys):
    _launch_one("_a_kernel", x)
    gpu.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    message = "^_b_kernel: the launch must succeed, got RuntimeError: CUDA error: an illegal memory"
    with pytest.raises(RuntimeError, match=message) as caught:
        _launch_one("_b_kernel", x, n=7)
    assert caught.value.__cause__ is gpu.error
    assert capsys.readouterr().err == (
        "llama4-triton: the last 2 launches, the failed one last\n"
        "   1 _a_kernel grid (24, 2)\n"
        "       x_ptr bfloat16 (6, 4):(1, 6)  residual_ptr None  N 24  eps 1e-05\n"
        "       BLOCK_N=64 num_warps=8\n"
        "   2 _b_kernel grid (7, 2)\n"
        "       x_ptr bfloat16 (6, 4):(1, 6)  residual_ptr None  N 7  eps 1e-05\n"
        "       BLOCK_N=64 num_warps=8\n"
    )


def test_a_launch_that_raises_is_named(debug, gpu, x, capsys):
    with pytest.raises(RuntimeError, match="^_c_kernel: .*, got OSError: out of resource"):
        _launch_one("_c_kernel", x, OSError("out of resource: shared memory"))
    assert gpu.synchronised == 0
    assert "1 _c_kernel grid (24, 2)" in capsys.readouterr().err


def test_an_interrupt_of_a_hang_is_told_and_goes_on(debug, gpu, x, capsys):
    gpu.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        _launch_one("_hanging_kernel", x)
    assert "_hanging_kernel grid" in capsys.readouterr().err


def test_the_last_twenty_are_kept(debug, gpu, x, capsys):
    for i in range(30):
        _launch_one(f"_kernel_{i}", x)
    with pytest.raises(RuntimeError):
        _launch_one("_last_kernel", x, MemoryError())
    said = capsys.readouterr().err
    assert said.startswith("llama4-triton: the last 20 launches")
    assert "_kernel_10 " not in said and " 1 _kernel_11 " in said and "20 _last_kernel " in said


def test_no_tensor_is_kept_alive(debug, gpu, x):
    import weakref

    with FakeTensorMode():
        tensor = torch.empty(3, device="cuda")
    dead = weakref.ref(tensor)
    _launch_one("_a_kernel", tensor)
    del tensor
    assert dead() is None


def test_history_is_told_whole_while_other_threads_launch(debug, gpu, x, capsys):
    stop = threading.Event()

    def launch():
        while not stop.is_set():
            _launch_one("_a_kernel", x)

    thread = threading.Thread(target=launch)
    thread.start()
    for _ in range(20):
        with pytest.raises(RuntimeError, match="^_b_kernel"):
            _launch_one("_b_kernel", x, MemoryError())
    stop.set()
    thread.join()


# Operators that can check values do so; each call below is wrong in a way that only values show.


def _kv():
    cache = torch.zeros(2, 4, 1, 2)
    table = torch.tensor([[0, 7]], dtype=torch.int32)  # page 7 is not there
    return PagedKV(k_cache=cache, v_cache=cache.clone(), block_table=table)


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def _rope():
    x = torch.zeros(1, 1, 2)
    options = dict(rope=None, qk_norm_eps=None, temperature=None)
    rope_and_cache(x, x, x, _kv(), _int32(0), torch.tensor([8]), **options)


def _sort():
    sort_by_expert(torch.full((1, 1), 9, dtype=torch.int32), torch.ones(1, 1), 4)


def _fp8():
    x = torch.zeros(1, 16).to(torch.float8_e4m3fn)
    fp8_matmul(x, torch.zeros(1), x, torch.ones(1))


def _prefill():
    attention_prefill(torch.zeros(1, 1, 2), _kv(), _int32(0, 1), _int32(6))


def _decode():
    attention_decode(torch.zeros(1, 1, 2), _kv(), _int32(6))


CHECKED = {
    "rope_and_cache": (_rope, IndexError, "slot_mapping must be <"),
    "sort_by_expert": (_sort, IndexError, "expert_ids must be -1"),
    "fp8_matmul": (_fp8, ValueError, "x_scale must be positive"),
    "attention_prefill": (_prefill, IndexError, "block_table"),
    "attention_decode": (_decode, IndexError, "block_table"),
}


@pytest.mark.parametrize("op", CHECKED)
def test_operators_check_values(debug, op):
    call, error, message = CHECKED[op]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("op", CHECKED)
def test_operators_trust_values_without_the_variable(op):
    launched = []
    with _launch.intercept(lambda kernel, grid, *args, **kwargs: launched.append(kernel)):
        CHECKED[op][0]()
    assert launched


def test_every_operator_with_a_check_is_here():
    import inspect

    import llama4_triton

    public = {name: getattr(llama4_triton, name) for name in llama4_triton._EXPORTS}
    have = {
        name
        for name, value in public.items()
        if inspect.isfunction(value) and "checked" in inspect.signature(value).parameters
    }
    assert have == set(CHECKED)


def test_what_has_no_values_is_not_checked(debug):
    assert _debug.is_checked(True, torch.empty(1))
    assert _debug.is_checked(False, torch.empty(1))
    with FakeTensorMode():
        assert not _debug.is_checked(False, torch.empty(1))


def test_traced_code_is_not_checked(debug):
    def double(x):
        return x * 2 if _debug.is_checked(False, x) else x

    x = torch.ones(2)
    assert torch.equal(torch.compile(double, fullgraph=True, backend="eager")(x), x)
    assert torch.equal(double(x), 2 * x)
