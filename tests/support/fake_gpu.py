"""A device for the selftest's child process that fails on request, on Triton's interpreter.

LLAMA4_FAKE_FAULTS is a JSON object from a pattern of "kernel config" to a fault:

    hang     the launch never ends
    wrong    one element of the last tensor that the kernel gets is changed
    oom      no memory
    illegal  the process is ended by a signal, as after an access beyond the device's memory
    fatal    CUDA's error for the same, which leaves the context unusable
    bit      the last bit of one element of the last tensor is another
    stale    a captured graph does not see new values
"""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import time

import torch

from llama4_triton.bench.worker import InterpreterBackend


class FakeGpu(InterpreterBackend):
    def __init__(self):
        super().__init__()
        self.faults = json.loads(os.environ.get("LLAMA4_FAKE_FAULTS", "{}"))

    def environment(self):
        return {"gpu": "Fake GPU", "pid": os.getpid()}

    def launch(self, kernel, grid, args, kwargs):
        config = " ".join(f"{name}={value}" for name, value in kwargs.items())
        fault = self.fault(f"{kernel.__name__} {config}")
        if fault == "hang":
            time.sleep(3600)
        elif fault == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.\nmore")
        elif fault == "illegal":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fault == "fatal":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        super().launch(kernel, grid, args, kwargs)
        out = [arg for arg in args if isinstance(arg, torch.Tensor)][-1].view(-1)
        if fault == "wrong":
            out[:1] += 100
        elif fault == "bit":
            out[:1].view(torch.uint8)[0] ^= 1

    def capture(self, run):
        outputs = run()
        if "stale" in self.faults.values():
            return outputs, lambda: None

        def replay():
            for mine, new in zip(outputs, run(), strict=True):
                mine.copy_(new)

        return outputs, replay

    def fault(self, text):
        for pattern, fault in self.faults.items():
            if fnmatch.fnmatchcase(text, pattern):
                return fault
        return None
