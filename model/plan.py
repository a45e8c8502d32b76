"""Memory that a model, a context and a step need, before anything is allocated.

    weights     = text parameters * itemsize, or what a checkpoint's are (fp8_checkpoint.py)
    cache       = kv_bytes(config, lengths)                     pages of both pools
    activations = step tokens * (6 H + 2 (Hq + 2 Hkv) D + 3 max(F, F_mlp)) * itemsize
                  + logits rows * V * itemsize

The first two are exact. The third is an estimate from above of what one layer and the head hold
at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .cache_size import DEFAULT_PAGE_SIZE, CacheFormat, kv_bytes
from .config import Llama4Config
from .generate import prefill_tokens

__all__ = ["MemoryPlan", "NotEnoughMemory", "available_bytes", "largest_context", "memory_plan"]


class NotEnoughMemory(RuntimeError):
    """The plan needs more memory than there is; the message says what would fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes on one device."""

    weights_bytes: int
    cache_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.activation_bytes

    def __str__(self) -> str:
        return (
            f"{_gb(self.total_bytes)} (weights {_gb(self.weights_bytes)}, KV cache "
            f"{_gb(self.cache_bytes)}, activations {_gb(self.activation_bytes)})"
        )


def memory_plan(
    config: Llama4Config,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    page_size: int = DEFAULT_PAGE_SIZE,
    cache_format: CacheFormat | None = None,
    weights_bytes: int | None = None,
) -> MemoryPlan:
    """What sequences of final `lengths` need, prefilled in blocks as `generate` does.

    weights_bytes: None: of all parameters in `dtype`.
    cache_format: of the cache; None: both pools in `dtype`.
    """
    step = prefill_tokens(config)
    tokens = sum(min(length, step) for length in lengths)
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    width = max(config.intermediate_size, config.intermediate_size_mlp or 0)
    per_token = 6 * config.hidden_size + 2 * heads * config.head_dim + 3 * width
    logits = len(lengths) * config.vocab_size
    if weights_bytes is None:
        weights_bytes = config.parameter_counts()["text"] * dtype.itemsize
    return MemoryPlan(
        weights_bytes=weights_bytes,
        cache_bytes=kv_bytes(
            config,
            lengths,
            step_tokens=step,
            aligned=True,
            page_size=page_size,
            dtype=dtype,
            format=cache_format,
        ),
        activation_bytes=(tokens * per_token + logits) * dtype.itemsize,
    )


def largest_context(
    config: Llama4Config,
    budget: int,
    *,
    batch: int,
    dtype: torch.dtype,
    weights_bytes: int | None = None,
) -> int:
    """Most tokens per sequence that fit into `budget` bytes; 0: not even one."""

    def fits(length: int) -> bool:
        needs = memory_plan(config, [length] * batch, dtype=dtype, weights_bytes=weights_bytes)
        return needs.total_bytes <= budget

    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def available_bytes(device: torch.device) -> int:
    """Memory that can be allocated now: free on a GPU, available on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def require_fit(
    config: Llama4Config,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    weights_bytes: int | None = None,
) -> MemoryPlan:
    """Return the plan, or say what would fit instead.

    Raises:
        NotEnoughMemory: the plan exceeds `available_bytes(device)`.
    """
    plan = memory_plan(config, lengths, dtype=dtype, weights_bytes=weights_bytes)
    budget = available_bytes(device)
    if plan.total_bytes <= budget:
        return plan
    context = largest_context(
        config, budget, batch=len(lengths), dtype=dtype, weights_bytes=weights_bytes
    )
    if context:
        hint = f"a context of {context} tokens would fit"
    else:
        share = max(1, budget)
        hint = (
            f"no context fits; the weights alone would fill {-(-plan.weights_bytes // share)} "
            "devices of this size"
        )
    raise NotEnoughMemory(
        f"run: the model must fit into the {_gb(budget)} available on {device}, got a plan of "
        f"{plan}: {hint}"
    )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
