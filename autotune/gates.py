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

import re
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
E4M3_MMA = re.compile(r"QGMMA\..*E4M3\.E4M3|QMMA\.")
RAGGED_STACK = 64  # bytes per thread: a few spilt registers outside the main loop
LOADED_BYTES = 2048  # per iteration and block: scales of 256 rows, page ids, words of a table
FEW_ROWS = 32  # of activations: weights are what such a tile reads
IN_FLIGHT = 32 * 1024  # bytes of weights per SM: bandwidth times latency, 3.35e12 / 132 * 1.2e-6
REGISTER_RISE = 16  # per thread; two allocation steps of a warp


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What a kernel promises for its aligned specialisation on sm_90, and why."""

    why: str
    rows: str = ""  # constexpr with the rows of the first operand of its matrix products; "": none
    rows_swapped: str = ""  # the same where SWAP_AB is set
    weights_first: tuple[str, ...] = ()  # constexprs with rows of weights, the first operand
    # Constexpr with rows of activations, where few of them leave reading weights to be done; "":
    # there are always few; None: weights are not what is read.
    few_rows: str | None = None
    promoted: Callable[[Mapping[str, Any]], int] | None = None  # fp32 additions per tile
    in_registers: Callable[[Mapping[str, Any]], int] | None = None  # bytes per iteration and block
    exact_division: bool = False
    operand: Callable[[Mapping[str, Any]], torch.dtype] | None = None  # what is multiplied


def _untransposed_values(config: Mapping[str, Any]) -> int:
    transposed = config["q_ptr"].dtype == torch.float8_e4m3fn and config["strides_v"] is None
    return config["BLOCK_N"] * config["BLOCK_D"] if transposed else 0


def _promotion(config: Mapping[str, Any]) -> int:
    return 0 if config["FAST_ACCUM"] else config["BLOCK_M"] * config["BLOCK_N"]


def _experts(why: str, few_rows: str = "", *more: str) -> Promise:
    return Promise(
        why=f"{why}: weights are the first operand of wgmma, at every number of rows",
        weights_first=("BLOCK_N", *more),
        few_rows=few_rows,
    )


def _decode_operand(config: Mapping[str, Any]) -> torch.dtype:
    """e4m3 where V lies transposed and q is not fp32; otherwise q's type, which holds e4m3."""
    q, k = config["q_ptr"].dtype, config["k_ptr"].dtype
    swapped = config["TRANSPOSED_V"] and q != torch.float32
    return torch.float8_e4m3fn if swapped and k == torch.float8_e4m3fn else q


_MOVES = Promise(why="moves rows or integers; no matrix product")
KERNELS = {
    "_fp8_matmul_kernel": Promise(
        why="y = x @ w.T; with SWAP_AB the weights' rows come first. Without FAST_ACCUM each "
        "element of the tile is added to an fp32 accumulator every BLOCK_K",
        rows="BLOCK_M",
        rows_swapped="BLOCK_N",
        promoted=_promotion,
    ),
    "_grouped_gemm_swiglu_kernel": _experts("gate and up of a tile of rows", "BLOCK_M"),
    "_grouped_gemm_scatter_kernel": _experts("down of a tile of rows", "BLOCK_M"),
    "_grouped_gemm_swiglu_ws_kernel": _experts("the same, warp-specialised", "BLOCK_M"),
    "_grouped_gemm_scatter_ws_kernel": _experts("the same, warp-specialised", "BLOCK_M"),
    "_shared_down_kernel": _experts("down of a tile of tokens", "BLOCK_M"),
    "_few_up_kernel": _experts("gate and up of the rows of 4 slots at most"),
    "_few_down_kernel": _experts("down of the rows of 4 slots at most"),
    "_route_and_up_kernel": _experts("the shared gate and up beside the routing"),
    "_sort_and_up_kernel": _experts("the shared gate and up beside the sort"),
    "_up_and_down_kernel": _experts(
        "gate and up of a tile of rows beside the shared down", "BLOCK_M", "BLOCK_N_DOWN"
    ),
    "_router_kernel": Promise(
        why="experts' rows of w_router come first; what quantises x beside them equals its "
        "reference in every bit",
        weights_first=("BLOCK_E",),
        exact_division=True,
    ),
    "_attention_prefill_kernel": Promise(
        why="rows are query tokens of one head; e4m3 values that are not stored transposed are "
        "transposed on their way through registers",
        rows="BLOCK_M",
        in_registers=_untransposed_values,
    ),
    "_prefill_schedule_kernel": _MOVES,
    "_attention_decode_kernel": Promise(
        why="keys, then elements of V, are the first operand of wgmma, up to 32 rows of q",
        weights_first=("BLOCK_N", "BLOCK_D"),
        few_rows="BLOCK_R",
        operand=_decode_operand,
    ),
    "_quantize_rowwise_kernel": Promise(
        why="equal to its reference in every bit, which needs rounded divisions",
        exact_division=True,
    ),
    "_quantize_groupwise_kernel": Promise(why="the same", exact_division=True),
    "_rms_norm_quantize_kernel": Promise(
        why="the mean is an approximate division, in the norm alone as well"
    ),
    "_attention_decode_schedule_kernel": _MOVES,
    "_attention_merge_kernel": _MOVES,
    "_convert_layout_kernel": _MOVES,
    "_merge_attention_kernel": _MOVES,
    "_count_kernel": _MOVES,
    "_gather_rows_kernel": _MOVES,
    "_rms_norm_kernel": _MOVES,
    "_rope_and_cache_kernel": _MOVES,
    "_scan_kernel": _MOVES,
    "_scatter_kernel": _MOVES,
    "_route_kernel": _MOVES,
    "_sort_kernel": _MOVES,
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
    loaded: int = LOADED_BYTES  # into registers, per iteration and block of a main loop, at most
    tf32: bool = False  # tf32 instructions allowed
    promotion_adds: int = 0  # fp32 additions per thread and dot in each main loop, at least
    exact_division: bool = False  # no approximate fp32 division
    e4m3: bool = False  # tensor cores multiply e4m3 and nothing else
    in_flight: int = 0  # bytes of weights being copied at a time, per SM, in each main loop
    weight_rows: tuple[int, ...] = ()  # of the tiles that count for this


def specialisation(launch: Launch) -> str:
    """ "aligned", "ragged", or "ragged-one" where a size is 1, which Triton compiles apart."""
    if launch.misaligned():
        return "ragged"
    signature = launch.binary().signature
    names = [p.name for p in launch.jit.params if not p.is_constexpr]
    ones = (name for name, part in zip(names, signature, strict=True) if part == "1")
    return "ragged-one" if any(not name.startswith("stride_") for name in ones) else "aligned"


def _operand(launch: Launch) -> torch.dtype:
    """What is multiplied, or the weights where those are decoded."""
    arguments = launch.arguments()
    weights = arguments.get("w")
    if isinstance(weights, tuple):
        first: torch.dtype = weights[0].dtype
        return first
    return next(arg.dtype for arg in arguments.values() if isinstance(arg, TensorSpec))


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
    operand = promise.operand(config) if promise.operand else _operand(launch)
    swapped = config.get("SWAP_AB") and promise.rows_swapped
    rows = config[swapped or promise.rows] if promise.rows else 0
    weight_rows = tuple(config[name] for name in promise.weights_first)
    # fp32 products are done in full
    tensor_cores = bool(rows or weight_rows) and operand != torch.float32
    few = promise.few_rows is not None and config.get(promise.few_rows, 1) <= FEW_ROWS
    return Requirements(
        wgmma=tensor_cores and (rows >= WGMMA_ROWS or bool(weight_rows)),
        pipelined=tensor_cores,
        loaded=LOADED_BYTES + (promise.in_registers(config) if promise.in_registers else 0),
        promotion_adds=adds,
        exact_division=promise.exact_division,
        e4m3=tensor_cores and operand == torch.float8_e4m3fn,
        in_flight=IN_FLIGHT if weight_rows and tensor_cores and few else 0,
        weight_rows=weight_rows,
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


def _e4m3(report: CompiledReport, required: Requirements) -> str:
    if not required.e4m3:
        return ""
    other = [name for name in report.facts.tensor if not E4M3_MMA.match(name)]
    if other or not report.facts.tensor:
        return f"e4m3 is promised, {', '.join(other) or 'nothing'} is there"
    return ""


def _in_flight(report: CompiledReport, required: Requirements) -> str:
    """Weights copied at a time by all blocks of an SM, in the main loop that has least."""
    if not required.in_flight:
        return ""
    blocks = report.occupancy.blocks
    if not blocks:  # which has its own gate
        return ""
    for loop in report.facts.ir_loops:
        tiles = [
            size
            for shape, size in loop.copies
            if shape.count("x") > 1 and int(shape.split("x")[0]) in required.weight_rows
        ]
        depth = loop.bytes_in_flight(report.num_stages) / max(1, loop.copy_bytes)
        found = int(min(tiles, default=0) * depth * blocks)
        if found < required.in_flight:
            return f"{found} B of weights in flight per SM, {required.in_flight} B are needed"
    return "" if report.facts.ir_loops else "no main loop copies weights"


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
    if listed > required.loaded:
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
    "e4m3": _e4m3,
    "in_flight": _in_flight,
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
