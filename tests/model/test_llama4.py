"""The kernel model against transformers and against the reference, on every executor.

fp32 against transformers' eager attention: 2e-4 on logits of about 4. Another order of sums makes
3e-6 at most in these 17 configurations; the margin is for other libraries and deeper models.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_configs import CASES, build, hf_logits, hf_model, make_tokens, packed

from llama4_triton.model.attention import StepAttention
from llama4_triton.model.cache import KVCache
from llama4_triton.model.config import SCOUT
from llama4_triton.model.llama4 import DecoderLayer, Llama4
from llama4_triton.model.presets import Parity
from llama4_triton.model.reference import DecoderLayer as ReferenceLayer
from llama4_triton.model.reference import Llama4 as Reference
from llama4_triton.model.reference import forced_routing, recorded_routing

pytestmark = pytest.mark.unsanitized

HF_BOUND = 2e-4

# Compiling each configuration's kernels takes longer than running them: the executor of compiled
# code gets two, which between them use every kernel.
COMPILED_CASES = ("scout", "maverick")


@pytest.fixture
def case(request, executor):
    if executor == "ptx" and request.param not in COMPILED_CASES:
        pytest.skip(f"compiled code runs {COMPILED_CASES}; the interpreter runs all")
    return CASES[request.param]


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_prefill_matches_transformers(case, device):
    (tokens,) = make_tokens(case, [15])  # two chunks of 8, three of 5
    want = hf_logits(hf_model(case), [tokens])[0]
    got = packed(build(Llama4, case).to(device), [tokens], device=device)[0].cpu()
    assert float((got - want).abs().max()) <= HF_BOUND
    assert float(want.abs().max()) > 1.0  # the bound says something at this scale only


@pytest.mark.parametrize("blocks", [[1], [5, 1, 9, 4]], ids=["token-by-token", "straddling"])
@pytest.mark.parametrize("case", COMPILED_CASES, indirect=True)
def test_any_division_into_steps_matches_transformers(case, blocks, device):
    (tokens,) = make_tokens(case, [11 if blocks == [1] else 19])  # chunks are 8
    want = hf_logits(hf_model(case), [tokens])[0]
    got = packed(build(Llama4, case).to(device), [tokens], blocks=blocks, device=device)[0].cpu()
    assert float((got - want).abs().max()) <= HF_BOUND


@pytest.mark.parametrize("case", COMPILED_CASES, indirect=True)
def test_a_sequence_in_a_ragged_batch_is_the_sequence_alone(case, device):
    case = replace(case, num_hidden_layers=2, no_rope_layers=(1, 0))  # one of each kind
    model = build(Llama4, case).to(device)
    tokens = make_tokens(case, [7, 1, 11])  # chunks are 8
    together = packed(model, tokens, blocks=[7, 4], device=device)
    for sequence, got in zip(tokens, together, strict=True):
        alone = packed(model, [sequence], blocks=[7, 4], device=device)[0]
        assert float((got - alone).abs().max()) <= 1e-5


@pytest.mark.parametrize("case", COMPILED_CASES, indirect=True)
def test_bf16_with_forced_routing_errs_no_more_than_twice_the_reference(case, device):
    """Against fp32 with the same routing; without it a flipped expert would decide the result."""
    (tokens,) = make_tokens(case, [19])
    exact_model, reference = build(Reference, case), build(Reference, case).bfloat16()
    with recorded_routing(exact_model) as routing:
        exact = packed(exact_model, [tokens])[0]
    with forced_routing(reference, routing):
        reference_error = packed(reference, [tokens])[0].float() - exact
    model = build(Llama4, case).bfloat16().to(device)
    routing = {i: tuple(part.to(device) for part in parts) for i, parts in routing.items()}
    with forced_routing(model, routing):
        error = packed(model, [tokens], device=device)[0].float().cpu() - exact
    assert float(error.norm()) <= 2 * float(reference_error.norm())
    assert float(error.abs().max()) <= 2 * float(reference_error.abs().max())
    assert float(reference_error.abs().max()) > 1e-3


@pytest.mark.parametrize("parity", ["default", "hf"])
@pytest.mark.parametrize("case", ["scout"], indirect=True)
def test_both_forms_of_rope_positions(case, parity, device):
    (tokens,) = make_tokens(case, [19])
    want = packed(build(Reference, case, parity=parity), [tokens])[0]
    got = packed(build(Llama4, case, parity=parity).to(device), [tokens], device=device)[0].cpu()
    assert float((got - want).abs().max()) <= HF_BOUND


@pytest.mark.parametrize("layer", [0, 3], ids=["local", "global"])
def test_scout_width_layer(layer, device, executor):
    """One decoder layer at Scout's width with the shipped tiles.

    Four experts of 1024, an eighth of the width as on one of 8 GPUs, keep it quick to fill.
    """
    if executor == "interpreter":
        pytest.skip("40 heads of 128 and tiles of this size are for compiled code")
    config = replace(SCOUT, num_local_experts=4, intermediate_size=1024, num_hidden_layers=4)
    torch.manual_seed(0)
    with torch.device("meta"):
        reference, model = (
            make(config, layer, Parity()) for make in (ReferenceLayer, DecoderLayer)
        )
    state = {}
    for name, value in reference.state_dict().items():
        if name.endswith("norm.weight"):
            state[name] = torch.ones(value.shape)
        else:
            # Uniform, because it is fast to draw; the variance of a normal one.
            scale = (3 / value.shape[1]) ** 0.5
            state[name] = torch.empty(value.shape).uniform_(-scale, scale).bfloat16()
    reference.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    model.load_state_dict({k: v.bfloat16().to(device) for k, v in state.items()}, assign=True)

    x = torch.randn(7, config.hidden_size).bfloat16()
    exact = _layer_output(reference, config, layer, x.float(), "cpu")
    routing = _router_choice(reference, config, layer, x.float())
    got = _layer_output(model, config, layer, x.to(device), device, forced=routing)
    rounded_reference = reference.bfloat16()
    want = _layer_output(rounded_reference, config, layer, x, "cpu", forced=routing)
    error, own = (got.float().cpu() - exact), (want.float() - exact)
    assert float(error.norm()) <= 2 * float(own.norm())
    assert float(own.norm()) > 1e-3 * float(exact.norm())


def _step(config, device, dtype):
    cache = KVCache.for_lengths(config, [7], page_size=64, dtype=dtype, device=device)
    return cache, cache.step([[1] * 7], logits="all")


@torch.no_grad()
def _layer_output(layer_module, config, layer, x, device, forced=None):
    owner = Llama4 if type(layer_module) is DecoderLayer else Reference
    with torch.device("meta"):
        rotary = owner(replace(config, vocab_size=8)).model.rotary
    cache, step = _step(config, device, x.dtype)
    if forced is not None:
        router = layer_module.feed_forward.router
        router.forced = tuple(part.to(device) for part in forced)
    layers = [cache.layer(index, step) for index in range(config.num_hidden_layers)]
    attend = [StepAttention(config, step, layers)] if owner is Llama4 else []
    out, h = layer_module(x, None, rotary(step.positions), layers[layer], step, *attend)
    return out + h


@torch.no_grad()
def _router_choice(reference, config, layer, x):
    chosen = []
    handle = reference.feed_forward.router.register_forward_hook(
        lambda _module, _inputs, out: chosen.append(out)
    )
    _layer_output(reference, config, layer, x, "cpu")
    handle.remove()
    return chosen[0]
