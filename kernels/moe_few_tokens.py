"""The experts of very few tokens: two launches after the router's, and no routing between them.

    _few_up_kernel     each program sums the logits and chooses the experts of all T tokens itself;
                       partial[s] = rows of gate and up summed over slice s of H, fp32
    _few_down_kernel   out[t] = shared down @ z_s[t] + sum over experts e of down[e] @ z[t, e]
                       + residual[t], with z = dt(swiglu(sum of the slices)) made on its way

A table of tiles would take longer to make than to do without: every program knows all choices, and
one with the same expert as an earlier slot ends at once. The tokens are the columns of every tile;
those that did not choose its expert are not stored, or are zeros. So an expert's weights are read
once however many tokens share it.
Layout: partial (S, R + T, 2F): a row per slot, gate then up, then a row per token of the shared
expert. Tiling: GEMM 1 is split in two over H where it has fewer programs than SMs; GEMM 2 sums all
experts in one accumulator, in the order of their first slots, and stores once.
Source: see moe.py; skipping the sort for few tokens as in vLLM's fused_moe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._expert_operands import Weights
from ._expert_tile import gate_and_up, product, step, weight_pointers
from ._launch import launch
from ._moe_operands import Layer, Logits
from ._names import named, nbytes
from ._quantize_rows import quantize_groups
from ._route_program import choices, load_logits, load_num_valid
from .counting_sort import padded_groups
from .grouped_gemm_config import GroupedGemmConfig

__all__ = ["launch_few_down", "launch_few_up"]

BLOCK_M = 16  # columns of a tile, of which the tokens are the first
FEW_TOKENS: tl.constexpr = tl.constexpr(4)


def _up_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    x, w, shared, T = (args[name] for name in ("x", "w", "shared_w", "T"))
    groups = T * args["TOP_K"] + (shared.ptr is not None)
    weights = 2 * groups * args["N"] * args["K"] * w.ptr.element_size()
    return nbytes(x.ptr, args["logits_ptr"], args["partial_ptr"]) + weights, 2 * weights


@triton.jit
def _store_partial(acc, partial_ptr, rows, mask_m, n0, N):
    """Store gate and up of (BLOCK_N, BLOCK_M) in rows of 2N."""
    gate, up = gate_and_up(acc)
    offs_n = n0 + tl.arange(0, acc.shape[0] // 2)
    ptrs = partial_ptr + rows[:, None] * (2 * N) + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    tl.store(ptrs, gate.T, mask=mask)
    tl.store(ptrs + N, up.T, mask=mask)


@triton.jit(
    do_not_specialize=["T", "S", "first", "count", "steps", "shared_programs", "num_counters"],
    **named("few_up", "x", _up_cost),
)
def _few_up_kernel(
    logits_ptr, num_valid_ptr, ids_ptr, weights_ptr, x, w, shared_w, partial_ptr, counters_ptr,
    T, E, S, first, count, N, K, steps, shared_programs, num_counters,
    stride_s, stride_t,
    IS_SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, ROUND_TO: tl.constexpr,
    ROUND_SCORE: tl.constexpr, TOP_K: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_E: tl.constexpr, SPLITS: tl.constexpr,
    FORMAT: tl.constexpr, X_FORMAT: tl.constexpr, ON_INPUT: tl.constexpr,
    FAST_ACCUM: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (shared_programs + T * TOP_K * cdiv(N, BLOCK_N // 2) * SPLITS,).

    A slice is `steps` blocks of BLOCK_K. The first program of slot 0 stores ids and weights, and
    zeros the counters of `_few_down_kernel`.
    """
    pid = tl.program_id(0)
    num_n = tl.cdiv(N, BLOCK_N // 2)
    n0 = pid // SPLITS % num_n * (BLOCK_N // 2)
    split = pid % SPLITS
    k_begin = split * steps * BLOCK_K
    k_end = tl.minimum(k_begin + steps * BLOCK_K, K)
    offs_m = tl.arange(0, BLOCK_M)
    tokens = tl.minimum(offs_m, T - 1).to(tl.int64)
    R = T * TOP_K
    partial_ptr += split.to(tl.int64) * (R + (T if shared_w.ptr is not None else 0)) * (2 * N)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if shared_w.ptr is not None:
        if pid < shared_programs:
            acc = product(
                acc, shared_w, tl.cast(0, tl.int64), n0, N, x, tokens, k_begin, k_end, K,
                FORMAT, X_FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_K,
            )  # fmt: skip
            _store_partial(acc, partial_ptr, (R + offs_m).to(tl.int64), offs_m < T, n0, N)
            return

    offs_t = tl.arange(0, FEW_TOKENS)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, triton.next_power_of_2(TOP_K))
    mask_t = offs_t < load_num_valid(num_valid_ptr, T)
    logits = load_logits(
        logits_ptr, offs_t, mask_t, offs_e, E, S, stride_s, stride_t, ROUND_TO, UNROLL
    )
    ids, weights, _ = choices(logits, offs_e, E, IS_SOFTMAX, RENORMALIZE, ROUND_SCORE, TOP_K)
    kept = mask_t[:, None] & (ids >= first) & (ids < first + count)
    ids = tl.where(kept, ids - first, -1)  # (FEW_TOKENS, top_k)
    weights = tl.where(kept, weights, 0.0)
    slots = offs_t[:, None] * TOP_K + offs_k[None, :]
    is_slot = (offs_t < T)[:, None] & (offs_k < TOP_K)[None, :]
    if pid == shared_programs:
        tl.store(ids_ptr + slots, ids, mask=is_slot)
        tl.store(weights_ptr + slots, weights, mask=is_slot)
        if counters_ptr is not None:
            for i in tl.range(0, num_counters, 128):
                offs_i = i + tl.arange(0, 128)
                zeros = tl.zeros((128,), dtype=tl.int32)
                tl.store(counters_ptr + offs_i, zeros, mask=offs_i < num_counters)

    slot = (pid - shared_programs) // (num_n * SPLITS)
    expert = tl.sum(tl.where((slots == slot) & is_slot, ids, 0))
    same = (ids == expert) & is_slot
    done_before = tl.sum((same & (slots < slot)).to(tl.int32))
    if (expert < 0) | (done_before > 0):
        return
    acc = product(
        acc, w, expert.to(tl.int64), n0, N, x, tokens, k_begin, k_end, K,
        FORMAT, X_FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_K,
    )  # fmt: skip
    # From tokens to the columns of the tile.
    is_token = offs_m[:, None] == offs_t[None, :]
    row = tl.sum(tl.where(same, slots + 1, 0), axis=1)  # 0: did not choose the expert
    rows = tl.sum(tl.where(is_token, row[None, :], 0), axis=1)
    chosen = rows > 0
    rows = tl.maximum(rows - 1, 0).to(tl.int64)
    if ON_INPUT:
        weight = tl.sum(tl.where(same, weights, 0.0), axis=1)
        acc *= tl.sum(tl.where(is_token, weight[None, :], 0.0), axis=1)[None, :]
    _store_partial(acc, partial_ptr, rows, chosen, n0, N)


@triton.jit
def _load_z(
    partial_ptr, stride_split, rows, mask_m, factor, offs_k, K,
    SPLITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dt(swiglu(sum of the slices) * factor) (BLOCK_M, len(offs_k)); 0 for rows of mask_m not."""
    ptrs = partial_ptr + rows[:, None] * (2 * K) + offs_k[None, :]
    mask = mask_m[:, None] & (offs_k < K)[None, :]
    gate = tl.load(ptrs, mask=mask, other=0.0)
    up = tl.load(ptrs + K, mask=mask, other=0.0)
    for s in tl.static_range(1, SPLITS):
        gate += tl.load(ptrs + s * stride_split, mask=mask, other=0.0)
        up += tl.load(ptrs + s * stride_split + K, mask=mask, other=0.0)
    return (gate * tl.sigmoid(gate) * up * factor[:, None]).to(DTYPE)


@triton.jit
def _add_expert(
    acc, w, expert, n0, N, K, k_begin, k_end,
    partial_ptr, stride_split, rows, mask_m, factor,
    SPLITS: tl.constexpr, DTYPE: tl.constexpr, QUANTIZE: tl.constexpr,
    FORMAT: tl.constexpr, FAST_ACCUM: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc (BLOCK_N, BLOCK_M) + w[expert, n0:, k_begin:k_end] @ z[rows, k_begin:k_end].T.

    z is made block by block.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    IN_BYTE: tl.constexpr = 2 if FORMAT == "int4_group" else 1
    by_step: tl.constexpr = w.ptr.dtype.element_ty == tl.uint8
    SCALED_AFTER: tl.constexpr = FORMAT == "e4m3_channel" and not by_step
    offs = tl.arange(0, BLOCK_K // IN_BYTE)
    w_ptrs, w_scale_ptrs = weight_pointers(
        w, expert, n0, N, k_begin, FORMAT, EVEN_N, BLOCK_N, BLOCK_K
    )
    channel_scale = 1.0
    if by_step and FORMAT == "e4m3_channel":
        channel_scale = tl.load(w_scale_ptrs)
    before = acc
    if SCALED_AFTER:
        acc = tl.zeros_like(acc)

    for k0 in tl.range(k_begin, k_end, BLOCK_K):
        if EVEN_K:
            w_tile = tl.load(w_ptrs)
        else:
            w_tile = tl.load(w_ptrs, mask=offs[None, :] < K - k0, other=0.0)
        z = _load_z(partial_ptr, stride_split, rows, mask_m, factor, k0 + offs, K, SPLITS, DTYPE)
        z_high, w_scale, z_scale = z, channel_scale, 1.0
        if FORMAT == "int4_group":
            high = k0 + BLOCK_K // 2 + offs
            z_high = _load_z(
                partial_ptr, stride_split, rows, mask_m, factor, high, K, SPLITS, DTYPE
            )
        if FORMAT == "int4_group" or FORMAT == "e4m3_block":
            w_scale = tl.load(w_scale_ptrs + k0 // 128 * w.scale_stride_k).to(tl.float32)
        if QUANTIZE:
            z_q, z_scale = quantize_groups(z.to(tl.float32))
            acc = step(acc, w_tile, w_scale, z_q, z_q, z_scale, FORMAT, True, FAST_ACCUM)
        else:
            acc = step(acc, w_tile, w_scale, z, z_high, z_scale, FORMAT, False, FAST_ACCUM)
        w_ptrs += tl.cast(BLOCK_K // IN_BYTE, tl.int64) * w.stride_k

    if SCALED_AFTER:
        acc = before + acc * tl.load(w_scale_ptrs)[:, None]
    return acc


def _down_cost(args: Mapping[str, Any]) -> tuple[int, int]:
    w, shared, T = args["w"], args["shared_w"], args["T"]
    groups = T * args["TOP_K"] + (shared.ptr is not None)
    weights = groups * args["N"] * args["K"] * w.ptr.element_size()
    moved = nbytes(args["partial_ptr"], args["residual_ptr"], args["out_ptr"])
    return moved + weights, 2 * groups * args["N"] * args["K"]


@triton.jit
def _last_sum(acc, sums_ptr, counter_ptr, n0, N, split, SPLITS: tl.constexpr):
    """Store acc as partial sum `split`; return how many came before, and the sum if all have.

    The counter orders the stores of the others before what is read here, which takes both acquire
    and release. The sum is in the order of the splits, whoever comes last.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs = tl.arange(0, BLOCK_M)[None, :] * N + offs_n[:, None]
    mask = (offs_n < N)[:, None]
    stride_split = tl.cast(N, tl.int64) * BLOCK_M
    tl.store(sums_ptr + split * stride_split + offs, acc, mask=mask)
    tl.debug_barrier()  # every thread has stored before one of them counts
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        acc = tl.zeros_like(acc)
        for s in tl.static_range(SPLITS):
            acc += tl.load(sums_ptr + s * stride_split + offs, mask=mask, other=0.0)
    return arrived, acc


@triton.jit(do_not_specialize=["T", "steps"], **named("few_down", "out_ptr", _down_cost))
def _few_down_kernel(
    ids_ptr, weights_ptr, partial_ptr, w, shared_w, residual_ptr, out_ptr, sums_ptr, counters_ptr,
    T, N, K, steps, stride_residual_t,
    TOP_K: tl.constexpr, SPLITS: tl.constexpr, DOWN_SPLITS: tl.constexpr,
    ON_INPUT: tl.constexpr, QUANTIZE: tl.constexpr,
    FORMAT: tl.constexpr, FAST_ACCUM: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N) * DOWN_SPLITS,): BLOCK_N columns of every token's out.

    N = H and K = F. With DOWN_SPLITS > 1 a program sums `steps` blocks of BLOCK_K of each expert,
    and the last of a column's programs adds them up.
    """
    pid_n = tl.program_id(0) // DOWN_SPLITS
    split = tl.program_id(0) % DOWN_SPLITS
    n0 = pid_n * BLOCK_N
    k_begin = split * steps * BLOCK_K
    k_end = tl.minimum(k_begin + steps * BLOCK_K, K)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    R = T * TOP_K
    stride_split = tl.cast(R + (T if shared_w.ptr is not None else 0), tl.int64) * (2 * K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    ones = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if shared_w.ptr is not None:
        acc = _add_expert(
            acc, shared_w, tl.cast(0, tl.int64), n0, N, K, k_begin, k_end,
            partial_ptr, stride_split, (R + offs_m).to(tl.int64), mask_m, ones,
            SPLITS, dtype, QUANTIZE, FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_K,
        )  # fmt: skip
    for slot in tl.range(0, R):
        expert = tl.load(ids_ptr + slot)
        is_first = expert >= 0
        for earlier in tl.range(0, slot):
            is_first &= tl.load(ids_ptr + earlier) != expert
        rows = tl.zeros((BLOCK_M,), dtype=tl.int32)
        factor = tl.zeros((BLOCK_M,), dtype=tl.float32)
        chosen = offs_m < 0
        for k in tl.static_range(TOP_K):
            slots = offs_m * TOP_K + k
            same = tl.load(ids_ptr + slots, mask=mask_m, other=-1) == expert
            rows = tl.where(same, slots, rows)
            chosen |= same
            if not ON_INPUT:
                weights = tl.load(weights_ptr + slots, mask=mask_m & same, other=0.0)
                factor = tl.where(same, weights, factor)
        if ON_INPUT:
            factor = ones
        acc = _add_expert(
            acc, w, tl.maximum(expert, 0).to(tl.int64), n0, N, K,
            k_begin, tl.where(is_first, k_end, 0),
            partial_ptr, stride_split, rows.to(tl.int64), chosen & mask_m, factor,
            SPLITS, dtype, QUANTIZE, FORMAT, FAST_ACCUM, EVEN_N, EVEN_K, BLOCK_K,
        )  # fmt: skip

    if DOWN_SPLITS > 1:
        arrived, acc = _last_sum(
            acc, sums_ptr, counters_ptr + pid_n, n0, N, split.to(tl.int64), DOWN_SPLITS
        )
        if arrived < DOWN_SPLITS - 1:
            return
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    rows_out = offs_m.to(tl.int64)[:, None]
    y = acc.T
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows_out * stride_residual_t + offs_n[None, :]
        y += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows_out * N + offs_n[None, :], y.to(dtype), mask=mask)


class Partial(NamedTuple):
    """What GEMM 1 leaves to GEMM 2."""

    sums: torch.Tensor  # (S, R + T, 2F) fp32, without T where there is no shared expert
    ids: torch.Tensor  # (T, top_k)
    weights: torch.Tensor
    counters: torch.Tensor | None  # one per column tile of GEMM 2 where that is split


def launch_few_up(layer: Layer, choice: Logits) -> Partial:
    """Launch GEMM 1 of every slot's expert and of the shared one."""
    plan, experts, shared, logits = layer.plan, layer.experts, layer.shared, choice.logits
    _, N, K = experts.gate.shape
    T, E = logits.shape[-2:]
    R, config = T * choice.top_k, plan.up
    steps, splits = _slices(K, plan.up_splits, config)
    new = layer.out.new_empty
    num_counters = triton.cdiv(K, plan.down.BLOCK_N) if plan.down_splits > 1 else 0
    partial = Partial(
        sums=new((splits, R + (T if shared else 0), 2 * N), dtype=torch.float32),
        ids=new((T, choice.top_k), dtype=torch.int32),
        weights=new((T, choice.top_k), dtype=torch.float32),
        counters=new(num_counters, dtype=torch.int32) if num_counters else None,
    )
    S, stride_s = choice.slices
    per_group = triton.cdiv(N, config.BLOCK_N // 2) * splits
    shared_programs = per_group if shared else 0
    decoded = layer.x.scale_ptr is None
    launch(
        _few_up_kernel, (shared_programs + R * per_group,),
        logits, choice.num_valid, partial.ids, partial.weights, layer.x,
        Weights.of(experts.gate, experts.up, decoded=decoded),
        Weights.of(*(shared.gate, shared.up) if shared else (None,), decoded=decoded),
        partial.sums, partial.counters,
        T, E, S, choice.first, choice.count, N, K, steps, shared_programs, num_counters,
        stride_s, logits.stride(-2),
        **choice.options(unroll=8), BLOCK_E=padded_groups(E),
        SPLITS=splits, **layer.constants(N, K, config, "X_FORMAT", "ON_INPUT"),
        BLOCK_M=BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partial


def launch_few_down(layer: Layer, partial: Partial) -> None:
    """Launch GEMM 2 of all of them, which computes layer.out."""
    plan, experts, shared, residual = layer.plan, layer.experts, layer.shared, layer.residual
    _, N, K = experts.down.shape
    T, top_k = partial.ids.shape
    config = plan.down
    steps, down_splits = _slices(K, plan.down_splits, config)
    sums = None
    if down_splits > 1:
        sums = layer.out.new_empty((down_splits, BLOCK_M, N), dtype=torch.float32)
    decoded = layer.x.scale_ptr is None
    launch(
        _few_down_kernel, (triton.cdiv(N, config.BLOCK_N) * down_splits,),
        partial.ids, partial.weights, partial.sums, Weights.of(experts.down, decoded=decoded),
        Weights.of(shared.down if shared else None, decoded=decoded), residual, layer.out,
        sums, partial.counters,
        T, N, K, steps, 0 if residual is None else residual.stride(0),
        TOP_K=top_k, SPLITS=len(partial.sums), DOWN_SPLITS=down_splits, QUANTIZE=not decoded,
        **layer.constants(N, K, config, "ON_INPUT"),
        BLOCK_M=BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _slices(K: int, splits: int, config: GroupedGemmConfig) -> tuple[int, int]:
    """Blocks of BLOCK_K in a slice, and how many slices, at most `splits`, none of them empty."""
    blocks = triton.cdiv(K, config.BLOCK_K)
    steps = triton.cdiv(blocks, splits)
    return steps, triton.cdiv(blocks, steps)
