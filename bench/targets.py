"""What MoE and attention are designed to reach on an H100, beside what has been reached.

    targets()      # rows: the case, its active experts and bytes, the figure to beat, the target

Nobody has measured these kernels on an H100: `measured` is empty until a report is committed. A
target is a design goal, not a claim. Bytes are what must move at least: active experts, x and out,
once each; `floor_us` is those at 3.35 TB/s, or the FLOPs at the data sheet's dense rate if longer.
Source of the figures to beat: MetaShuffling (PyTorch blog, 2025-05-12, H100 SXM 700 W, rotating
buffers, CUDA graph); its times of single GEMMs are recalled from that post, not re-read. vLLM's
33 us for one token: vllm-project/vllm#29329, device not stated. Marlin: by its own ratio.
Attention: 378 TFLOP/s is the best causal figure of plain Triton that was found, FlashAttention-3's
is 602 (its figures of forward in 16 bits, 2024); there is none for decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .shapes import MAVERICK, SCOUT, TextShape

__all__ = ["ATTENTION", "TARGETS", "AttentionTarget", "Target", "targets"]

BANDWIDTH = 3.35e12  # bytes per second
DENSE = {2: 989e12, 1: 1979e12}  # FLOP per second by bytes of an operand


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    case: str
    shape: TextShape
    tp: int
    tokens: int
    active: int  # experts that get a token
    itemsize: float  # bytes per weight
    gemms: tuple[str, ...]  # of "router", "up" (w13), "down" (w2)
    shared: bool  # the shared expert too
    unit: str  # "us", to stay below; "TFLOP/s", to exceed; "of Marlin", time to stay below
    target: float
    to_beat: float

    @property
    def flops(self) -> int:
        H, F = self.shape.hidden, self.shape.ffn // self.tp
        per_token = {"router": H * self.shape.experts, "up": 2 * F * H, "down": F * H}
        times = {"router": 1, "up": 1 + self.shared, "down": 1 + self.shared}
        return 2 * self.tokens * sum(per_token[gemm] * times[gemm] for gemm in self.gemms)

    @property
    def bytes(self) -> float:
        H, F = self.shape.hidden, self.shape.ffn // self.tp
        experts = self.active + self.shared
        weights = {
            "router": 2 * H * self.shape.experts,
            "up": experts * 2 * F * H * self.itemsize,
            "down": experts * F * H * self.itemsize,
        }
        rows = {"router": 0, "up": H + F, "down": F + H}  # 16-bit activations in and out
        moved = sum(weights[gemm] + 2 * self.tokens * rows[gemm] for gemm in self.gemms)
        return moved

    @property
    def floor_us(self) -> float:
        rate = DENSE[1 if self.itemsize == 1 else 2]
        return 1e6 * max(self.bytes / BANDWIDTH, self.flops / rate)


def _gemm(
    shape: TextShape, name: str, gemm: str, tokens: int, itemsize: float, unit: str,
    target: float, to_beat: float,
) -> Target:  # fmt: skip
    return Target(
        case=f"{shape.name} {name} TP8, {gemm} of the routed experts", shape=shape, tp=8,
        tokens=tokens, active=shape.experts, itemsize=itemsize, gemms=(gemm,), shared=False,
        unit=unit, target=target, to_beat=to_beat,
    )  # fmt: skip


TARGETS = (
    Target(
        case="scout bf16 TP8, whole layer", shape=SCOUT, tp=8, tokens=64, active=16, itemsize=2,
        gemms=("router", "up", "down"), shared=True, unit="us", target=185.0, to_beat=197.456,
    ),
    _gemm(SCOUT, "fp8", "up", 128, 1, "us", 57.0, 59.81),
    _gemm(SCOUT, "fp8", "down", 128, 1, "us", 30.0, 34.86),
    _gemm(MAVERICK, "fp8", "up", 128, 1, "us", 435.0, 440.53),
    _gemm(MAVERICK, "fp8", "down", 128, 1, "us", 222.0, 225.14),
    _gemm(SCOUT, "bf16", "up", 16_384, 2, "TFLOP/s", 680.0, 655.90),
    _gemm(SCOUT, "bf16", "down", 16_384, 2, "TFLOP/s", 620.0, 582.46),
    _gemm(SCOUT, "fp8", "up", 16_384, 1, "TFLOP/s", 1200.0, 1197.64),
    _gemm(SCOUT, "fp8", "down", 16_384, 1, "TFLOP/s", 1000.0, 941.83),
    Target(
        case="routing of 128 tokens to 128 experts", shape=MAVERICK, tp=8, tokens=128, active=0,
        itemsize=2, gemms=(), shared=False, unit="us", target=6.0, to_beat=9.0,
    ),
    Target(
        case="scout bf16 TP8, routed experts of one token", shape=SCOUT, tp=8, tokens=1, active=1,
        itemsize=2, gemms=("up", "down"), shared=False, unit="us", target=16.0, to_beat=28.19,
    ),
    Target(
        case="scout int4 TP8, routed experts", shape=SCOUT, tp=8, tokens=64, active=16,
        itemsize=0.5 + 2 / 128, gemms=("up", "down"), shared=False, unit="of Marlin", target=1.0,
        to_beat=1.0,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTarget:
    case: str
    tokens: int  # of keys
    bytes: float
    flops: float
    unit: str
    target: float
    to_beat: float | None = None
    active: int | None = None

    @property
    def floor_us(self) -> float:
        return 1e6 * max(self.bytes / BANDWIDTH, self.flops / DENSE[2])


def _attention_targets() -> tuple[AttentionTarget, ...]:
    """Of one layer with all its heads on one GPU."""
    heads, kv_heads, D = SCOUT.heads, SCOUT.kv_heads, SCOUT.head_dim
    chunk, million = SCOUT.chunk, 1_048_576

    def causal(tokens: int) -> float:
        return 4.0 * heads * D * (tokens * (tokens + 1) // 2)

    def keys(tokens: int, itemsize: int) -> float:
        return 2.0 * tokens * kv_heads * D * itemsize

    def rows(tokens: int) -> float:
        return 4.0 * tokens * heads * D  # q and out in bf16

    return (
        AttentionTarget(
            case="prefill, causal, bf16", tokens=chunk, bytes=keys(chunk, 2) + rows(chunk),
            flops=causal(chunk), unit="TFLOP/s", target=560.0, to_beat=378.0,
        ),
        AttentionTarget(
            case="local layer, prefill, bf16", tokens=million,
            bytes=keys(million, 2) + rows(million), flops=causal(chunk) * (million // chunk),
            unit="of 128 separate chunks", target=1.15,
        ),
        AttentionTarget(
            case="global layer, decode, e4m3", tokens=million, bytes=keys(million, 1),
            flops=4.0 * heads * D * million, unit="us", target=800.0,
        ),
        AttentionTarget(
            case="local layer, decode, e4m3", tokens=chunk, bytes=keys(chunk, 1),
            flops=4.0 * heads * D * chunk, unit="us", target=15.0,
        ),
        AttentionTarget(
            case="schedule, once per step", tokens=million, bytes=0.0, flops=0.0, unit="us",
            target=10.0,
        ),
    )  # fmt: skip


ATTENTION = _attention_targets()


def targets() -> list[dict[str, Any]]:
    """One row per target; `measured` is None, because nothing has been measured."""
    every: tuple[Target | AttentionTarget, ...] = (*TARGETS, *ATTENTION)
    return [
        dict(
            case=target.case,
            tokens=target.tokens,
            active=target.active,
            bytes=target.bytes,
            floor_us=target.floor_us,
            to_beat=target.to_beat,
            target=target.target,
            unit=target.unit,
            measured=None,
        )
        for target in every
    ]
