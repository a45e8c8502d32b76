"""Whole forward steps of full-size models, recorded without a GPU: what ships, what it launches.

    recording = record_step(WORKLOADS[0])          # launches, ATen calls, allocations
    shipped_launches()                             # one launch per binary that the project ships

A tensor-parallel rank is the model with divided heads and FFN widths (`rank_config`); collectives
are not part of a step yet. The model is recorded at steady state: the table of rotations has been
built. The tensors of a `Step` come from the host, `COPIES_PER_STEP` small copies that are made by
KVCache.step and not counted among the launches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llama4_triton.autotune.launches import H100, Binary, Launch
from llama4_triton.autotune.recorder import Recording, record
from llama4_triton.kernels._launch import DeviceProperties
from llama4_triton.kernels.fp8_matmul import fp8_matmul
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.model import config as configs
from llama4_triton.model.cache import DEFAULT_PAGE_SIZE, KVCache, Step, pages_needed
from llama4_triton.model.config import Llama4Config
from llama4_triton.model.llama4 import Llama4

from .expert_weights import FORMATS
from .moe_layer import MoeLayer
from .shapes import MODELS, SCOUT, TENSOR_PARALLEL, TOKENS, WORKLOADS, TextShape, Workload, linears

__all__ = [
    "COPIES_PER_STEP",
    "by_binary",
    "model_launches",
    "moe_layers",
    "rank_config",
    "record_linears",
    "record_step",
    "shipped_launches",
    "two_layers",
]

COPIES_PER_STEP = 9
# Every tile of rows, and every tile of tokens beside the routing.
MOE_TOKENS = tuple(sorted({*TOKENS, 2, 8, 24, 32, 40, 128, 512, 600, 2048}))
FULL_SIZE = {"scout": configs.SCOUT, "maverick": configs.MAVERICK}


def rank_config(shape: TextShape, tp: int) -> Llama4Config:
    """The configuration of what one of `tp` GPUs holds."""
    full = FULL_SIZE[shape.name]
    return replace(
        full,
        num_attention_heads=full.num_attention_heads // tp,
        num_key_value_heads=full.num_key_value_heads // tp,
        intermediate_size=full.intermediate_size // tp,
        intermediate_size_mlp=full.intermediate_size_mlp and full.intermediate_size_mlp // tp,
    )


def two_layers(config: Llama4Config) -> Llama4Config:
    """The model cut to a local layer and a global one; of Maverick's, the second has the experts.

    Each kind of attention and of feed-forward is there once, so it launches what the whole does.
    """
    return replace(config, num_hidden_layers=2, no_rope_layers=(1, 0))


def record_step(workload: Workload, *, dtype: torch.dtype = torch.bfloat16) -> Recording:
    """Record one forward call of the whole model on one GPU of `workload`."""
    return _record_all([workload], rank_config(workload.shape, workload.tp), dtype)


def _record_all(
    workloads: Sequence[Workload],
    config: Llama4Config,
    dtype: torch.dtype,
    device: DeviceProperties = H100,
) -> Recording:
    """Record a forward call of one model for each of `workloads`."""

    def make() -> tuple[Llama4, list[tuple[Step, KVCache]]]:
        with torch.device("cuda"), _NoInit(), _default_dtype(dtype):
            model = Llama4(config)
        steps = [_step_and_cache(workload, config, dtype) for workload in workloads]
        model.model.rotary(steps[0][0].positions)
        return model, steps

    def run(inputs: tuple[Llama4, list[tuple[Step, KVCache]]]) -> None:
        model, steps = inputs
        for step, cache in steps:
            model(step, cache)

    return record(run, make=make, device=device)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


class _NoInit(TorchFunctionMode):
    """Leaves parameters as they are: there is no memory to initialise."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def _step_and_cache(
    workload: Workload, config: Llama4Config, dtype: torch.dtype, device: str = "cuda"
) -> tuple[Step, KVCache]:
    """What KVCache.step returns, by shape: of its tensors only these are known to a recording."""
    ends = [a + b for a, b in zip(workload.new_tokens, workload.cached_tokens, strict=True)]
    T, B = workload.tokens, len(ends)
    num_global, num_local = pages_needed(config, ends, step_tokens=max(workload.new_tokens))
    cache = KVCache(
        config, num_global_pages=num_global, num_local_pages=num_local, dtype=dtype, device=device
    )
    width = -(-max(ends) // (16 * DEFAULT_PAGE_SIZE)) * 16

    def i32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    def i64(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    positions = i32(T)
    step = Step(
        input_ids=i64(T),
        positions=positions,
        temperature_positions=positions,
        cu_seqlens_q=i32(B + 1),
        seq_lens=i32(B),
        max_q_len=max(workload.new_tokens),
        global_block_table=i32(B, width),
        global_slot_mapping=i64(T),
        local_block_table=i32(B, width),
        local_slot_mapping=i64(T),
        logits_rows=i64(B),
    )
    return step, cache


def record_linears(
    shape: TextShape,
    tp: int,
    T: int,
    *,
    fast_accum: bool = False,
    device: DeviceProperties = H100,
) -> Recording:
    """Record the FP8 form of every dense projection: quantise x, then multiply."""

    def run() -> None:
        for N, K in linears(shape, tp).values():
            x = _cuda(T, K)
            w_q, w_scale = _cuda(N, K, dtype=torch.float8_e4m3fn), _cuda(N, dtype=torch.float32)
            x_q, x_scale = quantize_rowwise(x)
            fp8_matmul(x_q, x_scale, w_q, w_scale, fast_accum=fast_accum, strict=True)

    return record(run, device=device)


def moe_layers(shape: TextShape, tp: int, T: int) -> Iterator[MoeLayer]:
    """What engines ask of `moe`: each format in vLLM's and SGLang's layout, other forms of the
    call."""
    # Maverick has an e4m3 checkpoint; the other formats are the same code with more experts.
    for format in FORMATS if shape is SCOUT else ("e4m3_channel",):
        yield MoeLayer(shape=shape, tp=tp, T=T, format=format)
    if shape is SCOUT:
        yield MoeLayer(shape=shape, tp=tp, T=T, layout="hf", routed_by="topk_ids")


def _cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def by_binary(launches: Iterable[Launch]) -> dict[Binary, Launch]:
    """One launch per binary, the first that asks for it, in the order of the binaries' names."""
    found: dict[Binary, Launch] = {}
    for launch in launches:
        found.setdefault(launch.binary(), launch)
    return dict(sorted(found.items()))


def model_launches(
    shape: TextShape,
    tp: int,
    *,
    fp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    workloads: Sequence[Workload] = WORKLOADS,
    device: DeviceProperties = H100,
) -> tuple[Launch, ...]:
    """One launch per binary that a model asks for on one of `tp` GPUs like `device`.

    Args:
        fp8: with the dense projections in FP8 as well.
        workloads: of which those of `shape` and `tp` count.
    """
    same = [w for w in workloads if w.shape is shape and w.tp == tp]
    recordings = [_record_all(same, two_layers(rank_config(shape, tp)), dtype, device)]
    if fp8:
        for T in sorted({w.tokens for w in same}):
            for fast_accum in (False, True):
                recordings.append(
                    record_linears(shape, tp, T, fast_accum=fast_accum, device=device)
                )
    if workloads is WORKLOADS:  # which leave out tiles that other numbers of tokens ask for
        for T in MOE_TOKENS:
            layer = MoeLayer(shape=shape, tp=tp, T=T, layout="hf", dtype=dtype)
            recordings.append(layer.record(device=device))
    return tuple(by_binary(launch for r in recordings for launch in r.launches).values())


@functools.cache
def shipped_launches() -> tuple[Launch, ...]:
    """One launch per binary that any workload of shapes.py asks for: what is gated and warmed."""
    launches: list[Launch] = []
    for shape in MODELS:
        for tp in TENSOR_PARALLEL:  # 2 and 4 ask for nothing new
            launches += model_launches(shape, tp, fp8=True)
        for T in (4, 64, 4096):  # one of each regime
            for layer in moe_layers(shape, 8, T):
                launches += layer.record().launches
    return tuple(by_binary(launches).values())
