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
from .paged_kv import PagedKV
from .rope import RopeTable, Temperature

__all__ = ["call", "compute"]

Tensors = tuple[torch.Tensor, ...]


def call(name: str, fake: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return what `llama4_triton::name` returns for `args`; `fake` makes its empty outputs.

    Raises:
        RuntimeError: the reference's result has another shape or dtype than the operator's.
    """
    outputs = fake(*args)
    single = isinstance(outputs, torch.Tensor)
    results = compute(name, args)
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


def _gather_rows(x: torch.Tensor, rows: torch.Tensor, config: list[int]) -> Tensors:
    return (reference.gather_rows(x, rows),)


def _swiglu(gate: torch.Tensor, up: torch.Tensor, config: list[int]) -> Tensors:
    return (reference.swiglu(gate, up),)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, config: list[int]) -> Tensors:
    return (reference.rms_norm(x, weight, eps),)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, config: list[int]
) -> Tensors:
    return reference.add_rms_norm(x, residual, weight, eps)


def _quantize_rowwise(x: torch.Tensor, config: list[int]) -> Tensors:
    return reference.quantize_rowwise(x)


def _fp8_matmul(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    config: list[int],
) -> Tensors:
    return (reference.fp8_matmul(x_q, x_scale, w_q, w_scale, out_dtype=out_dtype),)


def _rope_and_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin: torch.Tensor | None,
    period: int,
    qk_norm_eps: float | None,
    attn_scale: float | None,
    floor_scale: float | None,
    config: list[int],
) -> Tensors:
    kv = PagedKV(k_cache=k_cache, v_cache=v_cache, block_table=positions.new_empty(0, 0))
    beyond = slot_mapping >= kv.num_pages * kv.page_size  # like the kernel, write no such slot
    temperature = None
    if attn_scale is not None and floor_scale is not None:
        temperature = Temperature(attn_scale=attn_scale, floor_scale=floor_scale)
    q_out = reference.rope_and_cache(
        q, k, v, kv, positions, slot_mapping.masked_fill(beyond, -1),
        rope=None if cos_sin is None else RopeTable(cos_sin=cos_sin, period=period),
        qk_norm_eps=qk_norm_eps, temperature=temperature,
    )  # fmt: skip
    return (q_out,)


def _attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    chunk_size: int,
    sm_scale: float,
    config: list[int],
) -> Tensors:
    kv = PagedKV(k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    return reference.attention_prefill(
        q, kv, cu_seqlens_q, seq_lens, chunk_size=chunk_size, sm_scale=sm_scale
    )


def _attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    workspace: torch.Tensor,
    chunk_size: int,
    sm_scale: float,
    num_splits: int,
    config: list[int],
) -> Tensors:
    kv = PagedKV(k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    return reference.attention_decode(q, kv, seq_lens, chunk_size=chunk_size, sm_scale=sm_scale)


def _route(logits: torch.Tensor, top_k: int, block_m: int, config: list[int]) -> Tensors:
    E = logits.shape[1]
    expert_ids, expert_weights = reference.route(logits, top_k)
    return expert_ids, *_sort_by_expert(expert_ids, expert_weights, E, block_m, config)


def _sort_by_expert(
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    num_experts: int,
    block_m: int,
    config: list[int],
) -> Tensors:
    from .counting_sort import tile_capacity

    R, E = expert_ids.numel(), num_experts
    routed = (expert_ids >= 0) & (expert_ids < E)
    offsets, row_slot = reference.sort_by_expert(expert_ids, E)
    used = reference.tile_table(offsets, R, block_m)
    unused = [(-1, 0, 0)] * (tile_capacity(R, E, block_m) - len(used))
    tiles = torch.tensor([*used, *unused], dtype=torch.int32).reshape(-1, 3)
    count = torch.tensor([len(used)], dtype=torch.int32)
    weights = torch.where(routed, expert_weights, 0.0)
    return weights, offsets, row_slot, tiles, count


def _grouped_gemm_swiglu(
    x: torch.Tensor,
    w_gate_up: torch.Tensor,
    expert_weights: torch.Tensor,
    row_slot: torch.Tensor,
    tiles: torch.Tensor,
    block_m: int,
    config: list[int],
) -> Tensors:
    ids = _expert_ids(row_slot, tiles, len(w_gate_up), expert_weights.shape[1])
    return (reference.grouped_gemm_swiglu(x, w_gate_up, ids, expert_weights),)


def _grouped_gemm_combine(
    z: torch.Tensor,
    w_down: torch.Tensor,
    row_slot: torch.Tensor,
    tiles: torch.Tensor,
    top_k: int,
    block_m: int,
    residual: torch.Tensor | None,
    workspace: torch.Tensor,
    config: list[int],
) -> Tensors:
    ids = _expert_ids(row_slot, tiles, len(w_down), top_k)
    return (reference.grouped_gemm_combine(z, w_down, ids, residual),)


def _expert_ids(
    row_slot: torch.Tensor, tiles: torch.Tensor, num_experts: int, top_k: int
) -> torch.Tensor:
    """(T, top_k): the expert of each slot, read back from the sorted order; -1 where dropped."""
    ids = torch.full_like(row_slot, -1)
    for expert, row, end in tiles.tolist():
        if 0 <= expert < num_experts:
            ids[row_slot[row:end].long()] = expert
    return ids.reshape(-1, top_k)
