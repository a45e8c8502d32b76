"""e4m3 forms of queries and of a paged cache, for cases and tests; plain PyTorch."""

from __future__ import annotations

import torch

from llama4_triton.kernels.paged_kv import Layout, PagedKV

__all__ = ["E4M3", "LARGEST", "quantized_cache", "quantized_queries"]

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def quantized_queries(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q_q, q_scale (T, Hq)), each row by its largest element."""
    scale = q.float().abs().amax(-1).clamp(min=1e-12) / LARGEST
    return (q.float() / scale[..., None]).to(E4M3), scale


def quantized_cache(kv: PagedKV, kind: str, layout: Layout) -> PagedKV:
    """A "nhd" cache of 16 or 32 bits in e4m3, its scales by "head" or "token".

    What is NaN stays so; scales by token are NaN for slots that are.
    """
    k, k_scale = _quantized(kv.k_cache, kind)
    v, v_scale = _quantized(kv.v_cache, kind)
    if layout == "transposed_v":
        v = _dense(v.view(torch.uint8).permute(0, 2, 3, 1)).view(E4M3)
    return PagedKV(
        k_cache=k, v_cache=v, block_table=kv.block_table,
        k_scale=k_scale, v_scale=v_scale, layout=layout,
    )  # fmt: skip


def _quantized(cache: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _dense(cache.float())
    if kind == "token":
        scale = wide.abs().amax(-1) / LARGEST
        return (wide / scale[..., None]).to(E4M3), scale
    scale = wide.nan_to_num(0.0).abs().amax((0, 1, 3)).clamp(min=1e-6) / LARGEST
    return (wide / scale[:, None]).to(E4M3), scale


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)
