"""A mixture-of-experts layer in few launches: router, routing, experts, shared expert.

    s[t, k], e[t, k] = the top_k of w_router @ x[t], scored                     (routing.py)
    out[t] = sum over k of W_down[e] @ swiglu(s * W_gate[e] @ x[t], s * W_up[e] @ x[t])
             + the shared expert's W_down @ swiglu(W_gate @ x[t], W_up @ x[t]) + residual[t]

    tokens        launches
    1 to 4        router | GEMM 1, whose programs choose their experts, and the shared GEMM 1
                  | GEMM 2 of all of them in one accumulator                    (moe_few_tokens.py)
    up to 512     router | routing in one program, the shared GEMM 1 beside it | GEMM 1, the shared
                  GEMM 2 beside it | GEMM 2                                        (moe_shared.py)
    more          router | top-k and counts | scan | scatter | GEMM 1, the shared one first
                  | GEMM 2, the shared one first in the same accumulator

e4m3 experts quantise x in the router's launch. Everything stays on the device, without waiting for
it: the sizes of the experts' groups reach the GEMMs as a table of tiles.
Source: llama-models llama4/moe.py.
"""

from __future__ import annotations

from typing import Any

import torch

from . import router
from ._check import is_aligned
from ._expert_operands import E4M3, Rows, flattened, multiplied_dtype, unflattened
from ._launch import device_properties, empty_workspace
from ._library import define
from ._moe_check import check_moe
from ._moe_operands import Given, Layer, Logits
from ._moe_steps import run
from ._paths import features
from ._sizes import flat
from .expert_weights import Experts
from .moe_plan import plan
from .quantize import quantize_groupwise, quantize_rowwise

__all__ = ["moe"]


def moe(
    x: torch.Tensor,
    experts: Experts,
    *,
    top_k: int,
    w_router: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    shared: Experts | None = None,
    residual: torch.Tensor | None = None,
    scoring: str = "sigmoid",
    renormalize: bool = False,
    score_dtype: torch.dtype | None = None,
    weight_on: str = "input",
    expert_range: tuple[int, int] | None = None,
    num_valid_tokens: torch.Tensor | None = None,
    x_quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
    fast_accum: bool = False,
    batch_invariant: bool = False,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Send each token through its `top_k` experts and the shared one, and add `residual`.

    Args:
        x: (T, H) fp32, fp16 or bf16, dense rows.
        experts: of this GPU, in one format; plain ones in x.dtype.
        top_k: 1 to min(8, E).
        w_router, logits, topk_ids with topk_weights: one of them. The router's weights (E, H) in
            x.dtype; logits (T, E); or a routing made elsewhere, (T, top_k) int32 and fp32.
        shared: an expert that every token meets with weight 1 (`Experts.dense`), in the format of
            `experts`.
        residual: (T, H) in x.dtype.
        scoring, renormalize, score_dtype: as in `route`; a score_dtype not with topk_ids.
        weight_on: the routing weight scales the expert's "input" (Llama 4), or its "output".
        expert_range: (first, count) of all E experts: those that `experts` holds.
        num_valid_tokens: (1,) int32, read on the device: later tokens meet no routed expert.
        x_quantized: (x_q, x_scale) of x for e4m3 experts, if something made them already, such as
            `rms_norm_quantize`.
        fast_accum: leave whole sums of e4m3 products to the tensor cores (fp8_matmul.py).
        batch_invariant: a token's bits depend on that token alone, not on how many there are or
            where it stands: tiles, splits and order are chosen from (N, K, E, dtype, GPU) only.
        workspace: `grouped_gemm_combine.combine_workspace_numel(T, top_k, H)` fp32 elements.
    Returns:
        (T, H) in x.dtype.
    Raises:
        ValueError: shapes, strides, devices, top_k and options.   TypeError: dtypes.
        UnsupportedArchitectureError: bf16 on a GPU before sm_80.
    Numerics: router logits are summed in fp32 and rounded to x.dtype; weights in fp32,
        or rounded to score_dtype. z is rounded to x.dtype, and then to e4m3 where the experts are.
        One more rounding, of the result; from 5 to 512 tokens another one before the routed experts
        are added to the shared one. With 4 slots at most z is not rounded before SwiGLU's factors
        are summed over slices of H.
        Deterministic; a token depends on itself only.
    Cost: 6*R*H*F flops, and as much per token for `shared`; bytes of x, out and active experts.
    Source: see the module; reference: kernels/reference.py:moe_layer.
    """
    op = "moe"
    first, numel = check_moe(
        op, x, experts, top_k, w_router, logits, topk_ids, topk_weights, shared, residual, scoring,
        score_dtype, weight_on, expert_range, num_valid_tokens, x_quantized,
    )  # fmt: skip
    x_q, x_scale = x_quantized or (None, None)
    return _moe(
        x, x_q, x_scale, w_router, logits, topk_ids, topk_weights,
        *flattened(experts), *flattened(shared), residual, num_valid_tokens,
        empty_workspace(op, numel, workspace, x.device),
        top_k, scoring == "softmax", renormalize, score_dtype, weight_on == "input", first,
        fast_accum, batch_invariant,
    )  # fmt: skip


def _moe_impl(
    x: torch.Tensor, x_q: torch.Tensor | None, x_scale: torch.Tensor | None,
    w_router: torch.Tensor | None, logits: torch.Tensor | None,
    topk_ids: Any, topk_weights: Any,  # both or none
    weights: list[torch.Tensor], scales: list[torch.Tensor],
    shared_weights: list[torch.Tensor], shared_scales: list[torch.Tensor],
    residual: torch.Tensor | None, num_valid: torch.Tensor | None, workspace: torch.Tensor,
    top_k: int, softmax: bool, renormalize: bool, score_dtype: torch.dtype | None,
    on_input: bool, first: int, fast_accum: bool, batch_invariant: bool,
) -> torch.Tensor:  # fmt: skip
    T, H = x.shape
    experts = unflattened(weights, scales)
    shared = unflattened(shared_weights, shared_scales) if shared_weights else None
    properties = device_properties(x.device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if T == 0:
        return out
    multiplied = multiplied_dtype(experts, x.dtype, properties)
    projections = experts.gate.weight, experts.up.weight, experts.down.weight
    count = experts.num_experts
    chosen = plan(
        T=T, H=H, F=experts.width, E=count, top_k=top_k, dtype=x.dtype, multiplied=multiplied,
        routed_to=count if w_router is None else len(w_router),
        format=experts.format, has_shared=shared is not None, fast_accum=fast_accum,
        batch_invariant=batch_invariant, properties=properties,
        last_arriver="last_arriver" in features("moe", x.device),
        aligned=is_aligned((H, experts.width), x, *projections),
    )  # fmt: skip

    # e4m3 experts want x in e4m3: quantised beside the router, or where there is none, before.
    by = "group" if experts.format == "e4m3_block" else "row"
    quantize = by if multiplied == E4M3 and x_q is None else None
    if w_router is not None:
        splits = router.num_slices(H, chosen.router_splits, chosen.router.BLOCK_K)
        logits, *made = router._router_impl(x, w_router, splits, quantize, flat(chosen.router))
        x_q, x_scale = made if quantize else (x_q, x_scale)
    elif quantize is not None:
        x_q, x_scale = {"row": quantize_rowwise, "group": quantize_groupwise}[quantize](x)
    layer = Layer(
        x=Rows.of(x) if x_q is None or multiplied != E4M3 else Rows.of(x_q, x_scale),
        x_format=by if multiplied == E4M3 else "plain",
        dtype=x.dtype, multiplied=multiplied, experts=experts, shared=shared,
        residual=residual, out=out, workspace=workspace, on_input=on_input,
        fast_accum=fast_accum, plan=chosen,
    )  # fmt: skip
    choice: Given | Logits
    if logits is None:
        choice = Given(
            topk_ids=topk_ids, topk_weights=topk_weights,
            num_valid=num_valid, first=first, count=count,
        )  # fmt: skip
    else:
        choice = Logits(
            logits=logits, top_k=top_k, softmax=softmax, renormalize=renormalize,
            logits_dtype=x.dtype if w_router is not None else None, score_dtype=score_dtype,
            num_valid=num_valid, first=first, count=count,
        )  # fmt: skip
    run(layer, choice)
    return out


_moe = define(
    "moe(Tensor x, Tensor? x_q, Tensor? x_scale, Tensor? w_router, Tensor? logits,"
    " Tensor? topk_ids, Tensor? topk_weights, Tensor[] weights, Tensor[] scales,"
    " Tensor[] shared_weights, Tensor[] shared_scales, Tensor? residual, Tensor? num_valid,"
    " Tensor(a!) workspace, int top_k, bool softmax, bool renormalize,"
    " ScalarType? score_dtype, bool on_input, int first, bool fast_accum, bool batch_invariant)"
    " -> Tensor",
    _moe_impl,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)
