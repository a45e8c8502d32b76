"""Hugging Face's config.json to `Llama4Config` and back. Use `Llama4Config.from_hf` and `to_hf`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .config import ConfigError, Llama4Config, RopeScaling, VisionConfig
from .quantization_config import check_quantization

__all__ = ["from_hf", "to_hf"]

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
)
# Read as they are; where absent, the defaults of Llama4Config are transformers' own.
_OPTIONAL = (
    "head_dim",
    "intermediate_size_mlp",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "attention_chunk_size",
    "rms_norm_eps",
    "use_qk_norm",
    "floor_scale",
    "attn_scale",
    "attention_bias",
    "tie_word_embeddings",
    "max_position_embeddings",
)
_HANDLED = {
    "attn_temperature_tuning",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "layer_types",
    "moe_layers",
    "no_rope_layers",
    "pad_token_id",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
}
# Say nothing about the forward pass of a text model.
_IGNORED = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "for_llm_compressor",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_ROPE_KEYS = {
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_type",
    "type",
}


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: {name} must be an object, got {type(value).__name__}")
    return value


def _rope(text: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """(rope_theta, scaling) from either style; transformers 5 has everything in one object."""
    name = "rope_parameters" if text.get("rope_parameters") is not None else "rope_scaling"
    rope = _mapping(name, text.get(name) or {})
    theta = rope.get("rope_theta", text.get("rope_theta", 500000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f'config: {name}.rope_type must be "default" or "llama3", got {kind!r}')
    unknown = set(rope) - _ROPE_KEYS
    if unknown - {"partial_rotary_factor"} or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"config: {name} must have no other keys, got {sorted(unknown)}")
    values: dict[str, Any] = {}
    for field in fields(RopeScaling):
        if field.name not in rope:
            raise ConfigError(f"config: {name}.{field.name} must be given, got no such key")
        values[field.name] = rope[field.name]
    return theta, RopeScaling(**values)


def _integers(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(i, int) for i in value):
        raise ConfigError(f"config: {name} must be a list of integers, got {value!r:.80}")
    return tuple(int(i) for i in value)


def _vision(data: Mapping[str, Any]) -> VisionConfig | None:
    vision = _mapping("vision_config", data.get("vision_config") or {})
    if not vision:
        return None
    names = [field.name for field in fields(VisionConfig)]
    missing = [name for name in names if name not in vision]
    if missing:
        raise ConfigError(f"config: vision_config.{missing[0]} must be given, got no such key")
    return VisionConfig(**{name: vision[name] for name in names})


def _check_supported(text: Mapping[str, Any]) -> None:
    if text.get("hidden_act", "silu") != "silu":
        raise ConfigError(f'config: hidden_act must be "silu", got {text["hidden_act"]!r:.80}')
    if text.get("quantization_config"):
        check_quantization(text["quantization_config"])


def _check_layer_types(config: Llama4Config, layer_types: object) -> None:
    """transformers masks by layer_types and rotates by no_rope_layers; they must agree."""
    want = _layer_types(config)
    if layer_types is not None and layer_types != want:
        raise ConfigError(
            "config: layer_types must be chunked_attention where no_rope_layers is 1 and "
            f"full_attention elsewhere, got {layer_types!r:.80}"
        )


def _layer_types(config: Llama4Config) -> list[str]:
    return [
        "chunked_attention" if config.is_rope_layer(i) else "full_attention"
        for i in range(config.num_hidden_layers)
    ]


def from_hf(data: Mapping[str, Any], *, strict: bool = False) -> Llama4Config:
    """See `Llama4Config.from_hf`."""
    data = _mapping("config.json", data)
    nested = "text_config" in data
    text = _mapping("text_config", data["text_config"]) if nested else data
    for name in _REQUIRED:
        if text.get(name) is None:
            raise ConfigError(f"config: {name} must be given, got no such key")
    unknown = sorted(set(text) - set(_REQUIRED) - set(_OPTIONAL) - _HANDLED - _IGNORED)
    unknown = [name for name in unknown if nested or name != "vision_config"]
    if unknown:
        message = f"config: unknown keys must not change the forward pass, got {unknown!r:.200}"
        if strict:
            raise ConfigError(message)
        warnings.warn(message, stacklevel=3)
    _check_supported(data)
    _check_supported(text)

    values: dict[str, Any] = {name: text[name] for name in _REQUIRED}
    values.update({name: text[name] for name in _OPTIONAL if name in text})
    if values.get("head_dim") is None:
        heads = values["num_attention_heads"]
        if not (isinstance(heads, int) and isinstance(values["hidden_size"], int) and heads > 0):
            raise ConfigError(f"config: num_attention_heads must be an integer > 0, got {heads!r}")
        values["head_dim"] = values["hidden_size"] // heads
    if "tie_word_embeddings" not in text and "tie_word_embeddings" in data:
        values["tie_word_embeddings"] = data["tie_word_embeddings"]
    values["rope_theta"], values["rope_scaling"] = _rope(text)
    # Early releases carried the integer 4 here.
    values["attn_temperature_tuning"] = bool(text.get("attn_temperature_tuning", True))
    if text.get("moe_layers") is not None:
        values["moe_layers"] = _integers("moe_layers", text["moe_layers"])
    values["no_rope_layers"] = _integers("no_rope_layers", text.get("no_rope_layers") or [])
    eos = text.get("eos_token_id")
    values["eos_token_id"] = () if eos is None else _integers("eos_token_id", _listed(eos))
    values["bos_token_id"] = text.get("bos_token_id")
    values["pad_token_id"] = text.get("pad_token_id")
    config = Llama4Config(**values, vision=_vision(data))
    _check_layer_types(config, text.get("layer_types"))
    return config


def _listed(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else [value]


def to_hf(config: Llama4Config) -> dict[str, Any]:
    """See `Llama4Config.to_hf`."""
    out: dict[str, Any] = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}
    out |= {name: getattr(config, name) for name in (*_REQUIRED, *_OPTIONAL)}
    if config.intermediate_size_mlp is None:
        out["intermediate_size_mlp"] = config.intermediate_size  # unused, but HF wants a number
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope["rope_type"] = "llama3"
        rope |= {f.name: getattr(config.rope_scaling, f.name) for f in fields(RopeScaling)}
    layers = range(config.num_hidden_layers)
    out |= {
        "attn_temperature_tuning": config.attn_temperature_tuning,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id) or None,
        "hidden_act": "silu",
        "layer_types": _layer_types(config),
        "moe_layers": [i for i in layers if config.is_moe_layer(i)],
        "no_rope_layers": [int(config.is_rope_layer(i)) for i in layers],
        "pad_token_id": config.pad_token_id,
        "rope_parameters": rope,
    }
    return out
