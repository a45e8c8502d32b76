"""torch.compile of every public function: one graph, compiled once for any number of tokens.

What depends on the number of tokens (tiles, launches, sizes of tables) is chosen inside the flat
operators, or is an expression of it. So one compilation serves eight counts, which meet every
choice there is, and makes the launches that uncompiled code makes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from support.op_calls import VARIANTS, OpCall, op_call
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from llama4_triton.autotune.recorder import recorded_launches
from llama4_triton.bench.case import tensors_of
from llama4_triton.kernels import _paths
from llama4_triton.kernels._paths import use
from llama4_triton.kernels.attention_prefill_config import default_block_m as prefill_block_m
from llama4_triton.kernels.grouped_gemm import grouped_gemm_swiglu
from llama4_triton.kernels.grouped_gemm_combine import grouped_gemm_combine
from llama4_triton.kernels.router import default_block_k, default_split, num_slices
from llama4_triton.kernels.routing import default_block_m, sort_by_expert

pytestmark = [pytest.mark.interpreter_only, pytest.mark.filterwarnings("ignore:.*lru_cache")]

OPS = sorted(_paths.OPS)
# Around 16, 64, 128, 256, 512 and 4096 tokens, where tiles, slices or launches change.
COUNTS = (3, 2, 17, 65, 129, 300, 513, 4999)


def _compilable(op: str, T: int, variant: int) -> OpCall:
    """A routing is made in the same graph: its tiles are as many as an expression of T says."""
    call = op_call(op, T, torch.bfloat16, variant)
    if "routing" not in call.inputs:
        return call
    inputs, options = dict(call.inputs), call.options
    routing = inputs.pop("routing")
    inputs |= dict(ids=routing.expert_ids, weights=routing.expert_weights)
    public = {"grouped_gemm_swiglu": grouped_gemm_swiglu,
              "grouped_gemm_combine": grouped_gemm_combine}[op]  # fmt: skip

    def function(ids, weights, **rest):
        return public(routing=sort_by_expert(ids, weights, routing.num_experts), **rest, **options)

    return OpCall(function=function, inputs=inputs)


def _layouts(launches) -> list[str]:
    """Kernels, grids, configurations and layouts; memory that is free may serve again or not."""
    return [re.sub(r"storage=\d+", "", repr(launch)) for launch in launches]


def _mark(call: OpCall, other: OpCall) -> None:
    """As dynamic the dimensions that differ between two numbers of tokens."""
    for x, y in zip(tensors_of(call.inputs), tensors_of(other.inputs), strict=True):
        for dim, sizes in enumerate(zip(x.shape, y.shape, strict=True)):
            if sizes[0] != sizes[1]:
                torch._dynamo.mark_dynamic(x, dim)


def _compiled(call: OpCall, backend) -> Callable[..., Any]:
    def run(**inputs):
        return call.function(**inputs, **call.options)

    return torch.compile(run, fullgraph=True, backend=backend)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "variant", [0, *(pytest.param(v, marks=pytest.mark.long) for v in range(1, VARIANTS))]
)
@pytest.mark.parametrize("op", OPS)
def test_one_compilation_serves_every_number_of_tokens(op, variant):
    counter = CompileCounterWithBackend("eager")
    compiled = None
    for T in COUNTS:
        call = _compilable(op, T, variant)
        _mark(call, _compilable(op, T + 7, variant))
        if compiled is None:
            compiled = _compiled(call, counter)
        want = recorded_launches(lambda call=call: call())
        got = recorded_launches(lambda call=call, run=compiled: run(**call.inputs))
        assert _layouts(got) == _layouts(want), T
        assert want
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", ["router", "route", "moe", "attention_prefill", "attention_decode"])
def test_results_are_those_of_uncompiled_code(op):
    """Through AOTAutograd, which functionalises what is written in place."""
    compiled = None
    with use(all="reference"):
        for T in (3, 17):
            call, again = _compilable(op, T, 1), _compilable(op, T, 1)
            _mark(again, _compilable(op, T + 7, 1))
            if compiled is None:
                compiled = _compiled(call, "aot_eager")
            want, got = call(), compiled(**again.inputs)
            for have, wanted in zip(tensors_of(got), tensors_of(want), strict=True):
                assert torch.equal(have, wanted)


def test_a_choice_by_symbols_is_the_choice_by_numbers():
    """At each step of a choice, on both sides of it."""
    for E in (1, 3, 16, 128):

        def of_random_tokens(rows, E=E):
            """The formula that default_block_m has the steps of."""
            mean = rows / E
            tile = triton.next_power_of_2(math.ceil(mean + 2 * math.sqrt(mean)))
            return min(128, max(16, tile))

        assert [default_block_m(n, E) for n in range(60 * E)] == [
            of_random_tokens(n) for n in range(60 * E)
        ]
    symbols = make_fx(_choices, tracing_mode="symbolic")(torch.zeros(3))
    for T in (2, 16, 17, 32, 33, 64, 65, 128, 129, 512, 513, 4096, 4097, 9999):
        assert symbols(torch.zeros(T)) == _choices(torch.zeros(T))


def _choices(x):
    T, bf16 = x.shape[0], torch.bfloat16
    split = default_split(T, 16)
    return [
        default_block_m(T, 3), prefill_block_m(T, 1, 128, bf16), prefill_block_m(T, 2, 64, bf16),
        split, default_block_k(T), num_slices(5120, split, default_block_k(T)),
    ]  # fmt: skip


def test_a_gradient_is_refused_while_code_is_traced():
    call = op_call("rms_norm", 3, torch.float32)
    call.inputs["x"].requires_grad_()
    compiled = torch.compile(lambda **k: call.function(**k, **call.options), backend="eager")
    with pytest.raises(NotImplementedError, match="x must not require grad"):
        compiled(**call.inputs)
