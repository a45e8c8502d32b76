"""Calls of `moe` with what they must return: drawn from a seed, judged element by element.

The reference is float64 on the same quantised inputs, except that z is rounded as the layer rounds
it. The layer's own z comes from fp32 sums, so where z lies within `DOUBT` of a point at which its
rounding changes, either value is right: the difference of the two, carried through |w_down|, is
added to what an element may be off by, and taken off its error in the other measures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from llama4_triton.bench.accuracy import BOUNDS, SIGMAS, Errors, measure
from llama4_triton.kernels import reference
from llama4_triton.kernels._launch import device_properties
from llama4_triton.kernels.expert_weights import Experts, Projection, dequantize, quantize_experts
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.moe_plan import plan

__all__ = ["Call", "assert_layer", "exact_router", "make_experts", "make_shared", "sparse_rows"]

F64 = torch.float64
# Of z, relative to itself and to the rms of its row: fp32 sums are off by 2.3e-6 of their rms, the
# sigmoids of the score and of SwiGLU by as much, and z has two such factors.
DOUBT = 8e-6


def make_experts(
    E: int, H: int, F: int, dtype: torch.dtype, *, format: str = "plain", layout: str = "vllm",
    generator: torch.Generator | None = None,
) -> Experts:  # fmt: skip
    """E experts whose gate and up are near 2, so that SwiGLU is far from linear, and z near 1."""
    w13 = torch.randn(E, 2 * F, H, generator=generator) * 2 / H**0.5
    w2 = torch.randn(E, H, F, generator=generator) / F**0.5
    w13, w2 = w13.to(dtype), w2.to(dtype)
    if layout == "hf":
        experts = Experts.from_hf(w13.mT.contiguous(), w2.mT.contiguous())
    else:
        experts = Experts.from_vllm(w13, w2)
    return experts if format == "plain" else quantize_experts(experts, format)


def make_shared(
    H: int, F: int, dtype: torch.dtype, *, format: str = "plain",
    generator: torch.Generator | None = None,
) -> Experts:  # fmt: skip
    one = make_experts(1, H, F, dtype, generator=generator)
    gate, up, down = (p.weight[0] for p in (one.gate, one.up, one.down))
    shared = Experts.dense(gate, up, down)
    return shared if format == "plain" else quantize_experts(shared, format)


def sparse_rows(
    T: int, H: int, dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """x of multiples of 1/16 below 4: with `exact_router` its logits are exact in any order."""
    x = torch.randn(T, H, generator=generator)
    return ((x * 16).round() / 16).clamp(-4, 4).to(dtype)


def exact_router(
    E: int, H: int, dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Router weights of four ones and twos per expert: sums of so few short numbers are exact."""
    columns = torch.rand(E, H, generator=generator).argsort(1)[:, :4]
    values = torch.randint(1, 3, (E, 4), generator=generator) * 2.0 - 3
    values[:, 2:] *= 2
    return torch.zeros(E, H).scatter_(1, columns, values).to(dtype)


@dataclass
class Call:
    """Arguments of one call of `moe`."""

    x: torch.Tensor
    experts: Experts
    top_k: int
    kwargs: dict[str, Any] = field(default_factory=dict)  # all the others

    def run(self, **changes: Any) -> torch.Tensor:
        return moe(self.x, self.experts, top_k=self.top_k, **self.kwargs | changes)

    def routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids among the experts that are here, and weights; the logits are taken as exact."""
        k = self.kwargs
        kept = k.get("expert_range") or (0, self.experts.num_experts)
        valid = k.get("num_valid_tokens")
        if k.get("topk_ids") is not None:
            return reference.local_experts(k["topk_ids"], k["topk_weights"], kept, valid)
        logits, dtype = k.get("logits"), None
        if logits is None:
            logits, dtype = self.x.double() @ k["w_router"].double().T, self.x.dtype
        return reference.route(
            logits, self.top_k, scoring=k.get("scoring", "sigmoid"),
            renormalize=k.get("renormalize", False), expert_range=kept, num_valid_tokens=valid,
            logits_dtype=dtype, score_dtype=k.get("score_dtype"),
        )  # fmt: skip

    def expected(self) -> Expected:
        k, experts = self.kwargs, self.experts
        shared, residual = k.get("shared"), k.get("residual")
        activation = z_activation = None
        in_e4m3 = experts.format.startswith("e4m3")
        if in_e4m3 and device_properties(self.x.device).capability >= (8, 9):
            activation = "group" if experts.format == "e4m3_block" else "row"
            z_activation = "group"
        options = dict(activation=activation, weight_on=k.get("weight_on", "input"))
        ids, weights = self.routing()
        everyone = torch.zeros_like(ids[:, :1]), torch.ones_like(weights[:, :1])
        routed, doubt = self._part(experts, ids, weights, z_activation, options)
        out, before = routed, torch.zeros_like(routed)
        if shared is not None:
            before, more = self._part(shared, *everyone, z_activation, options)
            doubt = doubt + more
        if residual is not None:
            before = before + residual.double()
        out = routed + before
        chosen = plan(
            T=max(1, len(self.x)), H=experts.hidden, F=experts.width, E=experts.num_experts,
            top_k=self.top_k, dtype=self.x.dtype, format=experts.format,
            has_shared=shared is not None, batch_invariant=k.get("batch_invariant", False),
        )  # fmt: skip
        twice = shared is not None and (chosen.regime == "some" or self.top_k > 1)
        return Expected(out=out, doubt=doubt, before=before if twice else None)

    def _part(
        self, experts: Experts, ids: torch.Tensor, weights: torch.Tensor,
        z_activation: str | None, options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        z = reference.grouped_gemm_swiglu(self.x, experts, ids, weights, out_dtype=F64, **options)
        spread = DOUBT * (z.abs() + z.pow(2).mean(1, keepdim=True).sqrt())
        low, middle, high = (
            _rounded(value, self.x.dtype, z_activation) for value in (z - spread, z, z + spread)
        )
        plain = Projection(weight=dequantize(experts.down, F64).abs())
        sizes = Experts(gate=experts.gate, up=experts.up, down=plain)
        width = (high - low).abs().nan_to_num(0.0, 0.0, 0.0)
        doubt = reference.grouped_gemm_combine(width, sizes, ids)
        plain = Projection(weight=dequantize(experts.down, F64))
        wide = Experts(gate=experts.gate, up=experts.up, down=plain)
        return reference.grouped_gemm_combine(middle, wide, ids), doubt


@dataclass(frozen=True, kw_only=True)
class Expected:
    out: torch.Tensor  # (T, H) float64
    doubt: torch.Tensor  # what roundings of z may move it by
    before: torch.Tensor | None  # what is rounded by itself before the routed experts are added


def _rounded(z: torch.Tensor, dtype: torch.dtype, activation: str | None) -> torch.Tensor:
    """What z counts as, in float64."""
    z = z.to(dtype)
    if activation is None:
        return z.double()
    z_q, scale = reference.quantize_groupwise(z)
    return z_q.double() * scale.double().repeat_interleave(128, dim=1)[:, : z.shape[1]]


def assert_layer(out: torch.Tensor, expected: Expected, rows: torch.Tensor | None = None) -> Errors:
    """Assert that `rows` of `out`, by default all that are finite, are as expected."""
    want, dtype = expected.out, out.dtype
    if rows is None:
        rows = want.isfinite().all(1)
    got, want, doubt = out.double()[rows], want[rows], expected.doubt[rows]
    noise = 0.0
    if expected.before is not None and len(want):
        before = expected.before[rows].abs()
        own, whole = (t.pow(2).mean(1).sqrt() for t in (before, want))
        tiny = torch.finfo(dtype).tiny
        noise = BOUNDS[dtype].rms * float((own / whole.clamp_min(tiny)).max())
        # The few that are larger than what `measure` takes Gaussian noise to be.
        far = before * BOUNDS[dtype].unit > SIGMAS * BOUNDS[dtype].rms * own[:, None]
        doubt = doubt + torch.where(far, before * BOUNDS[dtype].unit, 0.0)
    error = got - want
    error = error.sign() * (error.abs() - doubt).clamp_min(0.0)
    errors = measure(want + error, want, dtype=dtype, noise=noise)
    if errors.broken:
        raise AssertionError(f"{tuple(out.shape)} {dtype}: {errors}")
    return errors
