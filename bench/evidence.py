"""What is known of the kernels without a GPU, in one place: machine code, work, launches, gates.

    machine_code()     per binary that ships: registers, shared memory, occupancy, tensor-core
                       form, waits, and the verdict of every gate of autotune/gates.py
    work()             per operator at real size: launches, programs, bytes, padded FLOPs, and the
                       verdict of every limit of traffic_gates.py; under the interpreter only
    steps()            per forward step of a whole model: launches, GEMMs, allocations

`llama4-triton evidence` prints them. A kernel is compiled or interpreted, never both in a process,
so the command gets `work` from a child (`work_in_child`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from llama4_triton.autotune.compile import compile_all
from llama4_triton.autotune.manifest import manifest_row

from .shapes import WORKLOADS
from .steps import COPIES_PER_STEP, record_step, shipped_launches

__all__ = ["STEPS", "machine_code", "steps", "work", "work_in_child"]

STEPS = (
    "scout-tp8-decode-B1-T1-8k",
    "scout-tp8-decode-B64-T64-8k",
    "scout-tp8-prefill-B1-T16384-16k",
    "maverick-tp8-decode-B64-T64-8k",
    "maverick-tp8-prefill-B1-T16384-16k",
)
Row = dict[str, Any]


def machine_code(
    arch: str = "sm_90", *, jobs: int = 2, on_done: Callable[..., None] | None = None
) -> list[Row]:
    """One row per binary that ships; `faults` is empty where every gate passes."""
    launches = shipped_launches()
    results = compile_all(launches, arch, jobs=jobs, on_done=on_done)
    return [manifest_row(launch, results[launch.binary()], arch) for launch in launches]


def work(ids: Iterable[str] | None = None) -> list[Row]:
    """One row per case of LIMITS, or of `ids` among them; in an interpreting process.

    Raises:
        RuntimeError: Triton's interpreter is off.
    """
    import triton

    from .ops import find
    from .traffic_gates import LIMITS, count_case, faults

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("work: TRITON_INTERPRET must be 1 (work_in_child sees to it)")
    rows = []
    for id in LIMITS if ids is None else ids:
        row = count_case(find(id))
        ratios = dict(
            unique_ratio=row.unique_ratio,
            requested_ratio=row.requested_ratio,
            dram_ratio=row.dram_ratio,
            padded_ratio=row.padded_ratio,
        )
        rows.append(asdict(row) | ratios | dict(faults=faults(row, LIMITS[id])))
    return rows


def work_in_child(ids: Iterable[str] | None = None) -> list[Row]:
    """`work` in a process of its own, under the interpreter.

    Raises:
        RuntimeError: the process failed; the message is the last line that it wrote.
    """
    child = subprocess.run(
        [sys.executable, "-m", __name__, *(ids or ())],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"work: {(child.stderr.strip().splitlines() or ['no output'])[-1]}")
    rows: list[Row] = json.loads(child.stdout)
    return rows


def steps(ids: Iterable[str] = STEPS) -> list[Row]:
    """One row per step of a whole model: what it launches, by name, and what it allocates."""
    rows = []
    for workload in WORKLOADS:
        if workload.id in ids:
            recording = record_step(workload)
            rows.append(
                dict(
                    id=workload.id,
                    layers=workload.shape.layers,
                    launches=dict(Counter(launch.name for launch in recording.launches)),
                    gemms=len(recording.aten),
                    copies=COPIES_PER_STEP,
                    allocations=len(recording.allocations),
                    allocated_bytes=recording.allocated_bytes,
                )
            )
    return rows


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1:] or None)))
