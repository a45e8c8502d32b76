"""A Triton driver of a GPU that is not there: launches on CPU tensors are compiled, noted, not run.

with fake_driver() as gpu: rms_norm(x, weight, 1e-5)    gpu.launches == ["rms_norm_bf16_2048"]
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

__all__ = ["FakeDriver", "fake_driver"]


class FakeDriver:
    def __init__(self, capability=90, shared=232_448):
        self.launches = []  # names in the binary, as a profiler shows them
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared},
            load_binary=lambda *args: (object(), object(), 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, src, metadata):
        def launcher(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
            self.launches.append(metadata.name)
            if enter is not None:
                enter(launch_metadata)

        return launcher

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return f"fake {self.target.arch}"

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def fake_driver(kind=FakeDriver, **options):
    previous, gpu = driver._active, kind(**options)
    driver.set_active(gpu)
    try:
        yield gpu
    finally:
        driver._active = previous
