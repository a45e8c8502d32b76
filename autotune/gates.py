"""What the machine code of a launch must be like, and whether it is.

    required = requirements(launch, "sm_90")
    faults = violations(compile_launch(launch, "sm_90"), required)     # [] is a pass

`KERNELS` is the one table of what each kernel promises; `requirements` applies it to a launch's
config, dtypes and specialisation. On sm_90 the aligned specialisation, which the models run, must
be free of spills, use wgmma wherever its rows suffice, and keep its main loop fed by asynchronous
copies. Ragged ones (an odd size, stride or offset, or a size of 1) and other architectures must be
right and fit; they may be slow. `GATES` are the checks, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .compile import CompiledReport
from .launches import Launch, TensorSpec
from .occupancy import SMS

__all__ = [
    "GATES",
    "KERNELS",
    "Promise",
    "Requirements",
    "regressions",
    "requirements",
    "specialisation",
    "verdicts",
    "violations",
]

WGMMA_ROWS = 64  # rows of the first operand of one wgmma
RAGGED_STACK = 64  # bytes per thread: a few spilt registers outside the main loop
LOADED_BYTES = 1024  # per iteration and block: scales, page ids, words of a table
REGISTER_RISE = 16  # per thread; two allocation steps of a warp


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What a kernel promises for its aligned specialisation on sm_90, and why."""

    why: str
    rows: str = ""  # constexpr with the rows of the first operand of its matrix products; "": none
    rows_swapped: str = ""  # the same where SWAP_AB is set
    promoted: Callable[[Mapping[str, Any]], int] | None = None  # fp32 additions per tile
    exact_division: bool = False


def _promotion(config: Mapping[str, Any]) -> int:
    return 0 if config["FAST_ACCUM"] else config["BLOCK_M"] * config["BLOCK_N"]


_MOVES = Promise(why="moves rows or integers; no matrix product")
KERNELS = {
    "_fp8_matmul_kernel": Promise(
        why="y = x @ w.T; with SWAP_AB the weights' rows come first. Without FAST_ACCUM each "
        "element of the tile is added to an fp32 accumulator every BLOCK_K",
        rows="BLOCK_M",
        rows_swapped="BLOCK_N",
        promoted=_promotion,
    ),
    "_grouped_gemm_swiglu_kernel": Promise(
        why="rows of one expert times its weights", rows="BLOCK_M", rows_swapped="BLOCK_N"
    ),
    "_grouped_gemm_scatter_kernel": Promise(
        why="rows of one expert times its weights", rows="BLOCK_M", rows_swapped="BLOCK_N"
    ),
    "_attention_prefill_kernel": Promise(why="rows are query tokens of one head", rows="BLOCK_M"),
    "_attention_decode_kernel": Promise(
        why="rows are the query heads of one KV head, at most 16 in Llama 4", rows="BLOCK_G"
    ),
    "_quantize_rowwise_kernel": Promise(
        why="equal to its reference in every bit, which needs rounded divisions",
        exact_division=True,
    ),
    "_attention_merge_kernel": _MOVES,
    "_count_kernel": _MOVES,
    "_gather_rows_kernel": _MOVES,
    "_rms_norm_kernel": _MOVES,
    "_rope_and_cache_kernel": _MOVES,
    "_scan_kernel": _MOVES,
    "_scatter_kernel": _MOVES,
    "_sum_slots_kernel": _MOVES,
    "_swiglu_kernel": _MOVES,
    "_top_k_kernel": _MOVES,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirements:
    """What the machine code of a launch must satisfy, beside fitting on the GPU."""

    max_stack: int | None = 0  # bytes per thread; 0: no spills or local memory either; None: any
    wgmma: bool = False  # tensor-core work in wgmma only
    pipelined: bool = False  # main loops copy asynchronously and load no matrix into registers
    tf32: bool = False  # tf32 instructions allowed
    promotion_adds: int = 0  # fp32 additions per thread and dot in each main loop, at least
    exact_division: bool = False  # no approximate fp32 division


def specialisation(launch: Launch) -> str:
    """ "aligned", "ragged", or "ragged-one" where a size is 1, which Triton compiles apart."""
    signature = launch.binary().signature
    if any("!" in part for part in signature):
        return "ragged"
    names = [p.name for p in launch.jit.params if not p.is_constexpr]
    ones = (name for name, part in zip(names, signature, strict=True) if part == "1")
    return "ragged-one" if any(not name.startswith("stride_") for name in ones) else "aligned"


def requirements(launch: Launch, arch: str = "sm_90") -> Requirements:
    """What `launch` must compile to on `arch`.

    Raises:
        ValueError: the kernel has no row in KERNELS.
    """
    if launch.name not in KERNELS:
        raise ValueError(f"requirements: kernel must have a row in KERNELS, got {launch.name}")
    promise = KERNELS[launch.name]
    config = launch.arguments() | dict(launch.kwargs)
    adds = promise.promoted(config) // (32 * launch.num_warps) if promise.promoted else 0
    if arch != "sm_90":  # promotion is against an inaccuracy of Hopper's tensor cores
        return Requirements(max_stack=RAGGED_STACK, exact_division=promise.exact_division)
    if specialisation(launch) != "aligned":
        return Requirements(
            max_stack=RAGGED_STACK, promotion_adds=adds, exact_division=promise.exact_division
        )
    operand = next(arg.dtype for arg in launch.args if isinstance(arg, TensorSpec))
    swapped = config.get("SWAP_AB") and promise.rows_swapped
    rows = config[swapped or promise.rows] if promise.rows else 0
    tensor_cores = bool(rows) and operand != torch.float32  # fp32 products are done in full
    return Requirements(
        wgmma=tensor_cores and rows >= WGMMA_ROWS,
        pipelined=tensor_cores,
        promotion_adds=adds,
        exact_division=promise.exact_division,
    )


Gate = Callable[[CompiledReport, Requirements], str]


def _shared(report: CompiledReport, required: Requirements) -> str:
    limit = SMS[report.arch].shared_block
    over = report.shared > limit
    return f"{report.shared} B of shared memory, {limit} B is all there is" if over else ""


def _fits(report: CompiledReport, required: Requirements) -> str:
    fit = report.occupancy
    if fit.blocks or fit.limiter == "shared":  # which has its own gate
        return ""
    return f"no block fits on an SM, because of {fit.limiter}"


def _stack(report: CompiledReport, required: Requirements) -> str:
    if required.max_stack is None:
        return ""
    facts = report.facts
    used = facts.stack + facts.local
    if used > required.max_stack or (required.max_stack == 0 and facts.spills):
        return (
            f"{facts.stack} B stack, {facts.local} B local memory and {facts.spills} spill "
            f"instructions, {required.max_stack} B of stack allowed"
        )
    return ""


def _wgmma(report: CompiledReport, required: Requirements) -> str:
    missing = required.wgmma and not report.facts.sass["wgmma"]
    return "no wgmma" if missing else ""


def _mma_sync(report: CompiledReport, required: Requirements) -> str:
    count = report.facts.sass["mma.sync"]
    return f"{count} mma.sync where wgmma is promised" if required.wgmma and count else ""


def _waits(report: CompiledReport, required: Requirements) -> str:
    for loop in report.facts.main_loops:
        if loop.serialised:
            return f"wgmma serialised: {loop.waits} waits in a main loop with {loop.dots:g} dots"
    return ""


def _copies(report: CompiledReport, required: Requirements) -> str:
    if not required.pipelined:
        return ""
    facts = report.facts
    loops = facts.main_loops and facts.ir_loops
    if not loops:
        return "no main loop"
    idle = any(not loop.copies for loop in facts.main_loops) or any(
        not loop.copy_bytes for loop in facts.ir_loops
    )
    return "no asynchronous copies in a main loop" if idle else ""


def _loads(report: CompiledReport, required: Requirements) -> str:
    """A load that stayed plain is allowed if the IR says that it is small: listed, in effect."""
    if not required.pipelined:
        return ""
    facts = report.facts
    listed = max((loop.load_bytes for loop in facts.ir_loops), default=0)
    if listed > LOADED_BYTES:
        loads = next(loop.loads for loop in facts.ir_loops if loop.load_bytes == listed)
        return f"{listed} B per iteration loaded into registers in a main loop: {dict(loads)}"
    if not listed and any(loop.loads for loop in facts.main_loops):
        return f"loads in a main loop that the IR does not show: {facts.main_loops}"
    return ""


def _tf32(report: CompiledReport, required: Requirements) -> str:
    found = report.facts.sass["tf32"] + report.facts.ptx["tf32"]
    return f"{found} tf32 instructions" if found and not required.tf32 else ""


def _promoted(report: CompiledReport, required: Requirements) -> str:
    if not required.promotion_adds:
        return ""
    for loop in report.facts.main_loops:
        needed = required.promotion_adds * max(1.0, loop.dots)
        if loop.fp32_adds < needed:
            return f"{loop.fp32_adds} fp32 additions in a main loop, promotion needs {needed:g}"
    return ""  # with K known to be small there is no loop, and nothing to promote


def _atomics(report: CompiledReport, required: Requirements) -> str:
    count = report.facts.ptx["float atomic"]
    return f"{count} float atomics: the order of a sum would change" if count else ""


def _scratch(report: CompiledReport, required: Requirements) -> str:
    return f"{report.scratch} B of scratch from Triton's allocator" if report.scratch else ""


def _division(report: CompiledReport, required: Requirements) -> str:
    count = report.facts.ptx["inexact division"]
    return f"{count} inexact divisions" if required.exact_division and count else ""


GATES: dict[str, Gate] = {
    "shared": _shared,
    "fits": _fits,
    "stack": _stack,
    "wgmma": _wgmma,
    "mma.sync": _mma_sync,
    "waits": _waits,
    "copies": _copies,
    "loads": _loads,
    "tf32": _tf32,
    "promotion": _promoted,
    "atomics": _atomics,
    "scratch": _scratch,
    "division": _division,
}


def verdicts(report: CompiledReport, required: Requirements) -> dict[str, str]:
    """What each gate says; "" is a pass."""
    return {name: gate(report, required) for name, gate in GATES.items()}


def violations(report: CompiledReport, required: Requirements) -> list[str]:
    """Say how `report` falls short of `required`, "<gate>: <fault>" each; an empty list passes."""
    return [f"{name}: {said}" for name, said in verdicts(report, required).items() if said]


def regressions(
    reports: Iterable[CompiledReport], baseline: Mapping[str, int], *, allowed: int = REGISTER_RISE
) -> list[str]:
    """Say which binaries take over `allowed` registers per thread more than `baseline` has.

    The baseline maps str(binary) to registers; a binary without an entry is a fault too, so that a
    new one is recorded.
    """
    faults = []
    for report in reports:
        before = baseline.get(str(report.binary))
        if before is None:
            faults.append(f"{report.binary}: no recorded register count")
        elif report.registers > before + allowed:
            faults.append(f"{report.binary}: {report.registers} registers, {before} recorded")
    return faults
