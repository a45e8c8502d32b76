"""selftest --bisect: the layer and the operator that are named are the ones that are wrong."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from support.tiny_configs import CASES, build, make_tokens

from llama4_triton.bench import bisect as module
from llama4_triton.bench.bisect import bisect, tiny_models
from llama4_triton.kernels import _launch
from llama4_triton.model.llama4 import Llama4
from llama4_triton.model.reference import Llama4 as Reference
from llama4_triton.model.tiny import save_tiny_checkpoint, tiny_state

pytestmark = [pytest.mark.interpreter_only, pytest.mark.unsanitized]

# A dense layer and a MoE layer in turn; the second and the last layer are global.
CONFIG = replace(
    CASES["maverick"],
    no_rope_layers=(1, 0, 1, 0),
    hidden_size=32,
    intermediate_size=32,
    num_local_experts=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)
(TOKENS,) = make_tokens(CONFIG, [5])
STEPS = [TOKENS[:4], TOKENS[4:]]  # prefill, then decode
LONG = pytest.mark.long


@contextlib.contextmanager
def corrupted(kernel_name, call, argument, change):
    """Change what launch number `call` of a kernel has written to one of its arguments."""
    made = []

    def launch(kernel, grid, *args, **kwargs):
        with _launch.intercept(None):
            _launch.launch(kernel, grid, *args, **kwargs)
        if kernel.__name__ == kernel_name:
            if len(made) == call:
                change(args[kernel.arg_names.index(argument)])
            made.append(grid)

    with _launch.intercept(launch):
        yield
    assert len(made) > call, f"{kernel_name} was launched {len(made)} times"


def run():
    return bisect(build(Llama4, CONFIG), build(Reference, CONFIG), STEPS, page_size=4)


def test_nothing_departs_and_every_call_is_looked_at():
    found = run()
    assert found.first is None and all(row.ok for row in found.rows)
    assert [row.what for row in found.rows] == [f"layer {i}" for i in range(4)] + ["logits"]
    # Per step: embedding, norm; per layer 2 norms, RoPE and cache, attention; dense: SwiGLU; MoE:
    # one operator. Either step, a prefill and one of decode, makes a schedule for local and one
    # for global layers.
    assert found.calls == 2 * (2 + 4 * 4 + 2 * 1 + 2 * 1) + 4


def scale(x):
    x.mul_(1.01)


def set_one(x):
    x.view(-1)[3] = 7.0


# name: ((kernel, call, argument, change), the layer and operator that must be named)
FAULTS = {
    "experts of layer 3": (
        ("_few_down_kernel", 1, "out_ptr", scale),
        ("layer 3", "moe"),
    ),
    "cache of layer 2": (
        ("_rope_and_cache_kernel", 2, "k_cache_ptr", lambda cache: cache[0, 2].add_(0.1)),
        ("layer 2", "rope_and_cache"),
    ),
    "weights of layer 1": (
        ("_few_up_kernel", 0, "weights_ptr", scale),
        ("layer 1", "moe"),
    ),
    "decode of layer 0": (
        ("_attention_decode_kernel", 0, "out_ptr", set_one),
        ("layer 0", "attention_decode"),
    ),
    "embedding": (("_gather_rows_kernel", 0, "y_ptr", scale), ("embedding", "gather_rows")),
    "last norm": (("_rms_norm_kernel", 8, "y_ptr", set_one), ("head", "add_rms_norm")),
}


QUICK = ("experts of layer 3",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else LONG) for name in FAULTS]
)
def test_a_wrong_operator_is_named_with_its_layer(name):
    fault, (where, what) = FAULTS[name]
    with corrupted(*fault):
        found = run()
    assert found.first is not None, found.rows
    assert (found.first.where, found.first.what) == (where, what), str(found.first)
    # Later operators answer for themselves only: right results of wrong inputs.
    assert len(found.departures) == 1
    assert not all(row.ok for row in found.rows)
    assert str(found.first).startswith(f"{where}: {what}: output ")


def test_a_fault_between_the_operators_is_named_by_module():
    model = build(Llama4, CONFIG)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[3, 5] += 0.5
    found = bisect(model, build(Reference, CONFIG), STEPS, page_size=4)
    assert [row.ok for row in found.rows] == [True, True, False, False, False]
    assert found.first.where == "layer 2"
    assert found.first.what == "model.layers.2.self_attn.o_proj"
    assert found.first.message.startswith("step 0: max |diff| ")


@LONG
def test_what_nobody_has_written_is_not_compared(monkeypatch):
    """Memory of the cache beyond the tokens holds anything, huge values among it."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _garbage(empty(*a, **k)))
    fault = ("_rope_and_cache_kernel", 0, "v_cache_ptr", lambda cache: cache[0, 2].add_(0.1))
    with corrupted(*fault):
        found = run()
    assert (found.first.where, found.first.what) == ("layer 0", "rope_and_cache")


def _garbage(x):
    return x.fill_(1e30) if x.dtype == torch.float32 and x.dim() == 6 else x  # the cache's pages


def test_tiny_models_have_both_structures():
    models = tiny_models()
    assert list(models) == ["tiny Scout", "tiny Maverick"]
    for config, state in models.values():
        Llama4(config).load_state_dict(state, strict=True)


@pytest.fixture
def cli(monkeypatch):
    testing = pytest.importorskip("typer.testing", reason="the command line is an extra")
    from llama4_triton.cli import app

    monkeypatch.setattr("llama4_triton.bench.selftest_command.BLOCKS", (2, 1))
    return lambda *args: testing.CliRunner().invoke(app, ["selftest", "--bisect", *map(str, args)])


def test_the_command_on_a_checkpoint(cli, tmp_path):
    checkpoint = save_tiny_checkpoint(tmp_path, CONFIG)
    with corrupted("_swiglu_kernel", 1, "z_ptr", scale):
        result = cli("--checkpoint", checkpoint)
    assert result.exit_code == 1
    assert "first to depart: layer 2: swiglu: output 0" in result.output


@LONG
def test_the_command_without_one(cli, monkeypatch):
    monkeypatch.setattr(module, "tiny_models", lambda: {"one": (CONFIG, tiny_state(CONFIG))})
    result = cli()
    assert result.exit_code == 0, result.output
    assert "none departs" in result.output and "layer 3" in result.output
