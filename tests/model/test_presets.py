"""Parity presets: what each sets, how it is spelt, and that the models follow it.

Which preset equals transformers bit for bit is in test_reference.py; here what differs from the
default is shown to differ, and what does not is shown not to.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_configs import CASES, build, hf_logits, hf_model, make_tokens, packed

from llama4_triton.kernels import _launch
from llama4_triton.model.config import MAVERICK, SCOUT
from llama4_triton.model.generate import generate, logits_of
from llama4_triton.model.llama4 import Llama4
from llama4_triton.model.presets import PRESETS, Parity, parity_of
from llama4_triton.model.reference import Llama4 as Reference
from llama4_triton.model.reference import recorded_routing

CONFIG = CASES["scout"]
BOUND = 2e-4  # of fp32 logits about 4, the project's
no_kernels = pytest.mark.no_kernels

FIELDS = {
    "default": ("float32", "config", "sequence", "chunk"),
    "hf": ("model", "config", "slot", "absolute"),
    "vllm": ("float32", "long", "sequence", "absolute"),
    "sglang": ("model", "config", "sequence", "absolute"),
    "meta": ("model", "off", "sequence", "absolute"),
}


@no_kernels
def test_what_each_preset_sets():
    said = {
        name: (p.score_dtype, p.temperature, p.temperature_positions, p.rope_positions)
        for name, p in PRESETS.items()
    }
    assert said == FIELDS
    assert {p.max_model_len for p in PRESETS.values()} == {None}
    assert PRESETS["default"] == Parity()


@no_kernels
def test_a_preset_is_spelt_by_name_and_fields():
    assert parity_of("hf") == PRESETS["hf"]
    changed = parity_of("vllm, max_model_len=16384,score_dtype=model")
    assert changed == replace(PRESETS["vllm"], max_model_len=16384, score_dtype="model")
    assert parity_of("rope_positions=absolute") == Parity(rope_positions="absolute")
    assert parity_of(changed) is changed


BAD = {
    "preset": ("trt", r"^parity: must be one of default, hf, vllm, sglang, meta, got 'trt'$"),
    "empty": ("", "must be one of .*, got ''"),
    "field": ("hf,rope=chunk", r"fields must be score_dtype, .*max_model_len .*, got 'rope=chunk'"),
    "value": ("hf,score_dtype=bf16", "score_dtype must be one of 'float32', 'model', got 'bf16'"),
    "no value": ("hf,temperature", "temperature must be one of .*, got ''"),
    "length": ("vllm,max_model_len=0", "max_model_len must be None or an integer > 0, got 0"),
    "no length": ("vllm,max_model_len=-5", "fields must be .*, got 'max_model_len=-5'"),
}


@no_kernels
@pytest.mark.parametrize("name", BAD)
def test_bad_spelling(name):
    text, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        Reference(CONFIG, parity=text)


# config.json says tuned or not, parity, on or off
TEMPERATURES = [
    (True, "default", True), (False, "default", False), (False, "hf", False), (True, "hf", True),
    (True, "sglang", True), (True, "meta", False), (False, "temperature=on", True),
    (False, "vllm,max_model_len=32769", True), (True, "vllm,max_model_len=32768", False),
    (True, "vllm,max_model_len=32768,temperature=on", True),
]  # fmt: skip


@no_kernels
@pytest.mark.parametrize("said, parity, tuned", TEMPERATURES, ids=str)
def test_when_the_temperature_is_on(said, parity, tuned):
    for config in (SCOUT, MAVERICK, CONFIG):
        applied = parity_of(parity).applied(replace(config, attn_temperature_tuning=said))
        assert applied == replace(config, attn_temperature_tuning=tuned)


@no_kernels
def test_vllm_looks_at_the_longest_position_unless_told_a_length():
    for length, tuned in ((32768, False), (32769, True)):
        config = replace(SCOUT, max_position_embeddings=length)
        assert PRESETS["vllm"].applied(config).attn_temperature_tuning is tuned


@no_kernels
def test_in_fp32_presets_differ_in_the_temperature_only():
    """floor_scale is 4: of 27 tokens all but 3 are scaled; the other fields change roundings."""
    tokens = make_tokens(CONFIG, [27])
    logits = {name: packed(build(Reference, CONFIG, parity=name), tokens)[0] for name in PRESETS}
    off = packed(build(Reference, replace(CONFIG, attn_temperature_tuning=False)), tokens)[0]
    for name, got in logits.items():
        want, other = logits["default"], off
        if name == "meta":
            want, other = other, want
        assert float((got - want).abs().max()) <= BOUND, name
        assert float((got - other).abs().max()) > 100 * BOUND, name


@pytest.mark.unsanitized
def test_the_kernels_follow_transformers_in_a_left_padded_batch(device):
    """The temperature counts the padding."""
    tokens = make_tokens(CONFIG, [9, 14])
    ids = torch.tensor([[0] * 5 + tokens[0], tokens[1]])
    mask = torch.tensor([[0] * 5 + [1] * 9, [1] * 14])
    config = replace(
        CONFIG, num_hidden_layers=2, no_rope_layers=(1, 0), num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    want = hf_logits(hf_model(config), ids.tolist(), attention_mask=mask)
    got = logits_of(build(Llama4, config, parity="hf").to(device), ids, mask)
    assert float((got - want)[mask == 1].abs().max()) <= BOUND
    default = logits_of(build(Reference, config), ids, mask)
    assert float((default - want)[mask == 1].abs().max()) > 10 * BOUND


@no_kernels
def test_generation_of_a_ragged_batch_is_that_of_transformers_padded_on_the_left():
    # So much temperature that the padding decides the short one's tokens.
    config = replace(CONFIG, attn_scale=2.0, no_rope_layers=(1, 0, 0, 0))
    prompts = make_tokens(config, [3, 13])
    options = dict(max_new_tokens=6, stop_ids=(), page_size=4)
    got = generate(build(Reference, config, parity="hf"), prompts, **options).tokens
    ids = torch.tensor([[0] * 10 + prompts[0], prompts[1]])
    mask = torch.tensor([[0] * 10 + [1] * 3, [1] * 13])
    with torch.no_grad():
        out = hf_model(config).generate(
            ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    assert got == out[:, 13:].tolist()
    default = generate(build(Reference, config), prompts, **options).tokens
    assert default[0] != got[0] and default[1] == got[1]


# How presets round the scores of bf16 models.
ROUNDED = dict(default="fp32", hf="bf16", vllm="fp32", sglang="bf16", meta="bf16")


@no_kernels
@pytest.mark.parametrize("parity", PRESETS)
@pytest.mark.parametrize("tokens", [3, 7], ids=["few", "some"])
def test_the_kernels_are_told_how_to_round_scores(parity, tokens):
    """What they do then is in tests/kernels/test_moe.py."""
    seen = []

    def keep(kernel, grid, *args, **constants):
        if "ROUND_SCORE" in constants:
            seen.append(constants["ROUND_SCORE"])

    with _launch.intercept(keep):
        packed(build(Llama4, CONFIG, parity=parity).bfloat16(), make_tokens(CONFIG, [tokens]))
    assert seen == [ROUNDED[parity]] * CONFIG.num_moe_layers


@no_kernels
def test_the_reference_rounds_scores_the_same():
    tokens = make_tokens(CONFIG, [7])
    for parity, rounded in ROUNDED.items():
        model = build(Reference, CONFIG, parity=parity).bfloat16()
        with recorded_routing(model) as routing:
            packed(model, tokens)
        dtype = torch.bfloat16 if rounded == "bf16" else torch.float32
        assert {weights.dtype for _, weights in routing.values()} == {dtype}, parity


@no_kernels
def test_the_page_says_what_the_presets_set():
    page = (Path(__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \| (\w+) \|$", page, re.MULTILINE)
    assert {name: tuple(fields) for name, *fields in rows} == FIELDS
