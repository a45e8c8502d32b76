"""Gather rows of a matrix: the embedding lookup, and the rows that need logits.

    y[i] = x[rows[i]]        0 where rows[i] is not in [0, V)

Layout: x (V, H) with any row stride and dense rows; rows (N,) int32 or int64; y (N, H) contiguous.
Rows outside are zero, so a vocabulary that is divided over GPUs is looked up with
`rows - first_row` and the results add up.
Tiling: one program per row, BLOCK_H columns at a time.
Source: torch.nn.functional.embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_architecture, check_devices, check_tensor
from ._launch import launch
from ._library import define
from ._names import named, nbytes
from ._remembered import remembered
from ._sizes import flat, tiles

__all__ = ["GatherRowsConfig", "default_config", "gather_rows"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherRowsConfig:
    BLOCK_H: int
    num_warps: int


def default_config(H: int) -> GatherRowsConfig:
    """8 elements per thread: one 16-byte access of a 16-bit type."""
    block = min(2048, max(128, triton.next_power_of_2(H)))
    return GatherRowsConfig(BLOCK_H=block, num_warps=max(1, block // 256))


_default_tiles = tiles(default_config)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    y = args["y_ptr"]
    return 2 * nbytes(y) + nbytes(args["rows_ptr"]), 0


@triton.jit(do_not_specialize=["V"], **named("gather_rows", "x_ptr", _cost))
def _gather_rows_kernel(
    x_ptr, rows_ptr, y_ptr,
    V, H,
    stride_x_v, stride_y_n,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid (N,): program i copies row rows[i]."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i).to(tl.int64)
    inside = (row >= 0) & (row < V)
    x_ptr += tl.where(inside, row, 0) * stride_x_v
    y_ptr += i * stride_y_n

    for h0 in tl.range(0, H, BLOCK_H):
        offs_h = h0 + tl.arange(0, BLOCK_H)
        mask = offs_h < H
        x = tl.load(x_ptr + offs_h, mask=mask & inside, other=0.0)
        tl.store(y_ptr + offs_h, x, mask=mask)


def gather_rows(
    x: torch.Tensor, rows: torch.Tensor, *, config: GatherRowsConfig | None = None
) -> torch.Tensor:
    """Return the rows of `x` that `rows` names.

    Args:
        x: (V, H) fp32, fp16 or bf16, dense rows.
        rows: (N,) int32 or int64; a row outside [0, V) gives zeros.
        config: tile configuration; None takes `default_config(H)`.
    Returns:
        (N, H) in x.dtype.
    Raises:
        ValueError: shapes, strides or devices.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: a copy. Deterministic.
    Cost: no flops; bytes = 2*N*H*itemsize.
    Source: see the module; reference: kernels/reference.py:gather_rows.
    """
    _check("gather_rows", x, rows)
    return _gather_rows(x, rows, config and flat(config))


@remembered
def _check(op: str, x: torch.Tensor, rows: torch.Tensor) -> None:
    check_tensor(op, "x", x, ("V", "H"), FLOATS)
    check_tensor(op, "rows", rows, ("N",), (torch.int32, torch.int64), unit_last_stride=True)
    check_devices(op, x=x, rows=rows)
    check_architecture(op, x)


def _gather_rows_impl(
    x: torch.Tensor, rows: torch.Tensor, config: list[int] | None
) -> torch.Tensor:
    V, H = x.shape
    BLOCK_H, num_warps = config or _default_tiles(H)
    y = torch.empty((rows.shape[0], H), dtype=x.dtype, device=x.device)
    launch(
        _gather_rows_kernel, (rows.shape[0],),
        x, rows, y,
        V, H,
        x.stride(0), y.stride(0),
        BLOCK_H=BLOCK_H, num_warps=num_warps,
    )  # fmt: skip
    return y


_gather_rows = define(
    "gather_rows(Tensor x, Tensor rows, int[]? config) -> Tensor",
    _gather_rows_impl,
    lambda x, rows, config: x.new_empty((rows.shape[0], x.shape[1])),
)
