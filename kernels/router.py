"""Router: the logits of every expert for every token, as partial sums over the hidden size.

    partials[s, t, e] = sum over k in slice s of x[t, k] * w_router[e, k]        fp32
    logits[t, e]      = partials[0, t, e] + partials[1, t, e] + ...              by the reader

With few tokens one program per tile would leave most of the GPU idle, so the sum is split into
slices of whole BLOCK_K; what reads the logits (`route`, the first grouped GEMM) adds the slices in
order. Optionally x is quantised to e4m3 by more programs of the same launch.
Layout: x (T, H) and w_router (E, H) with any row stride and dense rows, one type; the results are
contiguous.
Tiling: weights first, (BLOCK_E, BLOCK_K) @ (BLOCK_K, BLOCK_T): the tensor cores want at least 64
rows in their first operand, which experts (rounded up) fill and a few tokens do not.
Source: split-K with partial sums added in a fixed order, which no atomics can give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import (
    FLOATS,
    check_architecture,
    check_devices,
    check_tensor,
    has_aligned_strides,
    is_aligned,
    require,
)
from ._launch import SM_90, DeviceProperties, device_properties, launch
from ._library import define
from ._names import named, nbytes
from ._quantize_rows import GROUP, quantize_group_rows, quantize_row
from ._remembered import remembered
from ._sizes import above, flat, largest, smallest, tiles

__all__ = [
    "RouterConfig",
    "RouterOutput",
    "default_config",
    "default_split",
    "num_slices",
    "router",
    "slice_columns",
]

MAX_EXPERTS = 512
MAX_SPLITS = 8  # read by one program after the other: one round of loads
PARTIAL_ELEMENTS = 2**16  # one program may have to read them all
SINGLE_SPLIT_T = 512  # more tokens than that are tiles enough
BLOCK_Q = 1024  # elements per step of a quantising program: 16 bytes per thread of four warps


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterOutput:
    """Partial logits, and x quantised where that was asked for: x ~ x_q * x_scale."""

    partials: torch.Tensor  # (S, T, E) fp32
    x_q: torch.Tensor | None = None  # (T, H) float8_e4m3fn
    x_scale: torch.Tensor | None = None  # "row": (T,) fp32; "group": (T, H / 128) fp32


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    BLOCK_T: int
    BLOCK_E: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def default_config(
    T: int,
    E: int,
    H: int,
    *,
    itemsize: int = 2,
    aligned: bool = True,
    properties: DeviceProperties = SM_90,
) -> RouterConfig:
    """Small tiles while tiles are few; their loads, not their arithmetic, take the time."""
    if itemsize == 4 or not (aligned and properties.has_mma):  # operands pass through registers
        return RouterConfig(BLOCK_T=16, BLOCK_E=64, BLOCK_K=32, num_warps=4, num_stages=2)
    block_k = default_block_k(T)
    if T <= 4096:  # 128 programs of 32 tokens; of 64, some SMs would have none
        block_t, block_e = 16 if T <= 128 else 32, 64
    else:
        block_t, block_e = 64, 64 if E <= 64 else 128
    stages = min(4, properties.shared_bytes // ((block_t + block_e) * block_k * itemsize))
    return RouterConfig(
        BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=block_k, num_warps=4, num_stages=stages
    )


_default_tiles = tiles(default_config)


def default_block_k(
    T: int, *, itemsize: int = 2, aligned: bool = True, properties: DeviceProperties = SM_90
) -> int:
    """BLOCK_K of `default_config`."""
    if itemsize == 4 or not (aligned and properties.has_mma):
        return 32
    return 128 - 64 * above(T, 4096)


def default_split(T: int, E: int) -> int:
    """As many slices as keep the partial sums small, and their readers' latency."""
    most = MAX_SPLITS * (1 - above(T, SINGLE_SPLIT_T))
    return largest(1, smallest(most, PARTIAL_ELEMENTS // largest(1, T * E)))


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    x, w = args["x_ptr"], args["w_ptr"]
    moved = nbytes(x, w, args["partials_ptr"], args["x_q_ptr"], args["x_scale_ptr"])
    return moved, 2 * x.numel() * w.shape[0]


@triton.jit(do_not_specialize=["T", "splits", "steps"], **named("router", "x_ptr", _cost))
def _router_kernel(
    x_ptr, w_ptr, partials_ptr, x_q_ptr, x_scale_ptr,
    T, E, H, splits, steps,
    stride_x_t, stride_w_e,
    QUANTIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens * tiles of experts * splits [+ T],): one tile of one slice each.

    A slice is `steps` blocks of BLOCK_K. With QUANTIZE "row" or "group" the last T programs
    quantise a row of x each.
    """
    pid = tl.program_id(0)
    tiles_e = tl.cdiv(E, BLOCK_E)
    tiles_t = tl.cdiv(T, BLOCK_T)
    router_programs = tiles_e * tiles_t * splits

    if pid < router_programs:
        pid_e = pid % tiles_e
        pid_t = pid // tiles_e % tiles_t
        split = pid // (tiles_e * tiles_t)
        offs_t = pid_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        offs_e = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
        mask_t = offs_t < T
        mask_e = offs_e < E

        acc = tl.zeros((BLOCK_E, BLOCK_T), dtype=tl.float32)
        begin = split * steps * BLOCK_K
        end = tl.minimum(begin + steps * BLOCK_K, H)
        for k0 in tl.range(begin, end, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            mask_k = (offs_k < H)[None, :]
            w_ptrs = w_ptr + offs_e[:, None] * stride_w_e + offs_k[None, :]
            w = tl.load(w_ptrs, mask=mask_e[:, None] & mask_k, other=0.0)  # (BLOCK_E, BLOCK_K)
            x_ptrs = x_ptr + offs_t[:, None] * stride_x_t + offs_k[None, :]
            x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_k, other=0.0)  # (BLOCK_T, BLOCK_K)
            acc = tl.dot(w, x.T, acc, input_precision="ieee")

        rows = split.to(tl.int64) * T + offs_t
        partials_ptrs = partials_ptr + rows[:, None] * E + offs_e[None, :]
        tl.store(partials_ptrs, acc.T, mask=mask_t[:, None] & mask_e[None, :])
    elif QUANTIZE is not None:
        t = (pid - router_programs).to(tl.int64)
        x_ptr += t * stride_x_t
        x_q_ptr += t * H
        if QUANTIZE == "row":
            quantize_row(x_ptr, x_q_ptr, x_scale_ptr + t, H, BLOCK_Q)
        else:
            quantize_group_rows(x_ptr, x_q_ptr, x_scale_ptr + t * (H // 128), H, BLOCK_Q)


def router(
    x: torch.Tensor,
    w_router: torch.Tensor,
    *,
    split_k: int | None = None,
    quantize: str | None = None,
    config: RouterConfig | None = None,
) -> RouterOutput:
    """Multiply tokens by the router's weights, in slices of H, and quantise them alongside.

    Args:
        x: (T, H) fp32, fp16 or bf16, dense rows.
        w_router: (E, H) in x.dtype, dense rows; 1 <= E <= 512.
        split_k: at most so many slices, each of whole BLOCK_K; None takes `default_split(T, E)`.
        quantize: None, or also make x_q and x_scale: "row", one scale per token, as
            `quantize_rowwise`; "group", one per 128 elements of a token.
        config: tile configuration; None takes `default_config(T, E, H)`. A token's partial sums
            are the same in any batch under one split_k and one config.
    Returns:
        RouterOutput; `route(output.partials, ...)` adds the slices.
    Raises:
        ValueError: shapes, strides, devices, split_k, quantize.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 before sm_80, quantize before sm_89.
    Numerics: products exact, fp32 sums in each slice. x_q and x_scale are equal in every bit to
        the quantising operators'. A NaN affects its own token only (or expert, in w_router).
        Deterministic.
    Cost: 2*T*E*H flops; bytes = (T + E)*H*itemsize + 4*S*T*E, and to quantise T*H + 4 per scale.
    Source: see the module; reference: kernels/reference.py:router.
    """
    splits = _check("router", x, w_router, split_k, quantize, config)
    partials, x_q, x_scale = _router(x, w_router, splits, quantize, config and flat(config))
    if quantize is None:
        return RouterOutput(partials=partials)
    return RouterOutput(partials=partials, x_q=x_q, x_scale=x_scale)


@remembered
def _check(
    op: str,
    x: torch.Tensor,
    w_router: torch.Tensor,
    split_k: int | None,
    quantize: str | None,
    config: RouterConfig | None,
) -> int:
    """Return how many slices there are."""
    check_tensor(op, "x", x, ("T", "H"), FLOATS)
    T, H = x.shape
    check_tensor(op, "w_router", w_router, ("E", H), (x.dtype,))
    E = w_router.shape[0]
    require(1 <= E <= MAX_EXPERTS, op, f"w_router must have 1 to {MAX_EXPERTS} rows", E)
    check_devices(op, x=x, w_router=w_router)
    check_architecture(op, x)
    known = quantize in (None, "row", "group")
    require(known, op, "quantize must be None, 'row' or 'group'", repr(quantize))
    if quantize is not None:
        check_architecture(op, x, torch.float8_e4m3fn)
    if quantize == "group":
        require(H % GROUP == 0, op, f"x must have H divisible by {GROUP} to quantise groups", H)
    if split_k is None:
        split_k = default_split(T, E)
    require(split_k >= 1, op, "split_k must be at least 1", split_k)
    block_k = config.BLOCK_K if config else _block_k(x, w_router)
    return num_slices(H, split_k, block_k)


def num_slices(H: int, split_k: int, block_k: int) -> int:
    """At most `split_k` slices of whole blocks, none of them empty unless H is 0."""
    blocks = largest(1, -(-H // block_k))
    return -(-blocks // -(-blocks // split_k))


def slice_columns(
    x: torch.Tensor, w_router: torch.Tensor, splits: int, config: Sequence[int] | None
) -> int:
    """Columns of x in each of `splits` slices: whole BLOCK_K, of the default where None is given.

    How many results there are is known before an address is, so the default that counts here is
    that of x and w_router without their offsets. Its BLOCK_K is a multiple of what is launched.
    """
    block_k = config[2] if config else _block_k(x, w_router)
    return -(-max(1, -(-x.shape[1] // block_k)) // splits) * block_k


def _block_k(x: torch.Tensor, w_router: torch.Tensor) -> int:
    return default_block_k(
        x.shape[0],
        itemsize=x.element_size(),
        aligned=has_aligned_strides((x.shape[1],), x, w_router),
        properties=device_properties(x.device),
    )


def _router_impl(
    x: torch.Tensor,
    w_router: torch.Tensor,
    splits: int,
    quantize: str | None,
    config: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    T, H = x.shape
    E = w_router.shape[0]
    BLOCK_T, BLOCK_E, BLOCK_K, num_warps, num_stages = config or _default_tiles(
        T,
        E,
        H,
        itemsize=x.element_size(),
        aligned=is_aligned((H,), x, w_router),
        properties=device_properties(x.device),
    )
    steps = slice_columns(x, w_router, splits, config) // BLOCK_K
    partials, x_q, x_scale = _router_fake(x, w_router, splits, quantize, config)
    programs = -(-T // BLOCK_T) * -(-E // BLOCK_E) * splits
    launch(
        _router_kernel, (programs + (0 if quantize is None else T),),
        x, w_router, partials, x_q if quantize else None, x_scale if quantize else None,
        T, E, H, splits, steps,
        x.stride(0), w_router.stride(0),
        QUANTIZE=quantize, BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E, BLOCK_K=BLOCK_K, BLOCK_Q=BLOCK_Q,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return partials, x_q, x_scale


def _router_fake(
    x: torch.Tensor,
    w_router: torch.Tensor,
    splits: int,
    quantize: str | None,
    config: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    T, H = x.shape
    scales = {None: (0,), "row": (T,), "group": (T, H // GROUP)}[quantize]
    return (
        x.new_empty((splits, T, w_router.shape[0]), dtype=torch.float32),
        x.new_empty((T, H) if quantize else (0,), dtype=torch.float8_e4m3fn),
        x.new_empty(scales, dtype=torch.float32),
    )


_router = define(
    "router(Tensor x, Tensor w_router, SymInt splits, str? quantize, int[]? config)"
    " -> (Tensor, Tensor, Tensor)",
    _router_impl,
    _router_fake,
)
