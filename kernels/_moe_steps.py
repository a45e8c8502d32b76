"""The launches of `moe`, by regime; moe.py checks and explains, moe_plan.py chooses.

Everything here is on tensors that have been checked.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch

from . import routing
from ._expert_operands import Rows
from ._moe_operands import Given, Layer, Logits
from .counting_sort import block_of_slots, empty_order, padded_groups
from .expert_weights import Experts
from .grouped_gemm import launch_up
from .grouped_gemm_combine import launch_down, launch_shared_down, launch_sum
from .grouped_gemm_ws import is_specialised, run_specialised
from .moe_few_tokens import launch_few_down, launch_few_up
from .moe_plan import Beside
from .moe_shared import launch_route_and_up, launch_sort_and_up, launch_up_and_down

__all__ = ["run"]

# Of a block of logits, and of the partial sums of one that are loaded at a time, by four warps.
BESIDE_ELEMENTS = 2048
LOADED_ELEMENTS = 8192

Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # expert_weights, row_slot, tiles


def run(layer: Layer, choice: Logits | Given) -> None:
    """Compute layer.out."""
    plan, shared = layer.plan, layer.shared
    if plan.regime == "few" and isinstance(choice, Logits):
        launch_few_down(layer, launch_few_up(layer, choice))
    elif plan.beside is not None and shared is not None:
        _run_beside(layer, choice, shared, plan.beside)
    else:
        _run_in_turn(layer, choice)


def _run_beside(layer: Layer, choice: Logits | Given, shared: Experts, beside: Beside) -> None:
    """The shared expert's GEMMs in the launches of the routing and of GEMM 1."""
    plan, experts, out = layer.plan, layer.experts, layer.out
    T, top_k, H, F = choice.tokens, choice.top_k, experts.hidden, experts.width
    ids = torch.empty((T, top_k), dtype=torch.int32, device=out.device)
    weights = torch.empty((T, top_k), dtype=torch.float32, device=out.device)
    order = ids, weights, *empty_order(T * top_k, choice.count, plan.block_m, out.device)
    tables = weights, order[3], order[4]
    shared_z, z = layer.empty_z(T), layer.empty_z(T * top_k)

    constants = layer.constants(F, H, beside.up, "X_FORMAT", "DTYPE")
    block_r = max(16, block_of_slots(choice.count) // 2)
    if isinstance(choice, Given):
        options = dict(BLOCK_R=block_r, BLOCK_G=padded_groups(choice.count))
        launch_sort_and_up(
            choice, plan.block_m, order, layer.x, shared, shared_z, options, constants, beside.up
        )
    else:
        options = _route_options(choice) | dict(BLOCK_R=block_r)
        launch_route_and_up(
            choice, plan.block_m, order, layer.x, shared, shared_z, options, constants, beside.up
        )
    names = "X_FORMAT", "Z_FORMAT", "DTYPE", "ON_INPUT"
    launch_up_and_down(
        layer.x, experts, z, tables, plan.block_m, shared_z, shared, layer.residual, out,
        layer.constants(F, H, plan.up, *names), plan.up, beside.down,
    )  # fmt: skip
    _finish(layer, z, tables, out, top_k)


def _run_in_turn(layer: Layer, choice: Logits | Given) -> None:
    """Routing, then both GEMMs, the shared expert's rows first and in the same accumulators."""
    plan, experts, shared = layer.plan, layer.experts, layer.shared
    top_k, H, F = choice.top_k, experts.hidden, experts.width
    tables, tile_count = _routed(choice, plan.block_m)
    if is_specialised(layer, top_k):
        return run_specialised(layer, tables, tile_count)
    z, shared_z = layer.empty_z(choice.tokens * top_k), None
    if shared is not None:
        shared_z = layer.empty_z(choice.tokens)
    launch_up(
        layer.x, experts, z, tables, plan.block_m,
        layer.constants(F, H, plan.up, "X_FORMAT", "DTYPE", "ON_INPUT"), astuple(plan.up),
        shared=shared, shared_z=shared_z,
    )  # fmt: skip
    residual = layer.residual
    if shared is not None and shared_z is not None and top_k > 1:  # the sum of the slots adds it
        constants = layer.constants(H, F, plan.down, "Z_FORMAT")
        launch_shared_down(shared_z, shared, layer.out, constants, astuple(plan.down), residual)
        residual, shared, shared_z = layer.out, None, None
    _finish(layer, z, tables, residual, top_k, shared, shared_z)


def _finish(
    layer: Layer,
    z: Rows,
    tables: Tables,
    residual: torch.Tensor | None,
    top_k: int,
    shared: Experts | None = None,
    shared_z: Rows | None = None,
) -> None:
    """GEMM 2 and the sum over k."""
    plan, experts = layer.plan, layer.experts
    direct = top_k == 1
    launch_down(
        z, experts, layer.out if direct else layer.workspace, tables[1:], plan.block_m,
        layer.constants(experts.hidden, experts.width, plan.down, "Z_FORMAT"), astuple(plan.down),
        residual=residual if direct else None, shared=shared, shared_z=shared_z,
    )  # fmt: skip
    if not direct:
        launch_sum(layer.workspace, residual, layer.out, top_k)


def _routed(choice: Logits | Given, block_m: int) -> tuple[Tables, torch.Tensor]:
    """And how many tiles there are, on the device."""
    if isinstance(choice, Given):
        tensors = routing._sort_by_expert_impl(
            choice.topk_ids, choice.topk_weights, choice.first, choice.count, choice.num_valid,
            block_m, None,
        )  # fmt: skip
    else:
        tensors = routing._route_impl(
            choice.logits, choice.top_k, choice.softmax, choice.renormalize, choice.first,
            choice.count, choice.num_valid, choice.logits_dtype, choice.score_dtype, block_m, None,
        )  # fmt: skip
    return (tensors[1], tensors[3], tensors[4]), tensors[5]


def _route_options(choice: Logits) -> dict[str, Any]:
    """The constexprs of `route_program` with the four warps of the shared expert's programs."""
    block_e = padded_groups(choice.logits.shape[-1])
    block_t = min(64, max(16, BESIDE_ELEMENTS // block_e))
    unroll = max(1, min(8, LOADED_ELEMENTS // (block_t * block_e)))
    return choice.options(unroll) | dict(BLOCK_T=block_t, BLOCK_E=block_e)
