"""The safetensors file format, read with suspicion.

8 bytes little-endian header length, a JSON header (name -> dtype, shape, data_offsets), then the
data without holes (github.com/huggingface/safetensors). A file is somebody else's: everything its
header declares is checked before any of its data is read or allocated. Error messages show names,
shapes and sizes, never other contents of a file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "DTYPES",
    "CheckpointError",
    "Tensor",
    "parse_json",
    "read_header",
    "read_tensor",
    "show",
]

MAX_HEADER_BYTES = 100 * 2**20
MAX_TENSORS = 100_000
MAX_DIMS = 8
MAX_NUMEL = 2**40

# Width of every type a file may declare; only those in DTYPES can be read.
_WIDTH = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2}
_WIDTH |= {"F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES["F8_E4M3"] = torch.float8_e4m3fn


class CheckpointError(ValueError):
    """A checkpoint that is malformed, incomplete, too large or not of this model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """Where one tensor's bytes lie."""

    path: Path
    name: str  # as the file spells it
    dtype: str  # as the file spells it
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


def show(name: str) -> str:
    """A name from a file, safe to print."""
    return repr(name if len(name) <= 96 else name[:93] + "...")


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("duplicate key")
        return dict(pairs)

    def constant(_: str) -> None:
        raise ValueError("NaN or Infinity")

    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        # The decoder's own message may quote the file.
        why = str(error) if str(error) in ("duplicate key", "NaN or Infinity") else "something else"
        raise CheckpointError(
            f"checkpoint: {what} must be JSON with unique keys and finite numbers, got {why}"
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"checkpoint: {what} must be a JSON object, got {type(data).__name__}"
        )
    return data


def read_header(path: Path) -> dict[str, Tensor]:
    what = show(path.name)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"checkpoint: {what} must be as long as its header says, got {size} bytes "
                "(truncated, or not a safetensors file)"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"checkpoint: header of {what} must be <= {MAX_HEADER_BYTES} bytes, got {length}"
            )
        header = parse_json(file.read(length), f"header of {what}")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"checkpoint: {what} must have <= {MAX_TENSORS} tensors, got more")
    start, end = 8 + length, 0
    tensors = {name: _entry(path, name, entry, start) for name, entry in header.items()}
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != start + end:
            raise CheckpointError(
                f"checkpoint: data of {what} must be without holes and overlaps, got one at "
                f"{show(tensor.name)}"
            )
        end += tensor.nbytes
    if start + end != size:
        raise CheckpointError(
            f"checkpoint: {what} must have {start + end} bytes as its header says, got {size} "
            "(truncated, or with something appended)"
        )
    return tensors


def _entry(path: Path, name: str, entry: object, start: int) -> Tensor:
    what = f"{show(name)} in {show(path.name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"checkpoint: {what} must have dtype, shape and data_offsets, got something else"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _WIDTH:
        raise CheckpointError(
            f"checkpoint: dtype of {what} must be one of {sorted(_WIDTH)}, got another"
        )
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(
            f"checkpoint: shape of {what} must be at most {MAX_DIMS} integers >= 0, got another"
        )
    if math.prod(max(1, dim) for dim in shape) > MAX_NUMEL:
        raise CheckpointError(f"checkpoint: {what} must have <= {MAX_NUMEL} elements, got {shape}")
    nbytes = math.prod(shape) * _WIDTH[dtype]
    if not _naturals(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"checkpoint: data_offsets of {what} must span {nbytes} bytes, as {dtype} {shape} "
            "takes, got another span"
        )
    return Tensor(
        path=path,
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        offset=start + offsets[0],
        nbytes=nbytes,
    )


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 2**62 for i in value)


def read_tensor(tensor: Tensor) -> torch.Tensor:
    data = torch.empty(tensor.nbytes, dtype=torch.uint8)
    view = data.numpy().data
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        done = 0
        while done < tensor.nbytes:  # one read() returns at most 2 GiB
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(
                    f"checkpoint: {show(tensor.path.name)} must not change while it is read, got "
                    "its end too early"
                )
            done += count
    return data.view(DTYPES[tensor.dtype]).view(tensor.shape)
