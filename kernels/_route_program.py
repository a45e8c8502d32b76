"""Routing on the device: what one program does with a block of tokens, or with all of them.

    load_logits, next_best, score     for a kernel that chooses the experts of few tokens itself
    choose_experts                    one block of tokens: ids and weights stored, experts counted
    route_program                     all tokens in this one program, up to the table of tiles
    _route_kernel, _top_k_kernel      what routing.py launches for few tokens and for many

None of the functions asks which program it is, so that a kernel can give them to one program of
its grid. A block of BLOCK_T tokens by BLOCK_E experts is in registers; above 8192 elements it
spills.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._names import named, nbytes
from .counting_sort import order_slots

__all__ = [
    "choices",
    "choose_experts",
    "load_logits",
    "load_num_valid",
    "next_best",
    "route_program",
    "score",
]


@triton.jit
def _ordered(bits):
    """Map the bits of an fp32 to an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _rounded(x, ROUND_TO: tl.constexpr):
    """Return fp32 x rounded to ROUND_TO ("fp32": not), still in fp32."""
    if ROUND_TO == "bf16":
        x = x.to(tl.bfloat16).to(tl.float32)
    elif ROUND_TO == "fp16":
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def load_logits(
    logits_ptr, offs_t, mask_t, offs_e, E, S, stride_s, stride_t,
    ROUND_TO: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Return (BLOCK_T, BLOCK_E) fp32 logits, -inf where NaN or beyond E.

    UNROLL 0: logits of any float type. Else partial sums, S slices of them at `stride_s`, which are
    added in order, UNROLL of them being read at a time, and rounded to ROUND_TO ("fp32": not).
    """
    mask_e = offs_e < E
    mask = mask_t[:, None] & mask_e[None, :]
    offs = offs_t.to(tl.int64)[:, None] * stride_t + offs_e[None, :]
    if UNROLL == 0:
        logits = tl.load(logits_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        logits = tl.zeros((offs_t.shape[0], offs_e.shape[0]), dtype=tl.float32)
        for s0 in tl.range(0, S, UNROLL):
            for i in tl.static_range(UNROLL):
                logits += tl.load(logits_ptr + offs, mask=mask & (s0 + i < S), other=0.0)
                logits_ptr += stride_s
    logits = tl.where(logits == logits, logits, float("-inf"))
    logits = _rounded(logits, ROUND_TO)
    logits += 0.0  # -0.0 and 0.0 are a tie
    return tl.where(mask_e[None, :], logits, float("-inf"))


@triton.jit
def make_keys(logits, offs_e, E):
    """Return the int32 keys that `next_best` takes: of the same order, and never chosen beyond E.

    Integers leave a value below -inf's: a chosen or padding expert is never chosen again.
    """
    return tl.where((offs_e < E)[None, :], _ordered(logits.to(tl.int32, bitcast=True)), -(2**31))


@triton.jit
def next_best(keys, offs_e, BLOCK_E: tl.constexpr):
    """Return the best expert of each row, the lowest of equals; its logit; the keys without it."""
    best = tl.max(keys, axis=1)  # (BLOCK_T,)
    ids = tl.min(tl.where(keys == best[:, None], offs_e[None, :], BLOCK_E), axis=1)
    keys = tl.where(offs_e[None, :] == ids[:, None], -(2**31), keys)
    return ids, _ordered(best).to(tl.float32, bitcast=True), keys


@triton.jit
def score(logit, top, total, IS_SOFTMAX: tl.constexpr):
    """Return the weight of a chosen logit; `top` and `total` are those of `softmax_terms`.

    Infinite logits share the weight of a softmax; a row of -inf alone has none.
    """
    if IS_SOFTMAX:
        above = tl.exp(tl.where(logit == top, 0.0, logit - top))
        weight = tl.where(top > float("-inf"), above / total, 0.0)
    else:
        weight = tl.sigmoid(logit)
    return weight


@triton.jit
def softmax_terms(logits, IS_SOFTMAX: tl.constexpr):
    """Return the largest logit of each row and the sum of exp(logit - largest), if needed."""
    top = tl.zeros((logits.shape[0],), dtype=tl.float32)
    total = top
    if IS_SOFTMAX:
        top = tl.max(logits, axis=1)
        equal = logits == top[:, None]
        total = tl.sum(tl.exp(tl.where(equal, 0.0, logits - top[:, None])), axis=1)
    return top, total


@triton.jit
def choices(
    logits, offs_e, E,
    IS_SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, ROUND_SCORE: tl.constexpr,
    TOP_K: tl.constexpr,
):  # fmt: skip
    """Return ids and weights (BLOCK_T, next power of 2 of TOP_K), and the keys without them.

    Weights are rounded to ROUND_SCORE ("fp32": not), after all else.
    """
    BLOCK_T: tl.constexpr = logits.shape[0]
    BLOCK_E: tl.constexpr = logits.shape[1]
    BLOCK_K: tl.constexpr = triton.next_power_of_2(TOP_K)
    offs_k = tl.arange(0, BLOCK_K)
    top, total = softmax_terms(logits, IS_SOFTMAX)
    keys = make_keys(logits, offs_e, E)
    ids = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    weights = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for k in tl.range(0, TOP_K):
        best, logit, keys = next_best(keys, offs_e, BLOCK_E)
        weight = score(logit, top, total, IS_SOFTMAX)
        ids = tl.where(offs_k[None, :] == k, best[:, None], ids)
        weights = tl.where(offs_k[None, :] == k, weight[:, None], weights)
    if RENORMALIZE:
        of_token = tl.sum(weights, axis=1)[:, None]
        weights = tl.where(of_token > 0.0, weights / of_token, 0.0)
    return ids, _rounded(weights, ROUND_SCORE), keys


@triton.jit
def choose_experts(
    logits_ptr, expert_ids_ptr, expert_weights_ptr,
    t0, end, num_valid, E, S, first, count,
    stride_s, stride_t,
    IS_SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, ROUND_TO: tl.constexpr,
    ROUND_SCORE: tl.constexpr, TOP_K: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Store the choices of tokens t0 and following, up to `end`; return (BLOCK_E,) counts.

    Experts `first` to first + count - 1 are numbered from 0; a choice of another one, and any of a
    token from `num_valid` on, is stored as -1 with weight 0. All experts of valid tokens count.
    """
    BLOCK_K: tl.constexpr = triton.next_power_of_2(TOP_K)
    offs_t = t0 + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t = offs_t < tl.minimum(end, num_valid)

    logits = load_logits(
        logits_ptr, offs_t, mask_t, offs_e, E, S, stride_s, stride_t, ROUND_TO, UNROLL
    )
    ids, weights, keys = choices(logits, offs_e, E, IS_SOFTMAX, RENORMALIZE, ROUND_SCORE, TOP_K)
    kept = mask_t[:, None] & (ids >= first) & (ids < first + count)
    slots = offs_t[:, None] * TOP_K + offs_k[None, :]
    mask = (offs_t < end)[:, None] & (offs_k < TOP_K)[None, :]
    tl.store(expert_ids_ptr + slots, tl.where(kept, ids - first, -1), mask=mask)
    tl.store(expert_weights_ptr + slots, tl.where(kept, weights, 0.0), mask=mask)

    chosen = (keys == -(2**31)) & (offs_e < E)[None, :] & mask_t[:, None]
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def load_num_valid(num_valid_ptr, T):
    """Return how many of T tokens are valid; all of them without a pointer."""
    num_valid = T
    if num_valid_ptr is not None:
        num_valid = tl.minimum(tl.load(num_valid_ptr), T)
    return num_valid


@triton.jit
def route_program(
    logits_ptr, num_valid_ptr,
    expert_ids_ptr, expert_weights_ptr, expert_offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
    T, E, S, first, count, capacity, block_m,
    stride_s, stride_t,
    IS_SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, ROUND_TO: tl.constexpr,
    ROUND_SCORE: tl.constexpr, TOP_K: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Route T tokens: all that a `Routing` holds, from logits or partial sums of them.

    First the choices, BLOCK_T tokens at a time, then the order, BLOCK_R slots at a time; between
    them the choices are in global memory.
    """
    num_valid = load_num_valid(num_valid_ptr, T)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for t0 in tl.range(0, T, BLOCK_T):
        counts += choose_experts(
            logits_ptr, expert_ids_ptr, expert_weights_ptr,
            t0, T, num_valid, E, S, first, count,
            stride_s, stride_t,
            IS_SOFTMAX, RENORMALIZE, ROUND_TO, ROUND_SCORE, TOP_K, UNROLL, BLOCK_T, BLOCK_E,
        )  # fmt: skip
    order_slots(
        expert_ids_ptr, expert_offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
        counts, tl.arange(0, BLOCK_E) - first,
        T * TOP_K, count, capacity, block_m, BLOCK_R, BLOCK_E,
    )  # fmt: skip


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    """Every table once; comparisons and integers."""
    return nbytes(*(arg for arg in args.values() if isinstance(arg, torch.Tensor))), 0


@triton.jit(
    do_not_specialize=["T", "S", "first", "count", "capacity", "block_m"],
    **named("route", "logits_ptr", _cost),
)
def _route_kernel(
    logits_ptr, num_valid_ptr,
    expert_ids_ptr, expert_weights_ptr, expert_offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
    T, E, S, first, count, capacity, block_m,
    stride_s, stride_t,
    IS_SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, ROUND_TO: tl.constexpr,
    ROUND_SCORE: tl.constexpr, TOP_K: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (1,): everything, for few tokens."""
    route_program(
        logits_ptr, num_valid_ptr, expert_ids_ptr, expert_weights_ptr,
        expert_offsets_ptr, row_slot_ptr, tiles_ptr, tile_count_ptr,
        T, E, S, first, count, capacity, block_m,
        stride_s, stride_t,
        IS_SOFTMAX, RENORMALIZE, ROUND_TO, ROUND_SCORE, TOP_K, UNROLL, BLOCK_T, BLOCK_E, BLOCK_R,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["T", "S", "first", "count", "tokens_per_program"],
    **named("top_k", "logits_ptr", _cost),
)
def _top_k_kernel(
    logits_ptr, num_valid_ptr, expert_ids_ptr, expert_weights_ptr, counts_ptr,
    T, E, S, first, count, tokens_per_program,
    stride_s, stride_t,
    IS_SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, ROUND_TO: tl.constexpr,
    ROUND_SCORE: tl.constexpr, TOP_K: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Grid (P,): program p chooses for tokens p * tokens_per_program and following, and counts.

    Of the BLOCK_G counts of a program the first `count` are written.
    """
    pid = tl.program_id(0)
    begin = pid * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, T)
    num_valid = load_num_valid(num_valid_ptr, T)

    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for t0 in tl.range(begin, end, BLOCK_T):
        counts += choose_experts(
            logits_ptr, expert_ids_ptr, expert_weights_ptr,
            t0, end, num_valid, E, S, first, count,
            stride_s, stride_t,
            IS_SOFTMAX, RENORMALIZE, ROUND_TO, ROUND_SCORE, TOP_K, UNROLL, BLOCK_T, BLOCK_E,
        )  # fmt: skip

    offs_g = tl.arange(0, BLOCK_E) - first
    mask_g = (offs_g >= 0) & (offs_g < count)
    tl.store(counts_ptr + pid * BLOCK_G + offs_g, counts, mask=mask_g)
