"""Design targets: what their bytes and floors are made of."""

from __future__ import annotations

import pytest

from llama4_triton.bench.targets import BANDWIDTH, TARGETS, targets

pytestmark = pytest.mark.no_kernels


def test_nothing_is_claimed():
    assert [row["measured"] for row in targets()] == [None] * len(TARGETS)


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
