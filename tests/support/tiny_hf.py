"""Tiny models of transformers that the adapter is tested on, text and image and text.

Two layers, one with chunks of 4 and RoPE and one global without, unless a case says otherwise:
enough for every operator and mask, and little to interpret.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llama4_triton.model.config import Llama4Config

from .tiny_configs import CASES, hf_model

__all__ = ["CHUNK", "HF_CASES", "IMAGE", "image_inputs", "image_model", "text_model"]

CHUNK = 4
IMAGE = 96  # the token that stands for a patch


def _two_layers(name: str, **changes) -> Llama4Config:
    moe_layers = (1,) if CASES[name].moe_layers else None
    small = dict(num_hidden_layers=2, no_rope_layers=(1, 0), attention_chunk_size=CHUNK)
    small |= dict(moe_layers=moe_layers) if moe_layers else {}
    return replace(CASES[name], **(small | changes))


HF_CASES: dict[str, Llama4Config] = {
    "scout": _two_layers("scout"),
    "maverick": _two_layers("maverick", moe_layers=(1,)),
    "mqa": _two_layers("mqa"),
    "group5-wide-heads": _two_layers("group5-wide-heads"),
    "top2": _two_layers("top2"),
    "128-experts": _two_layers("128-experts"),
    "all-dense": _two_layers("all-dense", moe_layers=()),
    "tied-bias": _two_layers("tied", attention_bias=True),
    "chunk5-no-temperature": _two_layers(
        "chunk5", attention_chunk_size=5, attn_temperature_tuning=False
    ),
}


def text_model(name: str, attn_implementation: str = "eager"):
    """transformers' model of a case, fp32."""
    model = hf_model(HF_CASES[name])
    model.config._attn_implementation = attn_implementation
    model.generation_config.eos_token_id = None  # random weights stop where they like
    model.generation_config.pad_token_id = 0
    return model


def image_model():
    """An image-and-text model with Scout's text part, fp32, random weights."""
    from transformers import Llama4Config as HfConfig
    from transformers import Llama4ForConditionalGeneration

    text = HF_CASES["scout"].to_hf()
    vision = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        image_size=28, patch_size=7, vision_output_dim=32, projector_input_dim=32,
        projector_output_dim=32, pixel_shuffle_ratio=0.5, num_channels=3, rope_theta=10000.0,
    )  # fmt: skip
    config = HfConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, boi_token_index=94,
        eoi_token_index=95,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def image_inputs(model) -> dict[str, torch.Tensor]:
    """A prompt of 11 tokens, 4 of them patches of one tile."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (1, 11), generator=generator)
    ids[0, 3:7] = IMAGE
    return dict(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28, generator=generator))
