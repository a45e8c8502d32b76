"""Design targets: what their bytes and floors are made of."""

from __future__ import annotations

import pytest

from llama4_triton.bench.targets import ATTENTION, BANDWIDTH, TARGETS, targets

pytestmark = pytest.mark.no_kernels


def test_nothing_is_claimed():
    assert [row["measured"] for row in targets()] == [None] * len(TARGETS + ATTENTION)


def test_the_whole_layer_moves_the_bytes_that_its_source_states():
    """534,937,600 weight bytes: 17 experts of 3 * 1024 * 5120 and the router, in bf16."""
    layer = TARGETS[0]
    activations = 2 * layer.tokens * 2 * (5120 + 1024)
    assert layer.bytes - activations == 534_937_600
    assert layer.floor_us == pytest.approx(1e6 * layer.bytes / BANDWIDTH)


def test_every_target_beats_its_figure_and_leaves_its_floor():
    for target in TARGETS:
        if target.unit == "TFLOP/s":
            assert target.target > target.to_beat
            assert target.flops / (target.target * 1e6) > target.floor_us
        else:
            assert target.target <= target.to_beat
        if target.unit == "us":
            assert target.target > target.floor_us


def test_prefill_flops():
    (up,) = (t for t in TARGETS if t.case.startswith("scout bf16 TP8, up") and t.tokens == 16_384)
    assert up.flops == 2 * 16_384 * 2048 * 5120


def test_attention_moves_and_computes_what_its_shapes_say():
    """40 q and 8 KV heads of 128; a million keys and values in e4m3 are 2.1 GB."""
    prefill, local, decode, decode_local, _ = ATTENTION
    assert prefill.flops == 4 * 40 * 128 * (8192 * 8193 // 2)
    assert local.flops == 128 * prefill.flops
    assert decode.bytes == 2**20 * 8 * 2 * 128 == 128 * decode_local.bytes
    assert 640 < decode.floor_us < 642 and decode.target > decode.floor_us
    assert decode_local.target > decode_local.floor_us
