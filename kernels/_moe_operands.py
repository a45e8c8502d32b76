"""What one call of `moe` is about, resolved: the layer, and where its routing comes from."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch

from ._expert_operands import E4M3, TL_DTYPES, Rows, tile_constants
from .expert_weights import GROUP, Experts
from .grouped_gemm_config import GroupedGemmConfig
from .moe_plan import MoePlan
from .routing import ROUND_TO

__all__ = ["Given", "Layer", "Logits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """A routing made elsewhere."""

    topk_ids: torch.Tensor  # (T, top_k) int32, of all experts
    topk_weights: torch.Tensor  # (T, top_k) fp32
    num_valid: torch.Tensor | None  # (1,) int32
    first: int  # expert of this GPU
    count: int  # of them

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def tokens(self) -> int:
        return self.topk_ids.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Logits:
    """Logits to choose by."""

    logits: torch.Tensor  # (T, E), or partial sums (S, T, E) fp32
    num_valid: torch.Tensor | None
    first: int
    count: int
    top_k: int
    softmax: bool
    renormalize: bool
    logits_dtype: torch.dtype | None  # partial sums are rounded to it
    score_dtype: torch.dtype | None  # and weights to this

    @property
    def tokens(self) -> int:
        return self.logits.shape[-2]

    @property
    def slices(self) -> tuple[int, int]:
        """How many partial sums there are, and the stride from one to the next."""
        return (len(self.logits), self.logits.stride(0)) if self.logits.ndim == 3 else (1, 0)

    def options(self, unroll: int) -> dict[str, Any]:
        """The constexprs of how logits are read; `unroll` partial sums at a time."""
        return dict(
            IS_SOFTMAX=self.softmax, RENORMALIZE=self.renormalize,
            ROUND_TO=ROUND_TO[self.logits_dtype], ROUND_SCORE=ROUND_TO[self.score_dtype],
            TOP_K=self.top_k, UNROLL=unroll if self.logits.ndim == 3 else 0,
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

    def constants(self, N: int, K: int, config: GroupedGemmConfig, *names: str) -> dict[str, Any]:
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
