"""The tiny configurations on which both model classes are compared with transformers.

`CASES` maps a test id to a config; `hf_model(config)` builds transformers' model with random
weights from `tiny_state`; `packed(...)` runs one of this project's models on a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from llama4_triton.model.cache import KVCache
from llama4_triton.model.config import Llama4Config, tiny_maverick, tiny_scout
from llama4_triton.model.tiny import tiny_state

__all__ = ["CASES", "build", "hf_logits", "hf_model", "make_tokens", "packed"]

# Chunk 8 and floor_scale 4: the 27 tokens of `make_tokens` meet 4 chunks and 6 temperatures.
_SCOUT = tiny_scout(vocab_size=97, hidden_size=48, attention_chunk_size=8, floor_scale=4)
_MAVERICK = tiny_maverick(vocab_size=97, hidden_size=48, attention_chunk_size=8, floor_scale=4)

CASES: dict[str, Llama4Config] = {
    "scout": _SCOUT,
    "maverick": _MAVERICK,
    "mha": replace(_SCOUT, num_attention_heads=4, num_key_value_heads=4),
    "mqa": replace(_SCOUT, num_attention_heads=6, num_key_value_heads=1),
    "group5-wide-heads": replace(_MAVERICK, num_attention_heads=5, num_key_value_heads=1),
    "smooth-rope-band": replace(
        _SCOUT,
        rope_scaling=replace(
            _SCOUT.rope_scaling,
            factor=8.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
    ),
    "top2": replace(_SCOUT, num_experts_per_tok=2),
    "top-all": replace(_MAVERICK, num_local_experts=3, num_experts_per_tok=3),
    "one-expert": replace(_SCOUT, num_local_experts=1),
    "128-experts": replace(_MAVERICK, num_local_experts=128, intermediate_size=32),
    "irregular-nope": replace(
        _SCOUT, num_hidden_layers=6, no_rope_layers=(0, 1, 1, 0, 0, 1), moe_layers=(1, 2, 5)
    ),
    "all-dense": replace(_MAVERICK, moe_layers=()),
    "tied": replace(_SCOUT, tie_word_embeddings=True),
    "bias": replace(_SCOUT, attention_bias=True),
    "chunk5": replace(_SCOUT, attention_chunk_size=5),
    "chunk-longer-than-text": replace(_SCOUT, attention_chunk_size=8192),
    "no-temperature": replace(_MAVERICK, attn_temperature_tuning=False),
}


def build(model_class: type, config: Llama4Config, *, seed: int = 0, **options) -> nn.Module:
    """A model of this project (reference or twin) in fp32 with the weights of `tiny_state`."""
    model = model_class(config, **options)
    state = tiny_state(config, seed=seed)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def hf_model(config: Llama4Config, *, seed: int = 0):
    """transformers' model, eager attention, fp32, with the same weights."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    hf_config = Llama4TextConfig(**config.to_hf(), attn_implementation="eager")
    model = Llama4ForCausalLM(hf_config)
    state = tiny_state(config, seed=seed)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def hf_logits(model, tokens: Sequence[Sequence[int]], **inputs) -> torch.Tensor:
    """(B, S, V) of sequences of one length."""
    return model(input_ids=torch.tensor(tokens), use_cache=False, **inputs).logits


def make_tokens(config: Llama4Config, lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


def packed(
    model: nn.Module,
    tokens: Sequence[Sequence[int]],
    *,
    blocks: Sequence[int] | None = None,
    page_size: int = 4,
    slot_offsets: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """Logits (S, V) of every token of every sequence, through a paged cache of the right size.

    Args:
        blocks: how many tokens each call gets, cyclically; None: all at once. A sequence that
            has run out of tokens sits the rest out.
    """
    config = model.config
    cache = KVCache.for_lengths(
        config,
        [len(sequence) for sequence in tokens],
        step_tokens=max(blocks) if blocks else None,
        page_size=page_size,
        dtype=model.lm_head.weight.dtype,
        device=device,
    )
    cache.begin(len(tokens), slot_offsets=slot_offsets)
    parts: list[list[torch.Tensor]] = [[] for _ in tokens]
    done, call = 0, 0
    longest = max(len(sequence) for sequence in tokens)
    while done < longest:
        size = blocks[call % len(blocks)] if blocks else longest
        rows = [b for b, sequence in enumerate(tokens) if len(sequence) > done]
        new = [tokens[b][done : done + size] for b in rows]
        logits = model(cache.step(new, rows=rows, logits="all"), cache)
        for b, part in zip(rows, logits.split([len(block) for block in new]), strict=True):
            parts[b].append(part)
        done, call = done + size, call + 1
    return [torch.cat(part) for part in parts]
