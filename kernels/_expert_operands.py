"""What the experts' kernels take: rows of activations and weights, with scales, as one argument.

A named tuple is passed to a kernel as it is: Triton specialises each member like an argument of
its own, and the kernel reads members by name. This file is the host's side of _expert_tile.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ._launch import DeviceProperties
from .expert_weights import Experts
from .weight_formats import Projection

__all__ = [
    "TL_DTYPES",
    "Rows",
    "Weights",
    "flattened",
    "multiplied_dtype",
    "tile_constants",
    "unflattened",
]

TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
E4M3 = torch.float8_e4m3fn


class Rows(NamedTuple):
    """Rows of x or z as a kernel's argument: (rows, K), their scales, and strides in elements."""

    ptr: Any
    scale_ptr: Any  # None unless e4m3: (rows,), or (rows, K / 128)
    stride: int
    scale_stride: int
    scale_stride_k: int

    @classmethod
    def of(cls, x: torch.Tensor, scale: torch.Tensor | None = None) -> Rows:
        strides = (0, 0) if scale is None else (*scale.stride(), 0)[:2]
        return cls(x, scale, x.stride(0), *strides)


class Weights(NamedTuple):
    """One projection, or gate and up, as a kernel's argument; the strides of gate and up agree."""

    ptr: Any
    up_ptr: Any  # None: one projection
    scale_ptr: Any  # None: plain
    up_scale_ptr: Any
    stride_e: int
    stride_n: int
    stride_k: int
    scale_stride_e: int
    scale_stride_n: int
    scale_stride_k: int

    @classmethod
    def of(
        cls, w: Projection | None, up: Projection | None = None, *, decoded: bool = False
    ) -> Weights:
        """`decoded`: e4m3 as bytes, for GPUs or activations that do not have it.

        Without w every member is None, ptr among them: Triton 3.6 does not compile a comparison of
        a tuple with None.
        """
        if w is None:
            return cls(*[None] * len(cls._fields))  # type: ignore[arg-type]

        def data(part: Projection) -> torch.Tensor:
            e4m3 = part.weight.dtype == torch.float8_e4m3fn
            return part.weight.view(torch.uint8) if e4m3 and decoded else part.weight

        strides = (0, 0, 0) if w.scale is None else (*w.scale.stride(), 0)[:3]
        return cls(data(w), up and data(up), w.scale, up and up.scale, *w.weight.stride(), *strides)


def flattened(experts: Experts | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(weights, scales) of gate, up and down, as a flat operator takes them; [] for what is not."""
    weights: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    if experts is not None:
        for part in (experts.gate, experts.up, experts.down):
            weights.append(part.weight)
            if part.scale is not None:
                scales.append(part.scale)
    return weights, scales


def unflattened(weights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> Experts:
    """The inverse of `flattened` for what is there."""
    pairs = zip(weights, scales or (None, None, None), strict=True)
    gate, up, down = (Projection(weight=w, scale=scale) for w, scale in pairs)
    return Experts(gate=gate, up=up, down=down)


def multiplied_dtype(
    experts: Experts, x_dtype: torch.dtype, properties: DeviceProperties
) -> torch.dtype:
    """What the tensor cores multiply: e4m3 if the weights are and the GPU has it, else x's type."""
    has_e4m3 = properties.capability >= (8, 9)
    return E4M3 if has_e4m3 and experts.format.startswith("e4m3") else x_dtype


def tile_constants(
    experts: Sequence[Experts], N: int, K: int, fast_accum: bool, config: Sequence[int]
) -> dict[str, Any]:
    """The constexprs that `product` needs beside the format of the activations.

    EVEN_N says that N is a multiple of 16 and that gate and up of all `experts` start at multiples
    of 16 bytes, as far as can be told from offsets: storages are taken to do so.
    """
    _, _, BLOCK_K, *_ = config
    starts = [w for part in experts for w in (part.gate.weight, part.up.weight)]
    even = all(w.storage_offset() * w.element_size() % 16 == 0 for w in starts)
    return dict(
        FORMAT=experts[0].format,
        FAST_ACCUM=fast_accum,
        EVEN_N=N % 16 == 0 and even,
        EVEN_K=K % BLOCK_K == 0,
    )
