"""Warp-specialised, persistent GEMMs of the experts: a long prefill on Hopper.

z[r]       = dt(swiglu(s * w_gate[e] @ x[r], s * w_up[e] @ x[r]))    rows in expert order
out[t]     = dt(w_down[e] @ z[row of t] + residual[t])               top_k = 1
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._quantize_rows import quantize_groups

GROUP: tl.constexpr = tl.constexpr(128)


@triton.jit
def _apart(value, limit):
    return tl.minimum(value, limit)


@triton.jit
def _weights(ptr, w, E, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_LAST: tl.constexpr):
    if K_LAST:
        rows = (E - 1) * (w.stride_e // w.stride_n) + N
        return tl.make_tensor_descriptor(ptr, [rows, K], [w.stride_n, 1], [BLOCK_N, BLOCK_K])
    else:
        rows = (E - 1) * (w.stride_e // w.stride_k) + K
        return tl.make_tensor_descriptor(ptr, [rows, N], [w.stride_k, 1], [BLOCK_K, BLOCK_N])


@triton.jit
def _weight_tile(desc, first, n0, k0, K_LAST: tl.constexpr):
    if K_LAST:
        return desc.load([first + n0, k0]).T
    else:
        return desc.load([first + k0, n0])


@triton.jit
def _tile(tiles_ptr, tile, num_m, num_n, GROUP_M: tl.constexpr):
    first_m = tile // (GROUP_M * num_n) * GROUP_M
    group_m = tl.minimum(num_m - first_m, GROUP_M)
    in_group = tile % (GROUP_M * num_n)
    entry = tiles_ptr + (first_m + in_group % group_m) * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), in_group // group_m


@triton.jit
def _grouped_gemm_swiglu_ws_kernel(
    x, w, z, tables,
    E, M, N, K,
    FORMAT: tl.constexpr, X_FORMAT: tl.constexpr, DTYPE: tl.constexpr, ON_INPUT: tl.constexpr,
    FAST_ACCUM: tl.constexpr, K_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    expert_weights_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr = tables
    HALF: tl.constexpr = BLOCK_N // 2
    x_desc = tl.make_tensor_descriptor(x.ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    gate_desc = _weights(w.ptr, w, E, N, K, HALF, BLOCK_K, K_LAST)
    up_desc = _weights(w.up_ptr, w, E, N, K, HALF, BLOCK_K, K_LAST)
    step_e = w.stride_e // (w.stride_n if K_LAST else w.stride_k)
    num_m = tl.load(tile_count_ptr)
    num_n = tl.cdiv(N, HALF)
    for tile in tl.range(
        tl.program_id(0), num_m * num_n, tl.num_programs(0),
        warp_specialize=True, disallow_acc_multi_buffer=True,
    ):  # fmt: skip
        expert, row, end, pid_n = _tile(tiles_ptr, tile, num_m, num_n, GROUP_M)
        n0 = pid_n * HALF
        first = expert * step_e
        rows = _apart(row, end) + tl.arange(0, BLOCK_M)
        inside = tl.minimum(rows, end - 1)
        gate = tl.zeros((BLOCK_M, HALF), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, HALF), dtype=tl.float32)
        steps = tl.where(expert < E, tl.cdiv(K, BLOCK_K), 0)
        for k in tl.range(0, steps):
            x_tile = x_desc.load([row, k * BLOCK_K])
            w_gate = _weight_tile(gate_desc, first, n0, k * BLOCK_K, K_LAST)
            w_up = _weight_tile(up_desc, first, n0, k * BLOCK_K, K_LAST)
            if FORMAT == "e4m3_block":
                x_scale = tl.load(x.scale_ptr + inside * x.scale_stride + k * x.scale_stride_k)
                at = expert * w.scale_stride_e + pid_n * w.scale_stride_n + k * w.scale_stride_k
                x_scale = x_scale[:, None]
                gate_scale = tl.load(w.scale_ptr + at)
                up_scale = tl.load(w.up_scale_ptr + at)
                gate += tl.dot(x_tile, w_gate) * (gate_scale * x_scale)
                up += tl.dot(x_tile, w_up) * (up_scale * x_scale)
            elif FORMAT == "e4m3_channel" and not FAST_ACCUM:
                gate += tl.dot(x_tile, w_gate)
                up += tl.dot(x_tile, w_up)
            else:
                gate = tl.dot(x_tile, w_gate, gate)
                up = tl.dot(x_tile, w_up, up)
        offs_n = n0 + tl.arange(0, HALF)
        if FORMAT == "e4m3_channel":
            x_scale = tl.load(x.scale_ptr + inside * x.scale_stride)[:, None]
            at = (
                tl.minimum(expert, E - 1) * w.scale_stride_e
                + tl.minimum(offs_n, N - 1) * w.scale_stride_n
            )
            gate = gate * x_scale * tl.load(w.scale_ptr + at)[None, :]
            up = up * x_scale * tl.load(w.up_scale_ptr + at)[None, :]
        score = tl.load(expert_weights_ptr + tl.load(row_slot_ptr + inside))[:, None]
        up *= score
        if ON_INPUT:
            gate *= score
        values = (gate * tl.sigmoid(gate) * up).to(DTYPE)
        mask_m = rows < end
        rows64 = rows.to(tl.int64)
        if z.scale_ptr is not None:
            values, scale = quantize_groups(values.to(tl.float32))
            tl.store(
                z.scale_ptr + rows64 * z.scale_stride + pid_n * z.scale_stride_k, scale, mask=mask_m
            )
        tl.store(
            z.ptr + (rows64 * N)[:, None] + offs_n[None, :],
            values,
            mask=mask_m[:, None] & (offs_n < N)[None, :],
        )


@triton.jit
def _grouped_gemm_scatter_ws_kernel(
    z, w, tables, residual_ptr, out_ptr,
    E, M, N, K, stride_residual_t,
    FORMAT: tl.constexpr, K_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row_slot_ptr, tiles_ptr, tile_count_ptr = tables
    z_desc = tl.make_tensor_descriptor(z.ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    w_desc = _weights(w.ptr, w, E, N, K, BLOCK_N, BLOCK_K, K_LAST)
    step_e = w.stride_e // (w.stride_n if K_LAST else w.stride_k)
    num_m = tl.load(tile_count_ptr)
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), num_m * num_n, tl.num_programs(0),
        warp_specialize=True, disallow_acc_multi_buffer=True,
    ):  # fmt: skip
        expert, row, end, pid_n = _tile(tiles_ptr, tile, num_m, num_n, GROUP_M)
        n0 = pid_n * BLOCK_N
        first = expert * step_e
        rows = _apart(row, end) + tl.arange(0, BLOCK_M)
        inside = tl.minimum(rows, end - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        steps = tl.where(expert < E, tl.cdiv(K, BLOCK_K), 0)
        for k in tl.range(0, steps):
            z_tile = z_desc.load([row, k * BLOCK_K])
            w_tile = _weight_tile(w_desc, first, n0, k * BLOCK_K, K_LAST)
            if FORMAT == "plain":
                acc = tl.dot(z_tile, w_tile, acc)
            else:
                scale = tl.load(z.scale_ptr + inside * z.scale_stride + k * z.scale_stride_k)
                if FORMAT == "e4m3_block":
                    at = (
                        expert * w.scale_stride_e
                        + n0 // GROUP * w.scale_stride_n
                        + k * w.scale_stride_k
                    )
                    scale *= tl.load(w.scale_ptr + at)
                acc += tl.dot(z_tile, w_tile) * scale[:, None]
        offs_n = n0 + tl.arange(0, BLOCK_N)
        if FORMAT == "e4m3_channel":
            at = (
                tl.minimum(expert, E - 1) * w.scale_stride_e
                + tl.minimum(offs_n, N - 1) * w.scale_stride_n
            )
            acc *= tl.load(w.scale_ptr + at)[None, :]
        slots = tl.load(row_slot_ptr + inside).to(tl.int64)
        mask = (rows < end)[:, None] & (offs_n < N)[None, :]
        if residual_ptr is not None:
            at = residual_ptr + (slots * stride_residual_t)[:, None] + offs_n[None, :]
            acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(
            out_ptr + (slots * N)[:, None] + offs_n[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=mask,
        )
