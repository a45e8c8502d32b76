"""Routing: the top-k experts of each token, and where each (token, choice) goes in expert order.

    ids[t], logit[t]  = top_k(logits[t])           NaN counts as -inf, ties to the lowest expert
    expert_weights[t] = sigmoid(logit[t])          in fp32; or softmax over all experts; optionally
                                                   divided by its sum over the top k, and rounded
    expert_ids[t]     = ids[t] - first             -1, and weight 0, where dropped
    row_slot          = the slots s = t * top_k + k, sorted by (expert_ids[t, k], s)

Dropped is an expert outside of this GPU's range [first, first + count), and every choice of a
token that is not valid; dropped slots come last in row_slot. A row of NaN gives experts 0 to
top_k - 1 with weight 0.
Layout: logits (T, E) with any row stride and dense rows, or partial sums (S, T, E) of them;
expert_ids and expert_weights (T, top_k), given ones with any row stride and dense rows.
Tiling: few slots are routed by one program in one launch (_route_program.py, _sort_program.py).
Many take three: blocks of tokens choose and count, one program scans the counts, blocks of slots
move (counting_sort.py). BLOCK_T * E is at most 8192, beyond which the block spills.
Source: llama-models llama4/moe.py (top-k of the raw logits, sigmoid of the chosen ones, neither
softmax nor renormalisation); softmax and its renormalisation as in Mixtral and Qwen's models.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from ._check import FLOATS, check_architecture, check_devices, check_index, check_tensor, require
from ._debug import is_checked
from ._launch import launch
from ._library import define
from ._remembered import remembered
from ._route_program import _route_kernel, _top_k_kernel
from ._routing_table import (
    Routing,
    RoutingConfig,
    check_routing,
    check_sizes,
    default_block_m,
    default_config,
    default_tiles,
)
from ._sizes import flat
from ._sort_program import _count_kernel, _sort_kernel
from .counting_sort import empty_order, padded_groups, scan_and_scatter

__all__ = [
    "Routing",
    "RoutingConfig",
    "check_routing",
    "default_block_m",
    "default_config",
    "route",
    "sort_by_expert",
]

SCORINGS = ("sigmoid", "softmax")
ROUND_TO = {None: "fp32", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "sigmoid",
    renormalize: bool = False,
    expert_range: tuple[int, int] | None = None,
    num_valid_tokens: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    score_dtype: torch.dtype | None = None,
    block_m: int | None = None,
    config: RoutingConfig | None = None,
) -> Routing:
    """Choose `top_k` experts for each token and sort the choices into expert order.

    Args:
        logits: (T, E) fp32, fp16 or bf16, dense rows; or (S, T, E) fp32 partial sums, dense rows,
            which are added in the order of S; 1 <= E <= 512.
        top_k: 1 to min(8, E).
        scoring: "sigmoid" of the chosen logits, or "softmax" over all E.
        renormalize: divide a token's weights by their sum, if that is not 0.
        expert_range: (first, count): the experts of this GPU. None: all.
        num_valid_tokens: (1,) int32, read on the device: tokens from there on are dropped.
        logits_dtype: round the logits, or the sums, to this type before all else; None: do not.
        score_dtype: round the weights to this type after all else, as transformers and SGLang do
            to x.dtype; None: do not, as vLLM. They are stored in fp32 either way.
        block_m: rows per tile of the grouped GEMMs; None takes `default_block_m(T * top_k, E)`.
        config: tile configuration; None takes `default_config(T, E, top_k)`.
    Returns:
        Routing among `count` experts, numbered from 0; see the module for what is dropped.
    Raises:
        ValueError: shapes, strides, top_k, scoring, expert_range, block_m.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: exact choice on the given logits; weights in fp32, or computed in fp32 and
        rounded once to score_dtype. +inf logits share a softmax, a row without a number above -inf
        has weights 0. Deterministic, and a token's choice and weights depend on its own logits
        only.
    Cost: T*E*top_k comparisons; bytes = S*T*E*itemsize + 12*T*top_k + the tables of `Routing`;
        1 launch for few slots (T <= 512 at E <= 128), else 3.
    Source: see the module; reference: kernels/reference.py:route.
    """
    block_m, first, count = _check_route(
        "route", logits, top_k, scoring, expert_range, num_valid_tokens, logits_dtype, score_dtype,
        block_m,
    )  # fmt: skip
    tensors = _route(
        logits, top_k, scoring == "softmax", renormalize, first, count, num_valid_tokens,
        logits_dtype, score_dtype, block_m, config and flat(config),
    )  # fmt: skip
    return _routing(tensors, block_m, count, top_k)


@remembered
def _check_route(
    op: str,
    logits: torch.Tensor,
    top_k: int,
    scoring: str,
    expert_range: tuple[int, int] | None,
    num_valid_tokens: torch.Tensor | None,
    logits_dtype: torch.dtype | None,
    score_dtype: torch.dtype | None,
    block_m: int | None,
) -> tuple[int, int, int]:
    """Return block_m and the experts of this GPU, (first, count)."""
    is_partial = isinstance(logits, torch.Tensor) and logits.ndim == 3
    if is_partial:
        check_tensor(op, "logits", logits, ("S", "T", "E"), (torch.float32,))
        require(len(logits) >= 1, op, "logits must have at least one partial sum", 0)
    else:
        check_tensor(op, "logits", logits, ("T", "E"), FLOATS)
    check_architecture(op, logits)
    T, E = logits.shape[-2:]
    block_m = check_sizes(op, T, E, top_k, block_m)
    known = scoring in SCORINGS
    require(known, op, f"scoring must be one of {', '.join(SCORINGS)}", repr(scoring))
    for name, dtype in (("logits_dtype", logits_dtype), ("score_dtype", score_dtype)):
        check_rounding(op, name, dtype)
    return block_m, *_check_experts(op, logits, E, expert_range, num_valid_tokens)


def sort_by_expert(
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    num_experts: int,
    *,
    expert_range: tuple[int, int] | None = None,
    num_valid_tokens: torch.Tensor | None = None,
    block_m: int | None = None,
    checked: bool = False,
    config: RoutingConfig | None = None,
) -> Routing:
    """Sort a routing made elsewhere into expert order.

    Args:
        expert_ids: (T, top_k) int32, dense rows; ids outside [0, E) are dropped.
        expert_weights: (T, top_k) fp32, dense rows.
        num_experts: E, 1 to 512.
        expert_range, num_valid_tokens: as in `route`; with a range, other ids are dropped.
        checked: read the ids and refuse those outside [-1, E); waits for the device.
        block_m, config: as in `route`.
    Returns:
        Routing among the experts of the range, numbered from 0.
    Raises:
        ValueError: shapes, strides, num_experts, top_k, expert_range, block_m.
        TypeError: dtypes.   IndexError: an id is outside [-1, E), with `checked` only.
    Numerics: exact and deterministic.
    Cost: bytes = 24*T*top_k + the tables of `Routing`; 1 launch for few slots, else 3.
    Source: see the module; reference: kernels/reference.py:sort_by_expert.
    """
    op = "sort_by_expert"
    block_m, first, count = _check_sort(
        op, expert_ids, expert_weights, num_experts, expert_range, num_valid_tokens, block_m
    )
    if is_checked(checked, expert_ids):
        bad = int(((expert_ids < -1) | (expert_ids >= num_experts)).sum())
        must = f"expert_ids must be -1 (not routed) or in [0, {num_experts})"
        require(bad == 0, op, must, f"{bad} others", IndexError)
    tensors = _sort_by_expert(
        expert_ids, expert_weights, first, count, num_valid_tokens, block_m,
        config and flat(config),
    )  # fmt: skip
    return _routing(tensors, block_m, count, expert_ids.shape[1])


@remembered
def _check_sort(
    op: str,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    num_experts: int,
    expert_range: tuple[int, int] | None,
    num_valid_tokens: torch.Tensor | None,
    block_m: int | None,
) -> tuple[int, int, int]:
    """Return block_m and the experts of this GPU, (first, count)."""
    check_index(op, "expert_ids", expert_ids, ("T", "top_k"))
    T, top_k = expert_ids.shape
    check_tensor(op, "expert_weights", expert_weights, (T, top_k), (torch.float32,))
    check_devices(op, expert_ids=expert_ids, expert_weights=expert_weights)
    block_m = check_sizes(op, T, num_experts, top_k, block_m)
    return block_m, *_check_experts(op, expert_ids, num_experts, expert_range, num_valid_tokens)


def check_rounding(op: str, name: str, dtype: torch.dtype | None) -> None:
    known = dtype in ROUND_TO
    require(known, op, f"{name} must be None, fp32, fp16 or bf16", dtype, TypeError)


def _check_experts(
    op: str,
    like: torch.Tensor,
    E: int,
    expert_range: tuple[int, int] | None,
    num_valid_tokens: torch.Tensor | None,
) -> tuple[int, int]:
    if num_valid_tokens is not None:
        check_index(op, "num_valid_tokens", num_valid_tokens, (1,))
        check_devices(op, num_valid_tokens=num_valid_tokens, logits=like)
    if expert_range is None:
        return 0, E
    first, count = expert_range
    inside = 0 <= first and 0 <= count and first + count <= E
    must = f"expert_range must be (first, count) within the {E} experts"
    require(inside, op, must, expert_range)
    return first, count


def _routing(tensors: tuple[torch.Tensor, ...], block_m: int, E: int, top_k: int) -> Routing:
    expert_ids, expert_weights, expert_offsets, row_slot, tiles, tile_count = tensors
    return Routing(
        expert_ids=expert_ids, expert_weights=expert_weights, expert_offsets=expert_offsets,
        row_slot=row_slot, tiles=tiles, tile_count=tile_count,
        block_m=block_m, num_experts=E, top_k=top_k,
    )  # fmt: skip


def _route_impl(
    logits: torch.Tensor, top_k: int, softmax: bool, renormalize: bool, first: int, count: int,
    num_valid: torch.Tensor | None, logits_dtype: torch.dtype | None,
    score_dtype: torch.dtype | None, block_m: int, config: list[int] | None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    T, E = logits.shape[-2:]
    BLOCK_T, BLOCK_R, max_programs, num_warps, one_program = config or default_tiles(T, E, top_k)
    is_partial = logits.ndim == 3
    stride_s = logits.stride(0) if is_partial else 0
    S = len(logits) if is_partial else 1
    block_e = padded_groups(E)
    # 64 registers per thread hold the slices that are read at a time; many tokens have one slice.
    unroll = max(1, min(16, 64 * 32 * num_warps // (BLOCK_T * block_e))) if one_program else 1
    options = dict(
        IS_SOFTMAX=softmax, RENORMALIZE=renormalize, ROUND_TO=ROUND_TO[logits_dtype],
        ROUND_SCORE=ROUND_TO[score_dtype], TOP_K=top_k, UNROLL=unroll if is_partial else 0,
        BLOCK_T=BLOCK_T, BLOCK_E=block_e, num_warps=num_warps,
    )  # fmt: skip
    ids, weights = _empty_choices(logits, T, top_k)
    order = empty_order(T * top_k, count, block_m, logits.device)
    if one_program:
        launch(
            _route_kernel, (1,),
            logits, num_valid, ids, weights, *order,
            T, E, S, first, count, len(order[2]), block_m,
            stride_s, logits.stride(-2),
            BLOCK_R=BLOCK_R, **options,
        )  # fmt: skip
        return ids, weights, *order
    per_program = max(1, triton.cdiv(triton.cdiv(T, BLOCK_T), max_programs)) * BLOCK_T
    counts = ids.new_empty((triton.cdiv(T, per_program), padded_groups(count)))
    launch(
        _top_k_kernel, (len(counts),),
        logits, num_valid, ids, weights, counts,
        T, E, S, first, count, per_program,
        stride_s, logits.stride(-2),
        BLOCK_G=counts.shape[1], **options,
    )  # fmt: skip
    scan_and_scatter(
        ids, counts, order, count, block_m, per_program * top_k,
        BLOCK_R=BLOCK_R, num_warps=num_warps,
    )  # fmt: skip
    return ids, weights, *order


def _sort_by_expert_impl(
    expert_ids: torch.Tensor, expert_weights: torch.Tensor, first: int, count: int,
    num_valid: torch.Tensor | None, block_m: int, config: list[int] | None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    T, top_k = expert_ids.shape
    chosen = config or default_tiles(T, max(1, count), top_k)
    _, BLOCK_R, max_programs, num_warps, one_program = chosen
    strides = expert_ids.stride(0), expert_weights.stride(0)
    ids, weights = _empty_choices(expert_ids, T, top_k)
    order = empty_order(T * top_k, count, block_m, ids.device)
    if one_program:
        launch(
            _sort_kernel, (1,),
            expert_ids, expert_weights, num_valid, ids, weights, *order,
            T, top_k, first, count, len(order[2]), block_m,
            *strides,
            BLOCK_R=BLOCK_R, BLOCK_G=padded_groups(count), num_warps=num_warps,
        )  # fmt: skip
        return ids, weights, *order
    per_program = max(1, triton.cdiv(triton.cdiv(T * top_k, BLOCK_R), max_programs)) * BLOCK_R
    counts = ids.new_empty((triton.cdiv(T * top_k, per_program), padded_groups(count)))
    launch(
        _count_kernel, (len(counts),),
        expert_ids, expert_weights, num_valid, ids, weights, counts,
        T, top_k, first, count, per_program,
        *strides,
        BLOCK_R=BLOCK_R, BLOCK_G=counts.shape[1], num_warps=num_warps,
    )  # fmt: skip
    scan_and_scatter(
        ids, counts, order, count, block_m, per_program, BLOCK_R=BLOCK_R, num_warps=num_warps
    )
    return ids, weights, *order


def _empty_choices(like: torch.Tensor, T: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.empty((T, top_k), dtype=torch.int32, device=like.device)
    return ids, torch.empty((T, top_k), dtype=torch.float32, device=like.device)


def _fake(like: torch.Tensor, T: int, top_k: int, count: int, block_m: int) -> Any:
    return *_empty_choices(like, T, top_k), *empty_order(T * top_k, count, block_m, like.device)


def _route_fake(
    logits, top_k, softmax, renormalize, first, count, num_valid, logits_dtype, score_dtype,
    block_m, config,
):  # fmt: skip
    return _fake(logits, logits.shape[-2], top_k, count, block_m)


def _sort_by_expert_fake(expert_ids, expert_weights, first, count, num_valid, block_m, config):
    return _fake(expert_ids, *expert_ids.shape, count, block_m)


_route = define(
    "route(Tensor logits, int top_k, bool softmax, bool renormalize, int first, int count,"
    " Tensor? num_valid, ScalarType? logits_dtype, ScalarType? score_dtype, SymInt block_m,"
    " int[]? config) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _route_impl,
    _route_fake,
)
_sort_by_expert = define(
    "sort_by_expert(Tensor expert_ids, Tensor expert_weights, int first, int count,"
    " Tensor? num_valid, SymInt block_m, int[]? config)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sort_by_expert_impl,
    _sort_by_expert_fake,
)
