"""Classes that take the place of transformers' Llama 4 layers on these kernels.

Each is a subclass without state of its own and with the original's name, so that a module becomes
one by `module.__class__ = ...` and back, and nothing that is saved or loaded changes. Where the
kernels do not apply (gradients, autocast, tensors that are sharded) it calls the original forward
and counts why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llama4_triton.kernels._check import FLOATS
from llama4_triton.kernels.layers import mlp_forward, moe_forward, rms_norm_forward

from .transformers_attention import fall_back

__all__ = ["replacements", "why_left"]

MAX_TOP_K = 8


@functools.cache
def replacements() -> dict[type[nn.Module], type[nn.Module]]:
    """transformers' class -> ours, made at the first call."""
    from transformers.models.llama4 import modeling_llama4 as hf

    def weights_of_moe(module: Any) -> list[torch.Tensor]:
        mlp, experts = module.shared_expert, module.experts
        shared = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
        return [experts.gate_up_proj, experts.down_proj, *shared]

    ours: tuple[Any, ...] = (
        (hf.Llama4TextMoe, moe_forward, weights_of_moe),
        (hf.Llama4TextRMSNorm, rms_norm_forward, lambda module: [module.weight]),
        (hf.Llama4TextMLP, mlp_forward, lambda module: []),  # its projections stay modules
    )
    return {entry[0]: _replacement(*entry) for entry in ours}


def __getattr__(name: str) -> Any:
    """The classes by name, as pickle looks for them."""
    if name.startswith("Llama4"):
        for ours in replacements().values():
            if ours.__name__ == name:
                return ours
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def why_left(module: Any) -> str | None:
    """Why `module`, of a class that can be replaced, must stay as it is; None: it need not."""
    for name, part in module.named_modules():
        if "forward" in vars(part):
            return f"the forward of {name or 'it'} is wrapped (offloading?)"
    act = getattr(getattr(module, "experts", None), "act_fn", None)
    act = getattr(module, "activation_fn", act)
    if act is not None and type(act).__name__ not in ("SiLU", "SiLUActivation"):
        return f"its activation is {type(act).__name__}, not SiLU"
    if not hasattr(module, "experts"):
        return None
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(module.shared_expert, name)
        if type(linear) is not nn.Linear or linear.bias is not None:
            return f"shared_expert.{name} is {type(linear).__name__}, not a plain nn.Linear"
    if module.top_k > MAX_TOP_K:
        return f"top_k is {module.top_k}, more than {MAX_TOP_K}"
    return None


def _replacement(
    original: Any,
    forward: Callable[..., Any],
    weights: Callable[[Any], list[torch.Tensor]],
) -> type[nn.Module]:
    def checked(self: nn.Module, x: torch.Tensor) -> Any:
        reason = _why_not(self, x, weights(self))
        if reason is None:
            return forward(self, x)
        fall_back(f"{original.__name__}: {reason}")
        return original.forward(self, x)

    members = dict(forward=checked, __module__=__name__, __doc__=f"{original.__name__} on kernels.")
    return type(original.__name__, (original,), members)


def _why_not(module: nn.Module, x: torch.Tensor, weights: list[torch.Tensor]) -> str | None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *module.parameters())):
        return "gradients are recorded; call under torch.no_grad()"
    if weights and torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if x.dtype not in FLOATS or any(w.dtype != x.dtype for w in weights):
        return f"weights that are not in the activations' type, {x.dtype}"
    if any(type(t).__name__ == "DTensor" for t in (x, *weights)):
        return "sharded tensors"
    return None
