"""Parity presets: the choices in which engines differ on the same checkpoint, by engine.

    Llama4(config, parity="hf")                            # as transformers computes it
    Llama4(config, parity="vllm,max_model_len=16384")      # as vLLM, started with that length
    Llama4(config, parity=Parity(rope_positions="absolute"))

docs/parity.md says who differs where and by how much, and what no preset reproduces. In exact
arithmetic only the temperature's fields change a result; the others change roundings.
Sources: transformers 5.23 models/llama4/modeling_llama4.py, vLLM 0.33 models/llama4.py, SGLang
0.5.23 srt/models/llama4.py, llama-models models/llama4/{args,model,moe}.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from .config import Llama4Config

__all__ = ["PRESETS", "Parity", "parity_of"]

VLLM_TUNES_ABOVE = 32768  # vllm models/llama4.py: a longer max_model_len turns the temperature on

CHOICES: dict[str, tuple[str, ...]] = {
    "score_dtype": ("float32", "model"),
    "temperature": ("config", "on", "off", "long"),
    "temperature_positions": ("sequence", "slot"),
    "rope_positions": ("chunk", "absolute"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """What a model follows where engines differ; the defaults are this project's own.

    Args:
        score_dtype: routing weights in "float32", or rounded to the "model"'s type.
        temperature: of the NoPE layers' queries: as the "config" says, "on", "off", or "long": on
            if max_model_len is above 32768, whatever the config says.
        temperature_positions: of a token in its "sequence", or of its "slot" in a padded batch,
            which counts the padding on the left of it.
        rope_positions: counted from the start of the token's "chunk", or "absolute".
        max_model_len: what temperature="long" looks at; None: config.max_position_embeddings.
    Raises:
        ValueError: a field is none of its choices.
    """

    score_dtype: str = "float32"
    temperature: str = "config"
    temperature_positions: str = "sequence"
    rope_positions: str = "chunk"
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                said = ", ".join(map(repr, known))
                raise ValueError(f"parity: {name} must be one of {said}, got {value!r}")
        length = self.max_model_len
        if length is not None and not (isinstance(length, int) and length > 0):
            raise ValueError(f"parity: max_model_len must be None or an integer > 0, got {length}")

    def applied(self, config: Llama4Config) -> Llama4Config:
        """`config` with attn_temperature_tuning as `temperature` decides it."""
        if self.temperature == "config":
            return config
        length = self.max_model_len or config.max_position_embeddings
        tuned = self.temperature == "on" or (
            self.temperature == "long" and length > VLLM_TUNES_ABOVE
        )
        return replace(config, attn_temperature_tuning=tuned)

    def score_rounding(self, x: torch.Tensor) -> torch.dtype | None:
        """The type that routing weights of tokens x are rounded to; None: they stay in fp32."""
        return x.dtype if self.score_dtype == "model" else None


_ABSOLUTE = Parity(rope_positions="absolute")
PRESETS: Mapping[str, Parity] = MappingProxyType(
    {
        "default": Parity(),
        "hf": replace(_ABSOLUTE, score_dtype="model", temperature_positions="slot"),
        "vllm": replace(_ABSOLUTE, temperature="long"),
        "sglang": replace(_ABSOLUTE, score_dtype="model"),
        "meta": replace(_ABSOLUTE, score_dtype="model", temperature="off"),
    }
)


def parity_of(text: str | Parity) -> Parity:
    """The preset of that name, with fields changed: "hf" or "vllm,max_model_len=16384".

    Without a name the fields change the default: "rope_positions=absolute".
    Raises:
        ValueError: no such preset or field, or a field's value is none of its choices.
    """
    if isinstance(text, Parity):
        return text
    first, *rest = (part.strip() for part in text.split(","))
    if "=" in first:
        first, rest = "default", [first, *rest]
    if first not in PRESETS:
        raise ValueError(f"parity: must be one of {', '.join(PRESETS)}, got {first!r}")
    changes: dict[str, Any] = {}
    for part in rest:
        name, _, value = part.partition("=")
        if name == "max_model_len" and value.isdigit():
            changes[name] = int(value)
        elif name in CHOICES:
            changes[name] = value
        else:
            known = ", ".join((*CHOICES, "max_model_len"))
            raise ValueError(f"parity: fields must be {known} and a value each, got {part!r}")
    return replace(PRESETS[first], **changes)
