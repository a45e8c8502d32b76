"""What a selftest has shown on a GPU: one JSON file per GPU, driver, torch, Triton and source.

    ${LLAMA4_TRITON_HOME:-~/.cache/llama4-triton}/selftest/<key>.json

The file says for which features of the fast paths every case passed, and what it was made on. It
counts for exactly that: another driver or an edited kernel has another key.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from ._environment import environment

__all__ = [
    "covered_features",
    "driver_version",
    "record_identity",
    "record_key",
    "record_path",
    "source_hash",
    "write_record",
]

DRIVER = Path("/proc/driver/nvidia/version")


def record_identity(device: torch.device) -> dict[str, str]:
    """What a record holds for: GPU, driver, torch, Triton and the kernels' source."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "gpu": gpu,
        "driver": driver_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "source": source_hash(),
    }


def record_key(device: torch.device) -> str:
    """The name of the record of `device`, without its folder and suffix."""
    identity = record_identity(device)
    readable = re.sub(r"[^a-z0-9]+", "-", identity["gpu"].lower()).strip("-")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{readable}-{digest[:16]}"


def record_path(device: torch.device) -> Path:
    """Where the record of `device` is, or would be."""
    return environment().home / "selftest" / f"{record_key(device)}.json"


def write_record(
    device: torch.device, features: Iterable[str], report: Mapping[str, Any] | None = None
) -> Path:
    """Record that a selftest passed on `device` for `features`, and return the file.

    Args:
        features: of the fast paths, those of which every case passed.
        report: anything that JSON can hold, kept beside it.
    """
    file = record_path(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **record_identity(device),
        "features": sorted(features),
        "report": dict(report or {}),
    }
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)
    _covered.cache_clear()
    return file


def covered_features(device: torch.device) -> frozenset[str]:
    """The features that a selftest of this GPU, driver and source has shown to work.

    Read once per device and process. A file that is damaged or of another source covers nothing.
    """
    if device.type != "cuda":
        return frozenset()
    return _covered(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _covered(index: int) -> frozenset[str]:
    device = torch.device("cuda", index)
    try:
        record = json.loads(record_path(device).read_text(encoding="utf-8"))
        if {name: record[name] for name in record_identity(device)} != record_identity(device):
            return frozenset()
        return frozenset(map(str, record["features"]))
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


@functools.cache
def source_hash() -> str:
    """Of every file of this folder, names included."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def driver_version() -> str:
    """NVIDIA's driver, "550.54.15"; "" where there is none.

    Where the kernel module does not say, the newest CUDA that the driver runs: "CUDA 12040".
    """
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", DRIVER.read_text())
    except OSError:
        found = None
    if found is not None:
        return found.group()
    if not torch.cuda.is_available():
        return ""
    return f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]
