"""Llama4Config: the released models' numbers, config.json in both styles, and every refusal."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from llama4_triton.model.config import (
    BEHEMOTH_HYPOTHETICAL,
    MAVERICK,
    SCOUT,
    ConfigError,
    Llama4Config,
    RopeScaling,
    tiny_maverick,
    tiny_scout,
)

pytestmark = pytest.mark.no_kernels

# Counted from transformers' modules on the meta device.
COUNTS = {
    "total": (108_641_793_536, 401_583_781_376),
    "text": (107_769_861_120, 400_711_848_960),
    "routed_experts": (96_636_764_160, 386_547_056_640),
    "shared_experts": (6_039_797_760, 3_019_898_880),
    "dense_mlp": (0, 6_039_797_760),
    "attention": (3_019_898_880, 3_019_898_880),
    "routers": (3_932_160, 15_728_640),
    "embedding": (1_034_485_760, 1_034_485_760),
    "lm_head": (1_034_485_760, 1_034_485_760),
    "vision": (850_960_896, 850_960_896),
    "projector": (20_971_520, 20_971_520),
    "active_text": (17_172_894_720, 17_184_691_200),
    "active_without_embedding": (16_138_408_960, 16_150_205_440),
}


@pytest.mark.parametrize("part", COUNTS)
def test_parameter_counts(part):
    got = (SCOUT.parameter_counts()[part], MAVERICK.parameter_counts()[part])
    assert got == COUNTS[part]


def test_behemoth_fits_the_public_figures():
    counts = BEHEMOTH_HYPOTHETICAL.parameter_counts()
    assert round(counts["active_text"] / 1e8) == 2885  # "288B active"
    assert round(counts["total"] / 1e9) == 1949  # "nearly two trillion"


@pytest.mark.parametrize(
    "config", [tiny_scout(), tiny_maverick(), tiny_scout(tie_word_embeddings=True)]
)
def test_parameter_counts_are_those_of_the_model(config):
    from llama4_triton.model.reference import Llama4

    counts = config.parameter_counts()
    assert counts["text"] == sum(p.numel() for p in Llama4(config).parameters())


def test_layer_patterns_of_the_released_models():
    for config in (SCOUT, MAVERICK):
        nope = [i for i in range(48) if not config.is_rope_layer(i)]
        assert nope == list(range(3, 48, 4)) and config.num_global_layers == 12
    assert SCOUT.dense_layers == () and SCOUT.num_moe_layers == 48
    assert MAVERICK.dense_layers == tuple(range(0, 48, 2)) and MAVERICK.num_moe_layers == 24


def test_explicit_layer_lists():
    config = tiny_scout(num_hidden_layers=3, no_rope_layers=(0, 1, 0), moe_layers=(2,))
    assert [config.is_rope_layer(i) for i in range(3)] == [False, True, False]
    assert [config.is_moe_layer(i) for i in range(3)] == [False, False, True]


def _released(config=SCOUT):
    """A config.json in the style of the released files."""
    text = {
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": config.interleave_moe_layer_step,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": config.num_local_experts,
        "output_router_logits": False,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": config.use_qk_norm,
        "vocab_size": 202048,
    }
    if config.rope_scaling is not None:
        text["rope_scaling"] = {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    vision = {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1408,
        "image_size": 336,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "vision_output_dim": 4096,
    }
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "image_token_index": 200092,
        "model_type": "llama4",
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": vision,
    }


@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_released_style(config):
    assert Llama4Config.from_hf(_released(config), strict=True) == config


@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_transformers_5_style(config):
    """What transformers makes of the released file and writes back, multimodal and text-only."""
    from transformers import Llama4Config as HFConfig

    hf = HFConfig(**json.loads(json.dumps(_released(config))))
    data = json.loads(hf.to_json_string(use_diff=False))
    assert "rope_parameters" in data["text_config"]
    got = Llama4Config.from_hf(data)
    want = replace(
        config,
        no_rope_layers=got.no_rope_layers,
        moe_layers=got.moe_layers,
    )
    assert got == want
    for i in range(48):
        assert got.is_rope_layer(i) == config.is_rope_layer(i)
        assert got.is_moe_layer(i) == config.is_moe_layer(i)
    text = json.loads(hf.text_config.to_json_string(use_diff=False))
    assert Llama4Config.from_hf(text) == replace(want, vision=None)


@pytest.mark.parametrize(
    "config",
    [
        tiny_scout(),
        tiny_maverick(),
        tiny_scout(moe_layers=(), tie_word_embeddings=True, attention_bias=True),
        tiny_scout(no_rope_layers=(0, 1, 1, 0), attention_chunk_size=None),
    ],
    ids=["scout", "maverick", "dense-tied-bias", "irregular-no-chunk"],
)
def test_to_hf_reads_back(config):
    got = Llama4Config.from_hf(json.loads(json.dumps(config.to_hf())), strict=True)
    layers = range(config.num_hidden_layers)
    assert got == replace(
        config,
        no_rope_layers=tuple(int(config.is_rope_layer(i)) for i in layers),
        moe_layers=tuple(i for i in layers if config.is_moe_layer(i)),
    )


def _text(**changes):
    text = _released()["text_config"] | changes
    return {name: value for name, value in text.items() if value is not ...}


def test_spellings():
    read = Llama4Config.from_hf
    assert read(_text(attn_temperature_tuning=4)).attn_temperature_tuning is True
    assert read(_text(attn_temperature_tuning=0)).attn_temperature_tuning is False
    assert read(_text()).attn_temperature_tuning is True
    assert read(_text(eos_token_id=200001)).eos_token_id == (200001,)
    assert read(_text(eos_token_id=...)).eos_token_id == ()
    assert read(_text(head_dim=...)).head_dim == 5120 // 40
    assert read(_text(moe_layers=[1, 5])).moe_layers == (1, 5)
    assert read(_text(moe_layers=[1, 5])).is_moe_layer(0) is False
    assert read(_text(attention_chunk_size=None)).attention_chunk_size is None
    inverted = read(_text(no_rope_layers=[1] * 47 + [0]))
    assert inverted.num_global_layers == 1 and not inverted.is_rope_layer(47)
    old = {"rope_type": "default"}
    assert read(_text(rope_scaling=old, rope_theta=1e4)).rope_theta == 1e4
    both = _text(rope_parameters={"rope_type": "default", "rope_theta": 2e4}, rope_theta=1e4)
    assert read(both).rope_theta == 2e4 and read(both).rope_scaling is None


def test_unknown_keys_warn_or_raise():
    with pytest.warns(UserWarning, match="unknown keys .* got .'frobnicate'"):
        Llama4Config.from_hf(_text(frobnicate=1))
    with pytest.raises(ConfigError, match="frobnicate"):
        Llama4Config.from_hf(_text(frobnicate=1), strict=True)


_ROPE = _released()["text_config"]["rope_scaling"]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"hidden_size": ...}, "hidden_size must be given"),
        ({"num_local_experts": None}, "num_local_experts must be given"),
        ({"hidden_size": 0}, "hidden_size must be an integer in 1"),
        ({"hidden_size": "5120"}, "hidden_size must be an integer"),
        ({"hidden_size": 5120.0}, "hidden_size must be an integer"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"vocab_size": 2**40}, "vocab_size must be an integer in 1..2147483647"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer in 1..1000"),
        ({"num_attention_heads": 41}, r"multiple of num_key_value_heads \(8\), got 41"),
        ({"head_dim": 127}, "head_dim must be even"),
        ({"num_experts_per_tok": 17}, r"num_experts_per_tok must be <= num_local_experts \(16\)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be an integer"),
        ({"attention_chunk_size": 0}, "attention_chunk_size must be an integer in 1"),
        ({"attention_chunk_size": -8192}, "attention_chunk_size must be"),
        ({"floor_scale": 0}, "floor_scale must be a finite number > 0"),
        ({"floor_scale": math.nan}, "floor_scale must be a finite"),
        ({"attn_scale": math.inf}, "attn_scale must be a finite number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a finite number > 0"),
        ({"rope_theta": "big"}, "rope_theta must be a finite number"),
        ({"use_qk_norm": 1}, "use_qk_norm must be a bool"),
        ({"interleave_moe_layer_step": 0}, "interleave_moe_layer_step must be"),
        ({"no_rope_layers": [1, 0]}, "one 0 or 1 for each of 48 layers"),
        ({"no_rope_layers": [2] * 48}, "one 0 or 1 for each"),
        ({"no_rope_layers": "none"}, "no_rope_layers must be a list of integers"),
        ({"moe_layers": [48]}, r"moe_layers must be different integers in 0\.\.47"),
        ({"moe_layers": [1, 1]}, "moe_layers must be different"),
        ({"moe_layers": [], "intermediate_size_mlp": None}, "intermediate_size_mlp must be given"),
        ({"layer_types": ["full_attention"] * 48}, "layer_types must be chunked_attention where"),
        ({"hidden_act": "gelu"}, 'hidden_act must be "silu"'),
        ({"quantization_config": {"bits": 4}}, "quant_method must be 'compressed-tensors'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'be "default" or "llama3"'),
        ({"rope_scaling": _ROPE | {"factor": 0}}, "rope_scaling.factor must be a finite"),
        ({"rope_scaling": _ROPE | {"low_freq_factor": 2.0}}, "must be <= high_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor must be given"),
        ({"rope_scaling": _ROPE | {"beta": 1}}, "rope_scaling must have no other keys"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        Llama4Config.from_hf(_text(**changes))


def test_refused_shapes_of_the_file():
    with pytest.raises(ConfigError, match="config.json must be an object, got list"):
        Llama4Config.from_hf([])
    with pytest.raises(ConfigError, match="text_config must be an object"):
        Llama4Config.from_hf({"text_config": 1})
    data = _released()
    del data["vision_config"]["vision_output_dim"]
    with pytest.raises(ConfigError, match="vision_config.vision_output_dim must be given"):
        Llama4Config.from_hf(data)
    with pytest.raises(ConfigError, match="original_max_position_embeddings must be an integer"):
        RopeScaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=0,
        )
