"""One mixture-of-experts layer of a full-size model, recorded: launches, allocations, binaries.

    layer = MoeLayer(shape=SCOUT, tp=8, T=64, format="e4m3_channel")
    layer.record().launches              # from the normed x to out, router and shared expert inside

What a GPU of a tensor-parallel group does (FFN widths divided by `tp`) or, with `ep`, of an
expert-parallel one, which has E / ep experts of the full width and no shared expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llama4_triton.autotune.launches import H100
from llama4_triton.autotune.recorder import Recording, record
from llama4_triton.kernels._launch import DeviceProperties
from llama4_triton.kernels.moe import moe

from .expert_weights import make_shared, make_weights
from .shapes import TextShape

__all__ = ["MoeLayer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeLayer:
    """A call of `moe` as a model or an engine makes it."""

    shape: TextShape
    T: int
    tp: int = 8
    ep: int = 1
    format: str = "plain"
    layout: str = "vllm"  # "hf" for plain weights
    has_shared: bool = True
    has_residual: bool = False
    routed_by: str = "w_router"  # or "logits", or "topk_ids"
    top_k: int = 1
    dtype: torch.dtype = torch.bfloat16
    fast_accum: bool = False
    batch_invariant: bool = False

    @property
    def id(self) -> str:
        parts = [self.shape.name, f"tp{self.tp}" if self.ep == 1 else f"ep{self.ep}"]
        parts += [self.format if self.format != "plain" else str(self.dtype).removeprefix("torch.")]
        parts += [f"T{self.T}"]
        plain = dict(layout="vllm", has_shared=self.ep == 1, routed_by="w_router", top_k=1)
        for name, value in plain.items():
            if getattr(self, name) != value:
                parts += [f"{name}={getattr(self, name)}"]
        parts += [name for name in ("fast_accum", "batch_invariant") if getattr(self, name)]
        return "-".join(parts)

    @property
    def E(self) -> int:
        """Experts of this GPU."""
        return self.shape.experts // self.ep

    @property
    def F(self) -> int:
        return self.shape.ffn // self.tp

    def inputs(self, device: str = "cuda") -> dict[str, Any]:
        """The arguments of `moe`; of fake tensors, when a recording makes them."""
        H, T, E = self.shape.hidden, self.T, self.shape.experts
        on: Any = torch.device(device)
        like: dict[str, Any] = dict(H=H, F=self.F, dtype=self.dtype, device=on, format=self.format)

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=on)

        routed: dict[str, Any] = dict(w_router=empty(E, H))
        if self.routed_by == "logits":
            routed = dict(logits=empty(T, E))
        elif self.routed_by == "topk_ids":
            ids = empty(T, self.top_k, dtype=torch.int32)
            routed = dict(topk_ids=ids, topk_weights=empty(T, self.top_k, dtype=torch.float32))
        x = empty(T, H)
        return dict(
            x=x,
            experts=make_weights(E=self.E, layout=self.layout, **like),
            **routed,
            shared=make_shared(**like) if self.has_shared else None,
            residual=empty(T, H) if self.has_residual else None,
            top_k=self.top_k,
            expert_range=(0, self.E) if self.ep > 1 else None,
            fast_accum=self.fast_accum,
            batch_invariant=self.batch_invariant,
        )

    def record(self, device: DeviceProperties = H100) -> Recording:
        """What one call launches, calls in ATen and allocates."""
        return record(lambda inputs: moe(**inputs), make=self.inputs, device=device)
