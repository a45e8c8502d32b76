"""The numbers of a Llama 4 model: field names are Hugging Face's where they have one.

`SCOUT` and `MAVERICK` are the released models. Two traps of the released config.json files are
handled here and nowhere else:

* `no_rope_layers` is inverted: 1 means the layer uses RoPE. `[]` means "every
  `no_rope_layer_interval`-th layer has none".
* RoPE comes in two styles: top-level `rope_theta` with `rope_scaling`, and `rope_parameters`
  with both inside (transformers 5).

Sources: transformers models/llama4/configuration_llama4.py, llama-models models/llama4/args.py,
and for Scout's scaling (factor 16, high_freq_factor 1) llama-models PR 322.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

__all__ = [
    "BEHEMOTH_HYPOTHETICAL",
    "MAVERICK",
    "SCOUT",
    "ConfigError",
    "Llama4Config",
    "RopeScaling",
    "VisionConfig",
    "tiny_maverick",
    "tiny_scout",
]


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "max_position_embeddings",
)
MAX_LAYERS = 1000  # properties loop over the layers, and a config is somebody else's file
_FLAGS = ("use_qk_norm", "attn_temperature_tuning", "attention_bias", "tie_word_embeddings")


class ConfigError(ValueError):
    """A model configuration with a missing, malformed or contradictory entry."""


def _require(condition: bool, name: str, must: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"config: {name} must {must}, got {got!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive_int(name: str, value: object, limit: int = 2**31 - 1) -> None:
    _require(_is_int(value) and 0 < value <= limit, name, f"be an integer in 1..{limit}", value)  # type: ignore[operator]


def _positive_float(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(
        number and math.isfinite(value) and value > 0,  # type: ignore[arg-type,operator]
        name,
        "be a finite number > 0",
        value,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """The "llama3" frequency scaling; low_freq_factor == high_freq_factor is a hard switch."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _positive_float(f"rope_scaling.{name}", getattr(self, name))
        _positive_int(
            "rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings
        )
        _require(
            self.low_freq_factor <= self.high_freq_factor,
            "rope_scaling.low_freq_factor",
            f"be <= high_freq_factor ({self.high_freq_factor})",
            self.low_freq_factor,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision encoder's sizes. No defaults: transformers' own are not the released model's."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int
    projector_input_dim: int
    projector_output_dim: int
    vision_output_dim: int

    def __post_init__(self) -> None:
        for field in fields(self):
            _positive_int(f"vision_config.{field.name}", getattr(self, field.name))

    def parameter_count(self) -> int:
        """Parameters of the vision model, its adapter included, the projector not."""
        h, m = self.hidden_size, self.intermediate_size
        patches = (self.image_size // self.patch_size) ** 2
        attention = 4 * (h * h + h)
        mlp = h * m + m + m * h + h
        layer = attention + mlp + 2 * 2 * h
        embeddings = h + (patches + 1) * h + self.num_channels * self.patch_size**2 * h
        adapter = m * self.projector_input_dim + self.projector_output_dim**2
        return self.num_hidden_layers * layer + embeddings + 2 * 2 * h + adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama4Config:
    """The text model, checked when made; `vision` only for counting parameters."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a routed expert and of the shared expert
    intermediate_size_mlp: int | None = None  # of a dense layer's MLP
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    interleave_moe_layer_step: int = 1
    moe_layers: tuple[int, ...] | None = None  # overrides the step
    no_rope_layers: tuple[int, ...] = ()  # 1 = uses RoPE (!); () derives from the interval
    no_rope_layer_interval: int = 4
    attention_chunk_size: int | None = 8192  # of the RoPE layers; None: they see everything
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    use_qk_norm: bool = True
    attn_temperature_tuning: bool = True
    floor_scale: float = 8192
    attn_scale: float = 0.1
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131072
    bos_token_id: int | None = 200000
    eos_token_id: tuple[int, ...] = (200001, 200007, 200008)
    pad_token_id: int | None = 200018
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            limit = MAX_LAYERS if name == "num_hidden_layers" else 2**31 - 1
            _positive_int(name, getattr(self, name), limit)
        for name in ("rms_norm_eps", "rope_theta", "floor_scale"):
            _positive_float(name, getattr(self, name))
        for name in _FLAGS:
            _require(isinstance(getattr(self, name), bool), name, "be a bool", getattr(self, name))
        scale = self.attn_scale
        _require(
            isinstance(scale, (int, float)) and math.isfinite(scale),
            "attn_scale",
            "be a finite number",
            scale,
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            f"be a multiple of num_key_value_heads ({self.num_key_value_heads})",
            self.num_attention_heads,
        )
        _require(self.head_dim % 2 == 0, "head_dim", "be even (RoPE turns pairs)", self.head_dim)
        _require(
            self.num_experts_per_tok <= self.num_local_experts,
            "num_experts_per_tok",
            f"be <= num_local_experts ({self.num_local_experts})",
            self.num_experts_per_tok,
        )
        if self.attention_chunk_size is not None:
            _positive_int("attention_chunk_size", self.attention_chunk_size)
        self._check_layers()
        if self.intermediate_size_mlp is not None:
            _positive_int("intermediate_size_mlp", self.intermediate_size_mlp)
        _require(
            self.intermediate_size_mlp is not None or not self.dense_layers,
            "intermediate_size_mlp",
            f"be given, as layers {list(self.dense_layers)[:4]} are dense",
            self.intermediate_size_mlp,
        )

    def _check_layers(self) -> None:
        L = self.num_hidden_layers
        _require(
            not self.no_rope_layers
            or (len(self.no_rope_layers) == L and set(self.no_rope_layers) <= {0, 1}),
            "no_rope_layers",
            f"be empty or have one 0 or 1 for each of {L} layers",
            self.no_rope_layers,
        )
        if self.moe_layers is not None:
            _require(
                all(_is_int(i) and 0 <= i < L for i in self.moe_layers)
                and len(set(self.moe_layers)) == len(self.moe_layers),
                "moe_layers",
                f"be different integers in 0..{L - 1}",
                self.moe_layers,
            )

    def is_rope_layer(self, layer: int) -> bool:
        """RoPE and chunked (local) attention; the other layers are NoPE and global."""
        if self.no_rope_layers:
            return self.no_rope_layers[layer] == 1
        return (layer + 1) % self.no_rope_layer_interval != 0

    def chunk_size(self, use_rope: bool) -> int:
        """Of a layer's attention; 0 where it sees everything."""
        return (self.attention_chunk_size or 0) if use_rope else 0

    def is_moe_layer(self, layer: int) -> bool:
        """Routed experts and a shared expert; the other layers have one dense MLP."""
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return (layer + 1) % self.interleave_moe_layer_step == 0

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if not self.is_moe_layer(i))

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - len(self.dense_layers)

    @property
    def num_global_layers(self) -> int:
        return sum(not self.is_rope_layer(i) for i in range(self.num_hidden_layers))

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part. `active_text`: those one text token meets."""
        H, L, moe = self.hidden_size, self.num_hidden_layers, self.num_moe_layers
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        expert = 3 * H * self.intermediate_size
        bias = q + 2 * kv + H if self.attention_bias else 0
        head = 0 if self.tie_word_embeddings else self.vocab_size * H
        parts = {
            "routed_experts": moe * self.num_local_experts * expert,
            "shared_experts": moe * expert,
            "dense_mlp": (L - moe) * 3 * H * (self.intermediate_size_mlp or 0),
            "attention": L * (2 * H * q + 2 * H * kv + bias),
            "routers": moe * H * self.num_local_experts,
            "norms": (2 * L + 1) * H,
            "embedding": self.vocab_size * H,
            "lm_head": head,
        }
        text = sum(parts.values())
        active = text - parts["routed_experts"] + moe * self.num_experts_per_tok * expert
        vision = self.vision.parameter_count() if self.vision else 0
        projector = self.vision.vision_output_dim * H if self.vision else 0
        return {
            "total": text + vision + projector,
            "text": text,
            **parts,
            "vision": vision,
            "projector": projector,
            "active_text": active,
            "active_without_embedding": active - parts["embedding"] if head else active,
        }

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, strict: bool = False) -> Llama4Config:
        """From a parsed config.json, multimodal (`text_config` inside) or text-only.

        Args:
            strict: raise on keys that are not known, instead of one warning that names them.
        Raises:
            ConfigError: a key is missing, malformed, contradictory or not supported.
        """
        from .hf_config import from_hf

        return from_hf(data, strict=strict)

    def to_hf(self) -> dict[str, Any]:
        """The text-only config.json that `from_hf` and transformers read back."""
        from .hf_config import to_hf

        return to_hf(self)


_VISION = VisionConfig(
    hidden_size=1408,
    num_hidden_layers=34,
    num_attention_heads=16,
    intermediate_size=5632,
    image_size=336,
    patch_size=14,
    num_channels=3,
    projector_input_dim=4096,
    projector_output_dim=4096,
    vision_output_dim=4096,
)

SCOUT = Llama4Config(
    vocab_size=202048,
    hidden_size=5120,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    num_local_experts=16,
    num_experts_per_tok=1,
    rope_scaling=RopeScaling(
        factor=16.0,
        low_freq_factor=1.0,
        high_freq_factor=1.0,
        original_max_position_embeddings=8192,
    ),
    max_position_embeddings=10485760,
    vision=_VISION,
)

MAVERICK = replace(
    SCOUT,
    num_local_experts=128,
    interleave_moe_layer_step=2,
    rope_scaling=None,
    use_qk_norm=False,
    max_position_embeddings=1048576,
)

# HYPOTHETICAL. Only "288B active, 16 experts, nearly two trillion parameters" is public; these
# sizes are invented to fit it (288.5e9 active, 1.949e12 in all) and describe no released model.
BEHEMOTH_HYPOTHETICAL = Llama4Config(
    vocab_size=202048,
    hidden_size=16384,
    intermediate_size=22528,
    num_hidden_layers=100,
    num_attention_heads=128,
    num_key_value_heads=16,
    head_dim=128,
    num_local_experts=16,
    num_experts_per_tok=1,
)


def tiny_scout(**overrides: Any) -> Llama4Config:
    """Scout's structure (every layer MoE, QK norm, scaled RoPE, group 5) in about 1 MB.

    The chunk, the temperature's floor and the scaled RoPE's original length are so short that
    a prompt of a few dozen tokens meets all three.
    """
    sizes: dict[str, Any] = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        intermediate_size_mlp=128,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        attention_chunk_size=16,
        floor_scale=8,
        rope_scaling=RopeScaling(
            factor=16.0,
            low_freq_factor=1.0,
            high_freq_factor=1.0,
            original_max_position_embeddings=64,
        ),
        vision=None,
    )
    if overrides.get("vocab_size", 0) < SCOUT.vocab_size:
        sizes |= dict(bos_token_id=1, eos_token_id=(2,), pad_token_id=None)
    return replace(SCOUT, **(sizes | overrides))


def tiny_maverick(**overrides: Any) -> Llama4Config:
    """Maverick's structure (dense and MoE layers in turn, no QK norm, plain RoPE), as small."""
    changes: dict[str, Any] = dict(
        num_local_experts=8, interleave_moe_layer_step=2, use_qk_norm=False, rope_scaling=None
    )
    return tiny_scout(**(changes | {"max_position_embeddings": 1048576} | overrides))
