"""The attention of one forward step: what the layers of a kind share, and the operator they call.

    attend = StepAttention(config, step, layers)      # once per step: a schedule per kind of layer
    out = attend(q, pages, chunk_size, like=v)        # per layer

Layers are of one kind if they have the same chunk size and the same type of cache. Their schedule,
which program does which rows and keys, is made from the lengths on the device, in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama4_triton.kernels._check import is_aligned
from llama4_triton.kernels._launch import device_properties
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_decode_schedule import DecodeSchedule, decode_schedule
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.attention_prefill_config import default_block_m
from llama4_triton.kernels.attention_schedule import PrefillSchedule, prefill_schedule
from llama4_triton.kernels.paged_kv import PagedKV

from .cache import LayerKV, Step
from .config import Llama4Config

__all__ = ["StepAttention"]

Kind = tuple[int, bool]  # chunk size, whether the cache is e4m3


class StepAttention:
    """Attends the new tokens of `step`; `layers` are all layers' pages, in order."""

    def __init__(self, config: Llama4Config, step: Step, layers: Sequence[LayerKV]) -> None:
        self._step = step
        self._prefill: dict[Kind, PrefillSchedule] = {}
        self._decode: dict[Kind, DecodeSchedule] = {}
        for index, kv in enumerate(layers):
            pages, chunk_size = kv.paged(), config.chunk_size(config.is_rope_layer(index))
            kind = chunk_size, pages.is_quantized
            if step.is_decode and kind not in self._decode:
                self._decode[kind] = decode_schedule(
                    step.seq_lens, chunk_size=chunk_size, capacity=pages.capacity,
                    num_kv_heads=pages.num_kv_heads, page_size=pages.page_size,
                )  # fmt: skip
            elif not step.is_decode and kind not in self._prefill:
                self._prefill[kind] = self._prefill_schedule(pages, chunk_size)

    def quantizes_q(self, pages: PagedKV) -> bool:
        """Whether q is wanted in e4m3, with a scale per row and head; decode makes it itself."""
        return pages.is_quantized and not self._step.is_decode

    def __call__(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        pages: PagedKV,
        chunk_size: int,
        like: torch.Tensor,
    ) -> torch.Tensor:
        """(T, Hq, D) in the type of `like` of queries q, or (q, q_scale) where `quantizes_q`."""
        step, kind = self._step, (chunk_size, pages.is_quantized)
        q, q_scale = q if isinstance(q, tuple) else (q, None)
        if step.is_decode:
            schedule = self._decode[kind]
            out, _ = attention_decode(
                q, pages, step.seq_lens, chunk_size=chunk_size, out_dtype=like.dtype,
                schedule=schedule,
            )  # fmt: skip
        else:
            out, _ = attention_prefill(
                q, pages, step.cu_seqlens_q, step.seq_lens, chunk_size=chunk_size,
                q_scale=q_scale, out_dtype=like.dtype, schedule=self._prefill[kind],
            )  # fmt: skip
        return out

    def _prefill_schedule(self, pages: PagedKV, chunk_size: int) -> PrefillSchedule:
        step, (*_, D) = self._step, pages.k_cache.shape
        T, B = len(step.positions), len(step.seq_lens)
        block_m = default_block_m(
            T, B, D, pages.k_cache.dtype, device_properties(step.seq_lens.device),
            aligned=is_aligned((), pages.k_cache, pages.v_cache),
        )  # fmt: skip
        return prefill_schedule(
            step.cu_seqlens_q, step.seq_lens, T, chunk_size=chunk_size, block_m=block_m
        )
