"""Judge the traffic of an operator on a workload: numbers, limits and what is wrong.

    row = count_case(case)                     # a case of bench/ops.py, at any size, without memory
    faults(row, LIMITS[case.id])               # [] is a pass

* unique: distinct sectors of operands, index tables and outputs against the compulsory bytes. More
  means that something is read which the formula does not need, less that the kernel skips work.
  Only slack: 31 bytes at either end of each contiguous piece.
* requested and dram: against the compulsory bytes. Unique bytes gate nothing by themselves: a
  kernel that reads its weights twice passes. `dram` is modelled (l2.py), so it judges the order of
  programs and lost reuse, and forecasts nothing.
* padded: FLOPs of tl.dot against the ideal ones.
* launches and atomics: exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llama4_triton.autotune.launches import H100
from llama4_triton.kernels import _launch

from .cost import Compulsory
from .hollow import hollow
from .l2 import H100_L2_BYTES, Dram, Occupancy, dram_bytes
from .traffic import Traffic, measure

if TYPE_CHECKING:
    from .case import Case

__all__ = ["LIMITS", "Limits", "Row", "count", "count_case", "faults", "unique_faults"]

SLACK = 62  # bytes that a contiguous piece may cost beyond its own: two sectors, less one byte each


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One operator on one workload."""

    id: str
    kernels: tuple[str, ...]  # one name per launch, in order
    programs: int
    idle: int  # programs without work
    atomics: int
    flops: int  # of tl.dot, padding included
    ideal_flops: int
    compulsory: int  # bytes
    unique: Mapping[str, int]  # bytes of distinct sectors by role
    requested: int  # bytes of requested sectors
    requested_bytes: int  # of active lanes
    dram: Dram | None  # modelled, cold cache, workspace included

    @property
    def unique_ratio(self) -> float:
        return sum(n for role, n in self.unique.items() if role != "workspace") / self.compulsory

    @property
    def requested_ratio(self) -> float:
        return self.requested / self.compulsory

    @property
    def dram_ratio(self) -> float:
        return self.dram.total / self.compulsory if self.dram else 0.0

    @property
    def padded_ratio(self) -> float:
        """Of matrix products; 0 where the operator has none."""
        return self.flops / self.ideal_flops if self.flops and self.ideal_flops else 0.0

    def __str__(self) -> str:
        return (
            f"{self.id}: {len(self.kernels)} launches, {self.programs} programs ({self.idle} idle),"
            f" {self.atomics} atomics, unique {self.unique_ratio:.4f},"
            f" requested {self.requested_ratio:.2f}, modelled DRAM {self.dram_ratio:.3f}"
            f" of {self.compulsory} B, padded {self.padded_ratio:.2f}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a row must not exceed; ratios are against what is compulsory."""

    launches: int  # exactly
    requested: float
    dram: float
    padded: float = 0.0  # 0: the operator has no matrix products
    atomics: int = 0  # exactly


def count(
    id: str,
    fn: Callable[[], object],
    *,
    flops: int,
    bytes: int,
    execute: bool = False,
    occupancy: Occupancy | None = 1,
    capacity: int = H100_L2_BYTES,
) -> Row:
    """Count what `fn` launches; flops and bytes are the compulsory ones.

    occupancy: programs per SM, as in `l2.dram_bytes`; None leaves the L2 model out.
    """
    traffic = measure(fn, execute=execute)
    dram = None
    if occupancy is not None and traffic.trace is not None:
        dram = dram_bytes(traffic.trace, occupancy=occupancy, capacity=capacity)
    return row_of(id, traffic, dram, flops=flops, bytes=bytes)


def count_case(case: Case, *, occupancy: Occupancy | None = 1, seed: int = 0) -> Row:
    """Count a case of bench/ops.py as an H100 would run it, whatever its size; nothing is computed.

    Outside an operator that must be executed (routing) no memory is touched.
    """
    with as_h100(), hollow():
        inputs = case.make(torch.device("cpu"), seed)
    with as_h100():
        return count(
            case.id,
            lambda: case.run(inputs),
            flops=case.cost.flops,
            bytes=case.cost.bytes,
            occupancy=occupancy,
        )


def as_h100() -> contextlib.AbstractContextManager[None]:
    return _launch.assume_device(H100)


def row_of(id: str, traffic: Traffic, dram: Dram | None, *, flops: int, bytes: int) -> Row:
    return Row(
        id=id,
        kernels=tuple(launch.kernel for launch in traffic.launches),
        programs=traffic.programs,
        idle=traffic.idle,
        atomics=traffic.atomics,
        flops=traffic.flops,
        ideal_flops=flops,
        compulsory=bytes,
        unique=traffic.unique,
        requested=traffic.requested,
        requested_bytes=traffic.requested_bytes,
        dram=dram,
    )


def unique_faults(traffic: Traffic, compulsory: Compulsory) -> list[str]:
    """Say where the distinct sectors of operands, index tables and outputs are not compulsory."""
    out = []
    pieces = compulsory.pieces
    for role, wanted, slack in (
        ("operand", compulsory.read, SLACK * pieces),
        ("index", compulsory.index, SLACK * compulsory.index_pieces),
        ("output", compulsory.written, SLACK * pieces),
    ):
        found = traffic.unique[role]
        if not wanted <= found <= wanted + slack:
            out.append(f"{role}: {found} unique bytes, {wanted} are compulsory (slack {slack})")
    return out


def faults(row: Row, limits: Limits) -> list[str]:
    """Say how `row` exceeds its limits; an empty list is a pass."""
    checks = {
        f"{len(row.kernels)} launches, not {limits.launches}": len(row.kernels) != limits.launches,
        f"{row.atomics} atomics, not {limits.atomics}": row.atomics != limits.atomics,
        f"unique bytes are {row.unique_ratio:.4f} of the compulsory ones": (
            not 0.995 <= row.unique_ratio <= 1.005
        ),
        f"requested bytes are {row.requested_ratio:.3f} of the compulsory ones, limit "
        f"{limits.requested}": row.requested_ratio > limits.requested,
        f"modelled DRAM bytes are {row.dram_ratio:.3f} of the compulsory ones, limit "
        f"{limits.dram}": row.dram_ratio > limits.dram,
        f"padded FLOPs are {row.padded_ratio:.3f} of the ideal ones, limit "
        f"{limits.padded}": row.padded_ratio > limits.padded,
    }
    return [fault for fault, found in checks.items() if found]


# What was counted when these were last looked at, about 2 % above; a rise is a regression, a fall
# is an occasion to lower them. H100, one program per SM. Workspace is in requested and dram.
LIMITS: dict[str, Limits] = {
    id: Limits(launches=launches, requested=requested, dram=dram, padded=padded)
    for id, launches, requested, dram, padded in (
        ("gather_rows-embedding-T4096", 1, 1.15, 1.03, 0.0),
        ("rope_and_cache-scout-local-tp8-T4096", 1, 1.68, 1.02, 0.0),
        ("rope_and_cache-scout-local-e4m3-token-transposed-tp8-T4096", 1, 1.89, 1.02, 0.0),
        ("convert_layout-transposed_v-e4m3-tp8", 1, 1.02, 1.02, 0.0),
        ("rms_norm-T16384", 1, 2.04, 1.02, 0.0),
        ("add_rms_norm-T4096", 1, 1.79, 1.02, 0.0),
        ("route-scout-T4096-uniform", 3, 1.19, 1.03, 0.0),
        ("route-maverick-T4096-skewed", 3, 1.29, 1.08, 0.0),
        ("sort_by_expert-scout-T4096-uniform", 3, 1.41, 1.05, 0.0),
        ("quantize_rowwise-T4096-K5120", 1, 1.71, 1.02, 0.0),
        ("swiglu-F1024-T4096", 1, 1.02, 1.02, 0.0),
        ("fp8_matmul-scout-tp1-qkv-T16-promoted", 1, 1.28, 1.02, 1.02),
        ("fp8_matmul-scout-tp1-qkv-T4096-promoted", 1, 21.11, 1.94, 1.02),
        ("fp8_matmul-scout-tp1-qkv-T4096-fast", 1, 15.96, 1.66, 1.02),
        ("attention_prefill-scout-tp8-prefill-B1-T4096-4k-global", 2, 14.83, 1.03, 1.05),
        ("attention_prefill-scout-tp8-prefill-B1-T4096-4k-global-e4m3-head", 2, 10.71, 1.03, 1.05),
        ("attention_prefill-scout-tp8-prefill-B1-T16384-16k-local", 2, 28.34, 1.03, 1.04),
        ("attention_prefill-scout-tp8-chunked-prefill-B1-T8192-128k-global", 2, 240.94, 2.52, 1.02),
        ("attention_decode-scout-tp8-decode-B1-T1-1M-global", 3, 1.03, 1.03, 3.27),
        ("attention_decode-scout-tp8-decode-B1-T1-10M-global", 3, 1.03, 1.03, 3.27),
        ("attention_decode-scout-tp8-decode-B64-T64-8k-local", 3, 1.03, 1.03, 3.27),
        ("grouped_gemm_swiglu-scout-tp8-T4096-uniform-vllm", 1, 3.02, 1.04, 1.22),
        ("grouped_gemm_swiglu-scout-tp8-T4096-uniform-k2", 1, 5.64, 1.15, 1.14),
        ("moe-scout-tp8-T1-uniform", 3, 1.1, 1.02, 16.4),
        ("moe-scout-tp8-T64-uniform", 4, 1.14, 1.02, 2.55),
        ("moe-scout-tp8-T64-uniform-e4m3_channel", 4, 1.25, 1.03, 2.55),
        ("moe-scout-tp8-T4096-uniform", 6, 5.6, 1.26, 1.16),
    )
}
