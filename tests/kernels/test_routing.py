"""route and sort_by_expert: choices, weights, ties, NaN, what is dropped, order, tiles, errors."""

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
# Several steps on few tokens, of several programs or of the one that does everything.
SMALL = RoutingConfig(BLOCK_T=4, BLOCK_R=4, max_programs=3, num_warps=1)
ONE = RoutingConfig(BLOCK_T=4, BLOCK_R=4, max_programs=1, num_warps=1, one_program=True)
CONFIGS = {"three launches": SMALL, "one launch": ONE}
both = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# (T, E, top_k, dtype), under the default configs
TOKENS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 300, 511, 512, 513, 1000, 1100)
CASES = [
    *((T, 16, 1, BF16) for T in TOKENS),
    *((T, 128, 1, BF16) for T in (1, 17, 64, 127, 512, 513)),
    *((T, 1, 1, BF16) for T in (1, 65)),
    *((T, 2, 2, torch.float16) for T in (2, 63, 600)),
    *((T, 160, 8, torch.float32) for T in (1, 15, 127)),
    *((T, 512, 8, torch.float32) for T in (16, 65)),
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
    assert tiles[count:] == [(-1, 0, 0, 0)] * (len(tiles) - count)
    assert len(tiles) == tile_capacity(R, E, block_m) and routing.tile_count.shape == (1,)
    first_rows = [first + i * block_m for _, first, _, i in tiles]
    ends = [min(row + block_m, end) for row, (_, _, end, _) in zip(first_rows, tiles, strict=True)]
    covered = [r for row, end in zip(first_rows, ends, strict=True) for r in range(row, end)]
    assert sorted(covered) == list(range(R))
    assert routing.tile_expert.tolist() == [tile[0] for tile in tiles]
    assert routing.tile_row.tolist() == first_rows


def assert_routed(routing, logits, top_k, **options):
    expert_ids, expert_weights = reference.route(logits, top_k, **options)
    assert routing.expert_ids.dtype == torch.int32 and torch.equal(routing.expert_ids, expert_ids)
    assert routing.expert_weights.dtype == torch.float32
    # A softmax adds the rounding of exponentials, of their sum and of a division.
    rtol = 2e-6 if options.get("scoring", "sigmoid") == "sigmoid" else 4e-6
    dtype = options.get("score_dtype")
    if dtype is None:
        torch.testing.assert_close(routing.expert_weights, expert_weights, rtol=rtol, atol=1e-30)
    else:  # rounding keeps order: what is within rtol before lies between the two bounds' roundings
        _, exact = reference.route(logits, top_k, **options | dict(score_dtype=None))
        low, high = ((exact * (1 + sign * rtol)).to(dtype).float() for sign in (-1, 1))
        got = routing.expert_weights
        assert torch.equal(got, got.to(dtype).float()) and bool(
            ((low <= got) & (got <= high)).all()
        )
    assert_sorted(routing, expert_ids)


def test_the_reference_orders_tiles_by_rows():
    offsets = torch.tensor([0, 3, 3, 40, 43, 80], dtype=torch.int32)
    assert reference.tile_table(offsets, 99, 32) == [
        (2, 3, 40, 0), (2, 3, 40, 1), (4, 43, 80, 0), (4, 43, 80, 1), (0, 0, 3, 0), (3, 40, 43, 0),
        (5, 80, 99, 0),
    ]  # fmt: skip


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


@both
def test_special_rows(device, config):
    logits = torch.tensor([row for row, _, _ in SPECIAL_ROWS.values()], device=device)
    routing = route(logits, 2, config=config)
    assert_routed(routing, logits, 2)
    for i, (name, (_, ids, weights)) in enumerate(SPECIAL_ROWS.items()):
        assert tuple(routing.expert_ids[i].tolist()) == ids, name
        for got, want in zip(routing.expert_weights[i].tolist(), weights or (), strict=False):
            assert want is None or got == pytest.approx(want, rel=1e-6, abs=1e-37), name


# The same rows under softmax: infinities share it, a row of -inf alone has none.
SOFTMAX_ROWS = {
    "all equal": (0.125, 0.125),
    "partly NaN": (1 / (1 + math.exp(-3.0)), 1 / (1 + math.exp(3.0))),
    "one number": (1.0, 0.0),
    "all NaN": (0.0, 0.0),
    "all -inf": (0.0, 0.0),
    "inf": (0.5, 0.5),
    "far out": (1.0, 0.0),
}


@both
@pytest.mark.parametrize("renormalize", [False, True])
def test_special_rows_of_a_softmax(device, config, renormalize):
    logits = torch.tensor([SPECIAL_ROWS[name][0] for name in SOFTMAX_ROWS], device=device)
    options = dict(scoring="softmax", renormalize=renormalize)
    routing = route(logits, 2, config=config, **options)
    assert_routed(routing, logits, 2, **options)
    for name, got, want in zip(
        SOFTMAX_ROWS, routing.expert_weights.tolist(), SOFTMAX_ROWS.values(), strict=True
    ):
        total = (sum(want) if renormalize else 1.0) or 1.0
        assert got == pytest.approx([weight / total for weight in want], rel=1e-6), name


# What a range, a count of tokens and partial sums are combined with: (name, options)
OPTIONS = {
    "renormalized sigmoid": dict(renormalize=True),
    "softmax": dict(scoring="softmax"),
    "renormalized softmax": dict(scoring="softmax", renormalize=True),
    "bf16": dict(logits_dtype=BF16),
    "fp16": dict(logits_dtype=torch.float16, renormalize=True),
    "scores in bf16": dict(score_dtype=BF16),
    "scores in fp16": dict(score_dtype=torch.float16, renormalize=True, scoring="softmax"),
}


@both
@pytest.mark.parametrize("name", OPTIONS)
def test_options(device, name, config):
    logits = torch.randn(37, 15, device=device) * 3
    assert_routed(route(logits, 2, config=config, **OPTIONS[name]), logits, 2, **OPTIONS[name])


RANGES = [(0, 15), (0, 5), (5, 5), (10, 5), (14, 1), (0, 0), (7, 0), (15, 0)]


@both
@pytest.mark.parametrize("expert_range", RANGES, ids=str)
def test_expert_range(device, expert_range, config):
    logits = torch.randn(23, 15, device=device)
    options = dict(expert_range=expert_range, renormalize=True)
    routing = route(logits, 2, config=config, **options)
    assert routing.num_experts == expert_range[1]
    assert_routed(routing, logits, 2, **options)

    everything = route(logits, 2, renormalize=True)
    again = sort_by_expert(
        everything.expert_ids, everything.expert_weights, 15, expert_range=expert_range,
        block_m=routing.block_m, config=config,
    )  # fmt: skip
    assert again.num_experts == expert_range[1]
    for name in TABLES:
        assert torch.equal(getattr(again, name), getattr(routing, name)), name


TABLES = ("expert_ids", "expert_weights", "expert_offsets", "row_slot", "tiles", "tile_count")


@both
@pytest.mark.parametrize("valid", [-1, 0, 1, 9, 22, 23, 24, INT_MAX])
def test_num_valid_tokens(device, valid, config):
    """Tokens beyond are dropped, whatever they hold."""
    logits = torch.randn(23, 15, device=device)
    logits[max(0, min(valid, 23)) :] = NAN
    number = torch.tensor([valid], dtype=torch.int32, device=device)
    routing = route(logits, 2, num_valid_tokens=number, config=config)
    assert_routed(routing, logits, 2, num_valid_tokens=number)
    assert int(routing.expert_offsets[-1]) == 2 * max(0, min(valid, 23))

    ids = torch.randint(0, 15, (23, 2), dtype=torch.int32, device=device)
    weights = torch.rand(23, 2, device=device)
    routing = sort_by_expert(ids, weights, 15, num_valid_tokens=number, config=config)
    ids, weights = reference.local_experts(ids, weights, (0, 15), number)
    assert torch.equal(routing.expert_ids, ids) and torch.equal(routing.expert_weights, weights)
    assert_sorted(routing, ids)


@pytest.mark.parametrize("S", [1, 3, 8, 40])
@pytest.mark.parametrize("T, E", [(5, 16), (64, 16), (70, 128), (530, 16)])
def test_partial_sums(device, T, E, S):
    partials = torch.randn(S, T, E, device=device)
    partials[S // 2, T // 2, 3] = NAN
    partials[0, 0, 4], partials[S - 1, T - 1, 5] = INF, -INF
    assert_routed(route(partials, 1, logits_dtype=BF16), partials, 1, logits_dtype=BF16)
    # A view: neither slices nor rows need be dense.
    wide = torch.full((S + 1, T + 3, E + 16), NAN, device=device)
    view = wide[:S, 1 : T + 1, 16:]
    view.copy_(partials)
    assert_routed(route(view, 1, logits_dtype=BF16), partials, 1, logits_dtype=BF16)


@both
def test_partial_sums_are_added_in_order(device, config):
    """In another order the sums would be others, and so would the choice."""
    parts = torch.tensor([[1.0, 0.0], [2.0**-24, 0.0], [2.0**-24, 1.0], [0.0, 2.0**-23]])
    partials = parts[:, None].to(device)
    # 1 + 2^-24 + 2^-24 is 1 from the left; 1 + 2^-23 from the right.
    assert route(partials, 1, config=config).expert_ids.tolist() == [[1]]
    assert route(partials.flip(0), 1, config=config).expert_ids.tolist() == [[0]]


@both
def test_logits_are_rounded_before_the_choice(device, config):
    logits = torch.tensor([[1.0, 1.0 + 2**-10, 1.0 + 2**-12]], device=device)
    for dtype, expert in ((None, 1), (torch.float32, 1), (torch.float16, 1), (BF16, 0)):
        routing = route(logits, 1, logits_dtype=dtype, config=config)
        assert routing.expert_ids.tolist() == [[expert]], dtype


@both
def test_scores_are_rounded_as_transformers_rounds_them(device, config):
    """The fp32 sigmoid, then x's type."""
    logits = (torch.arange(33 * 3, device=device).view(33, 3) - 70) / 8  # no score near a tie
    got = route(logits, 1, score_dtype=BF16, config=config).expert_weights
    assert torch.equal(got, torch.sigmoid(logits.amax(1, keepdim=True)).to(BF16).float())
    assert not torch.equal(got, route(logits, 1, config=config).expert_weights)


@both
def test_strided_logits_and_ids(device, config):
    wide = torch.full((11, 40), NAN, device=device)
    wide[:, 3:17] = torch.randn(11, 14, device=device)
    assert_routed(route(wide[:, 3:17], 2, config=config), wide[:, 3:17], 2)

    ids = torch.randint(0, 14, (11, 5), dtype=torch.int32, device=device)[:, 1:3]
    weights = torch.rand(11, 7, device=device)[:, 2:4]
    routing = sort_by_expert(ids, weights, 14, config=config)
    assert torch.equal(routing.expert_weights, weights) and routing.expert_weights.is_contiguous()
    assert_sorted(routing, ids)


@both
def test_dropped_ids(device, config):
    ids = torch.tensor(
        [[3, -1], [15, 0], [-1, -1], [INT_MAX, 15], [0, -(2**31)], [16, 15], [15, 14]],
        dtype=torch.int32,
        device=device,
    )
    weights = torch.rand(7, 2, device=device)
    weights[2] = NAN
    routing = sort_by_expert(ids, weights, 15, block_m=16, config=config)
    kept = (ids >= 0) & (ids < 15)
    assert torch.equal(routing.expert_weights, torch.where(kept, weights, 0.0))
    assert torch.equal(routing.expert_ids, torch.where(kept, ids, -1))
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


@both
@pytest.mark.parametrize("expert", [0, 7, 14])
def test_all_tokens_to_one_expert(device, expert, config):
    ids = torch.full((70, 1), expert, dtype=torch.int32, device=device)
    routing = sort_by_expert(ids, torch.ones(70, 1, device=device), 15, block_m=32, config=config)
    assert_sorted(routing, ids)


# Sizes that share few compiled kernels: E <= 15 and one or two experts per token.
sizes = {
    "T": st.integers(0, 40),
    "E": st.sampled_from([1, 2, 3, 7, 13, 15]),
    "top_k": st.integers(1, 2),
    "block_m": st.sampled_from([16, 32, 64, 128]),
    "config": st.sampled_from([SMALL, ONE]),
    "bounds": st.tuples(st.integers(0, 15), st.integers(0, 15)),
    "valid": st.none() | st.integers(0, 41),
    "seed": st.integers(0, 2**16),
}
few = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _restricted(device, E, bounds, valid):
    """The options that drop what others do: a range of the E experts, or None; valid tokens."""
    first, end = sorted(min(bound, E) for bound in bounds)
    number = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    return dict(
        expert_range=None if first == 0 and end == E else (first, end - first),
        num_valid_tokens=number,
    )


@few
@given(
    coarse=st.booleans(),
    scoring=st.sampled_from(["sigmoid", "softmax"]),
    renormalize=st.booleans(),
    S=st.sampled_from([None, 1, 3]),
    **sizes,
)
def test_route_property(
    device, T, E, top_k, block_m, config, bounds, valid, seed, coarse, scoring, renormalize, S
):
    top_k = min(top_k, E)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*([] if S is None else [S]), T, E, generator=generator)
    if coarse:  # many ties, and some that do not count
        logits = (logits * 2).round()
        logits[torch.rand(logits.shape, generator=generator) < 0.2] = NAN
    logits = logits.to(device)
    options = dict(scoring=scoring, renormalize=renormalize)
    options |= _restricted(device, E, bounds, valid)
    routing = route(logits, top_k, block_m=block_m, config=config, **options)
    assert routing.block_m == block_m
    assert_routed(routing, logits, top_k, **options)


@few
@given(**sizes)
def test_sort_property(device, T, E, top_k, block_m, config, bounds, valid, seed):
    top_k = min(top_k, E)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, E + 2, (T, top_k), generator=generator, dtype=torch.int32).to(device)
    weights = torch.rand(T, top_k, generator=generator).to(device)
    options = _restricted(device, E, bounds, valid)
    routing = sort_by_expert(ids, weights, E, block_m=block_m, config=config, **options)
    ids, weights = reference.local_experts(
        ids, weights, options["expert_range"] or (0, E), options["num_valid_tokens"]
    )
    assert torch.equal(routing.expert_ids, ids) and torch.equal(routing.expert_weights, weights)
    assert_sorted(routing, ids)


@both
def test_repeats_are_bitwise_equal(device, config):
    logits = torch.randn(50, 15, device=device)
    first = route(logits, 2, config=config)
    for _ in range(9):
        again = route(logits, 2, config=config)
        for name in TABLES:
            assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.interpreter_only
@pytest.mark.parametrize("order", ["reversed", "random"])
def test_program_order_does_not_matter(device, order):
    from support.sanitizer import sanitize

    logits = torch.randn(40, 7, device=device)
    with sanitize(order, seed=3):
        routing = route(logits, 2, config=SMALL)
    assert_routed(routing, logits, 2)


@both
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_token_is_routed_alone_as_in_the_batch(device, config, scoring):
    logits = torch.randn(9, 15, device=device)

    def choices(rows):
        routing = route(rows, 2, scoring=scoring, renormalize=True, config=config)
        return torch.cat((routing.expert_ids, routing.expert_weights.view(torch.int32)), dim=1)

    expected = choices(logits)
    for t in range(9):
        assert torch.equal(choices(logits[t : t + 1]), expected[t : t + 1]), t
    assert torch.equal(choices(logits.flip(0)), expected.flip(0))
    logits[[0, 8]] = NAN
    assert torch.equal(choices(logits)[1:8], expected[1:8])


def test_default_configs_are_within_the_register_budget():
    for T in (1, 64, 512, 4096):
        for E in (1, 15, 16, 17, 127, 128, 511, 512):
            config = default_config(T, E)
            assert config.BLOCK_T * E <= 8192 and config.BLOCK_R * E <= 8192


def test_few_slots_take_one_launch():
    one = [(512, 128, 1), (1000, 16, 1), (512, 16, 2), (64, 128, 8), (128, 512, 1), (0, 16, 1)]
    three = [(513, 128, 1), (1025, 16, 1), (513, 16, 2), (65, 128, 8), (129, 512, 1)]
    for cases, expected in ((one, True), (three, False)):
        for T, E, top_k in cases:
            assert default_config(T, E, top_k).one_program is expected, (T, E, top_k)


def test_default_block_m_holds_two_deviations_more_than_the_mean():
    rows = (0, 1, 16, 130, 150, 256, 640, 1024, 16384)
    assert [default_block_m(r, 16) for r in rows] == [16, 16, 16, 16, 16, 32, 64, 128, 128]
    assert default_block_m(10, 0) == 32


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
    "scoring": (lambda: route(torch.ones(3, 4), 1, scoring="tanh"), ValueError, "scoring .*'tanh'"),
    "logits_dtype": (
        lambda: route(torch.ones(3, 4), 1, logits_dtype=torch.int32), TypeError, "logits_dtype must"
    ),
    "score_dtype": (
        lambda: route(torch.ones(3, 4), 1, score_dtype=torch.float64), TypeError,
        "route: score_dtype must be None, fp32, fp16 or bf16, got torch.float64"
    ),
    "no parts": (lambda: route(torch.ones(0, 3, 4), 1), ValueError, "at least one partial sum"),
    "bf16 parts": (lambda: route(torch.ones(2, 3, 4).bfloat16(), 1), TypeError, "logits must be"),
    "range beyond E": (
        lambda: route(torch.ones(3, 4), 1, expert_range=(2, 3)), ValueError,
        r"expert_range must .* within the 4 experts, got \(2, 3\)"
    ),
    "negative range": (
        lambda: _sort(_ids(), expert_range=(-1, 2)), ValueError, "sort_by_expert: expert_range"
    ),
    "range of -1": (lambda: _sort(_ids(), expert_range=(1, -1)), ValueError, "expert_range"),
    "int64 valid": (
        lambda: route(torch.ones(3, 4), 1, num_valid_tokens=torch.tensor([2])), TypeError,
        "num_valid_tokens must be torch.int32"
    ),
    "valid of rank 0": (
        lambda: _sort(_ids(), num_valid_tokens=torch.tensor(2, dtype=torch.int32)), ValueError,
        r"num_valid_tokens must have shape \(1\)"
    ),
    "valid elsewhere": (
        lambda: _sort(_ids(), num_valid_tokens=torch.ones(1, dtype=torch.int32, device="meta")),
        ValueError, "num_valid_tokens on meta"
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
