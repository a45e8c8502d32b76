"""The reference path: every flat operator by kernels/reference.py, from the same arguments.

A function here has the name and the arguments of the flat operator and returns its results in
order; `call` puts them into tensors of the operator's own shapes, dtypes and strides, none of
which is an argument. What an operator writes in place is written in place. Configurations,
workspaces and fast_accum are ignored. It waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import reference
from ._expert_operands import E4M3, multiplied_dtype, unflattened
from ._launch import device_properties
from .attention_schedule import tile_capacity
from .paged_kv import Layout, PagedKV
from .rope import RopeTable, Temperature

__all__ = ["call", "compute"]

Tensors = tuple[torch.Tensor, ...]


def call(name: str, fake: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return what `llama4_triton::name` returns for `args`; `fake` makes its empty outputs.

    Raises:
        RuntimeError: the reference's result has another shape or dtype than the operator's.
    """
    outputs = fake(*args)
    results = compute(name, args)
    if outputs is None:  # everything is written in place
        return None
    single = isinstance(outputs, torch.Tensor)
    for output, result in zip((outputs,) if single else outputs, results, strict=True):
        if (output.shape, output.dtype) != (result.shape, result.dtype):
            raise RuntimeError(
                f"{name}: the reference must return {output.dtype} {tuple(output.shape)}, "
                f"got {result.dtype} {tuple(result.shape)}"
            )
        output.copy_(result)
    return outputs


def compute(name: str, args: tuple[Any, ...]) -> Tensors:
    """Return the results of `llama4_triton::name` in order, in float64 if its floats are that."""
    results: Tensors = globals()[f"_{name}"](*args)
    return results


def _gather_rows(x: torch.Tensor, rows: torch.Tensor, config: list[int] | None) -> Tensors:
    return (reference.gather_rows(x, rows),)


def _swiglu(gate: torch.Tensor, up: torch.Tensor, config: list[int] | None) -> Tensors:
    return (reference.swiglu(gate, up),)


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, config: list[int] | None
) -> Tensors:
    return (reference.rms_norm(x, weight, eps),)


def _add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    config: list[int] | None,
) -> Tensors:
    return reference.add_rms_norm(x, residual, weight, eps)


def _quantize_rowwise(x: torch.Tensor, config: list[int] | None) -> Tensors:
    return reference.quantize_rowwise(x)


def _quantize_groupwise(x: torch.Tensor, config: list[int] | None) -> Tensors:
    return reference.quantize_groupwise(x)


def _rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, config: list[int] | None
) -> Tensors:
    y = reference.rms_norm(x, weight, eps)
    return y, *reference.quantize_rowwise(y)


def _add_rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    config: list[int] | None,
) -> Tensors:
    y, h = reference.add_rms_norm(x, residual, weight, eps)
    return y, h, *reference.quantize_rowwise(y)


def _fp8_matmul(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    config: list[int] | None,
) -> Tensors:
    return (reference.fp8_matmul(x_q, x_scale, w_q, w_scale, out_dtype=out_dtype),)


def _rope_and_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    transposed_v: bool,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin: torch.Tensor | None,
    period: int,
    qk_norm_eps: float | None,
    attn_scale: float | None,
    floor_scale: float | None,
    quantize_q: bool,
    config: list[int] | None,
) -> Tensors:
    kv = PagedKV(
        k_cache=k_cache, v_cache=v_cache, block_table=positions.new_empty(0, 0),
        k_scale=k_scale, v_scale=v_scale, layout="transposed_v" if transposed_v else "nhd",
    )  # fmt: skip
    beyond = slot_mapping >= kv.num_pages * kv.page_size  # like the kernel, write no such slot
    temperature = None
    if attn_scale is not None and floor_scale is not None:
        temperature = Temperature(attn_scale=attn_scale, floor_scale=floor_scale)
    out = reference.rope_and_cache(
        q, k, v, kv, positions, slot_mapping.masked_fill(beyond, -1),
        rope=None if cos_sin is None else RopeTable(cos_sin=cos_sin, period=period),
        qk_norm_eps=qk_norm_eps, temperature=temperature, quantize_q=quantize_q,
    )  # fmt: skip
    return out if quantize_q else (out, q.new_empty(0, dtype=torch.float32))


def _convert_layout(
    v_cache: torch.Tensor,
    out: torch.Tensor,
    pages: torch.Tensor | None,
    transpose: bool,
    config: list[int] | None,
) -> Tensors:
    ids = range(len(out)) if pages is None else pages.tolist()
    inside = [page for page in ids if 0 <= page < len(out)]
    layout: Layout = "transposed_v" if transpose else "nhd"
    out[inside] = reference.convert_layout(v_cache[inside], layout)
    return ()


def _prefill_schedule(
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    num_tokens: int,
    chunk_size: int,
    block_m: int,
) -> Tensors:
    capacity = tile_capacity(num_tokens, len(seq_lens), chunk_size, block_m)
    return reference.prefill_schedule(
        cu_seqlens_q, seq_lens, chunk_size=chunk_size, block_m=block_m, capacity=capacity
    )


def _attention_prefill(
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    block_table: torch.Tensor,
    layout: Any,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    tiles: torch.Tensor,
    chunk_size: int,
    sm_scale: float,
    temperature: list[float] | None,
    out_dtype: torch.dtype,
    block_m: int,
    config: list[int] | None,
) -> Tensors:
    kv = PagedKV(
        k_cache=k_cache, v_cache=v_cache, block_table=block_table,
        k_scale=k_scale, v_scale=v_scale, layout=layout,
    )  # fmt: skip
    scale = None
    if temperature is not None:
        scale = Temperature(attn_scale=temperature[0], floor_scale=temperature[1])
    return reference.attention_prefill(
        q, kv, cu_seqlens_q, seq_lens, chunk_size=chunk_size, sm_scale=sm_scale,
        temperature=scale, q_scale=q_scale, out_dtype=out_dtype,
    )  # fmt: skip


def _attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    items: torch.Tensor,
    spans: torch.Tensor,
    count: torch.Tensor,
    workspace: torch.Tensor,
    layout: Layout,
    max_q_len: int,
    chunk_size: int,
    sm_scale: float,
    temperature: list[float],
    out_dtype: torch.dtype,
    config: list[int] | None,
) -> Tensors:
    kv = PagedKV(
        k_cache=k_cache, v_cache=v_cache, block_table=block_table, k_scale=k_scale,
        v_scale=v_scale, layout=layout,
    )  # fmt: skip
    scale = None
    if temperature:
        scale = Temperature(attn_scale=temperature[0], floor_scale=temperature[1])
    return reference.attention_decode(
        q, kv, seq_lens, cu_seqlens_q=cu_seqlens_q, max_q_len=max_q_len, chunk_size=chunk_size,
        sm_scale=sm_scale, temperature=scale, out_dtype=out_dtype,
    )  # fmt: skip


def _decode_schedule(
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    chunk_size: int,
    capacity: int,
    num_kv_heads: int,
    max_q_len: int,
    split_tokens: int,
    config: list[int],
) -> Tensors:
    from .attention_decode_schedule import num_items, unpacked

    B, sm_count = seq_lens.shape[0], device_properties(seq_lens.device).sm_count
    made = unpacked(config)
    found, spans = reference.decode_schedule(
        seq_lens, chunk_size=chunk_size, unit=made.UNIT, shortest=made.MIN_SPLIT,
        wanted=made.wanted(num_kv_heads, sm_count), cu_seqlens_q=cu_seqlens_q,
        split_tokens=split_tokens,
    )  # fmt: skip
    room = num_items(B, num_kv_heads, capacity, chunk_size, max_q_len, split_tokens, sm_count, made)
    items = seq_lens.new_full((room, 4), -1)
    items[: len(found)] = seq_lens.new_tensor(found).view(-1, 4)
    return items, seq_lens.new_tensor(spans).view(-1, 2), seq_lens.new_tensor([len(found)])


def _merge_attention(outs: torch.Tensor, lses: torch.Tensor) -> Tensors:
    return reference.merge_attention(outs, lses)


def _router(
    x: torch.Tensor,
    w_router: torch.Tensor,
    splits: int,
    quantize: str | None,
    config: list[int] | None,
) -> Tensors:
    from .router import slice_columns

    partials = reference.router(x, w_router, slice_columns(x, w_router, splits, config))
    if quantize is None:
        return partials, x.new_empty(0, dtype=torch.float8_e4m3fn), partials.new_empty(0)
    rows = x if quantize == "row" else x.reshape(-1, 128)
    x_q, x_scale = reference.quantize_rowwise(rows)
    scales = (len(x),) if quantize == "row" else (len(x), x.shape[1] // 128)
    return partials, x_q.view(x.shape), x_scale.view(scales)


def _route(
    logits: torch.Tensor,
    top_k: int,
    softmax: bool,
    renormalize: bool,
    first: int,
    count: int,
    num_valid: torch.Tensor | None,
    logits_dtype: torch.dtype | None,
    score_dtype: torch.dtype | None,
    block_m: int,
    config: list[int] | None,
) -> Tensors:
    expert_ids, expert_weights = reference.route(
        logits, top_k, scoring="softmax" if softmax else "sigmoid", renormalize=renormalize,
        expert_range=(first, count), num_valid_tokens=num_valid, logits_dtype=logits_dtype,
        score_dtype=score_dtype,
    )  # fmt: skip
    return expert_ids, expert_weights, *_order(expert_ids, count, block_m)


def _sort_by_expert(
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    first: int,
    count: int,
    num_valid: torch.Tensor | None,
    block_m: int,
    config: list[int] | None,
) -> Tensors:
    local = reference.local_experts(expert_ids, expert_weights, (first, count), num_valid)
    return *local, *_order(local[0], count, block_m)


def _order(expert_ids: torch.Tensor, num_experts: int, block_m: int) -> Tensors:
    from .counting_sort import tile_capacity

    R, E = expert_ids.numel(), num_experts
    offsets, row_slot = reference.sort_by_expert(expert_ids, E)
    used = reference.tile_table(offsets, R, block_m)
    unused = [(-1, 0, 0, 0)] * (tile_capacity(R, E, block_m) - len(used))
    tiles = torch.tensor([*used, *unused], dtype=torch.int32).reshape(-1, 4)
    return offsets, row_slot, tiles, torch.tensor([len(used)], dtype=torch.int32)


def _grouped_gemm_swiglu(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    expert_weights: torch.Tensor,
    row_slot: torch.Tensor,
    tiles: torch.Tensor,
    block_m: int,
    x_format: str,
    on_input: bool,
    fast_accum: bool,
    quantize_z: bool,
    out_dtype: torch.dtype,
    config: list[int] | None,
) -> Tensors:
    experts = unflattened(weights, scales)
    ids = _expert_ids(row_slot, tiles, experts.num_experts, expert_weights.shape[1])
    z = reference.grouped_gemm_swiglu(
        x, experts, ids, expert_weights, x_scale=x_scale,
        weight_on="input" if on_input else "output", out_dtype=out_dtype,
    )  # fmt: skip
    return reference.quantize_groupwise(z) if quantize_z else (z, z.new_empty(0).float())


def _grouped_gemm_combine(
    z: torch.Tensor,
    z_scale: torch.Tensor | None,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    row_slot: torch.Tensor,
    tiles: torch.Tensor,
    top_k: int,
    block_m: int,
    z_format: str,
    fast_accum: bool,
    residual: torch.Tensor | None,
    workspace: torch.Tensor,
    out_dtype: torch.dtype,
    config: list[int] | None,
) -> Tensors:
    experts = unflattened(weights, scales)
    ids = _expert_ids(row_slot, tiles, experts.num_experts, top_k)
    out = reference.grouped_gemm_combine(
        z, experts, ids, residual, z_scale=z_scale,
        activation="group" if z_format == "quantise" else None, out_dtype=out_dtype,
    )  # fmt: skip
    return (out,)


def _moe(
    x: torch.Tensor,
    x_q: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    w_router: torch.Tensor | None,
    logits: Any,  # where neither w_router nor ids are given
    topk_ids: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    shared_weights: list[torch.Tensor],
    shared_scales: list[torch.Tensor],
    residual: torch.Tensor | None,
    num_valid: torch.Tensor | None,
    workspace: torch.Tensor,
    top_k: int,
    softmax: bool,
    renormalize: bool,
    score_dtype: torch.dtype | None,
    on_input: bool,
    first: int,
    fast_accum: bool,
    batch_invariant: bool,
) -> Tensors:
    experts = unflattened(weights, scales)
    shared = unflattened(shared_weights, shared_scales) if shared_weights else None
    kept = first, experts.num_experts
    if topk_ids is not None and topk_weights is not None:
        chosen = reference.local_experts(topk_ids, topk_weights, kept, num_valid)
    else:
        logits_dtype = None
        if w_router is not None:
            logits_dtype = x.dtype
            logits = reference.router(x, w_router, max(1, x.shape[1]))
        chosen = reference.route(
            logits, top_k, scoring="softmax" if softmax else "sigmoid", renormalize=renormalize,
            expert_range=kept, num_valid_tokens=num_valid, logits_dtype=logits_dtype,
            score_dtype=score_dtype,
        )  # fmt: skip
    in_e4m3 = multiplied_dtype(experts, x.dtype, device_properties(x.device)) == E4M3
    by_group, given = experts.format == "e4m3_block", x_q if in_e4m3 else None
    return (
        reference.moe_layer(
            x if given is None else given, experts, *chosen,
            x_scale=None if given is None else x_scale,
            shared=shared, residual=residual, weight_on="input" if on_input else "output",
            activation=("group" if by_group else "row") if in_e4m3 else None,
            z_activation="group" if in_e4m3 else None, z_dtype=x.dtype, out_dtype=x.dtype,
        ),
    )  # fmt: skip


def _expert_ids(
    row_slot: torch.Tensor, tiles: torch.Tensor, num_experts: int, top_k: int
) -> torch.Tensor:
    """(T, top_k): the expert of each slot, read back from the sorted order; -1 where dropped."""
    ids = torch.full_like(row_slot, -1)
    for expert, first, end, _ in tiles.tolist():  # every tile of an expert has all of its rows
        if 0 <= expert < num_experts:
            ids[row_slot[first:end].long()] = expert
    return ids.reshape(-1, top_k)
