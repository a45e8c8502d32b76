"""How many GPUs a model and its context need, and how fast a decode step can be: from bytes alone.

    GPUs     n = tp * groups; tp divides the KV heads, and groups share what tp leaves too large
    memory   (routed experts + global pool) / n + (other weights + local pool) / tp + activations
    floor    bytes that a step reads on one GPU / bandwidth: weights as above, where of the routed
             experts those are read that B tokens are expected to choose; global KV / n; local / tp

Routed experts and whole chunks of the context are divided over all GPUs; what every token meets is
divided by heads and columns, and repeated in each group. The floor is modelled, not measured: it
counts no activations, no communication and no launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .cache_size import CacheFormat, pool_bytes
from .config import Llama4Config
from .generate import prefill_tokens
from .plan import memory_plan

__all__ = ["BANDWIDTH", "ServingPlan", "WeightFormat", "serving_plan", "uniform_bytes"]

WeightFormat = Literal["bf16", "fp8", "int4"]  # of the experts; all else stays bf16
BANDWIDTH = 3.35e12  # bytes per second of an H100's HBM3
MAX_GROUPS = 1024
FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingPlan:
    """Bytes of all GPUs together, unless they are said to be one's."""

    routed_bytes: int
    other_bytes: int  # all other weights, once
    pools: Mapping[str, int]  # "global", "local"
    activation_bytes: int  # of each GPU: an estimate from above
    tp: int
    groups: int
    memory_per_gpu: int
    routed_read: float  # of a decode step
    other_read: int
    pools_read: Mapping[str, int]

    @property
    def weights_bytes(self) -> int:
        return self.routed_bytes + self.other_bytes

    @property
    def gpus(self) -> int:
        return self.tp * self.groups

    @property
    def per_gpu_bytes(self) -> float:
        divided = self.routed_bytes + self.pools["global"]
        repeated = self.other_bytes + self.pools["local"]
        return divided / self.gpus + repeated / self.tp + self.activation_bytes

    @property
    def fits(self) -> bool:
        return self.per_gpu_bytes <= self.memory_per_gpu

    @property
    def read_per_gpu(self) -> float:
        divided = self.routed_read + self.pools_read["global"]
        return divided / self.gpus + (self.other_read + self.pools_read["local"]) / self.tp

    @property
    def floor_ms(self) -> float:
        return self.read_per_gpu / BANDWIDTH * 1e3


def serving_plan(
    config: Llama4Config,
    *,
    context: int,
    batch: int = 1,
    weights: WeightFormat = "bf16",
    format: CacheFormat | None = None,
    memory_per_gpu: int = 80 * 10**9,
    gpus: int | None = None,
) -> ServingPlan:
    """Plan for `batch` sequences of `context` tokens.

    Args:
        gpus: how many there are; None: the fewest that have room.
    Raises:
        ValueError: an argument out of range, a number of GPUs that the KV heads do not allow, or
            no number of GPUs has room.
    """
    for name, value in (("context", context), ("batch", batch), ("memory", memory_per_gpu)):
        if value < 1:
            raise ValueError(f"plan: {name} must be >= 1, got {value}")
    if weights not in get_args(WeightFormat):
        known = ", ".join(get_args(WeightFormat))
        raise ValueError(f"plan: weights must be one of {known}, got {weights!r}")
    format = format or CacheFormat()
    counts = config.parameter_counts()
    H, E, moe = config.hidden_size, config.num_local_experts, config.num_moe_layers
    expert = _expert_bytes(config, weights)
    dense = counts["text"] - counts["routed_experts"] - counts["shared_experts"]
    # Of an embedding that is no head, a step reads a row per token.
    tables = 0 if config.tie_word_embeddings else counts["embedding"]
    chosen = E * (1.0 - (1.0 - config.num_experts_per_tok / E) ** batch) if E else 0.0
    pools = pool_bytes(
        config, [context] * batch, step_tokens=prefill_tokens(config), aligned=True, format=format
    )

    def plan(tp: int, groups: int) -> ServingPlan:
        return ServingPlan(
            routed_bytes=moe * E * expert,
            other_bytes=moe * expert + 2 * dense,
            pools=pools,
            activation_bytes=memory_plan(config, [context], dtype=torch.bfloat16).activation_bytes,
            tp=tp,
            groups=groups,
            memory_per_gpu=memory_per_gpu,
            routed_read=moe * chosen * expert,
            other_read=moe * expert + 2 * (dense - tables + batch * H),
            pools_read=_pools_read(config, context, batch, format),
        )

    heads = config.num_key_value_heads
    allowed = [tp for tp in range(1, heads + 1) if heads % tp == 0]
    if gpus is not None:
        if gpus not in allowed and (gpus < 1 or gpus % heads):
            raise ValueError(
                f"plan: gpus must be one of {', '.join(map(str, allowed))} or a multiple of "
                f"{heads}, the KV heads, got {gpus}"
            )
        return plan(min(gpus, heads), -(-gpus // heads))
    choices = [(tp, 1) for tp in allowed] + [(heads, g) for g in range(2, MAX_GROUPS + 1)]
    for tp, groups in choices:
        made = plan(tp, groups)
        if made.fits:
            return made
    alone = (made.other_bytes + pools["local"]) / heads + made.activation_bytes
    raise ValueError(
        f"plan: memory must hold what {heads}-way tensor parallelism leaves on each GPU, "
        f"{alone / 1e9:.1f} GB without experts and context, got {memory_per_gpu / 1e9:.1f} GB"
    )


def uniform_bytes(config: Llama4Config, context: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes of a cache that keeps every token in every layer, without pages or scales."""
    token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return batch * context * config.num_hidden_layers * token


def _expert_bytes(config: Llama4Config, weights: WeightFormat) -> int:
    """Of one expert: e4m3 with a scale per output channel, int4 with one per 128 inputs."""
    H, ffn = config.hidden_size, config.intermediate_size
    values = 3 * H * ffn
    if weights == "bf16":
        return 2 * values
    if weights == "fp8":
        return values + FP32 * (2 * ffn + H)
    return values // 2 + FP32 * values // 128


def _pools_read(
    config: Llama4Config, context: int, batch: int, format: CacheFormat
) -> dict[str, int]:
    """K, V and scales of tokens that the last token of each sequence sees."""
    chunk = config.attention_chunk_size or context
    visible = {"global": context, "local": (context - 1) % chunk + 1}
    layers = {"global": config.num_global_layers}
    layers["local"] = config.num_hidden_layers - layers["global"]
    out = {}
    for pool, tokens in visible.items():
        row = config.head_dim * format.dtype(pool).itemsize
        if len(format.scale_shape(pool, 1, 1, 1)) == 3:
            row += FP32
        out[pool] = 2 * batch * layers[pool] * tokens * config.num_key_value_heads * row
    return out
