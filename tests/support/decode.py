"""Problems of attention_decode: several new rows, both page layouts, e4m3 caches, temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from support.attention import assert_attention_close, make_problem

from llama4_triton.kernels import reference
from llama4_triton.kernels.attention_decode import AttentionDecodeConfig, attention_decode
from llama4_triton.kernels.attention_decode_schedule import (
    DecodeSchedule,
    DecodeScheduleConfig,
    decode_schedule,
)
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.rope import Temperature

__all__ = ["SMALL", "SPLIT", "SPLITS", "Decode", "make_decode", "quantized", "transposed"]

E4M3 = torch.float8_e4m3fn
# Tiles and splits small enough that few keys have several.
SMALL = AttentionDecodeConfig(BLOCK_N=16, num_warps=4, num_stages=1)
SPLITS = DecodeScheduleConfig(
    UNIT=16, MIN_SPLIT=16, programs_per_sm=8, BLOCK_B=4, BLOCK_I=8, num_warps=4
)
SPLIT = replace(SPLITS, UNIT=64, MIN_SPLIT=64)


@dataclass(frozen=True, kw_only=True)
class Decode:
    q: torch.Tensor  # (T, Hq, D)
    kv: PagedKV
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    max_q_len: int
    chunk_size: int
    temperature: Temperature | None

    def schedule(
        self, config: DecodeScheduleConfig | None = None, split_tokens: int = 0
    ) -> DecodeSchedule:
        return decode_schedule(
            self.seq_lens, chunk_size=self.chunk_size, capacity=self.kv.capacity,
            num_kv_heads=self.kv.num_kv_heads, page_size=self.kv.page_size,
            cu_seqlens_q=self.cu_seqlens_q, max_q_len=self.max_q_len, split_tokens=split_tokens,
            config=config,
        )  # fmt: skip

    def run(
        self,
        splits: DecodeScheduleConfig | None = None,
        split_tokens: int = 0,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if splits or split_tokens:
            options["schedule"] = self.schedule(splits, split_tokens)
        options.setdefault("checked", True)
        return attention_decode(
            self.q, self.kv, self.seq_lens, cu_seqlens_q=self.cu_seqlens_q,
            max_q_len=self.max_q_len, chunk_size=self.chunk_size, temperature=self.temperature,
            **options,
        )  # fmt: skip

    @property
    def multiplies_e4m3(self) -> bool:
        """Whether q and the probabilities are rounded to e4m3."""
        fp32 = self.q.dtype == torch.float32
        return self.kv.is_quantized and self.kv.layout == "transposed_v" and not fp32

    def seen(self) -> torch.Tensor:
        """q as the tensor cores see it, in float64."""
        if not self.multiplies_e4m3:
            return self.q.double()
        q, scale = reference.quantize_rowwise(self.q.flatten(0, 1))
        return (q.double() * scale.double()[:, None]).view(self.q.shape)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in float64."""
        return reference.attention_decode(
            self.seen(), self.kv, self.seq_lens, cu_seqlens_q=self.cu_seqlens_q,
            chunk_size=self.chunk_size, temperature=self.temperature,
        )  # fmt: skip

    def _rows(self):
        """(row, position, k, v) of every row that sees a key, k and v in float64."""
        B = len(self.seq_lens)
        bounds = range(B + 1) if self.cu_seqlens_q is None else self.cu_seqlens_q.tolist()
        for b, seq_len in enumerate(self.seq_lens.tolist()):
            for row in range(bounds[b], bounds[b + 1]):
                p = seq_len - bounds[b + 1] + row
                start = p // self.chunk_size * self.chunk_size if self.chunk_size else 0
                if p >= 0:
                    yield row, p, *reference.cached(self.kv, b, start, p + 1, torch.float64)

    def same_dtype(self) -> torch.Tensor:
        """PyTorch's own answer in the dtype of q; the measure of what is attainable."""
        out = torch.zeros_like(self.q)
        for row, p, k, v in self._rows():
            q = self.q[row]
            if self.temperature is not None:
                steps = (p + 1) // self.temperature.floor_scale
                log = torch.log1p(torch.tensor(steps, dtype=torch.float64))
                q = q * (1.0 + self.temperature.attn_scale * log).to(q.dtype)
            k, v = (x.to(q.dtype).transpose(0, 1)[None] for x in (k, v))
            rows = torch.nn.functional.scaled_dot_product_attention(
                q[None, :, None], k, v, enable_gqa=True
            )
            out[row] = rows[0, :, 0]
        return out

    def e4m3_bound(self, want: torch.Tensor) -> torch.Tensor:
        """Largest error that rounding the probabilities to e4m3, and out, can make.

        A probability, or its product with the token's scale, is rounded relative to the largest of
        its tile so far: by 2^-4 of itself, or, where that is less, by half of the smallest e4m3,
        2^-10, with 2^8 for the largest. And fp32 sums of a few thousand terms: 1e-5.
        """
        q, bound = self.seen(), torch.zeros_like(want)
        group = q.shape[1] // self.kv.num_kv_heads
        for row, p, k, v in self._rows():
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v.abs()))  # (t, Hq, D)
            scores = torch.einsum("hd,thd->ht", q[row], k) * k.shape[-1] ** -0.5
            if self.temperature is not None:
                steps = (p + 1) // self.temperature.floor_scale
                scores *= 1.0 + self.temperature.attn_scale * math.log(steps + 1)
            mean = torch.einsum("ht,thd->hd", torch.softmax(scores, 1), v)
            bound[row] = 2**-4 * mean + 2**-18 * v.shape[0] * v.amax()
        return bound + 2**-8 * want.abs() + 1e-5 * (1 + want.abs().amax())

    def check(self, got: tuple[torch.Tensor, torch.Tensor]) -> None:
        out, lse = got
        want, lse_ref = self.expected()
        if not self.multiplies_e4m3:
            assert_attention_close(got, (want, lse_ref), self.same_dtype())
            return
        assert out.shape == want.shape and lse.dtype == torch.float32
        if not out.numel():
            return
        assert torch.equal(lse == -torch.inf, lse_ref == -torch.inf)
        visible = lse_ref > -torch.inf
        assert not out[~visible].any()
        assert ((lse.double() - lse_ref)[visible].abs() <= 1e-5).all()
        excess = (out.double() - want).abs() - self.e4m3_bound(want)
        assert (excess <= 0).all(), excess.max()


def make_decode(
    seq_lens: list[int],
    q_lens: list[int] | None = None,
    *,
    Hq: int = 5,
    Hkv: int = 1,
    D: int = 128,
    page_size: int = 64,
    chunk_size: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    scales: str = "",
    layout: str = "nhd",
    temperature: Temperature | None = None,
    spread: float = 1.0,
    device: torch.device,
) -> Decode:
    """q_lens None: one row of q per sequence, NaN where it has no token. scales: "head" or "token"
    of an e4m3 cache, "" for one of `dtype`."""
    new = [min(n, 1) for n in seq_lens] if q_lens is None else q_lens
    base = make_problem(
        new, seq_lens, Hq=Hq, Hkv=Hkv, D=D, page_size=page_size, chunk_size=chunk_size,
        dtype=torch.float32 if scales else dtype, device=device, spread=spread,
    )  # fmt: skip
    q, kv = base.q.to(dtype), base.kv
    if q_lens is None:
        rows = base.seq_lens > 0
        q = torch.full((len(seq_lens), Hq, D), torch.nan, dtype=dtype, device=device)
        q[rows] = base.q.to(dtype)
    if scales:
        kv = quantized(kv, scales)
    if layout == "transposed_v":
        kv = transposed(kv)
    return Decode(
        q=q, kv=kv, seq_lens=base.seq_lens,
        cu_seqlens_q=None if q_lens is None else base.cu_seqlens,
        max_q_len=1 if q_lens is None else max([*q_lens, 1]), chunk_size=chunk_size,
        temperature=temperature,
    )  # fmt: skip


def quantized(kv: PagedKV, kind: str) -> PagedKV:
    """e4m3 caches under scales of a head or of a token; what was NaN stays NaN, scales too."""
    out: dict[str, torch.Tensor] = {}
    for name, x in (("k", kv.k_cache), ("v", kv.v_cache)):
        wide = x.float()
        if kind == "token":
            scale = wide.abs().amax(-1) / 448.0  # (pages, page_size, Hkv)
            x_q = (wide / scale[..., None]).to(E4M3)
        else:
            scale = wide.nan_to_num().abs().amax((0, 1, 3)).clamp(min=1e-12) / 448.0
            x_q = (wide / scale[:, None]).to(E4M3)
        out |= {f"{name}_cache": x_q, f"{name}_scale": scale}
    return replace(kv, **out)


def transposed(kv: PagedKV) -> PagedKV:
    v = kv.v_cache.permute(0, 2, 3, 1).contiguous()
    return replace(kv, v_cache=v, layout="transposed_v")
