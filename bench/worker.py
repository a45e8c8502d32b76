"""The child process of the selftest: runs one case after another, and says what it is about to do.

    python -m llama4_triton.bench.worker EVENTS BACKEND

Requests come as JSON lines on standard input: {"id", "path", "features", "repeats", "replays"}.
Events are appended to the file EVENTS, one JSON object a line, each written before what it
announces, so that what a dead or silent process was doing can be read off the last one:

    {"event": "ready", "environment": {...}}
    {"event": "launch", "kernel": ..., "config": ..., "grid": ...}     then, once it is done
    {"event": "landed"}
    {"event": "done", "status": "ok", "message": "", "errors": [...], "launches": [...]}

The first run of a case waits for the device after every launch; the repeats and the graph do not.
BACKEND is "cuda", "interpreter", or "module:function", which returns any other `Backend`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from .case import Case, Outputs

__all__ = ["Backend", "CudaBackend", "InterpreterBackend", "main"]

# What the CUDA runtime and PyTorch say after a fault that leaves the context unusable.
FATAL = ("CUDA error", "illegal memory access", "illegal instruction", "unspecified launch failure")

Replay = Callable[[], None]


class Backend(Protocol):
    """Where cases run."""

    device: torch.device

    def environment(self) -> dict[str, Any]:
        """What the report says of it."""

    def launch(self, kernel: Any, grid: tuple[int, ...], args: Any, kwargs: Any) -> None:
        """Launch and wait."""

    def synchronize(self) -> None: ...

    def capture(self, run: Callable[[], Outputs]) -> tuple[Outputs, Replay] | None:
        """Capture `run` into a graph; None where there are no graphs."""


class InterpreterBackend:
    """Triton's interpreter on the CPU."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        from llama4_triton.kernels import interpreter

        interpreter.install()
        torch.set_num_threads(1)

    def environment(self) -> dict[str, Any]:
        return {"gpu": None}

    def launch(self, kernel: Any, grid: tuple[int, ...], args: Any, kwargs: Any) -> None:
        from llama4_triton.kernels import _launch

        _launch.launch(kernel, grid, *args, **kwargs)

    def synchronize(self) -> None:
        pass

    def capture(self, run: Callable[[], Outputs]) -> tuple[Outputs, Replay] | None:
        return None


class CudaBackend:
    """The first GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def environment(self) -> dict[str, Any]:
        from .doctor import gpu_facts

        return gpu_facts(self.device)

    def launch(self, kernel: Any, grid: tuple[int, ...], args: Any, kwargs: Any) -> None:
        from llama4_triton.kernels import _launch

        _launch.launch(kernel, grid, *args, **kwargs)
        torch.cuda.synchronize(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, run: Callable[[], Outputs]) -> tuple[Outputs, Replay] | None:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        return outputs, graph.replay


class _Wrong(Exception):
    """The case ran, and its result is not what it must be."""


class Worker:
    def __init__(self, events: Path, backend: str):
        self.file = events.open("a", encoding="utf-8")
        self.backend = _backend(backend)
        self.launches: dict[str, None] = {}  # those of the case, each once, in order
        self.tell(event="ready", environment=self.backend.environment())

    def tell(self, **event: Any) -> None:
        self.file.write(json.dumps(event) + "\n")
        self.file.flush()

    def serve(self) -> None:
        """Answer requests until there are no more, or until the device is beyond use."""
        for line in sys.stdin:
            fatal = self.answer(json.loads(line))
            if fatal:
                return

    def answer(self, request: dict[str, Any]) -> bool:
        """Run one case and tell how it went; True if nothing can run after it."""
        from llama4_triton.kernels._check import UnsupportedArchitectureError

        self.launches = {}
        errors: list[dict[str, Any]] = []
        status, message, fatal = "ok", "", False
        try:
            with torch.no_grad(), _paths(request):
                self.run(request, errors)
        except _Wrong as error:
            status, message = "wrong", str(error)
        except UnsupportedArchitectureError as error:
            status, message = "skipped", f"unsupported: {error}"
        except torch.OutOfMemoryError as error:
            status, message = "oom", _first_line(error)
        except Exception as error:
            fatal = any(words in str(error) for words in FATAL)
            status = "crash" if fatal else "error"
            message = f"{type(error).__name__}: {_first_line(error)}"
            traceback.print_exc()
        self.tell(
            event="done", status=status, message=message, errors=errors,
            launches=list(self.launches),
        )  # fmt: skip
        if self.backend.device.type == "cuda" and not fatal:
            torch.cuda.empty_cache()
        return fatal

    def run(self, request: dict[str, Any], errors: list[dict[str, Any]]) -> None:
        from .accuracy import measure_all
        from .ops import find

        case = find(request["id"])
        device = self.backend.device
        inputs = case.make(device)
        with self.traced():
            outputs = case.run(inputs)
        self.tell(event="judging")
        for got in measure_all(outputs, case.reference(inputs), case.bounds):
            errors.append({"values": got.values, "bounds": got.bounds, "worst": got.worst})
            if got.broken:
                raise _Wrong(str(got))
        first = _copies(outputs)
        for repeat in range(1, request["repeats"]):
            if repeat == 1 or repeat == request["repeats"] - 1:
                self.tell(event="repeat", number=repeat)
            again = case.run(inputs)
            self.backend.synchronize()
            if not _same_bits(again, first):
                raise _Wrong(f"run {repeat + 1} gave other bits than run 1")
        if request["replays"]:
            self.replay(case, inputs, request["replays"])

    def replay(self, case: Case, inputs: dict[str, Any], replays: int) -> None:
        """Capture the case, and replay it on other values in the same memory."""
        from .case import tensors_of

        self.tell(event="capture")
        captured = self.backend.capture(functools.partial(case.run, inputs))
        if captured is None:
            return
        outputs, replay = captured
        for seed in range(1, replays + 1):
            self.tell(event="replay", number=seed)
            other = case.make(self.backend.device, seed)
            pairs = zip(tensors_of(inputs), tensors_of(other), strict=True)
            for mine, new in pairs:
                mine.copy_(new)
            replay()
            self.backend.synchronize()
            eager = case.run(other)
            self.backend.synchronize()
            if not _same_bits(outputs, eager):
                raise _Wrong(f"replay {seed} of the captured graph gave other bits than a call")

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Tell of every launch before it is made, and wait for it."""
        from llama4_triton.kernels import _launch

        def on_launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
            config = " ".join(f"{name}={value}" for name, value in kwargs.items())
            self.launches[f"{kernel.__name__} {config} grid {tuple(grid)}"] = None
            self.tell(event="launch", kernel=kernel.__name__, config=config, grid=list(grid))
            with _launch.intercept(None):
                self.backend.launch(kernel, grid, args, kwargs)
            self.tell(event="landed")

        with _launch.intercept(on_launch):
            yield


def _backend(name: str) -> Backend:
    if name == "cuda":
        return CudaBackend()
    if name == "interpreter":
        return InterpreterBackend()
    module, _, function = name.partition(":")
    backend: Backend = getattr(importlib.import_module(module), function)()
    return backend


@contextlib.contextmanager
def _paths(request: dict[str, Any]) -> Iterator[None]:
    from llama4_triton.kernels._paths import assume_covered, use

    with use(all=request["path"]), assume_covered(request["features"]):
        yield


def _copies(outputs: Outputs) -> Outputs:
    return tuple(x.clone() for x in outputs)


def _same_bits(got: Outputs, want: Outputs) -> bool:
    return all(
        torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
        for a, b in zip(got, want, strict=True)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(arguments: list[str]) -> None:
    events, backend = arguments
    Worker(Path(events), backend).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
