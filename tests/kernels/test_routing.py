"""route and sort_by_expert: choices, ties, NaN, dropped ids, the order, the tile table, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama4_triton.kernels import reference
from llama4_triton.kernels.counting_sort import tile_capacity
from llama4_triton.kernels.routing import (
    RoutingConfig,
    default_block_m,
    default_config,
    route,
    sort_by_expert,
)

NAN, INF = math.nan, math.inf
INT_MAX = 2**31 - 1
BF16 = torch.bfloat16
# Several programs of several steps each, on few tokens.
SMALL = RoutingConfig(BLOCK_T=4, BLOCK_R=4, max_programs=3, num_warps=1)
# (T, E, top_k, dtype)
CASES = [
    (0, 16, 1, torch.bfloat16),
    (1, 16, 1, torch.bfloat16),
    (37, 16, 1, torch.bfloat16),
    (300, 16, 1, torch.bfloat16),
    (23, 16, 2, torch.float16),
    (70, 128, 1, torch.bfloat16),
    (9, 512, 8, torch.float32),
]


def assert_sorted(routing, expert_ids):
    """Offsets, order and tile table are the reference's; every slot has a row, every row a tile."""
    E, block_m, R = routing.num_experts, routing.block_m, expert_ids.numel()
    offsets, row_slot = reference.sort_by_expert(expert_ids, E)
    for tensor in (routing.expert_offsets, routing.row_slot, routing.tiles, routing.tile_count):
        assert tensor.dtype == torch.int32 and tensor.device == expert_ids.device
    assert torch.equal(routing.expert_offsets, offsets)
    assert torch.equal(routing.row_slot, row_slot)
    assert torch.equal(routing.row_slot.sort().values.cpu(), torch.arange(R, dtype=torch.int32))

    tiles = [tuple(tile) for tile in routing.tiles.tolist()]
    count = int(routing.tile_count)
    assert tiles[:count] == reference.tile_table(offsets, R, block_m)
    assert tiles[count:] == [(-1, 0, 0)] * (len(tiles) - count)
    assert len(tiles) == tile_capacity(R, E, block_m) and routing.tile_count.shape == (1,)
    assert [r for _, row, end in tiles[:count] for r in range(row, end)] == list(range(R))
    assert routing.tile_expert.tolist() == [expert for expert, _, _ in tiles]
    assert routing.tile_row.tolist() == [row for _, row, _ in tiles]


def assert_routed(routing, logits, top_k):
    expert_ids, expert_weights = reference.route(logits, top_k)
    assert routing.expert_ids.dtype == torch.int32 and torch.equal(routing.expert_ids, expert_ids)
    assert routing.expert_weights.dtype == torch.float32
    torch.testing.assert_close(routing.expert_weights, expert_weights, rtol=2e-6, atol=1e-30)
    assert_sorted(routing, expert_ids)


@pytest.mark.parametrize(
    "T, E, top_k, dtype", CASES, ids=[f"T{T}-E{E}-k{k}-{str(d)[6:]}" for T, E, k, d in CASES]
)
def test_equals_reference(device, T, E, top_k, dtype):
    logits = (torch.randn(T, E, device=device) * 4).to(dtype)
    assert_routed(route(logits, top_k), logits, top_k)


# One row each of E = 8, top_k = 2: the logits, the experts and the weights they must give.
SPECIAL_ROWS = {
    "all equal": ([1.0] * 8, (0, 1), (1 / (1 + math.exp(-1.0)),) * 2),
    "tie for second": ([0.0, 5.0, 3.0, 3.0, 0.0, 3.0, 0.0, 0.0], (1, 2), None),
    "signed zeros tie": ([-1.0, -1.0, -0.0, 0.0, -1.0, -1.0, -1.0, -1.0], (2, 3), (0.5, 0.5)),
    "partly NaN": ([NAN, -3.0, NAN, 0.0, NAN, NAN, NAN, NAN], (3, 1), (0.5, None)),
    "one number": ([NAN, NAN, NAN, 0.0, NAN, NAN, NAN, NAN], (3, 0), (0.5, 0.0)),
    "all NaN": ([NAN] * 8, (0, 1), (0.0, 0.0)),
    "all -inf": ([-INF] * 8, (0, 1), (0.0, 0.0)),
    "NaN and -inf tie": ([-INF, NAN, -INF, NAN] * 2, (0, 1), (0.0, 0.0)),
    "inf": ([0.0, INF, -INF, INF, 0.0, 0.0, 0.0, 0.0], (1, 3), (1.0, 1.0)),
    "far out": ([-1e30, -500.0, -1e38, -3e38, -INF, -INF, -INF, -INF], (1, 0), (0.0, 0.0)),
    "denormal": ([0.0, 1e-40, 2e-40, 0.0, 0.0, 0.0, 0.0, 0.0], (2, 1), (0.5, 0.5)),
}


def test_special_rows(device):
    logits = torch.tensor([row for row, _, _ in SPECIAL_ROWS.values()], device=device)
    routing = route(logits, 2, config=SMALL)
    assert_routed(routing, logits, 2)
    for i, (name, (_, ids, weights)) in enumerate(SPECIAL_ROWS.items()):
        assert tuple(routing.expert_ids[i].tolist()) == ids, name
        for got, want in zip(routing.expert_weights[i].tolist(), weights or (), strict=False):
            assert want is None or got == pytest.approx(want, rel=1e-6, abs=1e-37), name


def test_strided_logits_and_ids(device):
    wide = torch.full((11, 40), NAN, device=device)
    wide[:, 3:17] = torch.randn(11, 14, device=device)
    assert_routed(route(wide[:, 3:17], 2, config=SMALL), wide[:, 3:17], 2)

    ids = torch.randint(0, 14, (11, 5), dtype=torch.int32, device=device)[:, 1:3]
    weights = torch.rand(11, 7, device=device)[:, 2:4]
    routing = sort_by_expert(ids, weights, 14, config=SMALL)
    assert torch.equal(routing.expert_weights, weights) and routing.expert_weights.is_contiguous()
    assert_sorted(routing, ids)


def test_dropped_ids(device):
    ids = torch.tensor(
        [[3, -1], [15, 0], [-1, -1], [INT_MAX, 15], [0, -(2**31)], [16, 15], [15, 14]],
        dtype=torch.int32,
        device=device,
    )
    weights = torch.rand(7, 2, device=device)
    weights[2] = NAN
    routing = sort_by_expert(ids, weights, 15, block_m=16, config=SMALL)
    kept = (ids >= 0) & (ids < 15)
    assert torch.equal(routing.expert_weights, torch.where(kept, weights, 0.0))
    assert torch.equal(routing.expert_ids, ids)
    assert int(routing.expert_offsets[-1]) == int(kept.sum()) == 4
    assert_sorted(routing, ids)


def test_checked_mode_reads_the_ids(device):
    ids = torch.tensor([[0], [-1], [4]], dtype=torch.int32, device=device)
    weights = torch.ones(3, 1, device=device)
    sort_by_expert(ids, weights, 5, checked=True)
    for bad in (5, -2, INT_MAX):
        ids[2] = bad
        with pytest.raises(IndexError, match=r"sort_by_expert: expert_ids must be -1 .*\[0, 5\)"):
            sort_by_expert(ids, weights, 5, checked=True)


@pytest.mark.parametrize("expert", [0, 7, 14])
def test_all_tokens_to_one_expert(device, expert):
    ids = torch.full((70, 1), expert, dtype=torch.int32, device=device)
    routing = sort_by_expert(ids, torch.ones(70, 1, device=device), 15, block_m=32, config=SMALL)
    assert_sorted(routing, ids)


# Sizes that share few compiled kernels: E <= 15 and one or two experts per token.
sizes = {
    "T": st.integers(0, 40),
    "E": st.sampled_from([1, 2, 3, 7, 13, 15]),
    "top_k": st.integers(1, 2),
    "block_m": st.sampled_from([16, 32, 64, 128]),
    "seed": st.integers(0, 2**16),
}
few = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@few
@given(coarse=st.booleans(), **sizes)
def test_route_property(device, T, E, top_k, block_m, seed, coarse):
    top_k = min(top_k, E)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator)
    if coarse:  # many ties, and some that do not count
        logits = (logits * 2).round()
        logits[torch.rand(T, E, generator=generator) < 0.2] = NAN
    logits = logits.to(device)
    routing = route(logits, top_k, block_m=block_m, config=SMALL)
    assert routing.block_m == block_m
    assert_routed(routing, logits, top_k)


@few
@given(**sizes)
def test_sort_property(device, T, E, top_k, block_m, seed):
    top_k = min(top_k, E)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, E + 2, (T, top_k), generator=generator, dtype=torch.int32).to(device)
    weights = torch.rand(T, top_k, generator=generator).to(device)
    routing = sort_by_expert(ids, weights, E, block_m=block_m, config=SMALL)
    assert_sorted(routing, ids)
    assert torch.equal(routing.expert_weights, weights.where((ids >= 0) & (ids < E), 0.0))


def test_repeats_are_bitwise_equal(device):
    logits = torch.randn(50, 16, device=device)
    first = route(logits, 2)
    for _ in range(9):
        again = route(logits, 2)
        for name in ("expert_ids", "expert_weights", "expert_offsets", "row_slot", "tiles"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.interpreter_only
@pytest.mark.parametrize("order", ["reversed", "random"])
def test_program_order_does_not_matter(device, order):
    from support.sanitizer import sanitize

    logits = torch.randn(40, 7, device=device)
    with sanitize(order, seed=3):
        routing = route(logits, 2, config=SMALL)
    assert_routed(routing, logits, 2)


def test_a_token_is_routed_alone_as_in_the_batch(device):
    logits = torch.randn(9, 15, device=device)
    routing = route(logits, 2, config=SMALL)
    logits[[0, 8]] = NAN
    again = route(logits, 2, config=SMALL)
    assert torch.equal(routing.expert_ids[1:8], again.expert_ids[1:8])
    assert torch.equal(routing.expert_weights[1:8], again.expert_weights[1:8])


def test_default_configs_are_within_the_register_budget():
    for E in (1, 15, 16, 17, 127, 128, 511, 512):
        config = default_config(E)
        assert config.BLOCK_T * E <= 8192 and config.BLOCK_R * (E + 1) <= 8192
    rows = (0, 1, 16, 256, 257, 1024, 1025, 16384)
    assert [default_block_m(r, 16) for r in rows] == [16, 16, 16, 16, 32, 64, 128, 128]


def _ids(T=3, k=1, dtype=torch.int32):
    return torch.zeros(T, k, dtype=dtype)


def _sort(ids, weights=None, E=4, **kwargs):
    return sort_by_expert(ids, torch.ones(ids.shape) if weights is None else weights, E, **kwargs)


BAD_INPUTS = {
    "k zero": (lambda: route(torch.ones(3, 4), 0), ValueError, r"route: top_k must be in \[1, 4\]"),
    "k negative": (lambda: route(torch.ones(3, 4), -1), ValueError, "top_k must .* got -1"),
    "k above E": (lambda: route(torch.ones(3, 4), 5), ValueError, "for 4 experts, got 5"),
    "k above 8": (lambda: route(torch.ones(3, 16), 9), ValueError, r"in \[1, 8\] .* got 9"),
    "no experts": (lambda: route(torch.ones(3, 0), 1), ValueError, r"num_experts .* got 0"),
    "513 experts": (lambda: route(torch.ones(1, 513), 1), ValueError, "num_experts .* got 513"),
    "rank": (lambda: route(torch.ones(4), 1), ValueError, r"logits must have shape \(T, E\)"),
    "double": (lambda: route(torch.ones(3, 4).double(), 1), TypeError, "logits .* torch.float64"),
    "list": (lambda: route([[1.0]], 1), TypeError, "logits must be a torch.Tensor, got list"),
    "column-major": (lambda: route(torch.ones(4, 3).t(), 1), ValueError, "contiguous in its last"),
    "grad": (lambda: route(torch.ones(3, 4, requires_grad=True), 1), NotImplementedError, "grad"),
    "block_m": (lambda: route(torch.ones(3, 4), 1, block_m=48), ValueError, "block_m .* got 48"),
    "block_m 256": (lambda: route(torch.ones(3, 4), 1, block_m=256), ValueError, "block_m"),
    "int64 ids": (lambda: _sort(_ids(dtype=torch.int64)), TypeError, "expert_ids must be .*int32"),
    "bf16 weights": (lambda: _sort(_ids(), torch.ones(3, 1).bfloat16()), TypeError, "weights"),
    "mismatch": (lambda: _sort(_ids(), torch.ones(3, 2)), ValueError, r"expert_weights .*\(3, 1\)"),
    "ids of k 9": (lambda: _sort(_ids(k=9), E=16), ValueError, "sort_by_expert: top_k .* got 9"),
    "ids of k 0": (lambda: _sort(_ids(k=0)), ValueError, "top_k .* got 0"),
    "E zero": (lambda: _sort(_ids(), E=0), ValueError, "num_experts must .* got 0"),
    "two devices": (
        lambda: _sort(_ids(), torch.ones(3, 1, device="meta")), ValueError, "on one device"
    ),
    "too many rows": (
        lambda: route(torch.ones(1, 2).expand(2**30, 2), 2), ValueError, r"T \* top_k must"
    ),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name):
    call, error, match = BAD_INPUTS[name]
    with pytest.raises(error, match=match):
        call()


@pytest.mark.interpreter_only
def test_opcheck(device):
    ops = torch.ops.llama4_triton
    config = [4, 4, 3, 1]
    for T, E, top_k in ((6, 5, 2), (0, 5, 1)):
        torch.library.opcheck(ops.route.default, (torch.randn(T, E), top_k, 16, config))
        ids = torch.randint(-1, E, (T, top_k), dtype=torch.int32)
        given = (ids, torch.rand(T, top_k), E, 16, config)
        torch.library.opcheck(ops.sort_by_expert.default, given)
