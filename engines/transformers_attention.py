"""Attention of transformers' Llama 4 on these kernels, and the mask that tells them what to see.

transformers asks a mask function once per forward and kind of layer, and hands what it returns to
the attention function of each layer. Here that is no S x S tensor but a `RowMask`: per sequence the
slot of its first token and its length, on the device. A query at position p, counted from its first
token that is no padding, sees key t iff

    t <= p  and  (no chunks  or  t // chunk_size == p // chunk_size)

which is what transformers' causal and chunked masks say. Whatever else it may be asked for (packed
sequences, blocks of images, dropout, gradients) gets transformers' own mask and SDPA; `fallbacks`
counts why.

q has been rotated, normalised and scaled by the temperature by the layer, so none is given here.
Source: transformers masking_utils.py (`create_chunked_causal_mask`), models/llama4.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from llama4_triton.kernels._check import FLOATS, is_aligned
from llama4_triton.kernels._launch import device_properties
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_decode_schedule import decode_schedule
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.attention_prefill_config import default_block_m
from llama4_triton.kernels.attention_schedule import prefill_schedule
from llama4_triton.kernels.paged_kv import DENSE, PagedKV

__all__ = ["NAME", "RowMask", "attention", "fall_back", "fallbacks", "row_mask"]

NAME = "llama4_triton"  # attn_implementation
DECODE_ROWS = 8  # new tokens per sequence that attention_decode takes
DECODE_TILE = 128  # and these times the q heads of a KV head

fallbacks: Counter[str] = Counter()  # reason -> calls that transformers' own code answered


def fall_back(reason: str) -> None:
    """Count a call that transformers' own code answers, and warn the first time."""
    if torch.compiler.is_compiling():
        return
    if reason not in fallbacks:
        warnings.warn(f"llama4_triton: transformers' own code runs: {reason}", stacklevel=3)
    fallbacks[reason] += 1


@dataclass(frozen=True, eq=False, slots=True)
class RowMask:
    """What the queries of one forward see, for all layers of a kind; O(B) numbers.

    Args:
        starts: (B, 1) int32, slot of a sequence's token 0 in its row of keys (may be negative).
        seq_lens: (B,) int32, tokens from there to the newest one.
        bounds: (B + 1,) int32, first rows of the sequences' queries.
        chunk_size: 0 for global layers.
        q_length, kv_length: of the tensors that the layers will have.
        stock: makes the mask that transformers' SDPA takes instead.
    """

    starts: torch.Tensor
    seq_lens: torch.Tensor
    bounds: torch.Tensor
    chunk_size: int
    q_length: int
    kv_length: int
    stock: Callable[[], torch.Tensor | None]
    schedules: dict[Any, Any] = field(default_factory=dict)  # made by the first layer that asks

    def contiguous(self) -> RowMask:
        """What `generate` asks of the masks that it prepares for static caches."""
        return self

    def to(self, device: Any, **_: Any) -> RowMask:
        """On another device: for layers that accelerate has put there."""
        starts, seq_lens, bounds = (x.to(device) for x in (self.starts, self.seq_lens, self.bounds))
        return replace(self, starts=starts, seq_lens=seq_lens, bounds=bounds, schedules={})


def row_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> RowMask | torch.Tensor | None:
    """The mask function of transformers' interface; its arguments are documented there."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    stock = partial(
        sdpa_mask, batch_size=batch_size, q_length=q_length, kv_length=kv_length,
        q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function or causal_mask_function,
        attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap, device=device,
        allow_is_causal_skip=allow_is_causal_skip, config=config, **kwargs,
    )  # fmt: skip
    reason = None
    if use_vmap or (not allow_is_causal_skip and q_length > 1):
        reason = "a mask with packed sequences, blocks or functions of the caller's"
    elif local_size is not None and local_size != getattr(config, "attention_chunk_size", None):
        reason = "a sliding window"
    elif mask_function is not None and not _is_known(mask_function, causal_mask_function):
        reason = "a mask function that is neither causal nor chunked"
    elif attention_mask is not None and not _is_one_run(attention_mask):
        reason = "an attention_mask with holes"
    if reason is not None:
        fall_back(reason)
        return stock()
    pad = torch.zeros(batch_size, dtype=torch.int64, device=device)
    if attention_mask is not None:
        pad = (attention_mask.cumsum(dim=-1) == 0).sum(dim=-1)
    int32 = partial(torch.Tensor.to, dtype=torch.int32)
    return RowMask(
        starts=int32(pad - kv_offset)[:, None],
        seq_lens=int32((q_offset + q_length - pad).clamp(min=0)),
        bounds=torch.arange(batch_size + 1, dtype=torch.int32, device=device) * q_length,
        chunk_size=local_size or 0,
        q_length=q_length,
        kv_length=kv_length,
        stock=stock,
    )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: RowMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of transformers' interface.

    Args:
        query: (B, Hq, S, D), final.   key, value: (B, Hkv, Skv, D), the cache's, not repeated.
        attention_mask: a `RowMask`; anything else is transformers' SDPA's to apply.
    Returns:
        (out (B, S, Hq, D), None).
    """
    mask, reason = attention_mask, None
    if isinstance(mask, RowMask):
        reason = _why_not(query, key, value, mask, dropout, kwargs)
        if reason is None:
            return _attend(query, key, value, mask, scaling), None
        fall_back(reason)
        mask = mask.stock()
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _is_known(function: Callable[..., Any], causal: Callable[..., Any]) -> bool:
    """Whether `function` is the causal one, or that and chunks of the whole; by its parts.

    Code that is being traced has no parts to look at: the other arguments decide there.
    """
    if function is causal or torch.compiler.is_compiling():
        return True
    parts = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    functions = parts[0] if len(parts) == 1 and isinstance(parts[0], tuple) else ()
    names = [getattr(part, "__qualname__", "").split(".")[0] for part in functions]
    return names == ["chunked_overlay", "causal_mask_function"]


def _is_one_run(mask: torch.Tensor) -> bool:
    """Whether each row of a 2-D mask is a run of ones between zeros.

    Waits for the device, as transformers' own mask does, unless there is no waiting: traced or
    captured code takes it as given.
    """
    captured = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or captured:
        return True
    edges = (mask[:, 1:] & ~mask[:, :-1]).sum(dim=-1) + mask[:, 0]
    return bool((edges <= 1).all())


def _why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: RowMask,
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    D, group = query.shape[3], query.shape[1] // key.shape[1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "gradients are recorded; call under torch.no_grad()"
    if dropout:
        return "attention dropout"
    if any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux", "cache")):
        return "an attention with softcap, bias, sinks or pages"
    if kwargs.get("is_causal") is False:
        return "an attention that is not causal"
    if query.dtype not in FLOATS or not query.dtype == key.dtype == value.dtype:
        return f"queries, keys and values in {query.dtype}, {key.dtype}, {value.dtype}"
    if D % 2 or D > 256 or D != value.shape[3] or query.shape[1] != group * key.shape[1]:
        return f"heads of {D} in groups that are not whole"
    if (query.shape[2], key.shape[2]) != (mask.q_length, mask.kv_length):
        return "keys of another length than the mask was made for"
    return None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: RowMask,
    scaling: float | None,
) -> torch.Tensor:
    if mask.starts.device != query.device:
        mask = mask.to(query.device)
    B, Hq, S, D = query.shape
    q = query.transpose(1, 2).reshape(B * S, Hq, D)
    k, v = key.transpose(1, 2), value.transpose(1, 2)  # (B, Skv, Hkv, D)
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    kv = PagedKV(k_cache=k, v_cache=v, block_table=mask.starts, layout=DENSE)
    decodes = S <= DECODE_ROWS and S * (Hq // kv.num_kv_heads) <= DECODE_TILE
    run = _decode if decodes else _prefill
    return run(q, kv, mask, scaling).view(B, S, Hq, D)


def _decode(q: torch.Tensor, kv: PagedKV, mask: RowMask, scaling: float | None) -> torch.Tensor:
    S = mask.q_length
    rows = dict(cu_seqlens_q=mask.bounds, max_q_len=S) if S > 1 else {}
    options: dict[str, Any] = dict(chunk_size=mask.chunk_size, **rows)
    made = mask.schedules.get("decode")
    if made is None:
        made = mask.schedules["decode"] = decode_schedule(
            mask.seq_lens, capacity=kv.capacity, num_kv_heads=kv.num_kv_heads, page_size=1,
            **options,
        )  # fmt: skip
    out, _ = attention_decode(q, kv, mask.seq_lens, sm_scale=scaling, schedule=made, **options)
    return out


def _prefill(q: torch.Tensor, kv: PagedKV, mask: RowMask, scaling: float | None) -> torch.Tensor:
    T, B, chunk_size = q.shape[0], mask.seq_lens.shape[0], mask.chunk_size
    made = mask.schedules.get("prefill")
    if made is None:
        block_m = default_block_m(
            T, B, q.shape[2], q.dtype, device_properties(q.device),
            aligned=is_aligned((), q, kv.k_cache, kv.v_cache),
        )  # fmt: skip
        made = mask.schedules["prefill"] = prefill_schedule(
            mask.bounds, mask.seq_lens, T, chunk_size=chunk_size, block_m=block_m
        )
    out, _ = attention_prefill(
        q, kv, mask.bounds, mask.seq_lens, chunk_size=chunk_size, sm_scale=scaling, schedule=made
    )
    return out
