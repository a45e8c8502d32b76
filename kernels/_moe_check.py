"""What moe checks of its arguments, before anything is written."""

from __future__ import annotations

import torch

from . import routing
from ._check import FLOATS, check_architecture, check_devices, check_index, check_tensor, require
from ._grouped_gemm_check import check_activations, combine_workspace_numel
from ._remembered import remembered
from ._routing_table import MAX_EXPERTS, check_sizes
from .expert_weights import Experts, check_experts

__all__ = ["check_moe"]


@remembered
def check_moe(
    op: str,
    x: torch.Tensor,
    experts: Experts,
    top_k: int,
    w_router: torch.Tensor | None,
    logits: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    shared: Experts | None,
    residual: torch.Tensor | None,
    scoring: str,
    score_dtype: torch.dtype | None,
    weight_on: str,
    expert_range: tuple[int, int] | None,
    num_valid_tokens: torch.Tensor | None,
    x_quantized: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[int, int]:
    """Return the first expert of this GPU and the elements of the workspace.

    Raises:
        ValueError: shapes, strides, devices, top_k and options.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    """
    check_tensor(op, "x", x, ("T", "H"), FLOATS)
    T, H = x.shape
    check_experts(op, experts, H, x.dtype)
    check_architecture(op, x)
    given = dict(w_router=w_router, logits=logits, topk_ids=topk_ids)
    chosen = [name for name, value in given.items() if value is not None]
    require(len(chosen) == 1, op, "w_router, logits or topk_ids must be given, one of them", chosen)
    must = "topk_weights must be given with topk_ids, and not without"
    require((topk_ids is None) == (topk_weights is None), op, must, topk_weights)
    count = experts.num_experts
    first, E = (0, count) if expert_range is None else (expert_range[0], None)
    if expert_range is not None:
        must = f"expert_range must be (first, {count}) to match experts"
        require(expert_range[1] == count and first >= 0, op, must, expert_range)
    if w_router is not None:
        check_tensor(op, "w_router", w_router, (E or "E", H), (x.dtype,))
        E = w_router.shape[0]
    elif logits is not None:
        check_tensor(op, "logits", logits, (T, E or "E"), FLOATS)
        E = logits.shape[1]
    elif topk_ids is not None and topk_weights is not None:
        check_index(op, "topk_ids", topk_ids, (T, top_k))
        check_tensor(op, "topk_weights", topk_weights, (T, top_k), (torch.float32,))
    E = E or MAX_EXPERTS  # whoever gives ids knows how many there are
    must = f"expert_range must end within the {E} experts"
    require(first + count <= E, op, must, expert_range)
    check_sizes(op, T, E, top_k, None)
    routing.check_rounding(op, "score_dtype", score_dtype)
    must = "score_dtype must be None with topk_ids, whose weights are taken as they are"
    require(score_dtype is None or topk_ids is None, op, must, score_dtype)
    for name, value, known in (
        ("scoring", scoring, routing.SCORINGS), ("weight_on", weight_on, ("input", "output"))
    ):  # fmt: skip
        require(value in known, op, f"{name} must be one of {', '.join(known)}", repr(value))
    if shared is not None:
        check_experts(op, shared, H, x.dtype, name="shared")
        same = (shared.num_experts, shared.width, shared.format) == (
            1, experts.width, experts.format
        )  # fmt: skip
        must = f"shared must be one expert of width {experts.width} in format {experts.format}"
        require(same, op, must, f"{tuple(shared.gate.shape)} in {shared.format}")
    if residual is not None:
        check_tensor(op, "residual", residual, (T, H), (x.dtype,))
    if num_valid_tokens is not None:
        check_index(op, "num_valid_tokens", num_valid_tokens, (1,))
    x_q, x_scale = x_quantized or (None, None)
    if x_q is not None:
        check_activations(op, x_q, x_scale, experts)
        require(x_q.shape == x.shape, op, "x_quantized must have the shape of x", x_q.shape)
    check_devices(
        op, x=x, experts=experts.gate.weight, w_router=w_router, logits=logits, topk_ids=topk_ids,
        topk_weights=topk_weights, shared=None if shared is None else shared.gate.weight,
        residual=residual, num_valid_tokens=num_valid_tokens, x_quantized=x_q,
    )  # fmt: skip
    return first, combine_workspace_numel(T, top_k, H)
