"""The launch contract: device made current and restored, threads, grids, workspace, CPU tensors."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llama4_triton.kernels import _launch

pytestmark = pytest.mark.no_kernels


class FakeCuda:
    """Two devices and, per thread, which one is current."""

    def __init__(self):
        self._state = threading.local()
        self.reads = []

    @property
    def current(self):
        return getattr(self._state, "index", 0)

    @contextlib.contextmanager
    def device(self, device):
        before, self._state.index = self.current, device.index
        try:
            yield
        finally:
            self._state.index = before

    def properties(self, index):
        self.reads.append(index)
        return SimpleNamespace(
            multi_processor_count=(132, 20)[index],
            major=9,
            minor=index,
            memory_clock_rate=(2_619_000, 1_000_000)[index],
            memory_bus_width=(5120, 256)[index],
            shared_memory_per_block_optin=232_448,
        )


class StubKernel:
    """Stands where a JIT function stands: `kernel[grid](*args, **kwargs)`."""

    __name__ = "_stub_kernel"

    def __init__(self, body):
        self.body = body

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.body(grid, args, kwargs)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "device", fake.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: fake.current)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fake.properties)
    _launch._read_properties.cache_clear()
    yield fake
    _launch._read_properties.cache_clear()


def _tensor_on(index):
    with FakeTensorMode():
        return torch.empty(4, device=f"cuda:{index}")


def test_first_tensors_device_is_current_and_restored(cuda):
    seen = []
    kernel = StubKernel(lambda grid, args, kwargs: seen.append((grid, cuda.current, kwargs)))
    _launch.launch(kernel, (3,), 7, _tensor_on(1), _tensor_on(0), BLOCK=16)
    assert seen == [((3,), 1, {"BLOCK": 16, "enable_fp_fusion": True})]
    assert cuda.current == 0


def test_device_is_restored_when_the_launch_fails(cuda):
    def body(grid, args, kwargs):
        raise MemoryError

    with pytest.raises(MemoryError):
        _launch.launch(StubKernel(body), (1,), _tensor_on(1))
    assert cuda.current == 0


def test_two_threads_on_two_devices(cuda):
    inside = threading.Barrier(2, timeout=10)
    seen = {}

    def body(grid, args, kwargs):
        inside.wait()  # both threads are within their launch at the same time
        seen[args[0].device.index] = cuda.current
        inside.wait()

    def work(tensor, after):
        _launch.launch(StubKernel(body), (1,), tensor)
        after.append(cuda.current)

    after = []
    threads = [threading.Thread(target=work, args=(_tensor_on(i), after)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {0: 0, 1: 1}
    assert after == [0, 0]


def test_properties_are_read_once_per_device_and_never_assumed(cuda):
    for _ in range(2):
        first = _launch.device_properties(torch.device("cuda", 0))
        second = _launch.device_properties(torch.device("cuda", 1))
    assert cuda.reads == [0, 1]
    assert (first.sm_count, second.sm_count) == (132, 20)
    assert (first.capability, second.capability) == ((9, 0), (9, 1))
    assert first.bandwidth == pytest.approx(3.352e12, rel=1e-3)
    assert second.bandwidth == pytest.approx(6.4e10)
    assert _launch.device_properties(torch.device("cuda")) == first


@pytest.mark.parametrize("grid", [(2**31,), (2**16, 2**15), (1, 65_536), (1, 1, 65_536)], ids=str)
def test_grid_that_cuda_cannot_launch_is_refused(grid):
    kernel = StubKernel(lambda *_: pytest.fail("launched"))
    with pytest.raises(ValueError, match="_stub_kernel: grid must have a product of at most"):
        _launch.launch(kernel, grid, torch.empty(1))


def test_empty_grid_launches_nothing():
    kernel = StubKernel(lambda *_: pytest.fail("launched"))
    _launch.launch(kernel, (0,), torch.empty(1))
    _launch.launch(kernel, (5, 0), torch.empty(1))


def test_intercept_takes_launches_of_its_own_thread_only():
    taken, launched = [], []
    kernel = StubKernel(lambda grid, args, kwargs: launched.append(grid))

    def other_thread():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_launch, "_require_cpu_executor", lambda name: None)
            _launch.launch(kernel, (2,), torch.empty(1))

    with _launch.intercept(lambda kernel, grid, *args, **kwargs: taken.append(grid)):
        _launch.launch(kernel, (1,), torch.empty(1))
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert (taken, launched) == ([(1,)], [(2,)])


def test_workspace_is_new_memory_or_the_callers():
    cpu = torch.device("cpu")
    assert _launch.empty_workspace("op", 12, None, cpu).numel() == 12
    own = torch.empty(4, 5)
    assert _launch.empty_workspace("op", 12, own, cpu).data_ptr() == own.data_ptr()


@pytest.mark.parametrize(
    "workspace, error, match",
    [
        (torch.empty(11), ValueError, r"op: workspace must be .* at least 12 elements"),
        (torch.empty(12, 2)[:, 0], ValueError, "op: workspace must be contiguous"),
        (torch.empty(12, device="meta"), ValueError, "on device cpu, got .* on meta"),
        (torch.empty(12, dtype=torch.float64), TypeError, "op: workspace must be torch.float32"),
    ],
    ids=["small", "strided", "device", "dtype"],
)
def test_bad_workspace_is_refused(workspace, error, match):
    with pytest.raises(error, match=match):
        _launch.empty_workspace("op", 12, workspace, torch.device("cpu"))


def _run(code, **env):
    import os

    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean | env, cwd="/"
    )


def test_cpu_tensor_without_an_executor_says_how_to_turn_one_on():
    code = (
        "import torch\n"
        "from llama4_triton import rms_norm\n"
        "try: rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)\n"
        "except ValueError as error: print(error)\n"
    )
    result = _run(code)
    assert result.stdout.count("\n") == 1, result.stderr
    assert "must be on a CUDA device, got cpu (set TRITON_INTERPRET=1" in result.stdout


def test_environment_variable_turns_the_shimmed_interpreter_on():
    code = (
        "import torch\n"
        "from llama4_triton import rms_norm\n"
        "x = torch.full((1, 4), 3.0, dtype=torch.bfloat16)\n"
        "print(rms_norm(x, torch.ones(4, dtype=torch.bfloat16), 0.0).tolist())\n"
    )
    result = _run(code, TRITON_INTERPRET="1")
    assert result.stdout == "[[1.0, 1.0, 1.0, 1.0]]\n", result.stderr


def test_interpreter_without_the_shim_is_refused():
    # The shim is taken away again, as if somebody had turned the stock interpreter on.
    code = (
        "import torch, triton\n"
        "from llama4_triton import rms_norm\n"
        "from triton.runtime.interpreter import interpreter_builder\n"
        "interpreter_builder.llama4_triton_shim = False\n"
        "try: rms_norm(torch.ones(1, 4), torch.ones(4), 0.0)\n"
        "except ValueError as error: print(error)\n"
    )
    result = _run(code, TRITON_INTERPRET="1")
    assert "computes bf16 and fp8 wrongly without its shim" in result.stdout, result.stderr


def test_importing_kernels_has_no_side_effects():
    code = """
import os, importlib, pkgutil, pathlib
before = dict(os.environ)
import torch, triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
watched = (tl, tl.core, tl.math, tl.tensor, tl.standard, triton.runtime.jit, interpreter,
           interpreter.InterpreterBuilder, interpreter.GridExecutor, triton.knobs.runtime)
snapshot = [dict(vars(x)) for x in watched]
import llama4_triton
folder = pathlib.Path(llama4_triton.__file__).parent / "kernels"
names = sorted(p.stem for p in folder.glob("*.py"))
for name in names:
    importlib.import_module(f"llama4_triton.kernels.{name}")
assert dict(os.environ) == before, "os.environ was written"
for x, then in zip(watched, snapshot):
    assert dict(vars(x)) == then, f"{x} was patched"
assert not torch.cuda.is_initialized(), "a CUDA context was made"
print(len(names))
"""
    result = _run(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 12
