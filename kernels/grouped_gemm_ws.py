"""The experts' GEMMs of a long prefill on Hopper: persistent, fed by TMA, warp-specialised.

    z[r]   = dt(silu(s * w_gate[e] @ x[r]) * (s * w_up[e] @ x[r]))        r: row in expert order
    out[t] = dt(w_down[e] @ z[row of t] + residual[t])                    top_k = 1

`moe` takes these instead of grouped_gemm.py's and grouped_gemm_combine.py's for more than 512
tokens of top_k = 1 with tiles of 128 rows, on sm_90 with Triton >= 3.7, for 16-bit experts and for
e4m3 ones with a scale per channel, aligned to 16 bytes; and only where _paths.py lets it use
"warp_specialisation", which it does not before a selftest of that very GPU has covered it.

    router | top-k and counts | scan | scatter | shared GEMM 1 | shared GEMM 2, to out
    | rows of x into expert order (gather_rows.py) | GEMM 1 | GEMM 2, which adds to out

are 9 launches, 7 without a shared expert, and 2 fewer where routing is one program.
Layout: x (R, H) and z (R, F) contiguous, in expert order, so that TMA reads a tile of rows; weights
as in expert_weights.py, both layouts, read in place: all experts are one matrix for TMA, of which
an expert is a range of rows. Tokens are the first operand here, unlike in _expert_tile.py: the two
consumers share each tile of weights, and each has whole rows of z, of which 128 columns share a
scale. e4m3_block stays outside: with scales to multiply at each step, GEMM 1 spills registers.
Tiling: a program per SM takes tiles of 128 rows in the order of grouped_gemm.py. One warp loads,
two warpgroups have 64 of the 128 rows each.
Numerics: those of the pointer kernels, in the same order over k. In the model of the compiled code
16-bit results are the same bits; e4m3 ones may differ by a rounding in fp32, where GEMM 2 adds the
residual. With a shared expert out is rounded once more, before the routed experts are added.

What must hold, or Triton 3.7 to 3.9 compile something else:

* num_warps = 4; descriptors are made in the kernel and have two dimensions;
* one inner loop per tile;
* the scalar that is a coordinate of the split operand, `row`, is not the one that rows are counted
  from: the compiler adds 64 to it for the second consumer, whose range of rows starts at 64
  already. `_apart` makes another value of it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from ._check import is_aligned
from ._expert_operands import E4M3, TL_DTYPES, Weights
from ._launch import device_properties, launch
from ._names import named, nbytes
from ._paths import features
from ._quantize_rows import quantize_groups
from .expert_weights import Experts
from .gather_rows import _gather_rows_impl
from .gather_rows import default_config as gather_config
from .grouped_gemm import grouped_tile, launch_up
from .grouped_gemm_combine import launch_shared_down
from .weight_formats import Projection

if TYPE_CHECKING:
    from ._moe_operands import Layer

__all__ = ["is_specialised", "run_specialised"]

FEATURE = "warp_specialisation"
FORMATS = ("plain", "e4m3_channel")
BLOCK_M = 128  # two consumers of 64 rows
BLOCK_N = 128  # columns of z or of out; 256 of out would spill registers in Triton 3.9
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # expert_weights, row_slot, tiles
LIMIT = 2**31  # elements of x, z and out: offsets are int32, for the registers


@triton.jit
def _apart(row, end):
    """`row`, which is below `end`, as a value that is not the coordinate of a load."""
    return tl.minimum(row, end - 1)


@triton.jit
def _described(ptr, w, E, N, K, K_LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The weights (E, N, K) at `ptr` as one matrix, of rows along K or, transposed, along N."""
    if K_LAST:
        rows = (E - 1) * (w.stride_e // w.stride_n) + N
        return tl.make_tensor_descriptor(ptr, [rows, K], [w.stride_n, 1], [BLOCK_N, BLOCK_K])
    else:
        rows = (E - 1) * (w.stride_e // w.stride_k) + K
        return tl.make_tensor_descriptor(ptr, [rows, N], [w.stride_k, 1], [BLOCK_K, BLOCK_N])


@triton.jit
def _weight_tile(described, first, n0, k0, K_LAST: tl.constexpr):
    """(BLOCK_K, BLOCK_N) of the expert whose rows begin with `first`.

    Beyond K are zeros, but if rows are along N, where the next expert's begin, must be nothing.
    """
    if K_LAST:
        return described.load([first + n0, k0]).T
    else:
        return described.load([first + k0, n0])


def _up_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    x, w, z, E, N, K = (args[name] for name in ("x", "w", "z", "E", "N", "K"))
    R = z.ptr.shape[0]
    weights = 2 * min(E, R) * N * K * w.ptr.element_size()
    return nbytes(x.ptr, z.ptr, *args["tables"]) + weights, 4 * R * N * K


@triton.jit(do_not_specialize=["E", "R"], **named("grouped_gemm_swiglu_ws", "x", _up_cost))
def _grouped_gemm_swiglu_ws_kernel(
    x, w, z, tables,
    E, R, N, K,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, ON_INPUT: tl.constexpr, FAST_ACCUM: tl.constexpr,
    K_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): tiles of BLOCK_M rows and BLOCK_N columns of z; N = F and K = H.

    x.ptr is in expert order, x.scale_ptr in that of the tokens.
    """
    expert_weights_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr = tables
    described = tl.make_tensor_descriptor(x.ptr, [R, K], [x.stride, 1], [BLOCK_M, BLOCK_K])
    described_gate = _described(w.ptr, w, E, N, K, K_LAST, BLOCK_N, BLOCK_K)
    described_up = _described(w.up_ptr, w, E, N, K, K_LAST, BLOCK_N, BLOCK_K)
    step_e = w.stride_e // (w.stride_n if K_LAST else w.stride_k)
    num_n = tl.cdiv(N, BLOCK_N)

    for tile in tl.range(
        tl.program_id(0), tl.load(tile_count_ptr) * num_n, tl.num_programs(0),
        warp_specialize=True, disallow_acc_multi_buffer=True,
    ):  # fmt: skip
        expert, row, row_end, pid_n = grouped_tile(tiles_ptr, tile, 1, num_n, BLOCK_M, GROUP_M)
        n0 = pid_n * BLOCK_N
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # Dropped rows are tiles of expert E, for which there are no weights: nothing is summed.
        for k in tl.range(0, tl.where(expert < E, tl.cdiv(K, BLOCK_K), 0)):
            x_tile = described.load([row, k * BLOCK_K])
            w_gate = _weight_tile(described_gate, expert * step_e, n0, k * BLOCK_K, K_LAST)
            w_up = _weight_tile(described_up, expert * step_e, n0, k * BLOCK_K, K_LAST)
            if FORMAT == "e4m3_channel" and not FAST_ACCUM:
                gate += tl.dot(x_tile, w_gate)
                up += tl.dot(x_tile, w_up)
            else:
                gate = tl.dot(x_tile, w_gate, gate)
                up = tl.dot(x_tile, w_up, up)

        offs_m = _apart(row, row_end) + tl.arange(0, BLOCK_M)
        offs_n = n0 + tl.arange(0, BLOCK_N)
        mask_m = offs_m < row_end
        mask = mask_m[:, None]
        if FORMAT == "plain":  # others are of whole tiles
            mask = mask & (offs_n < N)[None, :]
        slots = tl.load(row_slot_ptr + tl.minimum(offs_m, row_end - 1))
        if FORMAT == "e4m3_channel":
            x_scale = tl.load(x.scale_ptr + slots * x.scale_stride)[:, None]
            scale_n = tl.minimum(expert, E - 1) * w.scale_stride_e + offs_n * w.scale_stride_n
            gate = gate * x_scale * tl.load(w.scale_ptr + scale_n)[None, :]
            up = up * x_scale * tl.load(w.up_scale_ptr + scale_n)[None, :]
        score = tl.load(expert_weights_ptr + slots)[:, None]
        if ON_INPUT:
            gate *= score
        up *= score
        values = (gate * tl.sigmoid(gate) * up).to(DTYPE)
        if z.scale_ptr is not None:
            values, z_scale = quantize_groups(values.to(tl.float32))
            z_scale_ptrs = z.scale_ptr + offs_m * z.scale_stride + pid_n * z.scale_stride_k
            tl.store(z_scale_ptrs, z_scale, mask=mask_m)
        z_ptrs = z.ptr + (offs_m * z.stride)[:, None] + offs_n[None, :]
        tl.store(z_ptrs, values, mask=mask)


def _down_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    z, w, E, N, K = (args[name] for name in ("z", "w", "E", "N", "K"))
    R = z.ptr.shape[0]
    moved = nbytes(z.ptr, args["residual_ptr"], args["out_ptr"], *args["tables"])
    return moved + min(E, R) * N * K * w.ptr.element_size(), 2 * R * N * K


@triton.jit(do_not_specialize=["E", "R"], **named("grouped_gemm_scatter_ws", "z", _down_cost))
def _grouped_gemm_scatter_ws_kernel(
    z, w, tables, residual_ptr, out_ptr,
    E, R, N, K, stride_residual_t,
    FORMAT: tl.constexpr, K_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): tiles of BLOCK_M rows and BLOCK_N columns; N = H and K = F.

    residual_ptr may be out_ptr: each element is read and written by one thread.
    """
    row_slot_ptr, tiles_ptr, tile_count_ptr = tables
    described = tl.make_tensor_descriptor(z.ptr, [R, K], [z.stride, 1], [BLOCK_M, BLOCK_K])
    described_w = _described(w.ptr, w, E, N, K, K_LAST, BLOCK_N, BLOCK_K)
    step_e = w.stride_e // (w.stride_n if K_LAST else w.stride_k)
    num_n = tl.cdiv(N, BLOCK_N)

    for tile in tl.range(
        tl.program_id(0), tl.load(tile_count_ptr) * num_n, tl.num_programs(0),
        warp_specialize=True, disallow_acc_multi_buffer=True,
    ):  # fmt: skip
        expert, row, row_end, pid_n = grouped_tile(tiles_ptr, tile, 1, num_n, BLOCK_M, GROUP_M)
        n0 = pid_n * BLOCK_N
        offs_m = _apart(row, row_end) + tl.arange(0, BLOCK_M)
        z_rows = tl.minimum(offs_m, row_end - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, tl.where(expert < E, tl.cdiv(K, BLOCK_K), 0)):
            z_tile = described.load([row, k * BLOCK_K])
            w_tile = _weight_tile(described_w, expert * step_e, n0, k * BLOCK_K, K_LAST)
            if FORMAT == "e4m3_channel":
                tl.static_assert(BLOCK_K == 128, "a step has one scale per row")
                z_scale_ptrs = z.scale_ptr + z_rows * z.scale_stride + k * z.scale_stride_k
                acc += tl.dot(z_tile, w_tile) * tl.load(z_scale_ptrs)[:, None]
            else:
                acc = tl.dot(z_tile, w_tile, acc)

        offs_n = n0 + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        if FORMAT == "e4m3_channel":
            scale_n = tl.minimum(expert, E - 1) * w.scale_stride_e + offs_n * w.scale_stride_n
            acc *= tl.load(w.scale_ptr + scale_n, mask=mask_n, other=0.0)[None, :]
        slots = tl.load(row_slot_ptr + z_rows)
        mask = (offs_m < row_end)[:, None] & mask_n[None, :]
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + (slots * stride_residual_t)[:, None] + offs_n[None, :]
            acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + (slots * N)[:, None] + offs_n[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def is_specialised(layer: Layer, top_k: int) -> bool:
    """Whether `layer` takes these kernels; the module says when."""
    plan, experts, x = layer.plan, layer.experts, layer.x.ptr
    H, F, rows = experts.hidden, experts.width, len(layer.out)
    if plan.regime != "many" or plan.block_m != BLOCK_M or top_k != 1:
        return False
    device = layer.out.device
    if FEATURE not in features("moe", device) or TRITON < (3, 7):
        return False
    in_e4m3 = layer.multiplied == E4M3
    parts = experts.gate, experts.up, experts.down
    residual = () if layer.residual is None else (layer.residual,)
    return (
        device_properties(device).capability == (9, 0)
        and experts.format in FORMATS
        and in_e4m3 == (experts.format != "plain")
        and in_e4m3 == plan.quantize_z
        and layer.multiplied.itemsize <= 2
        and experts.num_experts > 0
        and is_aligned((H, F), x, *residual, *(part.weight for part in parts))
        and all(_is_one_matrix(part) for part in parts)
        and rows * max(H, F, *(t.stride(0) for t in residual)) < LIMIT
    )


def _is_one_matrix(part: Projection) -> bool:
    """Whether TMA can read all experts as one matrix, in which an expert is a range of rows."""
    E, N, K = part.weight.shape
    stride_e, stride_n, stride_k = part.weight.stride()
    if stride_k == 1:
        rows, step = N, stride_n
    else:
        if K % _block_k(part.weight.dtype):
            return False
        rows, step = K, stride_k
    return stride_e % step == 0 and (E - 1) * (stride_e // step) + rows < LIMIT


def _block_k(dtype: torch.dtype) -> int:
    """128 bytes, the widest rows of a tile that shared memory swizzles."""
    return 128 // dtype.itemsize


def run_specialised(layer: Layer, tables: Tables, tile_count: torch.Tensor) -> None:
    """Compute layer.out of rows that are routed: all launches after the routing's."""
    residual = layer.residual
    if layer.shared is not None:
        _run_shared(layer, layer.shared, tables)
        residual = layer.out
    expert_weights, row_slot, tiles = tables
    E, F, H = layer.experts.gate.shape
    R, device = len(row_slot), layer.out.device
    x, z = layer.x.ptr, layer.empty_z(R)
    copied = x.view(torch.bfloat16) if x.dtype == E4M3 else x  # bytes, whatever they stand for
    config = list(astuple(gather_config(copied.shape[1])))
    sorted_x = _gather_rows_impl(copied, row_slot, config).view(x.dtype)

    gate, up, down = layer.experts.gate, layer.experts.up, layer.experts.down
    sms = device_properties(device).sm_count
    constants = dict(
        FORMAT=layer.experts.format, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        BLOCK_K=_block_k(x.dtype), GROUP_M=16, num_warps=4, num_stages=4,
    )  # fmt: skip
    _launch_with_scratch(
        device,
        _grouped_gemm_swiglu_ws_kernel, (min(sms, len(tiles) * triton.cdiv(F, BLOCK_N)),),
        layer.x._replace(ptr=sorted_x, stride=H), Weights.of(gate, up), z, (*tables, tile_count),
        E, R, F, H,
        DTYPE=TL_DTYPES[layer.dtype], ON_INPUT=layer.on_input, FAST_ACCUM=layer.fast_accum,
        K_LAST=gate.weight.stride(2) == 1, **constants,
    )  # fmt: skip
    _launch_with_scratch(
        device,
        _grouped_gemm_scatter_ws_kernel, (min(sms, len(tiles) * triton.cdiv(H, BLOCK_N)),),
        z, Weights.of(down), (row_slot, tiles, tile_count), residual, layer.out,
        E, R, H, F, 0 if residual is None else residual.stride(0),
        K_LAST=down.weight.stride(2) == 1, **constants,
    )  # fmt: skip


def _run_shared(layer: Layer, shared: Experts, tables: Tables) -> None:
    """out = the shared expert's result + residual, by the pointer kernels; no tile of `tables`."""
    plan, H, F = layer.plan, layer.experts.hidden, layer.experts.width
    z = layer.empty_z(len(layer.out))
    launch_up(
        layer.x, layer.experts, z, (*tables[:2], tables[2][:0]), plan.block_m,
        layer.constants(F, H, plan.up, "X_FORMAT", "DTYPE", "ON_INPUT"), astuple(plan.up),
        shared=shared, shared_z=z,
    )  # fmt: skip
    constants = layer.constants(H, F, plan.down, "Z_FORMAT")
    launch_shared_down(z, shared, layer.out, constants, astuple(plan.down), layer.residual)


def _launch_with_scratch(device: torch.device, *args: Any, **kwargs: Any) -> None:
    """`launch` what makes descriptors: 128 bytes of global memory each, per program.

    Triton asks its allocator for them, which is a context variable: it is set in a copy of the
    context, so the caller's stays what it is. The memory is torch's, of the launch's device and
    current stream: freed when this returns, it is used again in the order of that stream only.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def run() -> None:
        triton.set_allocator(allocate)
        launch(*args, **kwargs)

    contextvars.copy_context().run(run)
