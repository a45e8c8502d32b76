"""The reference against transformers' eager attention, and against itself divided differently.

The bound of 2e-4 on logits of about 4 is the project's; the two differ by 3e-6 in practice, because
transformers sums over masked keys too.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.tiny_configs import CASES, build, hf_logits, hf_model, make_tokens, packed

from llama4_triton.model import reference
from llama4_triton.model.cache import KVCache
from llama4_triton.model.config import SCOUT
from llama4_triton.model.presets import PRESETS
from llama4_triton.model.reference import (
    Llama4,
    forced_routing,
    recorded_routing,
    rope_frequencies,
)

pytestmark = pytest.mark.no_kernels

HF_BOUND, SELF_BOUND = 2e-4, 1e-5
LENGTH = 27  # four chunks of 8, the last one partial


@functools.cache
def _golden(name: str) -> torch.Tensor:
    """transformers' logits (2, LENGTH, V) of two sequences."""
    return hf_logits(hf_model(CASES[name]), make_tokens(CASES[name], [LENGTH, LENGTH]))


def _tokens(name: str) -> list[list[int]]:
    return make_tokens(CASES[name], [LENGTH, LENGTH])


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max())


@pytest.mark.parametrize("parity", ["default", "hf"])
@pytest.mark.parametrize("name", CASES)
def test_prefill_matches_transformers(name, parity):
    model = build(Llama4, CASES[name], parity=parity)
    got = torch.stack(packed(model, _tokens(name)))
    assert _difference(got, _golden(name)) <= HF_BOUND
    assert float(_golden(name).abs().max()) > 1.0  # the bound says something at this scale only


@pytest.mark.parametrize("blocks", [[1], [7, 1, 12]], ids=["one", "straddling"])
@pytest.mark.parametrize("name", CASES)
def test_any_division_into_steps_is_one_prefill(name, blocks):
    model = build(Llama4, CASES[name])
    whole = torch.stack(packed(model, _tokens(name)))
    got = torch.stack(packed(model, _tokens(name), blocks=blocks, page_size=3))
    assert _difference(got, whole) <= SELF_BOUND
    assert _difference(got, _golden(name)) <= HF_BOUND


@pytest.mark.parametrize("name", CASES)
def test_a_sequence_in_a_ragged_batch_is_the_sequence_alone(name):
    model = build(Llama4, CASES[name])
    tokens = make_tokens(CASES[name], [13, 1, 27, 8])
    for blocks in (None, [6, 5]):
        together = packed(model, tokens, blocks=blocks)
        for sequence, got in zip(tokens, together, strict=True):
            alone = packed(model, [sequence])[0]
            assert got.shape == alone.shape and _difference(got, alone) <= SELF_BOUND


@pytest.mark.parametrize("name", ["scout", "maverick", "top2", "irregular-nope", "chunk5"])
def test_left_padding_with_slot_positions_matches_transformers(name):
    config, pad = CASES[name], 8
    tokens = make_tokens(config, [LENGTH - pad, LENGTH])
    rows = [[0] * pad + tokens[0], tokens[1]]
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :pad] = 0
    want = hf_logits(hf_model(config), rows, attention_mask=mask)
    model = build(Llama4, config)
    for blocks in (None, [5]):
        got = packed(model, tokens, blocks=blocks, slot_offsets=[pad, 0])
        assert _difference(got[0], want[0, pad:]) <= HF_BOUND
        assert _difference(got[1], want[1]) <= HF_BOUND
    # The default, each sequence's own positions, is what transformers computes without padding.
    got = packed(model, tokens)
    assert _difference(got[0], want[0, pad:]) > 100 * HF_BOUND
    assert _difference(got[0], hf_logits(hf_model(config), [tokens[0]])[0]) <= HF_BOUND


@pytest.mark.parametrize("name", ["scout", "maverick", "mqa", "top2", "tied", "bias", "chunk5"])
def test_bf16_rounds_where_transformers_rounds(name):
    """Bit for bit, with its positions and score type; these inputs have no router ties."""
    config = CASES[name]
    hf = hf_model(config)
    for parameter in hf.parameters():  # .to(dtype) would round inv_freq too
        parameter.data = parameter.data.bfloat16()
    want = hf_logits(hf, _tokens(name))
    model = build(Llama4, config, parity="hf").bfloat16()
    assert torch.equal(torch.stack(packed(model, _tokens(name))), want)
    for field in ("score_dtype=float32", "rope_positions=chunk"):
        other = build(Llama4, config, parity=f"hf,{field}").bfloat16()
        assert not torch.equal(torch.stack(packed(other, _tokens(name))), want), field


def test_last_logits_are_rows_of_all_logits():
    model = build(Llama4, CASES["scout"])
    tokens = make_tokens(model.config, [5, 1, 11])
    want = torch.stack([logits[-1] for logits in packed(model, tokens)])
    cache = KVCache.for_lengths(model.config, [5, 1, 11], page_size=4, dtype=torch.float32)
    got = model(cache.step(tokens), cache)
    assert got.shape == want.shape and _difference(got, want) <= SELF_BOUND


def test_chunk_positions_repeat_bitwise_and_absolute_ones_do_not():
    """Two chunks with the same tokens, local layers only: the model cannot tell them apart."""
    config = replace(CASES["scout"], no_rope_layers=(1,) * 4)
    (chunk,) = make_tokens(config, [8])
    for rope_positions, same in (("chunk", True), ("absolute", False)):
        model = build(Llama4, config, parity=f"rope_positions={rope_positions}")
        first, *others = packed(model, [chunk * 5], blocks=[8])[0].split(8)
        assert all(torch.equal(first, other) for other in others) is same


def test_frequencies_of_scout():
    plain = rope_frequencies(replace(SCOUT, rope_scaling=None))
    ratio = plain / rope_frequencies(SCOUT)
    assert ratio.tolist() == [1.0] * 35 + [16.0] * 29
    assert plain[0] == 1.0 and plain.dtype == torch.float32


def _router(name: str, weight: torch.Tensor):
    config = replace(CASES[name], hidden_size=weight.shape[1], num_local_experts=len(weight))
    router = reference.Router(config, PRESETS["default"])
    router.weight.data = weight
    return router


def test_router_ties_go_to_the_lowest_expert():
    weight = torch.tensor([[0.0], [2.0], [1.0], [2.0], [2.0]])
    ids, weights = _router("top2", weight)(torch.ones(1, 1))
    assert ids.tolist() == [[1, 3]] and ids.dtype == torch.int32
    assert torch.equal(weights, torch.full((1, 2), 2.0).sigmoid())


def test_router_takes_nan_for_minus_infinity():
    router = _router("top2", torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [0.5, 0.0]]))
    ids, weights = router(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]))
    assert ids.tolist() == [[0, 2], [0, 1]]
    assert torch.equal(weights, torch.tensor([[1.0, 0.5], [-torch.inf, -torch.inf]]).sigmoid())


@pytest.mark.parametrize("name", ["scout", "maverick", "top2"])
def test_recorded_routing_forced_again_changes_nothing(name):
    model = build(Llama4, CASES[name])
    with recorded_routing(model) as routing:
        want = packed(model, _tokens(name))
    moe = [i for i in range(model.config.num_hidden_layers) if model.config.is_moe_layer(i)]
    assert list(routing) == moe
    with forced_routing(model, routing):
        assert all(map(torch.equal, packed(model, _tokens(name)), want))
    E, last = model.config.num_local_experts, moe[-1]
    other = {last: ((routing[last][0] + 1) % E, routing[last][1])}
    with forced_routing(model, other):
        assert _difference(packed(model, _tokens(name))[0], want[0]) > 0.1
    assert all(map(torch.equal, packed(model, _tokens(name)), want))


def _half_rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _late_temperature(config, positions):
    steps = torch.floor(positions.float() / config.floor_scale)
    return torch.log1p(steps) * config.attn_scale + 1.0


def _softmaxed_router(self, x):
    weights, ids = F.linear(x, self.weight).softmax(dim=-1).max(dim=-1, keepdim=True)
    return ids.int(), weights


def _score_on_output(self, x, routing, residual):
    ids, weights = routing
    out = _experts_forward(self, x, (ids, torch.ones_like(weights)), torch.zeros_like(x))
    return residual + out * weights


_experts_forward = reference.Experts.forward

FAULTS = {
    "half-rotate": ("_rotate", _half_rotate),
    "temperature-of-p-not-p+1": ("_temperature", _late_temperature),
    "softmax-router": ("Router.forward", _softmaxed_router),
    "score-on-the-output": ("Experts.forward", _score_on_output),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees(fault, monkeypatch):
    """Mistakes that give plausible text on a short prompt are far outside the bound."""
    path, wrong = FAULTS[fault]
    monkeypatch.setattr(f"{reference.__name__}.{path}", wrong)
    got = torch.stack(packed(build(Llama4, CASES["scout"]), _tokens("scout")))
    assert _difference(got, _golden("scout")) > 10 * HF_BOUND


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_chunk_size": 9},
        {"attention_chunk_size": None},
        {"rope_scaling": None},
        {"use_qk_norm": False},
        {"attn_temperature_tuning": False},
        {"floor_scale": 5},
        {"no_rope_layers": (1, 1, 1, 1)},
    ],
    ids=str,
)
def test_the_comparison_sees_every_field(changes):
    model = build(Llama4, replace(CASES["scout"], **changes))
    got = torch.stack(packed(model, _tokens("scout")))
    assert _difference(got, _golden("scout")) > 10 * HF_BOUND
