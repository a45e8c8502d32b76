"""GEMM 1 of the experts: gather, gate and up, score, SwiGLU.

    g[r], u[r] = s * w_gate[e] @ x[t], s * w_up[e] @ x[t]      r: row in expert order
    z[r]       = dt(g[r] * sigmoid(g[r]) * u[r])

with t the token, e the expert and s the routing weight of row r. The weight scales the expert's
input: w @ (s * x) = s * (w @ x), so it multiplies the fp32 accumulators, before the SwiGLU, which
is not linear; with weight_on="output" it multiplies z instead. Rows of dropped slots are 0.
Layout: x (T, H) with any row stride and dense rows; gate and up (E, F, H), see expert_weights.py;
z (R, F) contiguous.
Tiling: one program per tile of at most BLOCK_M rows of one expert and BLOCK_N rows of its weights,
half of them gate's and half up's: one product, and both halves of a row of z meet in one program.
The rows of x are gathered by pointer. The tiles of an expert run together, so that its weights and
rows come from DRAM once. The grid has room for the most tiles there can be; the programs of unused
ones end at once. A shared expert, which all tokens meet with weight 1, is done by programs of the
same launch that come first: its own GEMM 1, or its GEMM 2 where that is next.
Source: llama-models llama4/moe.py; the fp32 score as in vLLM's fused_moe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._expert_operands import (
    E4M3,
    TL_DTYPES,
    Rows,
    Weights,
    flattened,
    tile_constants,
    unflattened,
)
from ._expert_tile import gate_and_up, product, store_z
from ._grouped_gemm_check import check_swiglu, up_tiles
from ._launch import launch
from ._library import define
from ._names import named, nbytes
from ._sizes import flat
from .expert_weights import GROUP, Experts
from .grouped_gemm_config import GroupedGemmConfig
from .routing import Routing

__all__ = ["grouped_gemm_swiglu", "grouped_tile", "grouped_up", "shared_up"]


@triton.jit
def grouped_tile(
    tiles_ptr, pid,
    splits, num_n,
    BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Return expert, first row, the expert's end row and column tile of program `pid`.

    No rows: no work. Each tile of the table is split into `splits` row tiles of BLOCK_M. Programs
    go down all row tiles of an expert, GROUP_M at most, before they go to the next of the num_n
    column tiles of weights: no two experts have x or weights in common.
    """
    pid_m = pid // num_n
    entry = tiles_ptr + pid_m // splits * 4
    expert, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    i = tl.load(entry + 3) * splits + pid_m % splits  # which row tile of the expert
    of_expert = tl.cdiv(end - first, splits * BLOCK_M) * splits
    begin = i // GROUP_M * GROUP_M
    group_m = tl.maximum(tl.minimum(of_expert - begin, GROUP_M), 1)
    in_group = pid - (pid_m - i + begin) * num_n
    row = first + (begin + in_group % group_m) * BLOCK_M
    return expert, row, end, in_group // group_m


@triton.jit
def shared_up(
    pid,
    x, w, z,
    T, N, K,
    FORMAT: tl.constexpr, X_FORMAT: tl.constexpr, DTYPE: tl.constexpr, FAST_ACCUM: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program `pid` of the shared expert's GEMM 1: BLOCK_M tokens, BLOCK_N // 2 columns of z."""
    num_n = tl.cdiv(N, BLOCK_N // 2)
    offs_m = pid // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = pid % num_n * (BLOCK_N // 2)
    tokens = tl.minimum(offs_m, T - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    acc = product(
        acc, w, tl.cast(0, tl.int64), n0, N, x, tokens, 0, K, K,
        FORMAT, X_FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_K,
    )  # fmt: skip
    gate, up = gate_and_up(acc)
    store_z(gate, up, z, offs_m.to(tl.int64), offs_m < T, n0, N, DTYPE)


@triton.jit
def grouped_up(
    pid,
    x, w, z, tables,
    E, top_k, splits, N, K,
    FORMAT: tl.constexpr, X_FORMAT: tl.constexpr, DTYPE: tl.constexpr, ON_INPUT: tl.constexpr,
    FAST_ACCUM: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program `pid`, cdiv(N, BLOCK_N // 2) of them per row tile: one of z; N = F and K = H."""
    expert_weights_ptr, row_slot_ptr, tiles_ptr = tables
    num_n = tl.cdiv(N, BLOCK_N // 2)
    expert, row, row_end, pid_n = grouped_tile(tiles_ptr, pid, splits, num_n, BLOCK_M, GROUP_M)
    if row >= row_end:
        return

    # Rows beyond the end repeat the last one: unmasked loads, and rows of a product do not mix.
    offs_m = row + tl.arange(0, BLOCK_M)
    slots = tl.load(row_slot_ptr + tl.minimum(offs_m, row_end - 1))
    n0 = pid_n * (BLOCK_N // 2)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # Dropped rows are tiles of expert E, for which there are no weights: nothing is summed.
    acc = product(
        acc, w, tl.minimum(expert, E - 1).to(tl.int64), n0, N, x, (slots // top_k).to(tl.int64),
        0, tl.where(expert < E, K, 0), K,
        FORMAT, X_FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_K,
    )  # fmt: skip
    score = tl.load(expert_weights_ptr + slots)[None, :]
    if ON_INPUT:
        acc *= score
    gate, up = gate_and_up(acc)
    if not ON_INPUT:
        up *= score
    store_z(gate, up, z, offs_m.to(tl.int64), offs_m < row_end, n0, N, DTYPE)


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    x, w, z, E, N, K = (args[name] for name in ("x", "w", "z", "E", "N", "K"))
    R = z.ptr.shape[0]
    weights = 2 * min(E, R) * N * K * w.ptr.element_size()
    return nbytes(x.ptr, z.ptr, *args["tables"]) + weights, 4 * R * N * K


@triton.jit(
    do_not_specialize=["E", "top_k", "splits", "T", "shared_programs"],
    **named("grouped_gemm_swiglu", "x", _cost),
)
def _grouped_gemm_swiglu_kernel(
    x, w, z, tables,
    E, top_k, splits, N, K,
    shared_w, shared_z, T, shared_programs,
    FORMAT: tl.constexpr, X_FORMAT: tl.constexpr, DTYPE: tl.constexpr, ON_INPUT: tl.constexpr,
    FAST_ACCUM: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Grid (shared_programs + row tiles * cdiv(N, BLOCK_N // 2),): one tile of z each.

    N = F and K = H; the shared expert has the same, and its weights the same format.
    """
    pid = tl.program_id(0)
    if shared_w.ptr is not None:
        if pid < shared_programs:
            shared_up(
                pid, x, shared_w, shared_z, T, N, K,
                FORMAT, X_FORMAT, DTYPE, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            return
    grouped_up(
        pid - shared_programs, x, w, z, tables, E, top_k, splits, N, K,
        FORMAT, X_FORMAT, DTYPE, ON_INPUT, FAST_ACCUM, EVEN_N, EVEN_K,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )  # fmt: skip


def grouped_gemm_swiglu(
    x: torch.Tensor,
    experts: Experts,
    routing: Routing,
    *,
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    quantize_z: bool = False,
    weight_on: str = "input",
    fast_accum: bool = False,
    config: GroupedGemmConfig | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Apply the first half of each row's expert to its weighted token.

        z[r] = dt(silu(s * w_gate[e] @ x[t]) * (s * w_up[e] @ x[t]))

    Args:
        x: (T, H) fp32, fp16 or bf16, dense rows; or float8_e4m3fn with `x_scale`, for e4m3
            experts on GPUs that have it (elsewhere they are decoded, and x has 16 bits).
        experts: in one format; plain ones in x.dtype.
        routing: of the T tokens to the E experts.
        x_scale: fp32, one per row (T,), or per 128 of a row (T, H / 128) for blocks of weights.
        out_dtype: of z; None: x.dtype, or bf16 where that is e4m3.
        quantize_z: return z in e4m3 and its scales (R, F / 128); needs tiles of 128 columns.
        weight_on: "input" as above, or "output": s multiplies z.
        fast_accum: leave whole sums of e4m3 products to the tensor cores (fp8_matmul.py).
        config: tile configuration; None takes grouped_gemm_config.py's.
    Returns:
        z (R, F), rows in expert order, 0 for dropped slots; with quantize_z (z, z_scale).
    Raises:
        ValueError: shapes, strides, devices, weight_on or config.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80, e4m3 x before sm_89.
    Numerics: fp32 accumulators (of e4m3, every 128 of H; of blocks and int4 groups each scaled in
        fp32), scales, score and SwiGLU; one rounding, then quantisation as in quantize_groupwise.
        A row depends on its own token only. Deterministic.
    Cost: 4*R*H*F flops; bytes = R*H*itemsize + E_active*2*H*F*(bytes of a weight) + R*F*itemsize.
    Source: see the module; reference: kernels/reference.py:moe_layer.
    """
    x_format, out_dtype = check_swiglu(
        "grouped_gemm_swiglu", x, experts, routing, x_scale, out_dtype, quantize_z, weight_on,
        fast_accum, config,
    )  # fmt: skip
    z, z_scale = _grouped_gemm_swiglu(
        x, x_scale, *flattened(experts),
        routing.expert_weights, routing.row_slot, routing.tiles, routing.block_m,
        x_format, weight_on == "input", fast_accum, quantize_z, out_dtype, config and flat(config),
    )  # fmt: skip
    return (z, z_scale) if quantize_z else z


def empty_z(
    like: torch.Tensor, rows: int, F: int, dtype: torch.dtype, quantized: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Uninitialised z, and its scales if it is `quantized`."""
    z = like.new_empty((rows, F), dtype=E4M3 if quantized else dtype)
    return z, like.new_empty((rows, F // GROUP), dtype=torch.float32) if quantized else None


def num_row_tiles(tiles: torch.Tensor, block_m: int, config: Sequence[int]) -> tuple[int, int]:
    """(splits, num_m): row tiles of BLOCK_M in one of the table, and in all."""
    splits = block_m // config[0]
    return splits, tiles.shape[0] * splits


def launch_up(
    x: Rows,
    experts: Experts,
    z: Rows,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block_m: int,
    constants: dict[str, Any],
    config: Sequence[int],
    *,
    shared: Experts | None = None,
    shared_z: Rows | None = None,
) -> None:
    """Launch GEMM 1, with that of the shared expert for all rows of x if there is one."""
    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages = config
    E, N, K = experts.gate.shape
    T = x.ptr.shape[0]
    decoded = x.scale_ptr is None
    splits, num_m = num_row_tiles(tables[2], block_m, config)
    num_n = triton.cdiv(N, BLOCK_N // 2)
    shared_programs = triton.cdiv(T, BLOCK_M) * num_n if shared else 0
    launch(
        _grouped_gemm_swiglu_kernel, (shared_programs + num_m * num_n,),
        x, Weights.of(experts.gate, experts.up, decoded=decoded), z, tables,
        E, tables[0].shape[1], splits, N, K,
        Weights.of(*(shared.gate, shared.up) if shared else (None,), decoded=decoded), shared_z,
        T, shared_programs,
        **constants,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=GROUP_M,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def _grouped_gemm_swiglu_impl(
    x: torch.Tensor, x_scale: torch.Tensor | None,
    weights: list[torch.Tensor], scales: list[torch.Tensor],
    expert_weights: torch.Tensor, row_slot: torch.Tensor, tiles: torch.Tensor, block_m: int,
    x_format: str, on_input: bool, fast_accum: bool, quantize_z: bool, out_dtype: torch.dtype,
    config: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    experts = unflattened(weights, scales)
    _, N, K = experts.gate.shape
    config = config or up_tiles(x, experts, block_m, fast_accum)
    z, z_scale = empty_z(x, len(row_slot), N, out_dtype, quantize_z)
    constants = tile_constants([experts], N, K, fast_accum, config)
    constants |= dict(X_FORMAT=x_format, DTYPE=TL_DTYPES[out_dtype], ON_INPUT=on_input)
    tables = expert_weights, row_slot, tiles
    launch_up(Rows.of(x, x_scale), experts, Rows.of(z, z_scale), tables, block_m, constants, config)
    return z, x.new_empty(0, dtype=torch.float32) if z_scale is None else z_scale


def _grouped_gemm_swiglu_fake(
    x, x_scale, weights, scales, expert_weights, row_slot, tiles, block_m,
    x_format, on_input, fast_accum, quantize_z, out_dtype, config,
):  # fmt: skip
    z, z_scale = empty_z(x, row_slot.shape[0], weights[0].shape[1], out_dtype, quantize_z)
    return z, x.new_empty(0, dtype=torch.float32) if z_scale is None else z_scale


_grouped_gemm_swiglu = define(
    "grouped_gemm_swiglu(Tensor x, Tensor? x_scale, Tensor[] weights, Tensor[] scales,"
    " Tensor expert_weights, Tensor row_slot, Tensor tiles, SymInt block_m, str x_format,"
    " bool on_input, bool fast_accum, bool quantize_z, ScalarType out_dtype, int[]? config)"
    " -> (Tensor, Tensor)",
    _grouped_gemm_swiglu_impl,
    _grouped_gemm_swiglu_fake,
)
