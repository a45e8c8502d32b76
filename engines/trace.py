"""What a model computes on the way to its logits, by place, so that two engines can be compared.

    Place(step=0, layer=3, op="attention: queries")   ->   (T, Hq, D) fp32 on the CPU

A trace is a dict in the order of execution; engines that record the same places are comparable.
Tensors have the step's tokens first, in the layout of the released checkpoints: interleaved RoPE
pairs, experts by number. Step 0 is the prefill, every other step one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["OPS", "Place", "Recorder", "Trace", "hooked"]

# Each operation of a layer and of the model's ends, and the modules whose weights it reads.
OPS = {
    "embedding": ("embed_tokens",),
    "input norm": ("input_layernorm",),
    "attention: queries": ("self_attn.q_proj",),  # rotated, normalised, scaled by the temperature
    "attention: keys": ("self_attn.k_proj",),
    "attention: values": ("self_attn.v_proj",),
    "attention: output": ("self_attn.o_proj",),
    "post-attention norm": ("post_attention_layernorm",),
    "router: logits": ("feed_forward.router",),
    "router: experts": (),  # (T, k) their numbers, in ascending order
    "router: scores": (),  # (T, E), 0 of those that are not chosen
    "MoE": ("feed_forward.experts", "feed_forward.shared_expert"),
    "MLP": ("feed_forward",),
    "hidden state": (),  # what the next layer gets
    "final norm": ("norm",),
    "logits": ("lm_head",),
}


class Place(NamedTuple):
    """Where in a run a tensor was computed."""

    step: int
    layer: int | None  # None: before or after the layers
    op: str


Trace = dict[Place, torch.Tensor]


class Recorder:
    """Keeps what hooks hand over, in the order in which they do."""

    def __init__(self) -> None:
        self.trace: Trace = {}
        self.step = 0

    def keep(self, layer: int | None, op: str, value: torch.Tensor) -> None:
        self.trace[Place(self.step, layer, op)] = value.detach().float().cpu()

    def after(self, module: nn.Module, layer: int | None, op: str) -> RemovableHandle:
        """Keep the output of `module`, the first of several, as (T, width)."""

        def hook(_module: nn.Module, _inputs: object, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            self.keep(layer, op, first.reshape(-1, first.shape[-1]))

        return module.register_forward_hook(hook)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens inside."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()
