"""The routed experts of a mixture-of-experts layer: routing and two grouped GEMMs.

    out[t] = sum over the top_k experts e of t, with routing weight s, of
             (silu(s * x[t] @ w_gate[e]) * (s * x[t] @ w_up[e])) @ w_down[e]    + residual[t]

Everything stays on the device, without waiting for it: the sizes of the experts' groups reach the
GEMMs as a table of tiles. See routing.py, grouped_gemm.py and grouped_gemm_combine.py.
"""

from __future__ import annotations

import torch

from ._check import check_index, check_tensor, require
from .grouped_gemm import Experts, grouped_gemm_swiglu
from .grouped_gemm_combine import grouped_gemm_combine
from .routing import Routing, route, sort_by_expert

__all__ = ["moe"]


def moe(
    x: torch.Tensor,
    router: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    experts: Experts,
    *,
    top_k: int,
    residual: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Send each token through its `top_k` experts and add `residual`.

    Args:
        x: (T, H) fp32, fp16 or bf16, dense rows.
        router: logits (T, E), or a routing made elsewhere: (expert_ids (T, top_k) int32,
            expert_weights (T, top_k) fp32).
        experts: weights in x.dtype.
        residual: (T, H) in x.dtype; the shared expert's output.
        workspace: as in `grouped_gemm_combine`.
    Returns:
        (T, H) in x.dtype.
    Raises:
        ValueError: shapes, strides, devices or top_k.   TypeError: dtypes.
    Numerics: two roundings to x.dtype, of z and of the result. Deterministic; a token depends on
        itself only.
    Cost: 6*R*H*F flops; bytes = that of the parts.
    Source: see the parts; reference: kernels/reference.py:moe.
    """
    routing = _routing(router, len(experts.w_gate_up), top_k)
    z = grouped_gemm_swiglu(x, experts, routing)
    return grouped_gemm_combine(z, experts, routing, residual=residual, workspace=workspace)


def _routing(
    router: torch.Tensor | tuple[torch.Tensor, torch.Tensor], E: int, top_k: int
) -> Routing:
    if isinstance(router, torch.Tensor):
        check_tensor("moe", "router", router, ("T", E), (router.dtype,), unit_last_stride=False)
        return route(router, top_k)
    must = "router must be logits or (expert_ids, expert_weights)"
    is_pair = isinstance(router, tuple) and len(router) == 2
    require(is_pair, "moe", must, type(router).__name__, TypeError)
    expert_ids, expert_weights = router
    check_index("moe", "expert_ids", expert_ids, ("T", top_k))
    return sort_by_expert(expert_ids, expert_weights, E)
