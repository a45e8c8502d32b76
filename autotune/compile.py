"""Compile launches for a GPU that is not there, and report what the machine code is like.

    (launch,) = recorded_launches(lambda: rms_norm(x, weight, 1e-5))    # nothing runs
    report = compile_launch(launch, "sm_90")
    reports = compile_all(launches, "sm_90", jobs=2)                    # by binary, in processes

recorder.py runs the operator's own wrapper and describes its launches (launches.py);
`compile_launch` takes them through Triton's own JIT path, so that the specialisation (divisibility
by 16, equality to 1, integer widths) is the one a GPU would get. No tensor is there when it
compiles, only its dtype and alignment. sass.py reads the facts, gates.py judges them. Kernels
decorated for Triton's interpreter cannot be compiled: use another process.

Binaries are kept where Triton keeps them, in its cache on disk. A report is kept there too, under a
key made of the kernel's source with all that it calls, the binary, the architecture, the versions
of Triton and ptxas and the reader's own source, so that the next run neither compiles nor
disassembles. Files appear by an atomic rename: any number of processes can share the cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from llama4_triton.kernels import _launch

from . import sass
from .launches import Binary, Launch
from .occupancy import SMS, Occupancy, occupancy

__all__ = [
    "ARCHITECTURES",
    "CompileFailed",
    "CompiledReport",
    "artifacts",
    "compile_all",
    "compile_launch",
    "compiling_for",
]

ARCHITECTURES = tuple(SMS)
REPORT = "llama4_triton.json"
FEW = 4  # launches that one process compiles sooner than others have started


class CompileFailed(RuntimeError):
    """A launch does not compile for an architecture; the message says which and why, in a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledReport:
    """What the compiled code of one binary uses and contains."""

    binary: Binary
    arch: str
    shared: int  # bytes per block
    scratch: int  # bytes of global scratch per block, which only Triton's own allocator provides
    symbol: str  # the kernel's name in the binary
    key: str  # of the binary in Triton's cache
    facts: sass.Facts

    @property
    def kernel(self) -> str:
        return self.binary.name

    @property
    def config(self) -> dict[str, str]:
        return dict(self.binary.config)

    @property
    def num_warps(self) -> int:
        return self.binary.num_warps

    @property
    def num_stages(self) -> int:
        return self.binary.num_stages

    @property
    def registers(self) -> int:
        return self.facts.registers

    @property
    def stack(self) -> int:
        return self.facts.stack

    @property
    def spills(self) -> int:
        return self.facts.spills

    @property
    def occupancy(self) -> Occupancy:
        return occupancy(
            self.arch, registers=self.registers, shared=self.shared, num_warps=self.num_warps
        )

    @property
    def waits(self) -> int:
        """Waits for the tensor cores in the main loops, the most of any."""
        return max((loop.waits for loop in self.facts.main_loops), default=0)

    @property
    def bytes_in_flight(self) -> int:
        """Of one block, in the main loop that copies most; sass.py says how it is derived."""
        return max(
            (loop.bytes_in_flight(self.num_stages) for loop in self.facts.ir_loops), default=0
        )

    def __str__(self) -> str:
        at_once = self.occupancy
        return (
            f"{self.binary} on {self.arch}: {self.registers} registers, {self.stack} B stack, "
            f"{self.spills} spill instructions, {self.shared} B shared, {at_once.blocks} blocks "
            f"per SM ({at_once.limiter}), {self.facts.tensor or 'no tensor cores'}, "
            f"{self.waits} waits per loop, {self.bytes_in_flight} B in flight"
        )


class _Driver:
    """What the JIT asks a Triton driver on its way to a binary, answered for an absent GPU."""

    def __init__(self, arch: str):
        self.target = _target(arch)
        # A JIT function keeps its binaries by device. Never mixed with those of a real one, and
        # another cache on disk is filled anew.
        self.key = f"compile for {arch} into {triton.knobs.cache.dir}"

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.key

    def get_current_stream(self, device: object = None) -> int:
        return 0


def _target(arch: str) -> GPUTarget:
    """Triton's name of an architecture; it adds the "a" of sm_90a and sm_100a by itself."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"compile: arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


_driver_lock = threading.RLock()  # Triton's active driver is one per process


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[None]:
    """Make `arch` ("sm_90") what Triton compiles for, then restore the driver there was."""
    ours = _Driver(arch)
    with _driver_lock:
        previous = driver._active  # reading .active would look for a GPU
        driver.set_active(ours)
        try:
            yield
        finally:
            driver._active = previous


def compile_launch(launch: Launch, arch: str = "sm_90") -> CompiledReport:
    """Compile exactly the specialisation that `launch` would run on `arch`, and inspect it.

    Raises:
        CompileFailed: the compiler refuses.
        RuntimeError: the kernel was decorated for the interpreter.
        ValueError: there is no such architecture here.
    """
    binary = launch.binary()
    key = _report_key(launch, binary, arch)
    kept = _kept_report(key, launch)
    if kept is not None:
        return kept
    try:
        # Triton prints the whole PTX before it raises what ptxas said.
        with compiling_for(arch), contextlib.redirect_stdout(io.StringIO()):
            # What this process has compiled is forgotten: the cache on disk is what counts.
            launch.jit.device_caches.pop(_Driver(arch).key, None)
            compiled = launch.jit.warmup(
                *launch.args, grid=launch.grid, **_launch.OPTIONS, **launch.kwargs
            )
    except Exception as error:  # of many kinds, by the stage that refuses
        raise CompileFailed(f"{binary} on {arch}: {_reason(error)}") from error
    text = _disassembled(compiled.asm["cubin"])
    report = CompiledReport(
        binary=binary,
        arch=arch,
        shared=compiled.metadata.shared,
        scratch=compiled.metadata.global_scratch_size,
        symbol=sass.kernel_symbol(text),
        key=compiled.hash,
        facts=sass.read(cuobjdump=text, ptx=compiled.asm["ptx"], ttgir=compiled.asm["ttgir"]),
    )
    get_cache_manager(key).put(json.dumps(asdict(report)), REPORT, binary=False)
    return report


def compile_all(
    launches: Iterable[Launch],
    arch: str = "sm_90",
    *,
    jobs: int = 2,
    on_done: Callable[[Binary, CompiledReport | CompileFailed], None] | None = None,
) -> dict[Binary, CompiledReport | CompileFailed]:
    """Compile each binary that `launches` need once, in `jobs` processes; what fails is returned.

    `on_done` is called in this process as each binary is finished, in no particular order.
    """
    by_binary: dict[Binary, Launch] = {}
    for launch in launches:
        by_binary.setdefault(launch.binary(), launch)
    done: dict[Binary, CompiledReport | CompileFailed] = {}

    def finish(binary: Binary, result: CompiledReport | CompileFailed) -> None:
        done[binary] = result
        if on_done is not None:
            on_done(binary, result)

    missing = []
    for binary, launch in by_binary.items():
        kept = _kept_report(_report_key(launch, binary, arch), launch)
        if kept is None:
            missing.append(binary)
        else:
            finish(binary, kept)
    if jobs < 2 or len(missing) < FEW:
        for binary in missing:
            finish(binary, _attempt(by_binary[binary], arch))
    else:
        # Spawned, not forked: this process may have threads, of torch or of a caller.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=context) as pool:
            futures = {pool.submit(_attempt, by_binary[b], arch): b for b in missing}
            try:
                for future in as_completed(futures):
                    finish(futures[future], future.result())
            finally:
                pool.shutdown(cancel_futures=True)
    return {binary: done[binary] for binary in by_binary}


def artifacts(report: CompiledReport) -> dict[str, Path]:
    """The files of a compiled binary in Triton's cache: "cubin", "ptx", "ttgir"."""
    cache = get_cache_manager(report.key)
    stem = report.kernel[:150]  # as Triton cuts it
    found = {kind: cache.get_file(f"{stem}.{kind}") for kind in ("cubin", "ptx", "ttgir")}
    return {kind: Path(path) for kind, path in found.items() if path is not None}


def _attempt(launch: Launch, arch: str) -> CompiledReport | CompileFailed:
    try:
        return compile_launch(launch, arch)
    except CompileFailed as error:
        return CompileFailed(str(error))  # without its cause, which may not be picklable


def _reason(error: BaseException) -> str:
    """The line of a compiler's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "error" in line.lower() and "Repro" not in line]
    return f"{type(error).__name__}: {(said or lines or ['no message'])[-1]:.300}"


def _report_key(launch: Launch, binary: Binary, arch: str) -> str:
    target = _target(arch)
    parts = (
        launch.jit.cache_key,  # source of the kernel and of every jit function that it calls
        str(binary),
        arch,
        sorted(_launch.OPTIONS.items()),
        triton.__version__,
        _assembler(arch),
        sorted(get_cache_invalidating_env_vars().items()),
        _reader(),
        target.backend,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _assembler(arch: str) -> str:
    return str(make_backend(_target(arch)).hash())  # the version of ptxas


@functools.cache
def _reader() -> str:
    return hashlib.sha256(Path(sass.__file__).read_bytes()).hexdigest()


def _kept_report(key: str, launch: Launch) -> CompiledReport | None:
    """The report of an earlier run, if its binary is still there too."""
    path = get_cache_manager(key).get_file(REPORT)
    if path is None:
        return None
    try:
        report = _report_from(json.loads(Path(path).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # as if it had not been there; it is written again
    group = get_cache_manager(report.key).get_group(f"{launch.name[:150]}.json")
    return report if group and f"{launch.name[:150]}.cubin" in group else None


def _report_from(data: dict[str, Any]) -> CompiledReport:
    facts = data["facts"]
    facts["main_loops"] = tuple(sass.Loop(**loop) for loop in facts["main_loops"])
    facts["ir_loops"] = tuple(
        sass.IrLoop(
            **loop
            | {kind: tuple((str(n), int(b)) for n, b in loop[kind]) for kind in ("copies", "loads")}
        )
        for loop in facts["ir_loops"]
    )
    binary = data["binary"]
    binary["config"] = tuple((name, value) for name, value in binary["config"])
    binary["signature"] = tuple(binary["signature"])
    return CompiledReport(**data | {"facts": sass.Facts(**facts), "binary": Binary(**binary)})


def _disassembled(cubin: bytes) -> str:
    """Resource usage and SASS, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
