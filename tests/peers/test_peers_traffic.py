"""Our grouped GEMMs beside vLLM's and SGLang's on the same routing: traffic and machine code.

Opt-in: `--long`, and LLAMA4_TRITON_PEERS as support/peers.py says. Scout's experts on one of 8
GPUs, bf16, weights as (E, 2F, H) and (E, H, F) for all three. Configurations: the engines' own
tuned ones for an H100 (vLLM 0.33.0, E=16,N=1024; SGLang 0.5.23, triton_3_1_0), ours by default.
Both GEMMs of the layer; the engines launch the activation apart, we have it in the first GEMM, so
their first output is twice as wide. The tables are printed whoever is better.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.peers import PEERS, align, launches_of, load

from llama4_triton.bench import cost_experts as cost
from llama4_triton.bench.hollow import hollow
from llama4_triton.bench.shapes import SCOUT, routing_counts
from llama4_triton.kernels.expert_weights import Experts
from llama4_triton.kernels.grouped_gemm import grouped_gemm_swiglu
from llama4_triton.kernels.grouped_gemm_combine import grouped_gemm_combine
from llama4_triton.kernels.routing import Routing, default_block_m

pytestmark = pytest.mark.long

F16, BF16 = torch.float16, torch.bfloat16
NAMES = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
CONFIGS = {
    ("vllm", 16): (16, 64, 128, 64, 4, 4),
    ("vllm", 256): (64, 128, 64, 1, 8, 3),
    ("vllm", 4096): (128, 256, 64, 1, 8, 4),
    ("sglang", 16): (16, 64, 128, 1, 8, 3),
    ("sglang", 256): (64, 64, 64, 32, 4, 3),
    ("sglang", 4096): (128, 256, 64, 1, 8, 4),
}
ROUTINGS = ("uniform", "skewed", "one-hot")


def problem(T, routing, *, H=SCOUT.hidden, F=SCOUT.ffn // 8, E=SCOUT.experts, dtype=BF16):
    counts = routing_counts(routing, T, E)
    ids = torch.repeat_interleave(torch.arange(E), torch.tensor(counts)).to(torch.int32)
    ids = ids[torch.randperm(T, generator=torch.Generator().manual_seed(0))][:, None].contiguous()
    with hollow():
        x = torch.randn(T, H).to(dtype)
        w13, w2 = torch.randn(E, 2 * F, H, dtype=dtype), torch.randn(E, H, F, dtype=dtype)
    return counts, x, w13, w2, ids, torch.ones(T, 1)


def our_routing(ids, weights, E, block_m):
    """The engines' table in our form, made without a launch."""
    sorted_ids, _, _ = align(ids, E, block_m)
    T, counts = len(ids), torch.bincount(ids.flatten(), minlength=E).tolist()
    offsets = [sum(counts[:e]) for e in range(E + 1)]
    tiles = [
        (e, offsets[e], offsets[e + 1], i)
        for e in sorted(range(E), key=lambda e: (-counts[e], e))
        for i in range(-(-counts[e] // block_m))
    ]
    tiles += [(-1, 0, 0, 0)] * (T // block_m + min(E + 1, T) - len(tiles))
    return Routing(
        expert_ids=ids,
        expert_weights=weights,
        expert_offsets=torch.tensor(offsets, dtype=torch.int32),
        row_slot=sorted_ids[sorted_ids < T].contiguous(),
        tiles=torch.tensor(tiles, dtype=torch.int32),
        tile_count=torch.tensor([sum(1 for e, _, _ in tiles if e >= 0)], dtype=torch.int32),
        block_m=block_m,
        num_experts=E,
        top_k=1,
    )


def ours(x, w13, w2, ids, weights):
    experts = Experts.from_vllm(w13, w2)
    routing = our_routing(ids, weights, len(w13), default_block_m(len(x), len(w13)))

    def run():
        z = grouped_gemm_swiglu(x, experts, routing)
        return grouped_gemm_combine(z, experts, routing)

    return run


def config_of(peer, T):
    return dict(zip(NAMES, CONFIGS[peer, T], strict=True))


@pytest.mark.interpreter_only
@pytest.mark.parametrize("peer", PEERS)
def test_counts_of_a_foreign_kernel_are_exact(peer):
    """Executed program by program against classes of programs, at 1/8 of the width in fp16."""
    from llama4_triton.bench.l2 import dram_bytes
    from llama4_triton.bench.traffic import measure

    counts, x, w13, w2, ids, weights = problem(64, "skewed", H=640, F=128, dtype=F16)
    config = config_of(peer, 16)
    run = launches_of(peer, x, w13, w2, ids, weights, config)
    executed, batched = measure(run, execute=True), measure(run)
    for a, b in zip(executed.launches, batched.launches, strict=True):
        assert replace(a, classes=0) == replace(b, classes=0) and b.classes > 0
    assert executed.tensors == batched.tensors
    assert dram_bytes(executed.trace, sms=7, capacity=2**18) == dram_bytes(
        batched.trace, sms=7, capacity=2**18
    )
    # The first GEMM is what it should be, so the wrapper was called as the engine calls it.
    up = torch.stack([w13[e].float() @ row.float() for e, row in zip(ids[:, 0], x, strict=True)])
    run_again = launches_of(peer, x, w13, w2, ids, weights, config)
    run_again()
    first = run_again.__closure__[[c for c in run_again.__code__.co_freevars].index("up")]
    assert (first.cell_contents[:, 0].float() - up).abs().max() < 0.1
    block_m = config["BLOCK_SIZE_M"]
    rows = sum(-(-c // block_m) * block_m for c in counts)
    assert batched.flops == rows * (2 * 640 * 256 + 2 * 128 * 640)


@pytest.mark.interpreter_only
@pytest.mark.parametrize("T", [16, 256, 4096])
def test_traffic_side_by_side(T, capsys):
    """Same routing, same weights: what each requests, and what of it reaches DRAM (modelled)."""
    from llama4_triton.bench.l2 import dram_bytes
    from llama4_triton.bench.traffic import measure

    for peer in PEERS:
        load(peer)
    lines = [
        f"\nScout TP 8 bf16, T = {T}: both expert GEMMs, ours with the activation",
        f"{'routing':8} {'kernels':8} {'programs':>8} {'idle':>6} {'requested':>12} {'unique':>12}"
        f" {'DRAM, modelled':>14} {'padded/ideal':>12}",
    ]
    for routing in ROUTINGS:
        counts, x, w13, w2, ids, weights = problem(T, routing)
        runs = {p: launches_of(p, x, w13, w2, ids, weights, config_of(p, T)) for p in PEERS}
        runs["ours"] = ours(x, w13, w2, ids, weights)
        sizes = dict(tokens_per_expert=counts, tokens=T, hidden=5120, ffn=1024, itemsize=2)
        ideal = cost.moe(**sizes).flops
        weight_bytes = sum(c > 0 for c in counts) * 3 * 5120 * 1024 * 2
        for name, run in runs.items():
            traffic = measure(run)
            dram = dram_bytes(traffic.trace).total
            unique = sum(traffic.unique.values())
            lines.append(
                f"{routing:8} {name:8} {traffic.programs:8} {traffic.idle:6}"
                f" {traffic.requested:12,} {unique:12,} {dram:14,} {traffic.flops / ideal:12.2f}"
            )
            assert len(traffic.launches) == 2 and traffic.atomics == 0
            # Weights of the active experts, x and the routing weights; the engines' second GEMM
            # reads the activation, which is no product of theirs here.
            rest = traffic.unique["operand"] - weight_bytes - T * 5120 * 2 - 4 * max(T, 8)
            assert 0 <= rest == (0 if name == "ours" else T * 1024 * 2), name
    with capsys.disabled():
        print("\n".join(lines))


class _Recorded:
    """Stands for a jit function: keeps launches instead of making them."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        from llama4_triton.autotune.launches import Launch

        def launch(*args, **kwargs):
            sizes = grid(kwargs) if callable(grid) else grid
            self.launches.append(Launch.of(self.kernel, sizes, args, kwargs))

        return launch


@pytest.mark.compiled_only
@pytest.mark.parametrize("T", [16, 256, 4096])
def test_machine_code_side_by_side(T, capsys, monkeypatch):
    """sm_90, at the real widths: registers, spills, shared memory, blocks per SM, tensor cores."""
    from llama4_triton.autotune.compile import compile_launch
    from llama4_triton.autotune.launches import H100, Launch
    from llama4_triton.kernels import _launch

    _, x, w13, w2, ids, weights = problem(T, "uniform")
    launches = {}
    for peer in PEERS:
        module = load(peer)
        recorded = _Recorded(module.fused_moe_kernel)
        monkeypatch.setattr(module, "fused_moe_kernel", recorded)
        launches_of(peer, x, w13, w2, ids, weights, config_of(peer, T))()
        monkeypatch.undo()
        launches[peer] = recorded.launches
    mine = []

    def keep(kernel, grid, *args, **kwargs):
        mine.append(Launch.of(kernel, grid, args, kwargs))

    with _launch.assume_device(H100), _launch.intercept(keep):
        ours(x, w13, w2, ids, weights)()
    launches["ours"] = mine
    lines = [
        f"\nScout TP 8 bf16, T = {T}, sm_90",
        f"{'kernels':8} {'GEMM':>4} {'registers':>9} {'spills':>6} {'shared':>8} {'blocks/SM':>9} "
        "tensor cores",
    ]
    for name, pair in launches.items():
        assert len(pair) == 2
        for i, launch in enumerate(pair, 1):
            report = compile_launch(launch, "sm_90")
            lines.append(
                f"{name:8} {i:4} {report.registers:9} {report.spills:6} {report.shared:8,}"
                f" {report.occupancy.blocks:9} {report.facts.tensor}"
            )
            if name == "ours":
                assert report.spills == 0 and report.stack == 0
    with capsys.disabled():
        print("\n".join(lines))
