"""The main job in miniature: two tiny checkpoints on disk, real text, generation, and parity.

A Scout-like and a Maverick-like model with random weights but Llama 4's structure and vocabulary
are written in Hugging Face's format, loaded like any checkpoint, and run on a real prompt through
the real tokenizer: prefill, then generation across a chunk's end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_model
from .config import SCOUT, Llama4Config, tiny_maverick, tiny_scout
from .generate import Generation, generate
from .parity import ParityRow, compare
from .reference import Llama4 as Reference
from .tiny import save_tiny_checkpoint

__all__ = ["PROMPT", "DemoResult", "demo_configs", "run_demo"]

PROMPT = (
    "Three of four layers see only their own chunk of the text, and the fourth sees all of it. "
    "A sentence that runs over the end of a chunk is therefore remembered by a quarter of the "
    "model, until the chunks are long enough for nobody to notice. "
)
NEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What one model of the demo did."""

    name: str
    config: Llama4Config
    prompt_tokens: int
    generation: Generation
    text: str
    rows: list[ParityRow]
    seconds: float


def demo_configs() -> dict[str, Llama4Config]:
    """Name -> configuration, with the real vocabulary so that the real tokenizer serves."""
    vocabulary = dict(
        vocab_size=SCOUT.vocab_size,
        bos_token_id=SCOUT.bos_token_id,
        eos_token_id=SCOUT.eos_token_id,
        pad_token_id=SCOUT.pad_token_id,
    )
    return {
        "tiny Scout": tiny_scout(**vocabulary),
        "tiny Maverick": tiny_maverick(**vocabulary),
    }


def run_demo(
    name: str,
    config: Llama4Config,
    tokenizer: Any,
    directory: Path,
    *,
    device: torch.device,
    status: Callable[[str], None] = lambda message: None,
) -> DemoResult:
    """Write, load, generate with, and check one model.

    Args:
        tokenizer: has encode(text) -> ids and decode(ids) -> text (model/tokenizer.py).
        directory: where the checkpoint is written.
        status: told what is going on.
    """
    from .llama4 import Llama4

    start = time.perf_counter()
    status(f"{name}: writing a checkpoint")
    checkpoint = save_tiny_checkpoint(directory, config, seed=0)
    status(f"{name}: loading it twice, for the kernels and for the reference")
    model = load_model(checkpoint, Llama4, dtype=torch.float32, device=device)
    reference = load_model(checkpoint, Reference, dtype=torch.float32, device=device)

    prompt = tokenizer.encode(PROMPT, bos=True)
    chunk = config.attention_chunk_size or 0
    # The prompt ends two tokens before a chunk does, so generation crosses the boundary.
    prompt = prompt[: (len(prompt) + 2) // chunk * chunk - 2] if chunk else prompt
    tokens: list[int] = []

    def on_token(_row: int, token: int) -> None:
        tokens.append(token)
        status(f"{name}: {len(prompt)} tokens prefilled, {len(tokens)}/{NEW_TOKENS} generated")

    generation = generate(
        model, [prompt], max_new_tokens=NEW_TOKENS, stop_ids=(), page_size=16, on_token=on_token
    )
    status(f"{name}: comparing every layer with the reference")
    # The prompt in two blocks that straddle a chunk's end, then one generated token by itself.
    half = chunk + 3 if len(prompt) > chunk + 3 else len(prompt) // 2
    rows = compare(model, reference, [prompt[:half], prompt[half:], tokens[:1]])
    return DemoResult(
        name=name,
        config=config,
        prompt_tokens=len(prompt),
        generation=generation,
        text=tokenizer.decode(tokens),
        rows=rows,
        seconds=time.perf_counter() - start,
    )
