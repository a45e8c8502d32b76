"""The launches of `moe`, by regime; moe.py checks and explains, moe_plan.py chooses.

Everything here is on tensors that have been checked. A `Layer` is what does not depend on the
routing, a `Choice` is where the routing comes from.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch

from . import routing
from ._expert_operands import E4M3, TL_DTYPES, Rows, tile_constants
from ._routing_table import default_config as routing_config
from .counting_sort import block_of_slots, empty_order, padded_groups
from .expert_weights import GROUP, Experts
from .grouped_gemm import launch_up
from .grouped_gemm_combine import launch_down, launch_shared_down, launch_sum
from .moe_few_tokens import launch_few_down, launch_few_up
from .moe_plan import MoePlan
from .moe_shared import launch_route_and_up, launch_sort_and_up, launch_up_and_down

__all__ = ["Choice", "Layer", "run"]

BESIDE_ELEMENTS = 4096  # of a block of logits: four warps hold half as many as eight


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Logits (T, E) or (S, T, E), or ids and weights (T, top_k); and how to read them."""

    logits: torch.Tensor | None
    topk_ids: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_valid: torch.Tensor | None
    top_k: int
    first: int
    count: int
    softmax: bool
    renormalize: bool
    logits_dtype: torch.dtype | None

    @property
    def tokens(self) -> int:
        return len(self.topk_ids) if self.logits is None else self.logits.shape[-2]

    def options(self, unroll: int) -> dict[str, Any]:
        """The constexprs of how logits are read; `unroll` slices of partial sums at a time."""
        return dict(
            IS_SOFTMAX=self.softmax, RENORMALIZE=self.renormalize,
            ROUND_TO=routing.ROUND_TO[self.logits_dtype], TOP_K=self.top_k,
            UNROLL=unroll if self.logits.ndim == 3 else 0,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """x as it is multiplied, the weights, and where results go."""

    x: Rows
    x_format: str
    dtype: torch.dtype
    multiplied: torch.dtype
    experts: Experts
    shared: Experts | None
    residual: torch.Tensor | None
    out: torch.Tensor
    workspace: torch.Tensor
    on_input: bool
    fast_accum: bool
    plan: MoePlan

    @property
    def z_format(self) -> str:
        if self.multiplied != E4M3:
            return "plain"
        return "group" if self.plan.quantize_z else "quantise"

    def constants(self, N: int, K: int, config: Any, *names: str) -> dict[str, Any]:
        """The constexprs of a GEMM with N outputs and K inputs; `names` are those beyond all's."""
        every = dict(
            X_FORMAT=self.x_format, Z_FORMAT=self.z_format, DTYPE=TL_DTYPES[self.dtype],
            ON_INPUT=self.on_input,
        )  # fmt: skip
        present = [part for part in (self.experts, self.shared) if part is not None]
        common = tile_constants(present, N, K, self.fast_accum, astuple(config))
        return common | {name: every[name] for name in names}

    def empty_z(self, rows: int) -> Rows:
        """Uninitialised rows of z, and their scales if GEMM 1 quantises them."""
        F, out = self.experts.width, self.out
        if not self.plan.quantize_z:
            return Rows.of(out.new_empty((rows, F)))
        z = out.new_empty((rows, F), dtype=E4M3)
        return Rows.of(z, out.new_empty((rows, F // GROUP), dtype=torch.float32))


def run(layer: Layer, choice: Choice) -> None:
    """Compute layer.out."""
    if layer.plan.regime == "few" and choice.logits is not None:
        launch_few_down(layer, launch_few_up(layer, choice))
    elif layer.plan.regime == "some" and layer.shared is not None:
        _run_beside(layer, choice)
    else:
        _run_in_turn(layer, choice)


def _run_beside(layer: Layer, choice: Choice) -> None:
    """The shared expert's GEMMs in the launches of the routing and of GEMM 1."""
    plan, experts, shared, out = layer.plan, layer.experts, layer.shared, layer.out
    T, top_k, H, F = choice.tokens, choice.top_k, experts.hidden, experts.width
    ids = torch.empty((T, top_k), dtype=torch.int32, device=out.device)
    weights = torch.empty((T, top_k), dtype=torch.float32, device=out.device)
    order = ids, weights, *empty_order(T * top_k, choice.count, plan.block_m, out.device)
    tables = weights, order[3], order[4]
    sizes = choice.first, choice.count, plan.block_m
    shared_z, z = layer.empty_z(T), layer.empty_z(T * top_k)

    constants = layer.constants(F, H, plan.shared_up, "X_FORMAT", "DTYPE")
    if choice.logits is None:
        options = dict(BLOCK_R=_block_r(choice.count), BLOCK_G=padded_groups(choice.count))
        launch_sort_and_up(
            choice.topk_ids, choice.topk_weights, choice.num_valid, order,
            layer.x, shared, shared_z, sizes, options, constants, plan.shared_up,
        )  # fmt: skip
    else:
        launch_route_and_up(
            choice.logits, choice.num_valid, order,
            layer.x, shared, shared_z, sizes, _route_options(choice), constants, plan.shared_up,
        )  # fmt: skip
    names = "X_FORMAT", "Z_FORMAT", "DTYPE", "ON_INPUT"
    launch_up_and_down(
        layer.x, experts, z, tables, plan.block_m, shared_z, shared, layer.residual, out,
        layer.constants(F, H, plan.up, *names), plan.up, plan.shared_down,
    )  # fmt: skip
    _finish(layer, z, tables, out, top_k)


def _run_in_turn(layer: Layer, choice: Choice) -> None:
    """Routing, then both GEMMs, the shared expert's rows first and in the same accumulators."""
    plan, experts, shared, out = layer.plan, layer.experts, layer.shared, layer.out
    T, top_k, H, F = choice.tokens, choice.top_k, experts.hidden, experts.width
    tables = _routed(choice, plan.block_m)
    z = layer.empty_z(T * top_k)
    shared_z = None if shared is None else layer.empty_z(T)
    launch_up(
        layer.x, experts, z, tables, plan.block_m,
        layer.constants(F, H, plan.up, "X_FORMAT", "DTYPE", "ON_INPUT"), astuple(plan.up),
        shared=shared, shared_z=shared_z,
    )  # fmt: skip
    residual = layer.residual
    if shared is not None and top_k > 1:  # the sum of the slots adds it
        constants = layer.constants(H, F, plan.down, "Z_FORMAT")
        launch_shared_down(shared_z, shared, out, constants, astuple(plan.down), residual)
        residual, shared = out, None
    _finish(layer, z, tables, residual, top_k, shared, shared_z)


def _finish(
    layer: Layer,
    z: Rows,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
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
        residual=residual if direct else None, shared=shared, shared_z=shared and shared_z,
    )  # fmt: skip
    if not direct:
        launch_sum(layer.workspace, residual, layer.out, top_k)


def _routed(choice: Choice, block_m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """expert_weights, row_slot and tiles."""
    E = choice.count if choice.logits is None else choice.logits.shape[-1]
    config = list(astuple(routing_config(choice.tokens, E, choice.top_k)))
    if choice.logits is None:
        tensors = routing._sort_by_expert_impl(
            choice.topk_ids, choice.topk_weights, choice.first, choice.count, choice.num_valid,
            block_m, config,
        )  # fmt: skip
    else:
        tensors = routing._route_impl(
            choice.logits, choice.top_k, choice.softmax, choice.renormalize, choice.first,
            choice.count, choice.num_valid, choice.logits_dtype, block_m, config,
        )  # fmt: skip
    return tensors[1], tensors[3], tensors[4]


def _block_r(experts: int) -> int:
    return max(16, block_of_slots(experts) // 2)


def _route_options(choice: Choice) -> dict[str, Any]:
    """The constexprs of `route_program` with the four warps of the shared expert's programs."""
    T, E = choice.logits.shape[-2:]
    block_e = padded_groups(E)
    block_t = min(BESIDE_ELEMENTS // block_e, 16 if T <= 16 else 64 if T <= 64 else 256)
    unroll = max(1, min(16, 2 * BESIDE_ELEMENTS // (block_t * block_e)))
    return choice.options(unroll) | dict(
        BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_R=_block_r(choice.count)
    )
