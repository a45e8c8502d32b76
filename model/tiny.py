"""Random weights for small configurations, and checkpoints of them in Hugging Face's format.

The standard deviations keep every intermediate value and the logits near 1, so that a comparison
of two implementations is sensitive to all of them. Made for `demo` and tests.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checkpoint import INDEX_NAME, expected_shapes
from .config import Llama4Config

__all__ = ["save_tiny_checkpoint", "tiny_state"]


def tiny_state(
    config: Llama4Config, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A state dict by Hugging Face's names; the same on every machine for one seed."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1.0 + 0.1 * values
        elif name.endswith(".bias"):
            values *= 0.1
        elif name != "model.embed_tokens.weight" or config.tie_word_embeddings:
            # The experts' tensors are (E, in, out); every other weight is (out, in).
            fan_in = shape[1]
            # The router's logits are spread wider, so that rounding rarely changes the choice.
            values *= (2.0 if name.endswith("router.weight") else 1.0) / math.sqrt(fan_in)
        state[name] = values.to(dtype)
    return state


def save_tiny_checkpoint(
    directory: str | Path,
    config: Llama4Config,
    *,
    seed: int = 0,
    shards: int = 2,
    dtype: torch.dtype = torch.float32,
    nested: bool = False,
) -> Path:
    """Write config.json, `shards` safetensors files and their index; return the directory.

    Args:
        shards: 1 writes model.safetensors without an index.
        nested: the multimodal release's layout (`text_config`, names under `language_model.`).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    prefix = "language_model." if nested else ""
    state = {prefix + name: t for name, t in tiny_state(config, seed=seed, dtype=dtype).items()}
    data = config.to_hf()
    if nested:
        data = {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "text_config": data,
        }
    (directory / "config.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
    names = list(state)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = (
            "model.safetensors"
            if shards == 1
            else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        )
        part = {name: state[name] for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    if shards > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return directory
