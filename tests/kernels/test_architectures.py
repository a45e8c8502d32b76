"""What depends on the GPU: default configurations, and types that an old one does not have."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama4_triton.kernels import (
    _launch,
    attention_decode,
    attention_prefill,
    fp8_matmul,
    grouped_gemm_config,
)
from llama4_triton.kernels._check import UnsupportedArchitectureError, is_aligned
from llama4_triton.kernels._launch import SM_90, assume_device, device_properties
from llama4_triton.kernels._paths import use
from llama4_triton.kernels.expert_weights import Experts, Projection
from llama4_triton.kernels.gather_rows import gather_rows
from llama4_triton.kernels.grouped_gemm import grouped_gemm_swiglu
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.rope_and_cache import rope_and_cache
from llama4_triton.kernels.routing import route, sort_by_expert
from llama4_triton.kernels.swiglu import swiglu

pytestmark = pytest.mark.no_kernels

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
SHARED = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448,
          120: 101_376}  # fmt: skip


def _gpu(arch):
    return dataclasses.replace(SM_90, capability=divmod(arch, 10), shared_bytes=SHARED[arch])


def _tiles(config):
    """(M, N or K tile, ..., warps, stages) of a configuration, without its name."""
    hidden = ("GROUP_M", "SWAP_AB", "MIN_SPLIT", "programs_per_sm")
    return tuple(v for k, v in dataclasses.asdict(config).items() if k not in hidden)


# By what the tensor cores read. "wide" is sm_90, for which the kernels were tuned first.
# Of GEMM 1; GEMM 2 differs where it is named. By the rows of a tile of the routing.
EXPERTS = {
    "wide": {
        "plain": [(16, 64, 128, 4, 5), (32, 64, 128, 4, 4), (64, 128, 64, 4, 4),
                  (128, 256, 64, 8, 4)],
        "e4m3": [(16, 64, 128, 4, 8), (32, 64, 128, 4, 8), (64, 128, 128, 4, 4),
                 (64, 256, 128, 8, 4)],
        "e4m3 down": [(16, 64, 128, 4, 8), (32, 64, 128, 4, 8), (64, 128, 128, 8, 4),
                      (64, 128, 128, 8, 4)],
        "int4": [(16, 64, 128, 4, 8), (32, 64, 128, 4, 8), (64, 128, 128, 8, 4),
                 (128, 128, 128, 8, 4)],
    },
    "mma": {
        "plain": [(16, 64, 128, 4, 5), (32, 64, 128, 4, 4), (64, 128, 64, 4, 3),
                  (128, 128, 64, 8, 3)],
        "e4m3": [(16, 64, 128, 4, 8), (32, 64, 128, 4, 8), (64, 128, 128, 4, 4),
                 (64, 128, 128, 4, 4)],
        "e4m3 down": [(16, 64, 128, 4, 8), (32, 64, 128, 4, 8), (64, 128, 128, 8, 4),
                      (64, 128, 128, 8, 4)],
        "int4": [(16, 64, 128, 4, 8), (32, 64, 128, 4, 8), (64, 128, 128, 8, 4),
                 (128, 128, 128, 8, 4)],
        "decoded": [(16, 64, 128, 4, 5), (32, 64, 128, 4, 5), (64, 128, 128, 8, 3),
                    (64, 128, 128, 8, 3)],
    },
    "none": [(16, 64, 32, 4, 2)] * 4,
}  # fmt: skip
EXPERTS["mma, 99 KiB"] = EXPERTS["mma"] | {  # of shared memory: fewer stages
    "e4m3": [(16, 64, 128, 4, 8), (32, 64, 128, 4, 6), (64, 128, 128, 4, 3), (64, 128, 128, 4, 3)],
    "e4m3 down": [
        (16, 64, 128, 4, 8), (32, 64, 128, 4, 6), (64, 128, 128, 8, 3), (64, 128, 128, 8, 3),
    ],
    "int4": [
        (16, 64, 128, 4, 8), (32, 64, 128, 4, 8), (64, 128, 128, 8, 4), (128, 128, 128, 8, 3),
    ],
}  # fmt: skip
PREFILL = {  # rows per sequence 16, 64, 65 at head_dim 128; head_dim 256
    "wide": [(16, 64, 4, 5), (64, 64, 4, 5), (128, 128, 8, 3), (128, 32, 8, 5)],
    "mma": [(16, 64, 4, 5), (64, 64, 8, 5), (64, 64, 8, 5), (64, 32, 8, 4)],
    "none": [(16, 32, 8, 2)] * 3 + [(16, 16, 8, 2)],
}
DECODE = {  # head_dim 128, 256
    "wide": [(64, 4, 5), (64, 8, 5)],
    "mma": [(64, 4, 5), (32, 4, 5)],
    "none": [(16, 4, 1), (16, 4, 1)],
}
ROWS = (16, 32, 64, 128)  # of a tile of the routing
KINDS = {75: "none", 80: "mma", 86: "mma", 89: "mma", 90: "wide", 100: "wide", 120: "mma"}


def _experts(gemm, dtype, format, gpu, **options):
    return [
        _tiles(grouped_gemm_config.default_config(gemm, m, dtype, format, gpu, **options))
        for m in ROWS
    ]


@pytest.mark.parametrize("arch", KINDS)
def test_default_configurations(arch):
    gpu, kind = _gpu(arch), KINDS[arch]
    dtype = FP16 if kind == "none" else BF16
    for gemm in ("up", "down"):
        assert _experts(gemm, FP32, "plain", gpu) == EXPERTS["none"]
        if kind == "none":
            assert _experts(gemm, dtype, "plain", gpu) == EXPERTS["none"]
            continue
        expected = EXPERTS["mma, 99 KiB" if arch in (86, 89, 120) else kind]
        assert _experts(gemm, dtype, "plain", gpu) == expected["plain"]
        assert _experts(gemm, dtype, "int4_group", gpu) == expected["int4"]
        if arch >= 89:
            want = expected["e4m3" if gemm == "up" else "e4m3 down"]
            for format in ("e4m3_channel", "e4m3_block"):
                assert _experts(gemm, E4M3, format, gpu) == want
        else:
            assert _experts(gemm, dtype, "e4m3_channel", gpu) == expected["decoded"]
    sizes = ((32, 128), (128, 128), (130, 128), (4096, 256))
    for dt, want in ((dtype, PREFILL[kind]), (FP32, PREFILL["none"])):
        assert [
            _tiles(attention_prefill.default_config(T, 2, D, dt, gpu)) for T, D in sizes
        ] == want
    for dt, want in ((dtype, DECODE[kind]), (FP32, DECODE["none"])):
        assert [
            _tiles(attention_decode.default_config(D, dt, properties=gpu)) for D in (128, 256)
        ] == want


@pytest.mark.parametrize(
    "arch, promoted, fast",
    [
        (89, (128, 128, 128, 8, 3), (128, 128, 128, 8, 3)),
        (90, (128, 128, 128, 8, 4), (128, 256, 128, 8, 4)),
        (100, (128, 128, 128, 8, 4), (128, 256, 128, 8, 4)),
        (120, (128, 128, 128, 8, 3), (128, 128, 128, 8, 3)),
    ],
)
def test_default_configurations_of_fp8(arch, promoted, fast):
    def tiles(M, fast_accum):
        config = fp8_matmul.default_config(M, 5120, fast_accum=fast_accum, properties=_gpu(arch))
        return _tiles(config)

    assert (tiles(65, False), tiles(65, True)) == (promoted, fast)
    assert tiles(17, False) == (32, 64, 128, 4, 6)


@pytest.mark.parametrize("gemm", ["up", "down"])
def test_unaligned_operands_get_small_tiles(gemm):
    """Whatever the GPU, at most what compiles without spills; fp32 is small already."""
    for arch in (80, 90, 100):
        gpu = _gpu(arch)
        for format, block_k in (("plain", 32), ("e4m3_channel", 128), ("int4_group", 128)):
            found = _experts(gemm, BF16, format, gpu, aligned=False)
            assert found == [(min(m, 64), 64, block_k, 4, 2) for m in ROWS]
        assert _experts(gemm, FP32, "plain", gpu, aligned=False) == EXPERTS["none"]


def test_what_counts_as_aligned():
    x = torch.empty(4, 64, dtype=BF16)
    assert is_aligned((16, 32), x, x.t(), x[:, 16:48])
    assert not is_aligned((16, 24), x)
    assert not is_aligned((), x[:, 4:])  # starts 8 bytes into its storage
    assert not is_aligned((), torch.empty(4, 65))
    prefill = attention_prefill.default_config(4096, 1, 130, BF16, aligned=False)
    assert _tiles(prefill) == (16, 32, 4, 2)


def test_sm_90_is_what_a_configuration_is_for_without_a_gpu():
    assert device_properties(torch.device("cpu")).capability == (9, 0)
    default = grouped_gemm_config.default_config
    assert default("up", 64, BF16) == default("up", 64, BF16, "plain", _gpu(90))


def _empty(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def _ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def _kv():
    return PagedKV(
        k_cache=_empty(1, 4, 1, 16), v_cache=_empty(1, 4, 1, 16), block_table=_ints(0)[None]
    )


def _moe():
    experts = Experts.from_hf(_empty(2, 16, 8), _empty(2, 4, 16))
    return moe(_empty(3, 16), experts, top_k=1, logits=torch.zeros(3, 2))


def _routing():
    with assume_device(_gpu(90)):
        return sort_by_expert(_ints(0, 1, 1)[:, None], torch.ones(3, 1), 2)


def _swiglu():
    experts = Experts.from_hf(_empty(2, 16, 8), _empty(2, 4, 16))
    return grouped_gemm_swiglu(_empty(3, 16), experts, _routing())


def _swiglu_of_e4m3():
    part = Projection(weight=_empty(2, 128, 128, dtype=E4M3), scale=torch.ones(2, 128))
    experts = Experts(gate=part, up=part, down=part)
    x = _empty(3, 128, dtype=E4M3)
    return grouped_gemm_swiglu(x, experts, _routing(), x_scale=torch.ones(3))


def _rope():
    x = _empty(1, 1, 16)
    return rope_and_cache(
        x, x, x, _kv(), _ints(0), _ints(0).long(), rope=None, qk_norm_eps=None, temperature=None
    )


def _rope_of_e4m3():
    x, page = _empty(1, 1, 16, dtype=FP16), _empty(2, 4, 1, 16, dtype=E4M3)
    kv = PagedKV(k_cache=page, v_cache=page.clone(), block_table=_ints(0)[None],
                 k_scale=torch.ones(1), v_scale=torch.ones(1))  # fmt: skip
    return rope_and_cache(
        x, x, x, kv, _ints(0), _ints(0).long(), rope=None, qk_norm_eps=None, temperature=None
    )


BF16_CALLS = {
    "rms_norm": lambda: rms_norm(_empty(2, 4), _empty(4), 1e-5),
    "add_rms_norm": lambda: add_rms_norm(_empty(2, 4), _empty(2, 4), _empty(4), 1e-5),
    "gather_rows": lambda: gather_rows(_empty(2, 4), _ints(1)),
    "swiglu": lambda: swiglu(_empty(2, 4), _empty(2, 4)),
    "route": lambda: route(_empty(2, 4), 1),
    "moe": _moe,
    "grouped_gemm_swiglu": _swiglu,
    "rope_and_cache": _rope,
    "attention_prefill": lambda: attention_prefill.attention_prefill(
        _empty(1, 1, 16), _kv(), _ints(0, 1), _ints(1)
    ),
    "attention_decode": lambda: attention_decode.attention_decode(
        _empty(1, 1, 16), _kv(), _ints(1)
    ),
}
FP8_CALLS = {
    "grouped_gemm_swiglu": _swiglu_of_e4m3,
    "rope_and_cache": _rope_of_e4m3,
    "quantize_rowwise": lambda: quantize_rowwise(_empty(2, 16, dtype=FP16)),
    "fp8_matmul": lambda: fp8_matmul.fp8_matmul(
        _empty(2, 16, dtype=E4M3), torch.ones(2), _empty(3, 16, dtype=E4M3), torch.ones(3)
    ),
}


@pytest.fixture
def launched():
    """Names of kernels that were launched; none is executed."""
    names = []
    with _launch.intercept(lambda kernel, grid, *args, **kwargs: names.append(kernel.__name__)):
        yield names


@pytest.mark.parametrize("op", BF16_CALLS)
def test_bf16_needs_sm_80(launched, op):
    message = f"^{op}: the device must be sm_80 or newer for bfloat16, got sm_75 \\(use float16\\)$"
    with assume_device(_gpu(75)):
        with pytest.raises(UnsupportedArchitectureError, match=message):
            BF16_CALLS[op]()
        assert [name for name in launched if op in name] == []
        with use(all="reference"):
            BF16_CALLS[op]()
    with assume_device(_gpu(80)):
        BF16_CALLS[op]()


@pytest.mark.parametrize("op", FP8_CALLS)
def test_fp8_needs_sm_89(launched, op):
    message = f"^{op}: the device must be sm_89 or newer for float8_e4m3fn, got sm_86 \\(keep "
    with assume_device(_gpu(86)):
        with pytest.raises(UnsupportedArchitectureError, match=message):
            FP8_CALLS[op]()
        assert [name for name in launched if op in name] == []
        with use(all="reference"):
            FP8_CALLS[op]()
    with assume_device(_gpu(89)):
        FP8_CALLS[op]()


def test_fp16_is_everywhere(launched):
    x = _empty(2, 16, dtype=FP16)
    with assume_device(_gpu(75)):
        rms_norm(x, x[0], 1e-5)
        sort_by_expert(_ints(0)[None], torch.ones(1, 1), 2)
    assert launched[0] == "_rms_norm_kernel"
