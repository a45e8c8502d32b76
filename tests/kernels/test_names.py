"""What a profiler sees: names with operator, dtype and tile; bytes and FLOPs of a launch."""

from __future__ import annotations

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
from llama4_triton.kernels.fp8_matmul import fp8_matmul
from llama4_triton.kernels.gather_rows import gather_rows
from llama4_triton.kernels.grouped_gemm import Experts
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


def _prefill():
    attention_prefill(_empty(300, 10, 128), _kv(2), _ints(3), _ints(2))


def _decode():
    attention_decode(_empty(2, 10, 128), _kv(2), _ints(2), chunk_size=128)


def _split_decode():
    kv = PagedKV(k_cache=_empty(64, 64, 1, 128), v_cache=_empty(64, 64, 1, 128),
                 block_table=_ints(1, 64))  # fmt: skip
    attention_decode(_empty(1, 5, 128), kv, _ints(1))


def _moe(top_k=1, T=4, E=16):
    experts = Experts.from_hf(_empty(E, 128, 512), _empty(E, 256, 128))
    moe(_empty(T, 128), _empty(T, E), experts, top_k=top_k, residual=_empty(T, 128))


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
             torch.int64: "i64", E4M3: "fp8e4nv"}  # fmt: skip
    signature = {
        name: f"*{short[arg.dtype]}" if isinstance(arg, torch.Tensor) else "i32"
        for name, arg in args.items()
    }
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
    _prefill: [
        (
            "attention_prefill_bf16_128x64x128",
            300 * 10 * (2 * 128 * 2 + 4) + 2 * 192 * KV,
            "flops16",
            4 * 300 * 10 * 128 * 192,
        )
    ],
    _decode: [
        (
            "attention_decode_bf16_16x64x128",
            2 * 10 * (2 * 128 * 2 + 4) + 2 * 128 * KV,
            "flops16",
            4 * 2 * 10 * 128 * 128,
        )
    ],
    _split_decode: [
        (
            "attention_decode_bf16_16x64x128",
            5 * 128 * 2 + 5 * 8 * 129 * 4 + 64 * 64 * KV // 2,
            "flops16",
            4 * 5 * 128 * 4096,
        ),
        (
            "attention_merge_bf16_16x128",
            5 * 8 * 129 * 4 + 5 * (128 * 2 + 4),
            "flops16",
            2 * 8 * 5 * 128,
        ),
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
    """4 tokens, of 16 experts at most 4 are read."""
    launches = _launches(_moe)
    assert [_name(*launch) for launch in launches] == [
        "top_k_bf16_256x16",
        "count_i32_256x32",
        "scan_i32_128x32",
        "scatter_i32_256x32",
        "grouped_gemm_swiglu_bf16_16x64x128",
        "grouped_gemm_scatter_bf16_16x64x128",
    ]
    costs = [_cost(*launch) for launch in launches]
    assert costs[0] == {"name": "some_name", "bytes": 4 * 16 * 2 + 4 * 8, "flops16": 0}
    tiles = 4 * 3 * 4
    gate_up = 4 * 2 * 128 * 256 * 2
    assert costs[4]["bytes"] == (4 * 128 + 4 * 256) * 2 + gate_up + 4 * 4 + 4 * 4 + tiles
    assert costs[4]["flops16"] == 4 * 4 * 128 * 256
    moved = (4 * 256 + 2 * 4 * 128) * 2
    assert costs[5]["bytes"] == moved + gate_up // 2 + 4 * 4 + tiles
    assert costs[5]["flops16"] == 2 * 4 * 128 * 256


def test_experts_of_several():
    """With top_k = 2 the rows are kept in fp32 and summed."""
    *_, scatter, total = _launches(lambda: _moe(top_k=2, E=3))
    assert _name(*total) == "sum_slots_bf16_128"
    assert _cost(*total) == {
        "name": "some_name",
        "bytes": 8 * 128 * 4 + 2 * 4 * 128 * 2,
        "flops16": 8 * 128,
    }
    weights = 3 * 256 * 128 * 2
    tiles = scatter[1]["tiles_ptr"].numel() * 4
    assert _cost(*scatter)["bytes"] == 8 * 256 * 2 + weights + 8 * 128 * 4 + 8 * 4 + tiles


def test_every_kernel_is_named():
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
