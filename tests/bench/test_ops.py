"""The registry of operator cases: complete, reproducible, judged, and the code that ships."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch

from llama4_triton.bench.accuracy import measure_all
from llama4_triton.bench.case import Case, seeded, tensors_of
from llama4_triton.bench.cases_attention import STALE
from llama4_triton.bench.expert_load import Load, make_logits, make_routing
from llama4_triton.bench.hollow import hollow
from llama4_triton.bench.ops import OPS, cases, find
from llama4_triton.bench.selftest import INSTALLATION_CASES, REAL_CASES
from llama4_triton.bench.shapes import ROUTINGS
from llama4_triton.kernels import _paths, reference

CPU = torch.device("cpu")
no_kernels = pytest.mark.no_kernels
# The cheapest case of each operator.
ONE_PER_OP = {find(id).op: id for id in INSTALLATION_CASES}


@functools.cache
def every(size) -> dict[str, Case]:
    return {case.id: case for case in cases(size)}


@no_kernels
def test_every_operator_has_cases_of_both_sizes():
    assert set(OPS) == set(_paths.OPS)
    for size in ("small", "real"):
        assert {case.op for case in cases(size)} == set(OPS)
    counted = Counter(case.id for size in ("small", "real") for case in cases(size))
    assert max(counted.values()) == 1
    for id in counted:
        assert id.startswith(find(id).op if id in every("small") else every("real")[id].op)


@no_kernels
def test_named_cases_exist():
    assert set(REAL_CASES) <= set(every("real"))
    assert {every("real")[id].op for id in REAL_CASES} == set(OPS)
    assert set(INSTALLATION_CASES) <= set(every("small"))
    assert {every("small")[id].op for id in INSTALLATION_CASES} == set(OPS)
    with pytest.raises(ValueError, match="find: id must be that of a case, got 'nothing'"):
        find("nothing")
    with pytest.raises(ValueError, match='cases: size must be "real" or "small"'):
        next(cases("large"))
    assert [case.id for case in cases("small", "rms_norm-*-fp*")] == [
        "rms_norm-small-fp16",
        "rms_norm-small-fp32",
    ]


@no_kernels
@pytest.mark.parametrize("op", OPS)
def test_inputs_follow_from_the_seed_and_disturb_no_generator(op):
    case = find(ONE_PER_OP[op])
    state = torch.get_rng_state()
    one, again, other = (tensors_of(case.make(CPU, seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(one) >= 1
    assert all(_same(a, b) for a, b in zip(one, again, strict=True))
    drawn = op != "prefill_schedule"  # whose inputs are the lengths of the case
    assert not drawn or not all(_same(a, b) for a, b in zip(one, other, strict=True))
    assert [(x.shape, x.stride()) for x in one] == [(x.shape, x.stride()) for x in other]


def _same(a, b):
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(x):
    return x.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("op", OPS)
def test_the_operator_is_within_its_bounds_and_a_fault_is_not(device, op):
    case = find(ONE_PER_OP[op])
    inputs = case.make(device)
    outputs, want = case.run(inputs), case.reference(inputs)
    assert [e.broken for e in measure_all(outputs, want, case.bounds)] == [[]] * len(outputs)
    for number, output in enumerate(outputs):
        changed = output.clone().view(-1)
        at = int(changed.float().nan_to_num().abs().argmax())
        changed[at] = 0 if changed[at] != 0 else 1
        broken = (*outputs[:number], changed.view(output.shape), *outputs[number + 1 :])
        errors = measure_all(broken, want, case.bounds)
        assert [bool(e.broken) for e in errors] == [i == number for i in range(len(outputs))]


# The load of the experts.


@no_kernels
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("top_k, ep", [(1, 1), (2, 1), (1, 4)])
def test_a_histogram_reaches_the_router(routing, top_k, ep):
    load = Load(T=41, E=8, top_k=top_k, routing=routing, ep=ep)
    flat = [e for row in load.ids(seed=3) for e in row]
    assert [flat.count(e) for e in range(8)] == load.counts()
    assert load.rows == sum(load.counts()) == len(flat) - flat.count(-1)
    assert load.active == len(set(flat) - {-1})
    assert load.ids(seed=3) != load.ids(seed=4) or routing == "one-hot"
    if ep == 1:
        with seeded(CPU, 0):
            logits = make_logits(load, CPU, 3)
        ids, weights = reference.route(logits, top_k)
        assert ids.tolist() == load.ids(seed=3)
        assert 0.5 < float(weights.min()) < float(weights.max()) < 1.0


@no_kernels
def test_the_routing_made_on_the_host_is_the_operators():
    load = Load(T=37, E=5, ep=2, top_k=2, block_m=16)
    weights = torch.rand(37, 2)
    routing = make_routing(load, weights, 3)
    ids = torch.tensor(load.ids(3), dtype=torch.int32)
    offsets, row_slot = reference.sort_by_expert(ids, 5)
    assert torch.equal(routing.expert_offsets, offsets) and torch.equal(routing.row_slot, row_slot)
    tiles = reference.tile_table(offsets, 74, 16)
    count = int(routing.tile_count)
    assert [tuple(t) for t in routing.tiles[:count].tolist()] == tiles
    assert routing.tiles[count:].tolist() == [[-1, 0, 0, 0]] * (len(routing.tiles) - count)
    assert not routing.expert_weights[ids < 0].any()


# What an attention case must not look at.


@no_kernels
@pytest.mark.parametrize("id", ["attention_prefill-small-rows-64-local"])
def test_dead_slots_and_pages_are_poisoned(id):
    inputs = find(id).make(CPU)
    kv, chunk = inputs["kv"], 64
    bounds = inputs["cu_seqlens_q"].tolist()
    live = torch.zeros(kv.k_cache.shape[:2], dtype=torch.bool)
    for b, n in enumerate(inputs["seq_lens"].tolist()):
        oldest = (n - (bounds[b + 1] - bounds[b])) // chunk * chunk
        for t in range(oldest, n):
            live[kv.block_table[b, t // 64], t % 64] = True
        first, last = oldest // 64, -(-n // 64)
        assert (kv.block_table[b, last:] == STALE).all()
        assert (kv.block_table[b, :first] == STALE).all()
    for cache in (kv.k_cache, kv.v_cache):
        assert torch.equal(cache.isnan().all(-1).all(-1), ~live)
        assert not cache[live].isnan().any()
    assert kv.block_table.stride(0) % 16 == 0


# Costs, counted by hand.


MATRIX_PRODUCTS = {
    "attention_decode",
    "attention_prefill",
    "fp8_matmul",
    "grouped_gemm_combine",
    "grouped_gemm_swiglu",
    "moe",
    "router",
}


@no_kernels
def test_every_case_has_a_cost():
    for case in (*every("small").values(), *every("real").values()):
        cost = case.cost
        # All of a few tokens may be with other GPUs' experts: nothing is multiplied, zeros written.
        elsewhere = "-ep" in case.id and cost.flops == 0
        assert cost.written > 0 and cost.bytes == cost.read + cost.index + cost.written, case.id
        assert cost.read + cost.index > 0 or elsewhere, case.id
        assert (cost.flops > 0) == (case.op in MATRIX_PRODUCTS) or elsewhere, case.id


@no_kernels
def test_costs():
    def cost(id):
        found = find(id).cost
        return found.flops, found.bytes

    assert cost("rms_norm-T16") == (0, 2 * (2 * 16 * 5120 + 5120))
    assert cost("add_rms_norm-T16") == (0, 2 * (4 * 16 * 5120 + 5120))
    assert cost("fp8_matmul-scout-tp8-qkv-T16-fast") == (
        2 * 16 * 896 * 5120,
        (16 + 896) * 5120 + 4 * (16 + 896) + 2 * 16 * 896,
    )
    # One routed expert and the shared one: gate and up (1024, 5120) each, down (5120, 1024); the
    # router's weights (16, 5120); x and out.
    flops, bytes = cost("moe-scout-tp8-T16-one-hot")
    assert flops == 16 * (2 * 6 * 5120 * 1024 + 2 * 5120 * 16)
    assert bytes == 2 * (2 * 3 * 5120 * 1024 + 16 * 5120 + 2 * 16 * 5120)
    assert cost("moe-scout-tp8-T16-one-per-expert")[1] - bytes == 2 * 15 * 3 * 5120 * 1024
    # 131,072 keys of one head for five queries; the local layer sees its chunk of 8192.
    keys, q = 131_072, 5 * 128
    assert cost("attention_decode-scout-tp8-decode-B1-T1-128k-global") == (
        4 * q * keys,
        2 * 2 * q + 4 * 5 + 2 * 2 * 128 * keys + 4 * keys // 64 + 4,
    )
    assert cost("attention_decode-scout-tp8-decode-B1-T1-128k-local")[0] == 4 * q * 8192
    # 16 tokens, of which 3 are not in the table: 10 rows are read for the other 13.
    assert cost("gather_rows-embedding-T16") == (0, 2 * 5120 * (10 + 16) + 8 * 16)
    # 13 of 16 tokens are cached, of one KV head; 16 rows of cosines and sines of a chunk.
    rows = 16 * (5 + 1) + 13 + 16 * 5 + 2 * 13
    assert cost("rope_and_cache-global-tp8-T16") == (0, 2 * 128 * rows + 12 * 16)
    assert cost("rope_and_cache-scout-local-tp8-T16") == (
        0,
        2 * 128 * rows + 12 * 16 + 4 * 128 * 16,
    )
    # Of 16 tokens and 16 experts this GPU has 2 each; weights, row_slot and at most 4 tiles.
    flops, bytes = cost("grouped_gemm_swiglu-scout-T16-one-per-expert-ep8")
    assert flops == 2 * 2 * 2 * 5120 * 8192
    moved = 2 * 5120 + 2 * 2 * 5120 * 8192 + 16 * 8192
    assert bytes == 2 * moved + 4 * 16 + 4 * 16 + 4 * 4 * 4


@no_kernels
@pytest.mark.parametrize("T", [1, 4, 64, 16_384])
@pytest.mark.parametrize("seed", [0, 1])
def test_inputs_touch_what_the_cost_says(T, seed):
    """The rows, slots and positions that a cost is made of do not depend on the seed."""

    def make(case):
        with hollow():
            return case.make(CPU, seed)

    case = every("real")[f"gather_rows-embedding-T{T}"]
    inputs = make(case)
    x, rows = inputs["x"], inputs["rows"]
    inside = rows[(rows >= 0) & (rows < len(x))]
    assert case.cost.read == inside.unique().numel() * 5120 * 2
    assert case.cost.index == rows.numel() * rows.element_size()
    for kind in ("scout-local", "scout-local-absolute", "global"):
        case = every("real")[f"rope_and_cache-{kind}-tp8-T{T}"]
        inputs = make(case)
        cached, rope = int((inputs["slot_mapping"] >= 0).sum()), inputs["rope"]
        assert 0 < cached <= T
        table = 0
        if rope is not None:
            at = inputs["positions"] % rope.period if rope.period else torch.arange(T)
            table = at.unique().numel()
        assert case.cost.read == (6 * T + cached) * 128 * 2 + table * 128 * 4
        assert case.cost.written == (5 * T + 2 * cached) * 128 * 2


@no_kernels
@pytest.mark.parametrize("layer, chunk", [("global", 1 << 30), ("local", 64)])
def test_visible_pairs_are_those_of_the_mask(layer, chunk):
    case = find(f"attention_prefill-small-rows-64-{layer}")
    pairs = 0
    for q_len, n in zip([30, 1, 41], [47, 90, 41], strict=True):
        p, t = torch.arange(n - q_len, n)[:, None], torch.arange(n)
        pairs += int(((t <= p) & (t // chunk == p // chunk)).sum())
    assert case.cost.flops == 4 * 128 * 5 * pairs


# What ships is what is tested.


@pytest.mark.compiled_only
@pytest.mark.long
def test_small_cases_run_every_binary_of_the_real_ones():
    from llama4_triton.autotune.recorder import record
    from llama4_triton.bench.steps import shipped_launches

    def binaries(size):
        for case in cases(size):
            recording = record(case.run, make=lambda case=case: case.make(torch.device("cuda")))
            assert not recording.aten, case.id
            yield from ((launch.binary(), case.id) for launch in recording.launches)

    small = dict(binaries("small"))
    real = dict(binaries("real"))
    assert not {id for binary, id in real.items() if binary not in small}
    assert not [launch.binary() for launch in shipped_launches() if launch.binary() not in small]
