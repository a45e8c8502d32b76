"""The MoE layer at full size, counted: distinct bytes, requested weights, workspace, DRAM."""

from __future__ import annotations

import pytest

from llama4_triton.bench.moe_layer import MoeLayer
from llama4_triton.bench.moe_traffic import moe_traffic, products_bytes
from llama4_triton.bench.shapes import SCOUT

pytestmark = pytest.mark.interpreter_only

WORKSPACE = {"plain": 0.08}  # of what is compulsory, up to 64 tokens
WORKSPACE_OTHERS = 0.15


def case(*values, slow=True):
    marks = pytest.mark.long if slow else ()
    return pytest.param(*values, id="-".join(map(str, values)), marks=marks)


@pytest.mark.parametrize(
    "model, T, format, routing",
    [
        case("scout", 4, "plain", "uniform"),
        case("scout", 4, "e4m3_channel", "one-hot", slow=False),
        case("scout", 64, "plain", "uniform"),
        case("scout", 64, "e4m3_block", "skewed"),
        case("scout", 64, "int4_group", "uniform"),
        case("maverick", 64, "e4m3_channel", "uniform"),
        case("scout", 256, "plain", "uniform"),
        case("scout", 1024, "plain", "uniform"),
        case("scout", 4096, "plain", "uniform"),
        case("scout", 4096, "e4m3_channel", "uniform"),
        case("maverick", 4096, "e4m3_channel", "uniform"),
    ],
)
def test_bytes_are_what_the_formulas_say(model, T, format, routing):
    row = moe_traffic(model, T, format, routing)
    assert abs(row.unique - 1) < 1e-4, row  # edges of sectors
    assert row.weights == row.weights_formula, row
    if T <= 64:
        assert row.workspace <= WORKSPACE.get(format, WORKSPACE_OTHERS), row
    if T <= 1024:
        assert row.dram <= 1.10, row
    assert row.dram_products <= 1.10, row


@pytest.mark.no_kernels
def test_products_count_what_passes_between_them():
    """Scout, 4096 tokens: x three times, z twice, of routed and shared expert."""
    layer = MoeLayer(shape=SCOUT, T=4096)
    x, z, W = 4096 * 5120 * 2, 4096 * 1024 * 2, 17 * 3 * 5120 * 1024 * 2
    router = 16 * 5120 * 2
    assert products_bytes(layer, (256,) * 16) == 3 * x + 4 * z + W + router + x  # and out
