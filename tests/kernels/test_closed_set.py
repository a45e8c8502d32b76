"""One model asks for few binaries: tokens, lengths, batch and cache sizes are not compiled in.

Each operator meets 200 seeded steps of one model, and every (kernel, config) must have the one
specialisation that is written here. What may vary is the config: a handful by tokens.
"""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
import torch

from llama4_triton.autotune.launches import H100
from llama4_triton.autotune.recorder import recorded_launches
from llama4_triton.kernels._launch import assume_device
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.convert_layout import convert_layout
from llama4_triton.kernels.expert_weights import Experts, Projection
from llama4_triton.kernels.fp8_matmul import fp8_matmul
from llama4_triton.kernels.gather_rows import gather_rows
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.rope import RopeTable, Temperature
from llama4_triton.kernels.rope_and_cache import rope_and_cache
from llama4_triton.kernels.routing import sort_by_expert
from llama4_triton.kernels.swiglu import swiglu

pytestmark = pytest.mark.compiled_only

STEPS = 200
H, F, HQ, HKV, D, PAGE, CHUNK = 5120, 1024, 5, 1, 128, 64, 8192  # Scout over 8 GPUs
BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


def _empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype)


def _ints(*shape):
    return torch.empty(shape, dtype=torch.int32)


def _kv(rng, B):
    """A cache of any number of pages, a table of any width; a view of a wider one half the time."""
    pages, width = rng.randint(1, 200_000), rng.choice((1, rng.randint(2, 160_000)))
    cache = pages, PAGE, HKV, D
    table = _ints(B + rng.randint(0, 3), width + rng.choice((0, 1, 16)))[:B, :width]
    return PagedKV(k_cache=_empty(*cache), v_cache=_empty(*cache), block_table=table)


def _tokens(rng):
    return rng.choice((1, rng.randint(2, 64), rng.randint(2, 512), rng.randint(2, 16_384)))


def _norm(rng):
    T = _tokens(rng)
    rms_norm(_empty(T, H), _empty(H), 1e-5)
    add_rms_norm(_empty(T, H), _empty(T, H), _empty(H), 1e-5)


def _dense(rng):
    T = _tokens(rng)
    gather_rows(_empty(202_048, H), _ints(T))
    gather_rows(_empty(T, H), _ints(rng.randint(1, T)))
    swiglu(*_empty(T, 2 * F).split(F, dim=1))


def _fp8(rng):
    T = _tokens(rng)
    x_q, scale = quantize_rowwise(_empty(T, H))
    fp8_matmul(x_q, scale, _empty(896, H, dtype=E4M3), _empty(896, dtype=FP32))


def _rope(rng, **options):
    T = _tokens(rng)
    q, k, v = _empty(T, HQ + 2 * HKV, D).split([HQ, HKV, HKV], dim=1)
    slots = torch.empty(T, dtype=torch.int64)
    rope_and_cache(q, k, v, _kv(rng, rng.randint(1, 300)), _ints(T), slots, **options)


def _rope_chunk(rng):
    table = RopeTable(cos_sin=_empty(CHUNK, D, dtype=FP32), period=CHUNK)
    _rope(rng, rope=table, qk_norm_eps=1e-5, temperature=None)


def _rope_global(rng):
    scale = Temperature(attn_scale=0.1, floor_scale=8192.0)
    _rope(rng, rope=None, qk_norm_eps=None, temperature=scale)


def _rope_e4m3(rng):
    """Scales per token and head, or one of the tensor; several KV heads or one."""
    T, Hkv = _tokens(rng), rng.choice((1, 2, 8))
    q, k, v = _empty(T, HQ + 2 * Hkv, D).split([HQ, Hkv, Hkv], dim=1)
    pages = rng.randint(1, 200_000)
    scales = (pages, PAGE, Hkv) if rng.random() < 0.5 else (rng.choice((1, Hkv)),)
    for layout, v_shape in (("nhd", (PAGE, Hkv, D)), ("transposed_v", (Hkv, D, PAGE))):
        kv = PagedKV(
            k_cache=_empty(pages, PAGE, Hkv, D, dtype=E4M3),
            v_cache=_empty(pages, *v_shape, dtype=E4M3),
            block_table=_ints(1, 1),
            k_scale=_empty(*scales, dtype=FP32),
            v_scale=_empty(*scales, dtype=FP32),
            layout=layout,
        )
        rope_and_cache(
            q, k, v, kv, _ints(T), torch.empty(T, dtype=torch.int64),
            rope=None, qk_norm_eps=None, temperature=None, quantize_q=True,
        )  # fmt: skip


def _convert(rng):
    pages, Hkv = rng.randint(2, 10_000), rng.choice((1, 2, 8))
    v, ids = _empty(pages, PAGE, Hkv, D, dtype=E4M3), _ints(rng.randint(1, pages))
    out = convert_layout(v, layout="transposed_v")
    convert_layout(out, layout="nhd", out=v, pages=ids)


def _weights(E, format="plain"):
    F = 2048 if format != "plain" else 1024  # rows of 16 scales
    shapes = {"gate": (E, F, H), "up": (E, F, H), "down": (E, H, F)}
    if format == "plain":
        return Experts(**{name: Projection(weight=_empty(*s)) for name, s in shapes.items()})
    return Experts(
        **{
            name: Projection(weight=_empty(*s, dtype=E4M3), scale=_empty(*s[:2], dtype=FP32))
            for name, s in shapes.items()
        }
    )


def _moe(rng, E=16, top_k=1, format="plain", tokens=None):
    T = _tokens(rng) if tokens is None else rng.randint(*tokens)
    experts, shared = _weights(E, format), _weights(1, format)
    moe(_empty(T, H), experts, top_k=top_k, w_router=_empty(E, H), shared=shared)


def _moe_few(rng):
    _moe(rng, tokens=(2, 4))


def _moe_some(rng):
    _moe(rng, tokens=(5, 512))


def _moe_many(rng):
    _moe(rng, tokens=(513, 16_384))


def _moe_of_two(rng):
    _moe(rng, E=128, top_k=2, tokens=(513, 16_384))


def _moe_e4m3(rng):
    _moe(rng, format="e4m3_channel", tokens=(5, 512))


def _sort(rng):
    T = _tokens(rng)
    sort_by_expert(_ints(T, 1), _empty(T, 1, dtype=FP32), 16)


def _prefill(rng):
    T, B = _tokens(rng), rng.randint(1, 300)
    q = _empty(T, HQ + 2 * HKV, D)[:, :HQ] if rng.random() < 0.5 else _empty(T, HQ, D)
    chunk = rng.choice((0, CHUNK))
    attention_prefill(q, _kv(rng, B), _ints(B + 1), _ints(B), chunk_size=chunk)


def _decode(rng):
    B = rng.choice((1, rng.randint(2, 300)))
    chunk = rng.choice((0, CHUNK))
    attention_decode(_empty(B, HQ, D), _kv(rng, B), _ints(B), chunk_size=chunk)


def _found(call):
    """The specialisations of each (kernel, config), over all steps."""
    found = defaultdict(set)
    rng = random.Random(0)
    with assume_device(H100):
        for _ in range(STEPS):
            for launch in recorded_launches(lambda: call(rng)):
                binary = launch.binary()
                config = *binary.config, binary.num_warps, binary.num_stages
                found[binary.name, config].add(binary.signature)
    return found


# Kernels with more than one specialisation for a config, and why.
SEVERAL = {
    (_convert, "_convert_layout_kernel"): 2,  # either direction
    # Writes the result in bf16 with one split, parts in fp32 with several.
    (_decode, "_attention_decode_kernel"): 2,
}
CONFIGS = {  # how many configs of a kernel a model meets
    "_attention_prefill_kernel": 3,
    "_fp8_matmul_kernel": 4,  # 16, 32, 64 rows swapped, 128 rows
    "_rope_and_cache_kernel": 2,  # few tokens, many
    (_rope_e4m3, "_rope_and_cache_kernel"): 8,  # of either layout, of either kind of scales
    "_rms_norm_kernel": 2,  # with a residual and without
    # 16 tokens per tile, or 32 and from 4096 on 64; one token, two, up to four
    (_moe_few, "_few_up_kernel"): 2,
    (_moe_few, "_few_down_kernel"): 2,
    (_moe_some, "_router_kernel"): 2,
    (_moe_some, "_route_and_up_kernel"): 3,
    (_moe_some, "_up_and_down_kernel"): 4,
    (_moe_some, "_grouped_gemm_scatter_kernel"): 3,
    (_moe_many, "_router_kernel"): 2,
    (_moe_many, "_grouped_gemm_swiglu_kernel"): 2,
    (_moe_many, "_grouped_gemm_scatter_kernel"): 2,
    (_moe_of_two, "_router_kernel"): 2,
    (_moe_of_two, "_grouped_gemm_swiglu_kernel"): 4,
    (_moe_of_two, "_grouped_gemm_scatter_kernel"): 4,
    (_moe_of_two, "_shared_down_kernel"): 4,
    (_moe_e4m3, "_router_kernel"): 2,
    (_moe_e4m3, "_route_and_up_kernel"): 2,
    (_moe_e4m3, "_up_and_down_kernel"): 3,
    (_moe_e4m3, "_grouped_gemm_scatter_kernel"): 3,
}
CALLS = (
    _norm,
    _dense,
    _fp8,
    _rope_chunk,
    _rope_global,
    _rope_e4m3,
    _convert,
    _moe_few,
    _moe_some,
    _moe_many,
    _moe_of_two,
    _moe_e4m3,
    _sort,
    _prefill,
    _decode,
)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__[1:])
def test_sizes_that_vary_are_not_specialised(call):
    found = _found(call)
    configs = defaultdict(int)
    for (name, config), signatures in found.items():
        configs[name] += 1
        expected = SEVERAL.get((call, name), 1)
        text = "\n".join(map(str, sorted(signatures)))
        assert len(signatures) == expected, f"{name} {config}:\n{text}"
        assert all("!" not in part for signature in signatures for part in signature), text
    assert {name: configs[name] for name in configs} == {
        name: CONFIGS.get((call, name), CONFIGS.get(name, 1)) for name in configs
    }
