"""Write compiled binaries to a folder, with a manifest that says what each is and how good.

    rows = write_manifest(launches, compile_all(launches, arch), out)

`manifest.json` is a list of rows, one per binary, and is written last: a folder that has one is
complete. A binary that does not compile has a row as well, with its error and no files.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import triton

from .compile import CompiledReport, CompileFailed, artifacts
from .gates import requirements, specialisation, violations
from .launches import Binary, Launch

__all__ = ["manifest_row", "write_manifest"]

POINTER = re.compile(r"\*(\w+)")


def write_manifest(
    launches: Iterable[Launch],
    results: Mapping[Binary, CompiledReport | CompileFailed],
    out: Path,
    arch: str,
) -> list[dict[str, Any]]:
    """Copy each binary's cubin, PTX and GPU IR to `out`, and describe them in manifest.json.

    Raises:
        OSError: `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for launch in launches:
        binary = launch.binary()
        if binary in rows:
            continue
        row = manifest_row(launch, results[binary], arch)
        report = results[binary]
        if isinstance(report, CompiledReport):
            for kind, path in artifacts(report).items():
                shutil.copyfile(path, out / f"{row['name']}.{kind}")
        rows[binary] = row
    text = json.dumps(list(rows.values()), indent=1)
    (out / "manifest.json").write_text(text + "\n")
    return list(rows.values())


def manifest_row(
    launch: Launch, result: CompiledReport | CompileFailed, arch: str
) -> dict[str, Any]:
    """What there is to say of one binary, in plain values."""
    binary = launch.binary()
    special = specialisation(launch)
    name = _name(binary, special, arch)
    arguments = launch.arguments()
    row: dict[str, Any] = dict(
        name=name,
        cubin=None,
        kernel=binary.name,
        config={name: _plain(arguments[name]) for name, _ in binary.config},
        dtypes=sorted({kind for part in binary.signature for kind in POINTER.findall(part)}),
        specialisation=special,
        signature=list(binary.signature),
        arch=arch,
        num_warps=binary.num_warps,
        num_stages=binary.num_stages,
        triton=triton.__version__,
    )
    if isinstance(result, CompileFailed):
        return row | dict(gate="fail", faults=[str(result)])
    facts, at_once = result.facts, result.occupancy
    faults = violations(result, requirements(launch, arch))
    return row | dict(
        cubin=f"{name}.cubin",
        symbol=result.symbol,
        registers=result.registers,
        stack=result.stack,
        local=facts.local,
        spills=result.spills,
        shared=result.shared,
        tensor_core=facts.tensor,
        occupancy=at_once.blocks,
        limiter=at_once.limiter,
        waits=result.waits,
        dots=max((loop.dots for loop in facts.main_loops), default=0),
        loop_instructions=[loop.instructions for loop in facts.main_loops],
        copies=[list(map(list, loop.copies)) for loop in facts.ir_loops],
        loads=[list(map(list, loop.loads)) for loop in facts.ir_loops],
        bytes_in_flight=result.bytes_in_flight,
        gate="fail" if faults else "pass",
        faults=faults,
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _name(binary: Binary, special: str, arch: str) -> str:
    """Unique among binaries, and readable: kernel, element type, tile, specialisation."""
    config = dict(binary.config)
    tile = "x".join(value for key, value in config.items() if key.startswith("BLOCK_"))
    element = next((k for part in binary.signature for k in POINTER.findall(part)), "none")
    digest = hashlib.sha256(str(binary).encode()).hexdigest()[:8]
    stem = binary.name.strip("_").removesuffix("_kernel")
    return "-".join(part for part in (stem, element, tile, special, arch, digest) if part)
