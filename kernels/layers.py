"""Layers of transformers' Llama 4 computed by these kernels: MoE, RMSNorm, dense MLP.

Plain functions of the host module, whose attributes are those of transformers' classes
(models/llama4/modeling_llama4.py), and the same as stateless modules, the form in which Hugging
Face's `kernels` package replaces a forward:

    Llama4TextMoe.forward(module, hidden_states)  =  moe_forward(module, hidden_states)

The activation is taken to be SiLU: whoever puts these in place checks `config.hidden_act`.
Inference only: call under torch.no_grad().
"""

from __future__ import annotations

from typing import Any

import torch

from .expert_weights import Experts
from .moe import moe
from .rms_norm import rms_norm
from .swiglu import swiglu

__all__ = [
    "Llama4TextMLP",
    "Llama4TextMoe",
    "Llama4TextRMSNorm",
    "mlp_forward",
    "moe_forward",
    "rms_norm_forward",
]


def moe_forward(module: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward of transformers' Llama4TextMoe.

    Args:
        module: has top_k, hidden_dim, router, experts.gate_up_proj (E, H, 2F), experts.down_proj
            (E, F, H) and shared_expert.{gate,up,down}_proj.weight. Experts made beforehand, such as
            quantised ones, are taken from its _llama4_triton_experts and _llama4_triton_shared,
            both in one format.
        hidden_states: (..., H) in the weights' dtype.
    Returns:
        out (T, H) in that dtype and router_logits (T, E).
    Raises:
        What `moe` raises.
    Numerics: those of `moe` with logits given; the routing weight is rounded to x.dtype, as there.
    """
    x = hidden_states.reshape(-1, module.hidden_dim)
    _, logits = module.router(x)  # the module, not its weight: hooks on it record the logits
    experts = getattr(module, "_llama4_triton_experts", None)
    if experts is None:
        experts = Experts.from_hf(module.experts.gate_up_proj, module.experts.down_proj)
    shared = getattr(module, "_llama4_triton_shared", None)
    if shared is None:
        mlp = module.shared_expert
        shared = Experts.dense(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    out = moe(x, experts, top_k=module.top_k, logits=logits, shared=shared, score_dtype=x.dtype)
    return out, logits


def rms_norm_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of transformers' Llama4TextRMSNorm; x: (..., H) in module.weight's dtype."""
    return rms_norm(x.reshape(-1, x.shape[-1]), module.weight, module.eps).view(x.shape)


def mlp_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of transformers' Llama4TextMLP; x: (..., H). The projections stay modules."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    F = gate.shape[-1]
    z = swiglu(gate.reshape(-1, F), up.reshape(-1, F))
    return module.down_proj(z.view(gate.shape))


# Stateless, as `kernels` demands: no constructor, no members but forward and the two flags.


class Llama4TextMoe(torch.nn.Module):
    """See `moe_forward`."""

    can_torch_compile = True
    has_backward = False

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return moe_forward(self, hidden_states)


class Llama4TextRMSNorm(torch.nn.Module):
    """See `rms_norm_forward`."""

    can_torch_compile = True
    has_backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm_forward(self, x)


class Llama4TextMLP(torch.nn.Module):
    """See `mlp_forward`."""

    can_torch_compile = True
    has_backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return mlp_forward(self, x)
