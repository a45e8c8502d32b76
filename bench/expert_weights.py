"""Weights of experts for cases and recordings, in every format, of values that nobody quantised.

    make_weights(E=16, H=5120, F=1024, format="int4_group", dtype=torch.bfloat16, device=device)

Drawn in the format itself: quantising gigabytes would take longer than what is looked at, and
scales that differ from row to row and from block to block show where the wrong one is read. z and
the output stay near 1. The constructors are those that checkpoints go through.
"""

from __future__ import annotations

import torch

from llama4_triton.kernels.expert_weights import GROUP, Experts

from .case import F32, randn

__all__ = ["FORMATS", "bytes_per_weight", "make_shared", "make_weights", "scale_bytes"]

FORMATS = ("plain", "e4m3_channel", "e4m3_block", "int4_group")
E4M3 = torch.float8_e4m3fn
# rms of what is drawn: normal values times 64, and integers from -8 to 7
RMS = {"e4m3_channel": 64.0, "e4m3_block": 64.0, "int4_group": 4.6}

Pair = tuple[torch.Tensor, torch.Tensor | None]


def make_weights(
    *,
    E: int,
    H: int,
    F: int,
    dtype: torch.dtype,
    device: torch.device,
    format: str = "plain",
    layout: str = "vllm",
) -> Experts:
    """Experts as vLLM has them, (E, 2F, H) and (E, H, F), or plain ones as transformers does."""
    if layout == "hf":
        gate_up = randn(E, H, 2 * F, dtype=dtype, device=device).mul_(2 / H**0.5)
        return Experts.from_hf(gate_up, randn(E, F, H, dtype=dtype, device=device).div_(F**0.5))
    w13, w13_scale = _drawn(E, 2 * F, H, 2.0, format, dtype, device)
    w2, w2_scale = _drawn(E, H, F, 1.0, format, dtype, device)
    return Experts.from_vllm(w13, w2, w13_scale, w2_scale)


def make_shared(
    *, H: int, F: int, dtype: torch.dtype, device: torch.device, format: str = "plain"
) -> Experts:
    """One expert, of three nn.Linear weights."""
    parts = [_drawn(1, *shape, format, dtype, device) for shape in _shared_shapes(H, F)]
    weights = [w[0] for w, _ in parts]
    return Experts.dense(*weights, *[None if s is None else s[0] for _, s in parts])


def _shared_shapes(H: int, F: int) -> list[tuple[int, int, float]]:
    """(N, K, rms times sqrt(K)) of gate, up and down."""
    return [(F, H, 2.0), (F, H, 2.0), (H, F, 1.0)]


def _drawn(
    E: int, N: int, K: int, rms: float, format: str, dtype: torch.dtype, device: torch.device
) -> Pair:
    """(weight, scale) of that many rows, each weight of about rms / sqrt(K)."""
    rms /= K**0.5
    if format == "plain":
        return randn(E, N, K, dtype=dtype, device=device).mul_(rms), None
    if format == "int4_group":
        weight = torch.randint(0, 256, (E, N, K // 2), dtype=torch.uint8, device=device)
        shape: tuple[int, ...] = (E, N, K // GROUP)
    else:
        weight = randn(E, N, K, dtype=dtype, device=device).mul_(RMS[format]).to(E4M3)
        shape = (E, N) if format == "e4m3_channel" else (E, N // GROUP, K // GROUP)
    scale = torch.rand(shape, dtype=F32, device=device).add_(0.5).mul_(rms / RMS[format])
    return weight, scale


def bytes_per_weight(format: str, dtype: torch.dtype) -> float:
    return {"plain": float(dtype.itemsize), "int4_group": 0.5}.get(format, 1.0)


def scale_bytes(format: str, N: int, K: int) -> int:
    """fp32 scales of an (N, K) matrix."""
    rows = N // GROUP if format == "e4m3_block" else N
    columns = {"plain": 0, "e4m3_channel": 1}.get(format, K // GROUP)
    return 4 * rows * columns
