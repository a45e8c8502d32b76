"""What a profiler sees: names with operator, dtype and tile; bytes and FLOPs of a launch."""

from __future__ import annotations

import importlib
import re
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import triton
from support.fake_driver import fake_driver

from llama4_triton.kernels import _launch, _names
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.convert_layout import convert_layout
from llama4_triton.kernels.expert_weights import Experts
from llama4_triton.kernels.fp8_matmul import fp8_matmul
from llama4_triton.kernels.gather_rows import gather_rows
from llama4_triton.kernels.merge_attention import merge_attention
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.rope import RopeTable, Temperature
from llama4_triton.kernels.rope_and_cache import rope_and_cache
from llama4_triton.kernels.swiglu import swiglu

pytestmark = pytest.mark.compiled_only

BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


def _empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype)


def _ints(*shape):
    return torch.empty(shape, dtype=torch.int32)


def _norms():
    rms_norm(_empty(3, 5120), _empty(5120), 1e-5)
    add_rms_norm(*(_empty(3, 64, dtype=torch.float16),) * 2, _empty(64, dtype=torch.float16), 1e-5)


def _small():
    gather_rows(_empty(9, 64, dtype=FP32), _ints(5))
    swiglu(_empty(2, 300), _empty(2, 300))
    quantize_rowwise(_empty(6, 128))


def _fp8():
    x, w = _empty(200, 512, dtype=E4M3), _empty(256, 512, dtype=E4M3)
    fp8_matmul(x, _empty(200, dtype=FP32), w, _empty(256, dtype=FP32))


def _kv(B):
    cache = (3 * B, 64, 2, 128)
    return PagedKV(k_cache=_empty(*cache), v_cache=_empty(*cache), block_table=_ints(B, 3))


def _rope():
    q, k = _empty(5, 10, 128), _empty(5, 2, 128)
    table = RopeTable(cos_sin=_empty(8192, 128, dtype=FP32), period=8192)
    for rope, eps in ((table, 1e-5), (None, None)):
        rope_and_cache(
            q, k, k, _kv(2), _ints(5), torch.empty(5, dtype=torch.int64), rope=rope,
            qk_norm_eps=eps, temperature=Temperature(attn_scale=0.1, floor_scale=8192.0),
        )  # fmt: skip


def _rope_e4m3():
    q, k = _empty(5, 10, 128), _empty(5, 2, 128)
    options = dict(rope=None, qk_norm_eps=None, temperature=None, quantize_q=True)
    for scales, v_shape in (((6, 64, 2), (2, 128, 64)), ((1,), (64, 2, 128))):
        kv = PagedKV(
            k_cache=_empty(6, 64, 2, 128, dtype=E4M3), v_cache=_empty(6, *v_shape, dtype=E4M3),
            block_table=_ints(2, 3), k_scale=_empty(*scales, dtype=FP32),
            v_scale=_empty(*scales, dtype=FP32),
            layout="nhd" if scales == (1,) else "transposed_v",
        )  # fmt: skip
        rope_and_cache(q, k, k, kv, _ints(5), torch.empty(5, dtype=torch.int64), **options)


def _convert():
    v = _empty(6, 64, 2, 128, dtype=E4M3)
    out = convert_layout(v, layout="transposed_v")
    convert_layout(out, layout="nhd", out=v, pages=_ints(2))


def _prefill():
    attention_prefill(_empty(300, 10, 128), _kv(2), _ints(3), _ints(2))


def _decode():
    attention_decode(_empty(2, 10, 128), _kv(2), _ints(2), chunk_size=128)


def _split_decode():
    kv = PagedKV(k_cache=_empty(64, 64, 1, 128), v_cache=_empty(64, 64, 1, 128),
                 block_table=_ints(1, 64))  # fmt: skip
    attention_decode(_empty(1, 5, 128), kv, _ints(1))


def _merge_ranks():
    merge_attention(_empty(4, 3, 5, 128), _empty(4, 3, 5, dtype=FP32))


def _moe(top_k=1, T=64, E=16, shared=False, residual=True, **routed):
    experts = Experts.from_hf(_empty(E, 128, 512), _empty(E, 256, 128))
    one = Experts.dense(_empty(256, 128), _empty(256, 128), _empty(128, 256))
    options = routed or dict(w_router=_empty(E, 128))
    options |= dict(shared=one if shared else None, residual=_empty(T, 128) if residual else None)
    moe(_empty(T, 128), experts, top_k=top_k, **options)


def _launches(call):
    launches = []

    def keep(kernel, grid, *args, **kwargs):
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches.append((kernel, {name: named[name] for name in kernel.arg_names}))

    with _launch.intercept(keep):
        call()
    return launches


def _name(kernel, args):
    """As Triton asks for it: the types of the arguments, the values of the constants."""
    short = {BF16: "bf16", FP32: "fp32", torch.float16: "fp16", torch.int32: "i32",
             torch.int64: "i64", E4M3: "fp8e4nv", torch.uint8: "u8"}  # fmt: skip

    def type_of(arg):
        if isinstance(arg, tuple):
            return tuple(map(type_of, arg))
        return f"*{short[arg.dtype]}" if isinstance(arg, torch.Tensor) else "i32"

    signature = {name: type_of(arg) for name, arg in args.items()}
    constants = {p.name: args[p.name] for p in kernel.params if p.is_constexpr}
    proxy = namedtuple("SpecializationProxy", ["constants", "signature"])
    return kernel.repr(proxy(constants, signature))


def _cost(kernel, args):
    compiled = namedtuple("Metadata", ["name"])("some_name")
    return _names._metadata[kernel.__name__]((1,), compiled, args)


KV = 2 * 2 * 128 * 2  # bytes of K and V of one token in _kv
EXPECTED = {
    _norms: [
        ("rms_norm_bf16_2048", 2 * (2 * 3 * 5120 + 5120), "flops16", 4 * 3 * 5120),
        ("rms_norm_fp16_128", 2 * (4 * 3 * 64 + 64), "flops16", 5 * 3 * 64),
    ],
    _small: [
        ("gather_rows_fp32_128", 2 * 5 * 64 * 4 + 5 * 4, "flops32", 0),
        ("swiglu_bf16_512", 3 * 2 * 300 * 2, "flops16", 5 * 2 * 300),
        ("quantize_rowwise_bf16_128", 6 * 128 * 3 + 6 * 4, "flops16", 5 * 6 * 128),
    ],
    _fp8: [
        (
            "fp8_matmul_fp8e4nv_128x128x128",
            (200 + 256) * (512 + 4) + 200 * 256 * 2,
            "flops8",
            2 * 200 * 256 * 512,
        )
    ],
    _rope: [
        # q and k read and written, v copied; positions and slots; a row of the table per token
        (
            "rope_and_cache_bf16_4",
            2 * 5 * (10 + 2 * 2) * 128 * 2 + 5 * 12 + 5 * 128 * 4,
            "flops16",
            6 * 5 * 12 * 128,
        ),
        ("rope_and_cache_bf16_4", 2 * 5 * (10 + 2 * 2) * 128 * 2 + 5 * 12, "flops16", 0),
    ],
    _rope_e4m3: [
        # q, k and v read in 16 bits, written in 8 with a scale per token and head, or without
        (
            "rope_and_cache_bf16_4",
            5 * 128 * (2 * 14 + 14) + 5 * 12 + 5 * (10 + 2 * 2) * 4,
            "flops16",
            0,
        ),
        ("rope_and_cache_bf16_4", 5 * 128 * (2 * 14 + 14) + 5 * 12 + 5 * 10 * 4, "flops16", 0),
    ],
    _convert: [
        ("convert_layout_u8_64x64", 2 * 6 * 64 * 2 * 128, "flops8", 0),
        ("convert_layout_u8_64x64", 2 * 2 * 64 * 2 * 128 + 2 * 4, "flops8", 0),
    ],
    _prefill: [
        ("prefill_schedule_i32_32x128", (3 + 2 + 4 * (300 // 128 + 2)) * 4, "flops32", 0),
        (
            "attention_prefill_bf16_128x128x128",
            300 * 10 * (2 * 128 * 2 + 4) + 2 * 192 * KV,
            "flops16",
            4 * 300 * 10 * 128 * 192,
        ),
    ],
    _decode: [
        ("attention_decode_schedule_i32_256x32", 4 * (2 + 4 * 2 + 2 * 2), "flops32", 0),
        (
            "attention_decode_bf16_16x64x128",
            2 * 10 * (2 * 128 * 2 + 4) + 2 * 128 * KV,
            "flops16",
            4 * 2 * 10 * 128 * 128,
        ),
    ],
    _split_decode: [
        ("attention_decode_schedule_i32_256x32", 4 * (1 + 4 * 8 + 2), "flops32", 0),
        (
            "attention_decode_bf16_16x64x128",
            5 * (2 * 128 * 2 + 4) + 64 * 64 * KV // 2,
            "flops16",
            4 * 5 * 128 * 4096,
        ),
        (
            "attention_merge_bf16_64x32",
            5 * 8 * 129 * 4 + 5 * (128 * 2 + 4),
            "flops16",
            2 * 8 * 5 * 128,
        ),
    ],
    _merge_ranks: [
        ("merge_attention_bf16_4x32", (4 + 1) * 3 * 5 * (128 * 2 + 4), "flops16", 2 * 60 * 128)
    ],
}


@pytest.mark.parametrize("call", EXPECTED, ids=lambda call: call.__name__[1:])
def test_names_bytes_and_flops(call):
    got = [(_name(*launch), _cost(*launch)) for launch in _launches(call)]
    want = [
        (name, {"name": "some_name", "bytes": moved, key: flops})
        for name, moved, key, flops in EXPECTED[call]
    ]
    assert got == want


def test_experts():
    """64 tokens of 16 experts, all of which may be read."""
    launches = _launches(_moe)
    assert [_name(*launch) for launch in launches] == [
        "router_bf16_16x64x128x1024",
        "route_fp32_64x16x256",
        "grouped_gemm_swiglu_bf16_16x64x128",
        "grouped_gemm_scatter_bf16_16x64x128",
    ]
    costs = [_cost(*launch) for launch in launches]
    partials = launches[1][1]["logits_ptr"].numel() * 4
    assert costs[0] == {
        "name": "some_name",
        "bytes": (64 + 16) * 128 * 2 + partials,
        "flops16": 2 * 64 * 16 * 128,
    }
    slots, tiles = 4 * 64, launches[2][1]["tables"][2].numel() * 4
    gate_up = 16 * 2 * 128 * 256 * 2
    assert costs[2]["bytes"] == 64 * (128 + 256) * 2 + gate_up + 2 * slots + tiles
    assert costs[2]["flops16"] == 4 * 64 * 128 * 256
    moved = 64 * (256 + 2 * 128) * 2
    assert costs[3]["bytes"] == moved + gate_up // 2 + slots + tiles
    assert costs[3]["flops16"] == 2 * 64 * 128 * 256


def test_experts_of_several():
    """With top_k = 2 the rows are kept in fp32 and summed."""
    *_, scatter, total = _launches(lambda: _moe(top_k=2, E=3))
    assert _name(*total) == "sum_slots_bf16_128"
    assert _cost(*total) == {
        "name": "some_name",
        "bytes": 128 * 128 * 4 + 2 * 64 * 128 * 2,
        "flops16": 128 * 128,
    }
    weights = 3 * 256 * 128 * 2
    tiles = scatter[1]["tables"][1].numel() * 4
    assert _cost(*scatter)["bytes"] == 128 * 256 * 2 + weights + 128 * 128 * 4 + 128 * 4 + tiles


def test_experts_beside_a_shared_one():
    """Each operand of what rides in a launch counts once."""
    few, some = (_launches(lambda T=T: _moe(T=T, shared=True)) for T in (4, 64))
    assert [_name(*launch).rsplit("_", 2)[0] for launch in few] == ["router", "few_up", "few_down"]
    names = [_name(*launch).rsplit("_", 2)[0] for launch in some]
    assert names == ["router", "route_and_up", "up_and_down", "grouped_gemm_scatter"]
    one, all_of_them = 3 * 256 * 128 * 2, 16 * 3 * 256 * 128 * 2
    moved = sum(_cost(*launch)["bytes"] for launch in some)
    assert one + all_of_them < moved < 1.5 * (one + all_of_them)
    moved = sum(_cost(*launch)["bytes"] for launch in few)
    assert 5 * one < moved < 1.5 * 5 * one


def test_every_kernel_is_named():
    for file in Path(_launch.__file__).parent.glob("*.py"):
        importlib.import_module(f"llama4_triton.kernels.{file.stem}")
    kernels = {
        name
        for file in Path(_launch.__file__).parent.glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert kernels == set(_names._metadata)


def test_the_binary_has_the_name_and_the_kernel_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x, w = _empty(3, 128), _empty(128)
    seen = []
    hooks = triton.knobs.runtime.launch_enter_hook
    with fake_driver(capability=80) as gpu:
        kernel = _launches(lambda: rms_norm(x, w, 1e-5))[0][0]
        rms_norm(x, w, 1e-5)
        assert kernel.launch_metadata is None  # nothing is collected without a hook
        hooks.add(lambda metadata: seen.append(metadata.get()))
        try:
            rms_norm(x, w, 1e-5)
        finally:
            hooks.calls.clear()
            kernel.launch_metadata = None
    assert gpu.launches == ["rms_norm_bf16_128"] * 2
    assert kernel.__name__ == "_rms_norm_kernel"
    (ptx,) = tmp_path.rglob("*.ptx")
    assert ".entry rms_norm_bf16_128(" in ptx.read_text()
    (metadata,) = seen
    assert metadata["name"] == "rms_norm_bf16_128"
    assert metadata["bytes"] == 2 * (2 * 3 * 128 + 128) and metadata["flops16"] == 4 * 3 * 128
