"""Triton's own JIT path takes the current stream of the device that the launch made current."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from llama4_triton.kernels import _launch
from llama4_triton.kernels.rms_norm import _rms_norm_kernel

pytestmark = pytest.mark.compiled_only


class TensorOn1(torch.Tensor):
    """CPU memory that says it lies on the second GPU."""

    device = torch.device("cuda", 1)


class TwoDevices:
    """A driver of two GPUs: the current device is per thread, a stream per device and thread."""

    def __init__(self):
        self._state = threading.local()
        self.launches = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            load_binary=lambda *args: (object(), object(), 32, 0, 1024),
            unload_module=lambda module: None,
        )

    @contextlib.contextmanager
    def device(self, device):
        before, self._state.index = self.get_current_device(), device.index
        try:
            yield
        finally:
            self._state.index = before

    def launcher_cls(self, src, metadata):
        def launcher(x, y, z, stream, *args):
            self.launches.append((self.get_current_device(), stream))

        return launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return getattr(self._state, "index", 0)

    def get_current_stream(self, device):
        return (device, threading.current_thread().name)


def test_the_stream_is_the_current_one_of_the_tensors_device(monkeypatch):
    gpus = TwoDevices()
    monkeypatch.setattr(torch.cuda, "device", gpus.device)
    monkeypatch.setattr(_launch, "current_device", gpus.get_current_device)
    monkeypatch.setattr(driver, "_active", gpus)
    monkeypatch.setattr(_rms_norm_kernel, "device_caches", _rms_norm_kernel.device_caches.copy())
    _rms_norm_kernel.device_caches.clear()
    x = torch.zeros(1, 128).as_subclass(TensorOn1)

    def work():
        _launch.launch(
            _rms_norm_kernel, (1,), x, None, x, None, x, 128, 128, 0, 0, 128, 1e-5,
            HAS_RESIDUAL=False, BLOCK_H=128, num_warps=1,
        )  # fmt: skip

    threads = [threading.Thread(target=work, name=name) for name in ("a", "b")]
    for thread in threads:
        thread.start()
        thread.join()
    assert gpus.launches == [(1, (1, "a")), (1, (1, "b"))]
    assert gpus.get_current_device() == 0
