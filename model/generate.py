"""Generation: prefill in blocks, then one token per sequence and step, greedy or sampled.

Works with either class of model, the kernels' (llama4.py) or the reference, because both take a
`Step` and a `KVCache`. The host reads one token per sequence and step, after the forward call;
nothing inside the call synchronises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .cache import DEFAULT_PAGE_SIZE, CacheFormat, KVCache, Step
from .config import Llama4Config
from .presets import Parity

__all__ = ["Generation", "Sampling", "generate", "logits_of", "prefill_tokens", "sample"]

OnToken = Callable[[int, int], None]  # (sequence, token id)


class Model(Protocol):
    config: Llama4Config
    parity: Parity

    def __call__(self, step: Step, cache: KVCache) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy (ties to the lowest id)."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"Sampling: temperature must be finite and >= 0, got {self.temperature}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"Sampling: top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """Tokens generated per sequence, the stop token excluded, and how many forward calls."""

    tokens: list[list[int]]
    prefill_steps: int
    decode_steps: int


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Choose one token per row of logits (N, V); returns (N,) int64."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    probs = (logits.float() / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        # The token that crosses top_p stays in, so at least one always does.
        ordered[ordered.cumsum(dim=-1) - ordered >= sampling.top_p] = 0.0
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def prefill_tokens(config: Llama4Config) -> int:
    """Tokens per prefill step: a chunk, and all end with theirs, so the local pool holds one."""
    return config.attention_chunk_size or 8192


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    cache_format: CacheFormat | None = None,
    on_token: OnToken | None = None,
) -> Generation:
    """Continue every prompt by up to `max_new_tokens` tokens.

    Args:
        prompts: token ids per sequence, at least one each.
        stop_ids: end a sequence; None takes the config's end tokens.
        cache_format: types of the cache's pools; None: the model's.
        on_token: called as soon as a token is known.
    Raises:
        ValueError: an empty prompt, or a length out of range.
    """
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be >= 0, got {max_new_tokens}")
    for prompt in prompts:
        if not prompt:
            raise ValueError(
                "generate: prompts must have at least one token each, got an empty one"
            )
    if not prompts or max_new_tokens == 0:
        return Generation(tokens=[[] for _ in prompts], prefill_steps=0, decode_steps=0)
    config, sampling = model.config, sampling or Sampling()
    stop = set(config.eos_token_id if stop_ids is None else stop_ids)
    weight = next(iter(model.parameters()))  # type: ignore[attr-defined]
    cache = KVCache.for_lengths(
        config,
        [len(prompt) + max_new_tokens for prompt in prompts],
        step_tokens=prefill_tokens(config),
        aligned=True,
        page_size=page_size,
        dtype=weight.dtype,
        format=cache_format,
        device=weight.device,
    )
    if model.parity.temperature_positions == "slot":  # as if padded on the left to the longest
        longest = max(map(len, prompts))
        cache.begin(len(prompts), slot_offsets=[longest - len(prompt) for prompt in prompts])
    generator = torch.Generator(device=weight.device).manual_seed(sampling.seed)
    tokens: list[list[int]] = [[] for _ in prompts]

    def take(rows: Sequence[int], logits: torch.Tensor) -> list[int]:
        """Append the chosen token of each row; return the rows that go on."""
        going = []
        for row, token in zip(rows, sample(logits, sampling, generator).tolist(), strict=True):
            if token in stop:
                continue
            tokens[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if len(tokens[row]) < max_new_tokens:
                going.append(row)
        return going

    active: list[int] = []
    prefill_steps = decode_steps = 0
    block = prefill_tokens(config)
    for start in range(0, max(map(len, prompts)), block):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) > start]
        step = cache.step([prompts[row][start : start + block] for row in rows], rows=rows)
        logits = model(step, cache)
        prefill_steps += 1
        ready = [i for i, row in enumerate(rows) if len(prompts[row]) <= start + block]
        active += take([rows[i] for i in ready], logits[ready])
    active.sort()
    while active:
        step = cache.step([tokens[row][-1:] for row in active], rows=active)
        active = take(active, model(step, cache))
        decode_steps += 1
    return Generation(tokens=tokens, prefill_steps=prefill_steps, decode_steps=decode_steps)


@torch.no_grad()
def logits_of(
    model: Model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    blocks: Sequence[int] | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
) -> torch.Tensor:
    """Logits of a padded batch, fed through the cache in blocks of columns.

    A model whose parity says temperature_positions="slot" takes the attention temperature from the
    column, left padding included, as transformers does.

    Args:
        input_ids: (B, S) int64.
        attention_mask: (B, S), 0 = padding (at either end); None: no padding.
        blocks: columns per forward call, summing to S; None: all at once.
    Returns:
        (B, S, V) fp32 on the CPU; rows of padding are 0.
    Raises:
        ValueError: shapes, the blocks' sum, or a mask with a hole in a sequence.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"logits: input_ids must have shape (B, S), got {tuple(input_ids.shape)}")
    B, S = input_ids.shape
    keep = torch.ones(B, S, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    if keep.shape != (B, S):
        raise ValueError(
            f"logits: attention_mask must have shape ({B}, {S}), got {tuple(keep.shape)}"
        )
    starts = torch.nn.functional.pad(keep.int(), (1, 0)).diff(dim=1) == 1
    if bool((starts.sum(1) > 1).any()):
        raise ValueError("logits: attention_mask must have no hole inside a sequence, got one")
    blocks = [S] if blocks is None else list(blocks)
    if sum(blocks) != S or min(blocks, default=0) < 0:
        raise ValueError(f"logits: blocks must be >= 0 and sum to S = {S}, got {blocks}")
    out = torch.zeros(B, S, model.config.vocab_size)
    weight = next(iter(model.parameters()))  # type: ignore[attr-defined]
    lengths = keep.sum(1).tolist()
    cache = KVCache.for_lengths(
        model.config, lengths, page_size=page_size, dtype=weight.dtype, device=weight.device
    )
    if model.parity.temperature_positions == "slot":
        cache.begin(B, slot_offsets=keep.int().argmax(1).tolist())
    start = 0
    for block in blocks:
        part = keep[:, start : start + block]
        rows = [row for row in range(B) if bool(part[row].any())]
        if rows:
            ids = [input_ids[row, start : start + block][part[row]].tolist() for row in rows]
            logits = model(cache.step(ids, rows=rows, logits="all"), cache)
            out[:, start : start + block][part] = logits.float().cpu()
        start += block
    return out
