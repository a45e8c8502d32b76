"""Rotary frequencies and the cos/sin tables that `rope_and_cache` reads; plain PyTorch.

    inv_freq[i] = theta^(-2i / D)                        i < D/2, scaled as Llama 3 does on request
    table[r]    = [cos(fp32(p_r) * inv_freq) | sin(fp32(p_r) * inv_freq)]        one row of D

Where positions are absolute the angle is rounded to fp32, as transformers and Meta's code do: at
ten million tokens that is up to half a radian, and part of the model. RoPE scores depend on
differences only, so a layer that never compares tokens of different chunks may rotate by p % chunk
instead: right at any length, and a table of `chunk` rows serves all tokens. Its angles are float64,
since fp32 ones cost a score up to 0.004 at the end of a chunk of 8192.
Source: transformers modeling_rope_utils._compute_llama3_parameters, Llama4TextRotaryEmbedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ._check import check_tensor, require

__all__ = [
    "RopeScaling",
    "RopeTable",
    "Temperature",
    "build_rope_table",
    "check_rope_options",
    "rope_inv_freq",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling; wavelengths beyond the original context grow by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeTable:
    """Which row of `cos_sin` rotates token t at position p.

    Args:
        cos_sin: (rows, D) fp32 contiguous, D/2 cosines then D/2 sines.
        period: > 0: row p % period, for a layer with chunks of `period` tokens; 0: row t, the
            table is made for the tokens of one call, at their absolute positions.
    """

    cos_sin: torch.Tensor
    period: int

    @classmethod
    def for_chunk(cls, inv_freq: torch.Tensor, chunk_size: int) -> RopeTable:
        """Chunk-relative positions: built once per model, serves every call."""
        positions = torch.arange(chunk_size, device=inv_freq.device)
        return cls(cos_sin=build_rope_table(inv_freq, positions, exact=True), period=chunk_size)

    @classmethod
    def for_positions(cls, inv_freq: torch.Tensor, positions: torch.Tensor) -> RopeTable:
        """Absolute positions, bit for bit as transformers: built once per step."""
        return cls(cos_sin=build_rope_table(inv_freq, positions), period=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Temperature:
    """Scale of q at position p: 1 + attn_scale * ln(floor((p + 1) / floor_scale) + 1)."""

    attn_scale: float
    floor_scale: float


def rope_inv_freq(
    theta: float,
    head_dim: int,
    *,
    scaling: RopeScaling | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return the (D/2,) fp32 inverse frequencies."""
    exponent = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    inv_freq = 1.0 / theta**exponent
    if scaling is None:
        return inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / scaling.factor, inv_freq)
    if low == high:
        return scaled  # no band between the two: Scout, where the formula below is 0/0
    smooth = (context / wavelength - low) / (high - low)
    blend = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, blend, scaled)


def build_rope_table(
    inv_freq: torch.Tensor, positions: torch.Tensor, *, exact: bool = False
) -> torch.Tensor:
    """Return (len(positions), D) fp32: cosines then sines of position * inv_freq.

    exact: in float64, rounded once at the end; else in fp32, as transformers.
    """
    wide = torch.float64 if exact else torch.float32
    angle = positions.to(wide)[:, None] * inv_freq.to(wide)
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def check_rope_options(
    op: str,
    rope: RopeTable | None,
    qk_norm_eps: float | None,
    temperature: Temperature | None,
    num_tokens: int,
    head_dim: int,
) -> None:
    """Check the table, which must have a row for each of `num_tokens` tokens, and the numbers."""
    if rope is not None:
        table = rope.cos_sin
        check_tensor(op, "rope.cos_sin", table, ("rows", head_dim), (torch.float32,))
        require(rope.period >= 0, op, "rope.period must be >= 0", rope.period)
        rows = rope.period or num_tokens
        must = f"rope.cos_sin must be contiguous with at least {rows} rows"
        enough = table.is_contiguous() and table.shape[0] >= rows
        require(enough, op, must, tuple(table.shape))
    if qk_norm_eps is not None:
        valid = 0 <= qk_norm_eps < float("inf")
        require(valid, op, "qk_norm_eps must be finite and >= 0", qk_norm_eps)
    if temperature is not None:
        for name in ("attn_scale", "floor_scale"):
            value = getattr(temperature, name)
            valid = abs(value) < float("inf") and (name == "attn_scale" or value > 0)
            must = "finite" if name == "attn_scale" else "finite and > 0"
            require(valid, op, f"temperature.{name} must be {must}", value)
