"""Prefill problems over e4m3 caches, the kernel's own roundings emulated, and error bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from llama4_triton.bench.e4m3_cache import E4M3, LARGEST, quantized_cache, quantized_queries
from llama4_triton.kernels import reference
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.rope import Temperature

from .attention import Problem

__all__ = ["E4M3", "Quantized", "assert_quantized_close", "emulated", "quantized"]

# Largest relative error of rounding to each; a binade's smallest number has half a unit.
ROUNDING = {
    E4M3: 2.0**-4,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-23,
}


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Arguments of attention_prefill over e4m3 caches; q_scale is None unless q is e4m3 too."""

    q: torch.Tensor
    q_scale: torch.Tensor | None
    kv: PagedKV
    cu_seqlens: torch.Tensor
    seq_lens: torch.Tensor
    chunk_size: int

    def expected(
        self,
        temperature: Temperature | None = None,
        *,
        kv: PagedKV | None = None,
        sm_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in float64 of the same quantised inputs, or with other caches."""
        return reference.attention_prefill(
            self.q, kv or self.kv, self.cu_seqlens, self.seq_lens, chunk_size=self.chunk_size,
            q_scale=self.q_scale, temperature=temperature, out_dtype=torch.float64,
            sm_scale=sm_scale,
        )  # fmt: skip


def quantized(problem: Problem, *, kind: str, layout: str, q: bool = True) -> Quantized:
    """The problem with its caches, and q unless told otherwise, in e4m3."""
    rows, q_scale = quantized_queries(problem.q) if q else (problem.q, None)
    return Quantized(
        q=rows,
        q_scale=q_scale,
        kv=quantized_cache(problem.kv, kind, layout),
        cu_seqlens=problem.cu_seqlens,
        seq_lens=problem.seq_lens,
        chunk_size=problem.chunk_size,
    )


def emulated(
    given: Quantized, block_n: int, temperature: Temperature | None = None
) -> torch.Tensor:
    """out in float64 with the probabilities of each key tile rounded to e4m3 as the kernel does."""
    kv, (T, Hq, D) = given.kv, given.q.shape
    out = torch.zeros(T, Hq, D, dtype=torch.float64, device=given.q.device)
    bounds, group = given.cu_seqlens.tolist(), Hq // kv.num_kv_heads
    for b, seq_len in enumerate(given.seq_lens.tolist()):
        for i in range(bounds[b], bounds[b + 1]):
            p = seq_len - bounds[b + 1] + i
            lo = p // given.chunk_size * given.chunk_size if given.chunk_size else 0
            r = given.q_scale[i].double() * D**-0.5
            if temperature is not None:
                at = torch.tensor([p], device=out.device)
                r = r * reference.query_temperature(
                    at, temperature.attn_scale, temperature.floor_scale
                )
            m = torch.full((Hq,), -torch.inf, dtype=torch.float64, device=out.device)
            l, acc = torch.zeros_like(m), torch.zeros_like(out[i])
            for n0 in range(lo // block_n * block_n, p + 1, block_n):
                t = torch.arange(max(n0, lo), min(n0 + block_n, p + 1), device=out.device)
                k, v = reference.cached_keys(kv, b, t, torch.float64)
                k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
                weight, largest = torch.ones(len(t), Hq, device=out.device).double(), 1.0
                if kv.scale_kind == "token":
                    # The largest of a key tile is that of all keys loaded, up to the last row's.
                    live = torch.arange(max(n0, lo), min(n0 + block_n, seq_len))
                    page, slot = kv.block_table[b].long()[live // kv.page_size], live % kv.page_size
                    scale = kv.v_scale[page, slot].double().repeat_interleave(group, dim=1)
                    largest = scale.amax(0)
                    weight = scale[: len(t)] / largest
                s = torch.einsum("hd,thd->ht", given.q[i].double(), k) * r[:, None]
                m_new = torch.maximum(m, s.amax(1))
                P = 256 * torch.exp(s - m_new[:, None])
                alpha = torch.exp(m - m_new)
                rounded = (P * weight.T).float().to(E4M3).double()
                v = v / (weight * largest)[..., None]
                l = l * alpha + P.sum(1)
                acc = acc * alpha[:, None] + torch.einsum("ht,thd->hd", rounded, v) * (
                    largest[:, None] if kv.scale_kind == "token" else 1.0
                )
                m = m_new
            if l.any():
                out[i] = acc / l[:, None]
    return out


def assert_quantized_close(
    got: tuple[torch.Tensor, torch.Tensor],
    given: Quantized,
    temperature: Temperature | None = None,
) -> None:
    """Element by element against float64 of the same inputs.

    A probability P is rounded once, by `rounding` of it; in e4m3 after multiplication by 2^8, where
    what is below 2^-6 loses 2^-10 instead: 2^-18 of the row's largest, which the sum of the row is
    not less than. The weights of v's scales by token are at most 1. So with |v| at most `most`,
        |out - ref| <= (rounding + 1e-5) * sum(P |v|) / l + 2^-18 * keys * most + the output's own,
    where 1e-5 is for sums, exponentials and scores in fp32. LSE has no rounding of P: 1e-5.
    """
    (out, lse), (ref, lse_ref) = got, given.expected(temperature)
    assert out.shape == ref.shape and lse.dtype == torch.float32
    assert torch.equal(lse == -torch.inf, lse_ref == -torch.inf)
    visible = lse_ref > -torch.inf
    if not visible.any():
        assert not out.any()
        return
    worst = (lse.double() - lse_ref)[visible].abs().max()
    assert worst <= 1e-5 * max(1.0, lse_ref[visible].abs().max() / 16), worst
    kv = given.kv
    bits = kv.v_cache.view(torch.uint8) & 0x7F  # |v|
    absolute, _ = given.expected(temperature, kv=dataclasses.replace(kv, v_cache=bits.view(E4M3)))
    keys = int(given.seq_lens.max())
    most = float(absolute.abs().max()) if kv.scale_kind == "token" else 0.0
    most = max(most, float(kv.v_scale.nan_to_num(0.0).max()) * LARGEST)
    tiny = 2.0**-18 * keys * most if given.q.dtype == E4M3 else 0.0
    own = ROUNDING[out.dtype] * ref.abs()
    bound = (ROUNDING[given.q.dtype] + 1e-5) * absolute + tiny + own
    error = (out.double() - ref).abs()
    assert (error <= bound).all(), f"error {error.max():.3e}, {(error / bound).max():.2f} x bound"
