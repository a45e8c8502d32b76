"""Padding of the experts' tiles beside vLLM's on the same routing, and what invariance costs."""

from __future__ import annotations

import pytest

from llama4_triton.bench import moe_tables as tables
from llama4_triton.bench.moe_layer import MoeLayer
from llama4_triton.bench.shapes import MAVERICK, MODELS, ROUTINGS, SCOUT, TOKENS, routing_counts

pytestmark = pytest.mark.no_kernels


def test_rows_are_padded_by_expert():
    assert tables.padded_rows((300, 0, 12), 64) == 320 + 64
    assert tables.padded_rows((300, 0, 12), 16) == 304 + 16
    assert tables.vllm_block_m(SCOUT, 16_384) == 128
    assert tables.vllm_block_m(MAVERICK, 1024) == 16


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("T", TOKENS)
def test_no_more_padded_flops_than_vllm(shape, routing, T):
    counts = routing_counts(routing, T, shape.experts)
    layer = MoeLayer(shape=shape, T=T, format=tables.FORMATS[shape.name])
    theirs = tables.padded_rows(counts, tables.vllm_block_m(shape, T))
    ours = tables.padded_flops(layer, counts)
    assert ours <= theirs * 6 * shape.hidden * layer.F


def test_the_price_of_invariance_is_a_table():
    text = tables.invariance_table(tokens=(1, 64))
    rows = [line.split("|")[1:-1] for line in text.splitlines()[3:]]
    assert [row[0].strip() for row in rows] == ["scout", "scout", "maverick", "maverick"]
    launches = [[int(cell) for cell in row[-2:]] for row in rows]
    assert launches == [[3, 4], [4, 4]] * 2
