"""serving_plan: exact bytes, the fewest GPUs, the decode floor, against counts made by hand."""

from __future__ import annotations

import pytest
import torch

from llama4_triton.kernels.paged_kv import E4M3
from llama4_triton.model.cache_size import CacheFormat
from llama4_triton.model.config import MAVERICK, SCOUT, tiny_scout
from llama4_triton.model.serving import serving_plan, uniform_bytes

pytestmark = pytest.mark.no_kernels
TEN_MILLION = 10_485_760
FP8 = CacheFormat(global_dtype=E4M3, local_dtype=E4M3, scales="head")


def test_scout_at_ten_million_tokens():
    """K and V of 8 heads of 128: 2048 B a token and layer in fp8, and 32 B of scales per layer."""
    fp8 = serving_plan(SCOUT, context=TEN_MILLION, format=FP8)
    scales = 2 * 8 * 4
    assert fp8.pools["global"] == 12 * (2048 * TEN_MILLION + scales)
    assert fp8.pools["local"] == 36 * (2048 * 8192 + scales)
    bf16 = serving_plan(SCOUT, context=TEN_MILLION)
    assert bf16.pools == {"global": 12 * 4096 * TEN_MILLION, "local": 36 * 4096 * 8192}
    gb = [round(sum(p.pools.values()) / 1e9, 1) for p in (fp8, bf16)]
    assert gb == [258.3, 516.6]
    for dtype, size in ((torch.bfloat16, 4096), (E4M3, 2048)):
        assert uniform_bytes(SCOUT, TEN_MILLION, 1, dtype) == 48 * size * TEN_MILLION
    assert (fp8.gpus, bf16.gpus) == (8, 16)


@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_weights_are_those_of_the_model(config):
    counts = config.parameter_counts()
    experts = counts["routed_experts"] + counts["shared_experts"]
    per_expert = 5120 + 2 * 8192  # output channels of down, of gate and up
    many = config.num_moe_layers * (config.num_local_experts + 1)
    expected = {
        "bf16": 2 * counts["text"],
        "fp8": 2 * (counts["text"] - experts) + experts + 4 * per_expert * many,
        "int4": 2 * (counts["text"] - experts) + experts // 2 + 4 * experts // 128,
    }
    for weights, size in expected.items():
        made = serving_plan(config, context=8192, weights=weights, memory_per_gpu=10**12)
        assert made.weights_bytes == size and made.gpus == 1


def test_the_fewest_gpus_that_have_room():
    """Every smaller number is too few, and each of them is said to be."""
    for memory in (10, 24, 40, 80, 141, 640):
        arguments = dict(context=1_048_576, batch=3, memory_per_gpu=memory * 10**9)
        made = serving_plan(SCOUT, **arguments)
        assert made.fits and made.gpus == serving_plan(SCOUT, gpus=made.gpus, **arguments).gpus
        smaller = [n for n in (1, 2, 4, *range(8, made.gpus, 8)) if n < made.gpus]
        assert not any(serving_plan(SCOUT, gpus=n, **arguments).fits for n in smaller)
    assert {serving_plan(SCOUT, context=8192, memory_per_gpu=n * 10**9).gpus for n in
            (300, 120, 60, 30)} == {1, 2, 4, 8}  # fmt: skip


def test_the_floor_of_one_token_is_its_active_weights_and_its_visible_keys():
    counts, context = SCOUT.parameter_counts(), 10 * 8192 + 5
    made = serving_plan(SCOUT, context=context, gpus=1, memory_per_gpu=10**12)
    read = 2 * (counts["active_text"] - counts["embedding"] + SCOUT.hidden_size)
    assert made.routed_read + made.other_read == pytest.approx(read, rel=1e-12)
    assert made.pools_read == {"global": 12 * 4096 * context, "local": 36 * 4096 * 5}
    total = read + sum(made.pools_read.values())
    assert made.floor_ms == pytest.approx(total / 3.35e12 * 1e3, rel=1e-12)
    at_end = serving_plan(SCOUT, context=10 * 8192, gpus=1, memory_per_gpu=10**12)
    assert at_end.pools_read["local"] == 36 * 4096 * 8192
    eight = serving_plan(SCOUT, context=context, gpus=8)
    assert eight.floor_ms == pytest.approx(made.floor_ms / 8)
    sixteen = serving_plan(SCOUT, context=context, gpus=16)
    assert made.floor_ms / 16 < sixteen.floor_ms < made.floor_ms / 8  # groups repeat weights


def test_many_tokens_read_every_expert_once():
    counts = MAVERICK.parameter_counts()
    few, many = (serving_plan(MAVERICK, context=64, batch=b, gpus=8) for b in (2, 10_000))
    assert few.routed_read == pytest.approx(2 * counts["routed_experts"] / 128 * (2 - 1 / 128))
    assert many.routed_read == pytest.approx(2 * counts["routed_experts"])


def test_scales_of_tokens_are_read_and_kept():
    token = CacheFormat(global_dtype=E4M3)
    made = serving_plan(SCOUT, context=8192, format=token, gpus=8)
    assert made.pools["global"] == 12 * 8192 * (2048 + 64) == made.pools_read["global"]
    assert made.pools["local"] == 36 * 8192 * 4096


def test_kv_heads_bound_tensor_parallelism():
    config = tiny_scout()  # two KV heads
    assert serving_plan(config, context=64, gpus=2).tp == 2
    made = serving_plan(config, context=64, gpus=6)
    assert (made.tp, made.groups) == (2, 3)
    with pytest.raises(ValueError, match="gpus must be one of 1, 2 or a multiple of 2, .* got 3"):
        serving_plan(config, context=64, gpus=3)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (dict(context=0), "context must be >= 1, got 0"),
        (dict(context=1, batch=0), "batch must be >= 1, got 0"),
        (dict(context=1, weights="fp4"), "weights must be one of bf16, fp8, int4, got 'fp4'"),
        (dict(context=1, memory_per_gpu=10**9), "memory must hold what 8-way tensor parallelism"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match="^plan: " + match):
        serving_plan(SCOUT, **arguments)
