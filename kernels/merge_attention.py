"""The exact merge of attention over keys that several ranks hold, by log-sum-exp.

    lse = ln(sum_r exp(lse[r]));   out = sum_r exp(lse[r] - lse) * out[r]

Layout: outs (R, T, Hq, D) and lses (R, T, Hq), as `attention_prefill` and `attention_decode` return
them for one rank's keys each, gathered.
Tiling: a program is one warp that merges 32 columns of a row, ranks in ascending order; see
_merge_partials.py.
Source: FlashAttention's online softmax; context parallelism by query (arXiv 2411.01783).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_architecture, check_devices, check_tensor
from ._launch import launch
from ._library import define
from ._merge_partials import BLOCK_C, BLOCK_S, merge_columns
from ._names import named, nbytes
from ._remembered import remembered
from ._sizes import power_of_2

__all__ = ["merge_attention"]


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    outs = args["outs_ptr"]
    return nbytes(outs, args["lses_ptr"], args["out_ptr"], args["lse_ptr"]), 2 * outs.numel()


@triton.jit(do_not_specialize=["R", "rows"], **named("merge_attention", "outs_ptr", _cost))
def _merge_attention_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr,
    R, rows,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (rows * cdiv(D, BLOCK_C),): program = (row = token and head, columns)."""
    PARTS: tl.constexpr = triton.cdiv(D, BLOCK_C)
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    offs_c = tl.program_id(0) % PARTS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < D
    out, lse = merge_columns(
        outs_ptr + row * D + offs_c, lses_ptr + row, mask_c, R,
        rows.to(tl.int64) * D, rows.to(tl.int64), BLOCK_S,
    )  # fmt: skip
    tl.store(out_ptr + row * D + offs_c, out.to(out_ptr.dtype.element_ty), mask=mask_c)
    if tl.program_id(0) % PARTS == 0:
        tl.store(lse_ptr + row, lse)


def merge_attention(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the results of R disjoint sets of keys into that of all of them.

    Args:
        outs: (R, T, Hq, D) fp32, fp16 or bf16; contiguous.
        lses: (R, T, Hq) fp32, natural log-sum-exp of the scaled scores; contiguous. -inf where a
            rank has no visible key, with out 0.
    Returns:
        out (T, Hq, D) in outs.dtype; lse (T, Hq) fp32. Nowhere a visible key: (0, -inf).
    Raises:
        ValueError: shapes, strides, devices.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: fp32, ranks in ascending order, one rounding at the end. Exact up to fp32 for fp32
        outs; partial results that were rounded to 16 bits stay so.
    Cost: (R + 1) * T * Hq * (D * itemsize + 4) bytes.
    Source: see the module; reference: kernels/reference.py:merge_attention.
    """
    _check("merge_attention", outs, lses)
    return _merge_attention(outs, lses)


@remembered
def _check(op: str, outs: torch.Tensor, lses: torch.Tensor) -> None:
    check_tensor(op, "outs", outs, ("R", "T", "Hq", "D"), FLOATS)
    check_tensor(op, "lses", lses, tuple(outs.shape[:3]), (torch.float32,))
    for name, x in (("outs", outs), ("lses", lses)):
        if not x.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {x.stride()}")
    check_architecture(op, outs)
    check_devices(op, outs=outs, lses=lses)


def _merge_attention_impl(
    outs: torch.Tensor, lses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _outputs(outs, lses)
    R, T, Hq, D = outs.shape
    BLOCK_R = max(1, min(BLOCK_S, power_of_2(R)))
    launch(
        _merge_attention_kernel, (T * Hq * -(-D // BLOCK_C),),
        outs, lses, out, lse,
        R, T * Hq,
        D=D, BLOCK_S=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=1,
    )  # fmt: skip
    return out, lse


def _outputs(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


_merge_attention = define(
    "merge_attention(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    _merge_attention_impl,
    _outputs,
)
