"""What a call costs the host, counted, on the launch path of a GPU: at most so many Python calls.

Triton's share of a launch is measured beside it: it differs by kernel (arguments that are tuples,
constants of a module, which it compares each time) and by version. An operator of several launches
may take Triton's share once more for each further one.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
from support.host_cost import dispatches, gpu_like, python_calls
from support.op_calls import VARIANTS, op_call

from llama4_triton.kernels import _paths
from llama4_triton.kernels.attention_decode_schedule import decode_schedule
from llama4_triton.kernels.attention_schedule import prefill_schedule
from llama4_triton.kernels.prepared import prepare

pytestmark = pytest.mark.compiled_only

OPS = sorted(_paths.OPS)
CALLS = 40
OURS = 20  # of them, whatever Triton's version
PINNED = triton.__version__.startswith("3.7.")  # its own share is up to 10 calls more in 3.9
DISPATCHES = 6
PREPARED = 12
# The routed and the shared expert's z, the tables of the routing, logits, workspace, result.
ALLOCATIONS = {"moe": 11}


@pytest.fixture(autouse=True)
def _gpu():
    with gpu_like():
        yield


def _call(op, variant):
    """One call as a layer makes it: schedules are made once per step, for all layers."""
    call = op_call(op, 5, torch.bfloat16, variant)
    given, options = call.inputs, dict(call.options)
    if op == "attention_prefill":
        options["schedule"] = prefill_schedule(
            given["cu_seqlens_q"], given["seq_lens"], 5,
            chunk_size=options.get("chunk_size", 0), block_m=16,
        )  # fmt: skip
    if op == "attention_decode":
        kv = given["kv"]
        options["schedule"] = decode_schedule(
            given["seq_lens"], chunk_size=options.get("chunk_size", 0), capacity=kv.capacity,
            num_kv_heads=kv.num_kv_heads, page_size=kv.page_size,
        )  # fmt: skip
    call = dataclasses.replace(call, options=options)
    for _ in range(3):  # compiled, its program written, and run once
        call()
    return call


@pytest.mark.parametrize("variant", range(VARIANTS))
@pytest.mark.parametrize("op", OPS)
def test_a_call(op, variant):
    call = _call(op, variant)
    cost = python_calls(lambda: call.function(**call.inputs, **call.options))
    _, *further = cost.launches
    assert cost.total - sum(cost.launches) <= OURS, cost
    if PINNED:
        assert cost.total <= CALLS + sum(further), cost
    assert len(dispatches(call)) <= ALLOCATIONS.get(op, DISPATCHES)


@pytest.mark.parametrize("op", OPS)
def test_a_prepared_call(op):
    call = _call(op, 0)
    prepared = prepare(call.function, **call.inputs, **call.options)
    name = next(name for name in prepared.names if prepared.tensor(name).numel())
    x = prepared.tensor(name)
    other = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    for run in (lambda: prepared(), lambda: prepared(**{name: other})):
        cost = python_calls(run)
        assert cost.total <= PREPARED + 6 * (len(prepared.program.steps) - 1), cost
    assert dispatches(prepared) == []


def test_the_count_sees_what_is_called():
    def inner():
        return 1

    assert python_calls(lambda: [inner() for _ in range(3)]).total == 4  # and the list
    assert dispatches(lambda: torch.zeros(2) + 1) != []
