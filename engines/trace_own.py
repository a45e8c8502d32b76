"""This project's model on its kernels: run token blocks and record every operation of every layer.

What the fused operators do not return is read beside them: queries on their way into attention,
keys and values from the pages they were written to; logits and choices of the router by the
routing operators on the input that `moe` gets (`moe` itself returns neither).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.router import router as router_op
from llama4_triton.kernels.routing import route
from llama4_triton.model.attention import StepAttention
from llama4_triton.model.cache import KVCache
from llama4_triton.model.llama4 import Attention, Llama4, Router

from .trace import Recorder, Trace, hooked

__all__ = ["observe", "with_parity"]


def with_parity(model: Llama4, parity: Any, config: Any) -> Llama4:
    """A model of the checkpoint's `config` that follows `parity` with the weights of `model`."""
    with torch.device("meta"):
        other = Llama4(config, parity=parity)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


@torch.no_grad()
def observe(model: Llama4, blocks: Sequence[Sequence[int]], page_size: int = 64) -> Trace:
    """Run the token blocks of one sequence, a step each, through a cache of the model's type."""
    recorder, weight = Recorder(), model.lm_head.weight
    cache = KVCache.for_lengths(
        model.config, [sum(map(len, blocks))], page_size=page_size, dtype=weight.dtype,
        device=weight.device,
    )  # fmt: skip
    with hooked(_hooks(model, recorder)):
        for recorder.step, block in enumerate(blocks):
            model(cache.step([list(block)], logits="all"), cache)
    return recorder.trace


def _hooks(model: Llama4, recorder: Recorder) -> Iterator[RemovableHandle]:
    after, config = recorder.after, model.config
    for index, layer in enumerate(model.model.layers):
        if index == 0:
            yield layer.register_forward_pre_hook(_embedding_hook(recorder))
        yield after(layer.get_submodule("input_layernorm"), index, "input norm")
        attention = layer.get_submodule("self_attn")
        yield attention.register_forward_pre_hook(_attention_hook(recorder, index))
        yield after(attention, index, "attention: output")
        yield after(layer.get_submodule("post_attention_layernorm"), index, "post-attention norm")
        is_moe = config.is_moe_layer(index)
        if is_moe:
            router = layer.get_submodule("feed_forward.router")
            yield router.register_forward_hook(
                _router_hook(recorder, index, config.num_experts_per_tok)
            )
        yield after(layer.get_submodule("feed_forward"), index, "MoE" if is_moe else "MLP")
        yield layer.register_forward_hook(_layer_hook(recorder, index))
    yield after(model.model.norm, None, "final norm")
    yield after(model.lm_head, None, "logits")


def _embedding_hook(recorder: Recorder) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        recorder.keep(None, "embedding", inputs[0])

    return hook


def _layer_hook(recorder: Recorder, layer: int) -> Any:
    def hook(_module: nn.Module, _inputs: object, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        recorder.keep(layer, "hidden state", out[0] + out[1])

    return hook


def _attention_hook(recorder: Recorder, layer: int) -> Any:
    """Put an observer between the layer and the step's attention."""

    def hook(_module: Attention, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, rope, kv, step, attend = inputs
        return x, rope, kv, step, _Watched(attend, recorder, layer, kv.slot_mapping)

    return hook


class _Watched:
    """A StepAttention that records what it is given."""

    def __init__(
        self, attend: StepAttention, recorder: Recorder, layer: int, slots: torch.Tensor
    ) -> None:
        self._attend, self._recorder, self._layer, self._slots = attend, recorder, layer, slots
        self.quantizes_q = attend.quantizes_q

    def __call__(self, q: Any, pages: PagedKV, chunk_size: int, like: torch.Tensor) -> torch.Tensor:
        keep, layer = self._recorder.keep, self._layer
        keep(layer, "attention: queries", q)
        keep(layer, "attention: keys", pages.k_cache.flatten(0, 1)[self._slots])
        keep(layer, "attention: values", pages.v_cache.flatten(0, 1)[self._slots])
        return self._attend(q, pages, chunk_size, like)


def _router_hook(recorder: Recorder, layer: int, top_k: int) -> Any:
    def hook(module: Router, inputs: tuple[torch.Tensor], _out: object) -> None:
        (x,) = inputs
        partials = router_op(x, module.weight).partials
        routing = route(
            partials, top_k, logits_dtype=x.dtype, score_dtype=module.parity.score_rounding(x)
        )
        logits = functools.reduce(torch.add, partials).to(x.dtype)  # in the order of `route`
        ids = routing.expert_ids.long()
        scores = torch.zeros_like(partials[0]).scatter_(1, ids, routing.expert_weights)
        recorder.keep(layer, "router: logits", logits)
        recorder.keep(layer, "router: experts", ids.sort().values)
        recorder.keep(layer, "router: scores", scores)

    return hook
