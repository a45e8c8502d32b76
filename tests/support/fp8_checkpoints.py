"""Tiny checkpoints in compressed-tensors' style, and the weights that they stand for.

`fp8_state` is what the files hold: experts one by one, e4m3 with bf16 scales per output channel.
`stands_for` multiplies it out, in float32, under the model's own names.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama4_triton.model.config import Llama4Config
from llama4_triton.model.tiny import tiny_state

__all__ = ["QUANTIZATION", "fp8_state", "save_fp8_checkpoint", "stands_for"]

QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "float", "strategy": "token", "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head", "re:.*router"],
    "kv_cache_scheme": None,
}  # fmt: skip


def fp8_state(
    config: Llama4Config,
    *,
    every_linear: bool = False,
    plain_layers: Collection[int] = (),
    scale_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """`tiny_state` in bf16, with e4m3 experts except in `plain_layers`; or every projection."""
    state: dict[str, torch.Tensor] = {}
    for name, values in tiny_state(config, dtype=torch.bfloat16).items():
        owner, _, leaf = name.rpartition(".")
        parts = {name: values}
        if owner.endswith(".experts"):
            leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
            parts = {
                f"{owner}.{e}.{part}.weight": half.contiguous()
                for e, expert in enumerate(values.mT)
                for part, half in zip(leaves, expert.chunk(len(leaves)), strict=True)
            }
        plain = any(name.startswith(f"model.layers.{i}.") for i in plain_layers)
        e4m3 = not plain and (".experts" in name or (every_linear and "_proj.weight" in name))
        for part, weight in parts.items():
            if not e4m3:
                state[part] = weight
                continue
            scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(scale_dtype)
            # A bf16 scale may be the smaller one, and then e4m3's largest number is exceeded.
            q = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            state |= {part: q, f"{part}_scale": scale}
    return state


def save_fp8_checkpoint(
    directory: Path, config: Llama4Config, state: dict[str, torch.Tensor], *, nested: bool = True
) -> Path:
    """config.json and model.safetensors; nested: as the multimodal release has them."""
    directory.mkdir(parents=True, exist_ok=True)
    data = config.to_hf() | {"quantization_config": QUANTIZATION}
    if nested:
        data = {"text_config": config.to_hf(), "quantization_config": QUANTIZATION}
        state = {f"language_model.{name}": values for name, values in state.items()}
    (directory / "config.json").write_text(json.dumps(data), encoding="utf-8")
    save_file(state, directory / "model.safetensors")
    return directory


def stands_for(config: Llama4Config, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 weights by the model's names."""
    wide = {
        name: values.float() * state[f"{name}_scale"].float()
        if f"{name}_scale" in state
        else values.float()
        for name, values in state.items()
        if not name.endswith("_scale")
    }
    for i in filter(config.is_moe_layer, range(config.num_hidden_layers)):
        owner = f"model.layers.{i}.feed_forward.experts"
        for leaf, parts in {
            "gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)
        }.items():  # fmt: skip
            experts = [
                torch.cat([wide.pop(f"{owner}.{e}.{part}.weight") for part in parts]).T
                for e in range(config.num_local_experts)
            ]
            wide[f"{owner}.{leaf}"] = torch.stack(experts)
    return wide
