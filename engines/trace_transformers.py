"""Stock transformers: load a checkpoint, run it and record every operation of every layer.

Its modelling code runs as it is, with eager attention; hooks read what modules return, and queries,
keys and values where the attention function gets them. Source: transformers 5.23
models/llama4/modeling_llama4.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .trace import Recorder, Trace, hooked

__all__ = ["load", "observe"]


def load(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """transformers' text model of the checkpoint.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError, OSError: transformers refuses the checkpoint.
    """
    try:
        from transformers import Llama4ForCausalLM
    except ImportError:
        raise ModuleNotFoundError(
            "diff: --engine transformers needs transformers: pip install 'transformers>=5'"
        ) from None
    with _quiet():
        model: Any = Llama4ForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", local_files_only=True,
            use_safetensors=True,
        )  # fmt: skip
    loaded: nn.Module = model.to(device).eval()
    return loaded


@torch.no_grad()
def observe(
    model: Any, prompt: Sequence[int], steps: int, continuation: Sequence[int] | None = None
) -> tuple[Trace, list[int]]:
    """Run the prompt and `steps` tokens more, by themselves, through a cache.

    Args:
        continuation: the tokens to go on with; None: greedy.
    Returns:
        The trace, and the `steps` tokens.
    """
    recorder, tokens, cache = Recorder(), list(continuation or ()), None
    block = list(prompt)
    with hooked(_hooks(model, recorder)), _attention_inputs(recorder, len(prompt)):
        for step in range(steps + 1):
            recorder.step = step
            ids = torch.tensor([block], device=model.device)
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            if step == len(tokens):
                tokens.append(int(out.logits[0, -1].argmax()))
            block = tokens[step : step + 1]
    return recorder.trace, tokens[:steps]


def _hooks(model: Any, recorder: Recorder) -> Iterator[RemovableHandle]:
    after, text = recorder.after, model.model
    yield after(text.embed_tokens, None, "embedding")
    for index, layer in enumerate(text.layers):
        yield after(layer.input_layernorm, index, "input norm")
        yield after(layer.self_attn, index, "attention: output")
        yield after(layer.post_attention_layernorm, index, "post-attention norm")
        if layer.is_moe_layer:
            router = layer.feed_forward.router
            yield router.register_forward_hook(_router_hook(recorder, index, router.top_k))
        yield after(layer.feed_forward, index, "MoE" if layer.is_moe_layer else "MLP")
        yield after(layer, index, "hidden state")
    yield after(text.norm, None, "final norm")
    yield after(model.lm_head, None, "logits")


def _router_hook(recorder: Recorder, layer: int, top_k: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: object, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        scores, logits = out
        recorder.keep(layer, "router: logits", logits)
        recorder.keep(layer, "router: experts", logits.topk(top_k).indices.sort().values)
        recorder.keep(layer, "router: scores", scores)

    return hook


@contextmanager
def _attention_inputs(recorder: Recorder, prompt_tokens: int) -> Iterator[None]:
    """Record what the attention function is given, whichever it is.

    Keys and values come with those of the cache before them: the step's own are the last ones.
    """
    modeling_llama4: Any = importlib.import_module("transformers.models.llama4.modeling_llama4")
    functions = modeling_llama4.ALL_ATTENTION_FUNCTIONS

    class Watched:
        def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
            attention = functions.get_interface(name, default)

            def watched(module: Any, *inputs: torch.Tensor, **kwargs: Any) -> Any:
                new = prompt_tokens if recorder.step == 0 else 1
                for op, x in zip(("queries", "keys", "values"), inputs[:3], strict=True):
                    rows = x[0, :, -new:].transpose(0, 1)  # (T, heads, D)
                    recorder.keep(module.layer_idx, f"attention: {op}", rows)
                return attention(module, *inputs, **kwargs)

            return watched

    modeling_llama4.ALL_ATTENTION_FUNCTIONS = Watched()
    try:
        yield
    finally:
        modeling_llama4.ALL_ATTENTION_FUNCTIONS = functions


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice on loading."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
