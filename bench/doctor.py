"""What there is on this machine, whether it fits together, and which path each operator takes.

    for finding in examine(): print(finding.topic, finding.value, finding.verdict, finding.why)

Nothing is compiled, launched or written. It works without a GPU, and says so.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

__all__ = ["Finding", "driver_verdict", "examine", "gpu_facts", "kernel_paths", "versions"]

# Oldest Linux driver that loads the machine code of a CUDA toolkit: of any 12.x or 13.x by CUDA's
# minor-version compatibility, and the one that came with that toolkit. Source: NVIDIA's CUDA
# toolkit release notes.
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
OWN_DRIVER = {
    (12, 4): "550.54.14",
    (12, 5): "555.42.02",
    (12, 6): "560.28.03",
    (12, 8): "570.26",
    (12, 9): "575.51.03",
    (13, 0): "580.65.06",
    (13, 1): "590.44.01",
}
OLDEST_CAPABILITY = (7, 5)
TESTED_TRITON = ("3.6", "3.7", "3.8", "3.9")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the doctor's table."""

    topic: str
    value: str
    verdict: str = "ok"  # "ok", "note" (works, but know it) or "fault" (will not work)
    why: str = ""


def versions() -> dict[str, str]:
    """Of everything that decides what is executed."""
    from llama4_triton import __version__
    from llama4_triton.kernels._records import source_hash

    return {
        "llama4-triton": __version__,
        "source": source_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": triton.__version__,
        "ptxas": ptxas_release() or "",
    }


def ptxas_release(capability: tuple[int, int] = (9, 0)) -> str | None:
    """CUDA release of the assembler that makes Triton's machine code, "12.8"; None: there is none.

    Triton has one of its own for Blackwell.
    """
    knobs = triton.knobs.nvidia
    tool = getattr(knobs, "ptxas_blackwell", None) if capability >= (10, 0) else None
    try:
        path = (tool or knobs.ptxas).path
    except (RuntimeError, AttributeError):
        return None
    return _release(path)


@functools.cache
def _release(path: str) -> str | None:
    found = re.search(r"release (\d+\.\d+)", _output([path, "--version"]) or "")
    return found.group(1) if found else None


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """What a report says of the GPU and of what runs on it; `device` is a CUDA device."""
    from llama4_triton.kernels._launch import device_properties
    from llama4_triton.kernels._records import driver_version

    from .selftest import compute_sanitizer

    properties = torch.cuda.get_device_properties(device)
    known = device_properties(device)
    return {
        "gpu": properties.name,
        "capability": list(known.capability),
        "sm_count": known.sm_count,
        "shared_bytes": known.shared_bytes,
        "memory_bytes": properties.total_memory,
        "driver": driver_version(),
        "clocks_mhz": _clocks(),
        "compute_sanitizer": compute_sanitizer(),
        **versions(),
    }


def _clocks() -> dict[str, int] | None:
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    line = (_output(query) or "").strip().splitlines()[:1]
    values = re.findall(r"\d+", line[0]) if line else []
    return dict(zip(fields, map(int, values), strict=True)) if len(values) == len(fields) else None


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def driver_verdict(driver: str, release: str) -> Finding:
    """Whether `driver` ("550.54.15") loads what the ptxas of CUDA `release` ("12.8") makes."""
    topic = "driver for that machine code"
    major, minor = (int(part) for part in release.split(".")[:2])
    oldest = OLDEST_DRIVER.get(major)
    runs = re.fullmatch(r"CUDA (\d+)", driver)  # where the driver's own version is not to be had
    if runs and int(runs.group(1)) // 1000 >= major:
        return Finding(topic=topic, value=driver, why=f"runs CUDA {major}")
    if oldest is None or not re.match(r"\d+\.", driver):
        why = f"not known which driver the code of ptxas {release} needs"
        return Finding(topic=topic, value=driver or "unknown", verdict="note", why=why)
    if _number(driver) < _number(oldest):
        why = f"ptxas {release} made the code: the driver must be {oldest} or newer"
        return Finding(topic=topic, value=driver, verdict="fault", why=why)
    own = OWN_DRIVER.get((major, minor))
    if own is None or _number(driver) >= _number(own):
        return Finding(topic=topic, value=driver, why=f"ptxas {release} needs {oldest} or newer")
    why = (
        f"older than CUDA {release}'s own driver {own}; machine code loads all the same "
        f"(from {oldest} on)"
    )
    return Finding(topic=topic, value=driver, verdict="note", why=why)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def examine() -> list[Finding]:
    """Look at everything; `kernel_paths` says the rest."""
    facts = versions()
    findings = [
        Finding(topic=name, value=facts[name] or "none")
        for name in ("llama4-triton", "python", "torch")
    ]
    findings += [_triton(facts["triton"]), *_gpu(), _cache(), *_settings()]
    return findings


def _triton(version: str) -> Finding:
    if version.startswith(TESTED_TRITON):
        return Finding(topic="triton", value=version)
    why = f"this project is tested with {', '.join(TESTED_TRITON)}"
    return Finding(topic="triton", value=version, verdict="note", why=why)


def _gpu() -> list[Finding]:
    from llama4_triton.kernels._launch import device_properties
    from llama4_triton.kernels._records import driver_version

    release = ptxas_release()
    assembler = Finding(
        topic="ptxas", value=f"CUDA {release}" if release else "none", why="Triton's assembler",
        verdict="ok" if release else "fault",
    )  # fmt: skip
    if not torch.cuda.is_available():
        why = "kernels run on Triton's interpreter on the CPU: right, and slow"
        if torch.version.cuda is None:
            why += "; this torch is built for the CPU only"
        elif driver_version():
            why += f"; there is a driver {driver_version()}, but torch sees no GPU"
        return [assembler, Finding(topic="GPU", value="none", verdict="note", why=why)]
    device = torch.device("cuda", torch.cuda.current_device())
    known = device_properties(device)
    release = ptxas_release(known.capability)
    capability = f"sm_{known.capability[0]}{known.capability[1]}"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    old = known.capability < OLDEST_CAPABILITY
    findings = [
        Finding(topic="ptxas", value=f"CUDA {release}", why=f"Triton's assembler for {capability}"),
        Finding(
            topic="GPU",
            value=torch.cuda.get_device_name(device),
            why=f"{capability}, {known.sm_count} SMs, {known.shared_bytes:,} B of shared memory "
            f"per block, {memory:.0f} GiB",
            verdict="fault" if old else "ok",
        ),
    ]
    if release:
        findings.append(driver_verdict(driver_version(), release))
    if known.capability < (8, 9):
        why = "fp8_matmul and quantize_rowwise raise UnsupportedArchitectureError"
        findings.append(
            Finding(topic="float8_e4m3fn", value="no", verdict="note", why=f"{capability}: {why}")
        )
    return [*findings, _record(device)]


def _record(device: torch.device) -> Finding:
    from llama4_triton.kernels._paths import OPS, UNMODELLED
    from llama4_triton.kernels._records import covered_features, record_path

    file = record_path(device)
    doubtful = frozenset().union(*OPS.values()) & UNMODELLED
    if not file.is_file():
        why = "run llama4-triton selftest --gpu"
        if doubtful:
            why += f"; until then off: {', '.join(sorted(doubtful))}"
        return Finding(topic="selftest record", value="none", verdict="note", why=why)
    covered = ", ".join(sorted(covered_features(device) & doubtful)) or "nothing that needs it"
    return Finding(topic="selftest record", value=str(file), why=f"this GPU passed; on: {covered}")


def _cache() -> Finding:
    folder = Path(triton.knobs.cache.dir)
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        why = "not writable: set TRITON_CACHE_DIR, or every process compiles anew"
        return Finding(topic="Triton cache", value=str(folder), verdict="fault", why=why)
    binaries = sum(1 for _ in folder.glob("*/*.cubin")) if folder.is_dir() else 0
    why = f"{binaries} binaries" if binaries else "empty: the first call of each kernel compiles"
    return Finding(
        topic="Triton cache", value=str(folder), why=why, verdict="ok" if binaries else "note"
    )


def _settings() -> list[Finding]:
    from llama4_triton.kernels._environment import environment

    settings = environment()
    findings = [
        Finding(topic="records", value=str(settings.home / "selftest"), why="LLAMA4_TRITON_HOME")
    ]
    if settings.path:
        findings.append(Finding(topic="LLAMA4_TRITON_PATH", value=settings.path, verdict="note"))
    if settings.debug:
        why = "arguments are read back and every launch waits: slow"
        findings.append(Finding(topic="LLAMA4_TRITON_DEBUG", value="1", verdict="note", why=why))
    if settings.no_jit:
        why = "a kernel that is not in Triton's cache is an error"
        findings.append(Finding(topic="LLAMA4_TRITON_NO_JIT", value="1", verdict="note", why=why))
    if triton.knobs.runtime.interpret:
        why = "kernels run on Triton's interpreter, on the CPU"
        findings.append(Finding(topic="TRITON_INTERPRET", value="1", verdict="note", why=why))
    for name, what in (("typer", "the command line"), ("tokenizers", "real text")):
        if importlib.util.find_spec(name) is None:
            findings.append(
                Finding(topic=name, value="not installed", verdict="note", why=f"for {what}")
            )
    return findings


def kernel_paths() -> dict[str, tuple[str, str]]:
    """Of every operator, the path it takes on the current device, and why."""
    from llama4_triton.kernels._paths import path_report

    if torch.cuda.is_available():
        return path_report(torch.device("cuda", torch.cuda.current_device()))
    return path_report(torch.device("cpu"))
