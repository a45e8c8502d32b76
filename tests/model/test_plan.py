"""The memory plan: exact parts, the largest context that fits, and what the error says."""

from __future__ import annotations

import pytest
import torch
from support.tiny_configs import CASES

from llama4_triton.model import plan
from llama4_triton.model.cache import KVCache
from llama4_triton.model.config import MAVERICK, SCOUT
from llama4_triton.model.generate import prefill_tokens
from llama4_triton.model.plan import largest_context, memory_plan, require_fit

pytestmark = pytest.mark.no_kernels

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["scout", "maverick", "chunk5", "all-dense"])
def test_the_cache_part_is_what_the_cache_takes(name):
    config, lengths = CASES[name], [37, 5]
    cache = KVCache.for_lengths(
        config,
        lengths,
        step_tokens=prefill_tokens(config),
        aligned=True,
        page_size=16,
        dtype=torch.bfloat16,
    )
    planned = memory_plan(config, lengths, dtype=torch.bfloat16, page_size=16)
    assert planned.cache_bytes == cache.nbytes


def test_released_models():
    """Scout in bf16: 107.77e9 text parameters; at 10M tokens 12 global layers and a chunk."""
    scout = memory_plan(SCOUT, [10_485_760], dtype=torch.bfloat16)
    assert scout.weights_bytes == 2 * 107_769_861_120
    assert scout.cache_bytes == 4096 * (12 * 10_485_760 + 36 * 8192)
    assert memory_plan(MAVERICK, [1], dtype=torch.bfloat16).weights_bytes == 2 * 400_711_848_960


def test_activations_are_an_estimate_from_above():
    """One layer's tensors at their largest, counted by hand for the widest MLP."""
    config = CASES["scout"]
    T = 8
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention = T * (3 * config.hidden_size + 2 * q + 2 * kv)
    experts = T * (4 * config.hidden_size + 3 * config.intermediate_size)
    planned = memory_plan(config, [T], dtype=torch.float32).activation_bytes
    assert planned >= 4 * (max(attention, experts) + config.vocab_size)


def test_largest_context_is_the_edge():
    config = CASES["scout"]
    budget = memory_plan(config, [500, 500], dtype=torch.float32).total_bytes
    context = largest_context(config, budget, batch=2, dtype=torch.float32)
    assert context >= 500  # the last page has room
    fits = memory_plan(config, [context] * 2, dtype=torch.float32)
    beyond = memory_plan(config, [context + 1] * 2, dtype=torch.float32)
    assert fits.total_bytes <= budget < beyond.total_bytes
    assert largest_context(config, 1000, batch=1, dtype=torch.float32) == 0


def test_require_fit(monkeypatch):
    config = CASES["scout"]
    needed = memory_plan(config, [40], dtype=torch.float32)
    monkeypatch.setattr(plan, "available_bytes", lambda device: needed.total_bytes)
    assert require_fit(config, [40], dtype=torch.float32, device=CPU) == needed
    with pytest.raises(plan.NotEnoughMemory, match="a context of .* tokens would fit"):
        require_fit(config, [4000], dtype=torch.float32, device=CPU)
    half = needed.weights_bytes // 2 - 1
    monkeypatch.setattr(plan, "available_bytes", lambda device: half)
    with pytest.raises(plan.NotEnoughMemory, match="the weights alone would fill 3 devices"):
        require_fit(config, [40], dtype=torch.float32, device=CPU)


def test_available_memory_of_the_host_is_plausible():
    assert 10**7 < plan.available_bytes(CPU) < 10**14
