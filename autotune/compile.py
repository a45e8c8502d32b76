"""Compile the launches an operator makes for a GPU that is not there, and judge the machine code.

    (launch,) = recorded_launches(lambda: rms_norm(x, weight, 1e-5))    # CPU tensors, nothing runs
    faults = violations(compile_launch(launch, "sm_90"), Requirements(spill_free=True))

`recorded_launches` runs the operator's own wrapper and keeps the arguments of its launches;
`compile_launch` takes them through Triton's own JIT path, so that the specialisation (divisibility
by 16, equality to 1, integer widths) is the one a GPU would get; `violations` judges the report.

The tensors are CPU tensors of the real shapes, never read or written, so `torch.empty` costs no
memory however large they are. Kernels decorated for Triton's interpreter cannot be compiled: use
another process. Resource usage and SASS are printed by cuobjdump, PTX by Triton.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from llama4_triton.kernels import _launch

__all__ = [
    "CompiledReport",
    "Launch",
    "Loop",
    "Requirements",
    "compile_launch",
    "compiling_for",
    "recorded_launches",
    "violations",
]

# Opt-in shared memory of one thread block, in bytes (CUDA C++ programming guide).
MAX_SHARED = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448}
NO_CONSTEXPRS = ("num_warps", "num_stages")  # among the keywords of a launch


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One call of `_launch.launch` that was recorded instead of executed."""

    kernel: Any  # the @triton.jit function
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]  # constexprs, num_warps, num_stages


def recorded_launches(fn: Callable[[], object]) -> list[Launch]:
    """Call `fn` and return the launches it makes, in order, none of them executed."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        launches.append(Launch(kernel=kernel, grid=grid, args=args, kwargs=kwargs))

    with _launch.intercept(record):
        fn()
    return launches


class _Driver:
    """What the JIT asks a Triton driver on its way to a binary, answered for an absent GPU."""

    def __init__(self, arch: str):
        capability = int(arch.removeprefix("sm_"))
        self.target = GPUTarget("cuda", capability, 32)
        self.key = f"compile for {arch}"

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.key  # a JIT function keeps its binaries by device: never mixed with a real one

    def get_current_stream(self, device: object = None) -> int:
        return 0


_driver_lock = threading.RLock()  # Triton's active driver is one per process


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[None]:
    """Make `arch` ("sm_90") what Triton compiles for, then restore the driver there was."""
    with _driver_lock:
        previous = driver._active  # reading .active would look for a GPU
        driver.set_active(_Driver(arch))
        try:
            yield
        finally:
            driver._active = previous


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """One innermost loop over tensor-core instructions in the machine code."""

    instructions: Counter[str]
    dots: float  # tl.dot's executed per iteration; the compiler may have unrolled some


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledReport:
    """What the compiled code of one launch uses and contains."""

    kernel: str
    arch: str
    config: dict[str, Any]  # constexprs by name
    num_warps: int
    num_stages: int
    registers: int
    stack: int  # bytes per thread
    local: int  # bytes per thread
    spills: int  # instructions that access local memory
    shared: int  # bytes per block
    scratch: int  # bytes of global scratch per block, which only Triton's own allocator provides
    ptx: Counter[str]  # per kind of PATTERNS_PTX
    sass: Counter[str]  # per kind of PATTERNS_SASS
    main_loops: tuple[Loop, ...]

    @property
    def serialised(self) -> bool:
        """Whether some main loop waits for the tensor cores more often than it has dots."""
        return any(loop.instructions["wgmma wait"] > loop.dots for loop in self.main_loops)

    def __str__(self) -> str:
        tensor = {kind: self.sass[kind] for kind in ("wgmma", "mma.sync") if self.sass[kind]}
        return (
            f"{self.kernel} {self.config} {self.num_warps} warps {self.num_stages} stages: "
            f"{self.registers} registers, {self.stack} B stack, {self.spills} spill instructions, "
            f"{self.shared} B shared, {tensor or 'no tensor cores'}, "
            f"{self.sass['cp.async']} cp.async, {self.sass['tma']} TMA, "
            f"{self.ptx['add.f32']} add.f32"
        )


# Every instruction is counted under each kind whose pattern its text matches.
PATTERNS_PTX = {
    "wgmma": r"wgmma\.mma_async",
    "wgmma commit": r"wgmma\.commit_group",
    "tf32": r"w?g?mma\..*\.tf32",
    "float atomic": r"(atom|red)\.global\S*\.(f|bf)\d+",
    "add.f32": r"add(\.rn)?(\.ftz)?\.f32",
    "inexact division": r"div\.(full|approx)",
}
PATTERNS_SASS = {
    "wgmma": r"[HQI]GMMA",
    "wgmma wait": r"WARPGROUP\.DEPBAR",
    "mma.sync": r"[HQID]MMA",
    "tf32": r"HG?MMA.*TF32",
    "cp.async": r"LDGSTS",
    "tma": r"UTMA(LDG|STG)",
    "ld.global": r"LDG\.",
    "spill": r"(LDL|STL)",
    "fp32 add": r"FADD",
}


def compile_launch(launch: Launch, arch: str = "sm_90") -> CompiledReport:
    """Compile exactly the specialisation that `launch` would run on `arch`, and inspect it.

    Raises:
        RuntimeError: the kernel was decorated for the interpreter, or does not compile.
    """
    if not isinstance(launch.kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            f"compile_launch: kernel must be a compiled JIT function, got "
            f"{type(launch.kernel).__name__} (Triton's interpreter is on: use another process)"
        )
    with compiling_for(arch):
        compiled = launch.kernel.warmup(
            *launch.args, grid=launch.grid, **_launch.OPTIONS, **launch.kwargs
        )
    return CompiledReport(
        kernel=compiled.metadata.name,
        arch=arch,
        config={name: value for name, value in launch.kwargs.items() if name not in NO_CONSTEXPRS},
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        shared=compiled.metadata.shared,
        scratch=compiled.metadata.global_scratch_size,
        **_inspect(compiled.hash, compiled.asm["ptx"], compiled.asm["cubin"]),
    )


def _disassembled(key: str, cubin: bytes) -> str:
    """Resource usage and SASS of a binary, kept beside it in Triton's cache."""
    cache = get_cache_manager(key)
    kept = cache.get_file("cuobjdump.txt")
    if kept is not None:
        return Path(kept).read_text()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    cache.put(text, "cuobjdump.txt", binary=False)
    return text


@functools.lru_cache(maxsize=256)
def _inspect(key: str, ptx: str, cubin: bytes) -> dict[str, Any]:
    text = _disassembled(key, cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(
            f"compile_launch: cuobjdump must print resource usage, got {text!r:.200}"
        )
    registers, stack, local = (int(value) for value in usage.groups())
    ptx_lines = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]+[^\n]*;)", ptx, re.MULTILINE)
    sass_lines = [
        (int(address, 16), text)
        for address, text in re.findall(
            r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", text
        )
    ]
    ptx_counts = _count(PATTERNS_PTX, ptx_lines)
    sass_counts = _count(PATTERNS_SASS, [line for _, line in sass_lines])
    # Each tl.dot is one commit group in PTX; in SASS the assembler adds waits and may unroll.
    mma_per_dot = max(1.0, ptx_counts["wgmma"] / max(1, ptx_counts["wgmma commit"]))
    return dict(
        registers=registers, stack=stack, local=local, spills=sass_counts["spill"],
        ptx=ptx_counts, sass=sass_counts,
        main_loops=tuple(
            Loop(instructions=counts, dots=_mma(counts) / mma_per_dot)
            for counts in _main_loops(sass_lines)
        ),
    )  # fmt: skip


def _mma(counts: Counter[str]) -> int:
    return counts["wgmma"] + counts["mma.sync"]


def _count(patterns: dict[str, str], lines: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for kind, pattern in patterns.items():
        counts[kind] = sum(re.match(pattern, line) is not None for line in lines)
    return counts


def _main_loops(lines: list[tuple[int, str]]) -> list[Counter[str]]:
    """Count the bodies of backward branches that hold tensor-core work, innermost ones only."""
    bodies = {}
    for end, text in lines:
        target = re.search(r"^BRA(?:\.\w+)* .*?0x([0-9a-f]+)", text)
        if target and (start := int(target.group(1), 16)) < end:
            body = [text for address, text in lines if start <= address <= end]
            bodies[start, end] = _count(PATTERNS_SASS, body)
    spans = [span for span, counts in bodies.items() if _mma(counts)]
    return [
        bodies[span]
        for span in spans
        if not any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirements:
    """What a launch's machine code must satisfy."""

    spill_free: bool = True  # no stack, no local memory
    wgmma: bool = False  # tensor-core work in wgmma only
    pipelined: bool = False  # main loops copy asynchronously, and load nothing into registers
    tf32: bool = False  # tf32 instructions allowed
    promotion_adds: int = 0  # fp32 additions per thread outside the tensor cores, at least


def violations(report: CompiledReport, required: Requirements) -> list[str]:
    """Say how `report` falls short of `required`; an empty list is a pass."""
    limit = MAX_SHARED[report.arch]
    loads = sum(loop.instructions["ld.global"] for loop in report.main_loops)
    spilt = report.stack + report.local + report.spills
    copies = report.sass["cp.async"] + report.sass["tma"]
    checks = {
        f"{report.shared} B of shared memory, {limit} B is all there is": report.shared > limit,
        f"{report.stack} B stack, {report.spills} spills": required.spill_free and spilt > 0,
        "no wgmma": required.wgmma and not report.sass["wgmma"],
        f"{report.sass['mma.sync']} mma.sync": required.wgmma and report.sass["mma.sync"] > 0,
        "wgmma serialised: more waits in the main loop than dots": report.serialised,
        "no asynchronous copies": required.pipelined and not copies,
        f"{loads} loads into registers in the main loop": required.pipelined and loads > 0,
        "tf32": not required.tf32 and report.sass["tf32"] + report.ptx["tf32"] > 0,
        f"{report.scratch} B of scratch from Triton's allocator": report.scratch > 0,
        "a float atomic": report.ptx["float atomic"] > 0,
        f"{report.ptx['add.f32']} fp32 additions, promotion needs {required.promotion_adds}": (
            report.ptx["add.f32"] < required.promotion_adds
        ),
    }
    return [fault for fault, found in checks.items() if found]
