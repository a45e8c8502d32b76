"""Experts and their formats: views of every layout, exact round trips, quantisers, bad inputs."""

from __future__ import annotations

import math

import pytest
import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels.expert_weights import (
    Experts,
    Projection,
    check_experts,
    dequantize,
    pack_int4,
    quantize_block,
    quantize_channel,
    quantize_experts,
    quantize_int4,
    unpack_int4,
)

pytestmark = pytest.mark.no_kernels

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
E, F, H = 3, 256, 128
FORMATS = ["e4m3_channel", "e4m3_block", "int4_group"]


def _parts(experts):
    return {"gate": experts.gate, "up": experts.up, "down": experts.down}


def _storage(x):
    return x.untyped_storage().data_ptr()


def _vllm(format="plain", dtype=BF16):
    """w13, w2 and their scales, made of gate and up quantised apart: scales differ by half."""
    gate, up, down = torch.randn(E, F, H), 3 * torch.randn(E, F, H), torch.randn(E, H, F)
    experts = Experts(*[], **{n: Projection(weight=w.to(dtype)) for n, w in zip(
        ("gate", "up", "down"), (gate, up, down), strict=True)})  # fmt: skip
    if format != "plain":
        experts = quantize_experts(experts, format)
    w13 = torch.cat((experts.gate.weight, experts.up.weight), dim=1)
    if format == "plain":
        return experts, w13, experts.down.weight, None, None
    scale = torch.cat((experts.gate.scale, experts.up.scale), dim=1)
    return experts, w13, experts.down.weight, scale, experts.down.scale


def _assert_same(got, want):
    for part, projection in _parts(got).items():
        other = _parts(want)[part]
        assert projection.format == other.format and projection.shape == other.shape
        assert torch.equal(dequantize(projection), dequantize(other)), part


@pytest.mark.parametrize("format", ["plain", *FORMATS])
def test_vllm_layout_is_viewed(format):
    want, w13, w2, w13_scale, w2_scale = _vllm(format)
    experts = Experts.from_vllm(w13, w2, w13_scale, w2_scale)
    check_experts("moe", experts, H, BF16)
    assert (experts.num_experts, experts.width, experts.hidden) == (E, F, H)
    assert experts.format == format
    _assert_same(experts, want)
    assert experts.gate.weight.data_ptr() == w13.data_ptr()
    assert experts.up.weight.data_ptr() == w13[:, F:].data_ptr()
    assert experts.down.weight.data_ptr() == w2.data_ptr()
    if format != "plain":
        assert experts.gate.scale.data_ptr() == w13_scale.data_ptr()
        assert experts.up.scale.data_ptr() == w13_scale[:, w13_scale.shape[1] // 2 :].data_ptr()
        assert experts.down.scale.data_ptr() == w2_scale.data_ptr()


@pytest.mark.parametrize("format", ["plain", *FORMATS])
def test_hf_layout_is_viewed(format):
    """Weights and scales transposed, as transformers has them; bytes stay K-major in memory."""
    want, w13, w2, w13_scale, w2_scale = _vllm(format)
    scales = [
        None if s is None else s.unsqueeze(2) if s.ndim == 2 else s for s in (w13_scale, w2_scale)
    ]
    scales = [None if s is None else s.transpose(1, 2) for s in scales]
    gate_up, down = w13.transpose(1, 2), w2.transpose(1, 2)
    if format == "plain":
        gate_up, down = gate_up.contiguous(), down.contiguous()
    experts = Experts.from_hf(gate_up, down, *scales)
    check_experts("moe", experts, H, BF16)
    _assert_same(experts, want)
    assert experts.gate.weight.data_ptr() == gate_up.data_ptr()
    assert experts.up.weight.data_ptr() == gate_up[:, :, F:].data_ptr()
    assert experts.down.weight.data_ptr() == down.data_ptr()
    if format != "plain":
        assert {_storage(p.scale) for p in _parts(experts).values()} == set(map(_storage, scales))


@pytest.mark.parametrize("format", ["plain", *FORMATS])
def test_dense_layers_are_one_expert(format):
    want, *_ = _vllm(format)
    want = Experts(**{
        part: Projection(weight=p.weight[:1], scale=None if p.scale is None else p.scale[:1])
        for part, p in _parts(want).items()
    })  # fmt: skip
    weights = [p.weight[0] for p in _parts(want).values()]
    scales = [None if p.scale is None else p.scale[0] for p in _parts(want).values()]
    experts = Experts.dense(*weights, *scales)
    check_experts("moe", experts, H, BF16, name="shared")
    _assert_same(experts, want)
    for got, w, s in zip(_parts(experts).values(), weights, scales, strict=True):
        assert got.weight.data_ptr() == w.data_ptr()
        assert s is None or got.scale.data_ptr() == s.data_ptr()


# The same values as vLLM, transformers and nn.Linear checkpoints shape them: (w13, w2) scales.
TENSOR_SCALES = {
    "one value": (torch.tensor(0.5), torch.tensor(2.0)),
    "(1,)": (torch.tensor([0.5]), torch.tensor([2.0])),
    "(E,)": (torch.tensor([0.5, 0.25, 3.0]), torch.tensor([1.0, 2.0, 0.1])),
    "(E, 1)": (torch.tensor([[0.5], [0.25], [3.0]]), torch.tensor([[1.0], [2.0], [0.1]])),
    "(E, 1, 1)": (torch.rand(E, 1, 1), torch.rand(E, 1, 1)),
    "(E, 2)": (torch.rand(E, 2), torch.rand(E)),
    "(E, N)": (torch.rand(E, 2 * F), torch.rand(E, H)),
    "(E, N, 1)": (torch.rand(E, 2 * F, 1), torch.rand(E, H, 1)),
    "(E, 1, N)": (torch.rand(E, 1, 2 * F), torch.rand(E, H, 1)),  # transformers with fbgemm
}


@pytest.mark.parametrize("layout", ["hf", "vllm"])
@pytest.mark.parametrize("form", TENSOR_SCALES)
def test_scale_forms_are_views_of_channels(form, layout):
    if form == "(E, 1, N)" and layout == "vllm":
        pytest.skip("vLLM has output channels first")
    w13 = torch.randn(E, 2 * F, H).to(E4M3)
    w2 = torch.randn(E, H, F).to(E4M3)
    s13, s2 = TENSOR_SCALES[form]
    if layout == "vllm":
        experts = Experts.from_vllm(w13, w2, s13, s2)
    else:
        experts = Experts.from_hf(w13.transpose(1, 2), w2.transpose(1, 2), s13, s2)
    check_experts("moe", experts, H, BF16)
    assert experts.format == "e4m3_channel"
    if s13.numel() == E * 2 * F:
        want13 = s13.reshape(E, 2, F)
    else:  # one value for all, one per expert, or one per expert and half
        want13 = s13.reshape(-1, 2 if form == "(E, 2)" else 1, 1).expand(E, 2, F)
    assert torch.equal(experts.gate.scale, want13[:, 0])
    assert torch.equal(experts.up.scale, want13[:, 1])
    assert torch.equal(experts.down.scale, s2.reshape(-1, max(1, s2.numel() // E)).expand(E, H))
    assert _storage(experts.gate.scale) == _storage(experts.up.scale) == _storage(s13)
    assert _storage(experts.down.scale) == _storage(s2)
    if s13.numel() <= E:
        assert experts.gate.scale.stride(1) == experts.up.scale.stride(1) == 0


def test_every_int4_byte():
    """All 256 bytes, at every place of a group, and back."""
    row, place = torch.arange(256)[:, None], torch.arange(4 * 64)
    bytes_ = ((row + 5 * place) % 256).to(torch.uint8)  # 4 groups; a column has each byte once
    q = unpack_int4(bytes_)
    assert q.shape == (256, 512) and q.dtype == torch.int8
    assert q.min() == -8 and q.max() == 7
    assert torch.equal(pack_int4(q), bytes_)
    for n, g, j in [(0, 0, 0), (5, 3, 17), (127, 2, 63)]:  # the documented formula
        byte = int(bytes_[n, 64 * g + j])
        assert int(q[n, 128 * g + j]) == byte % 16 - 8
        assert int(q[n, 128 * g + 64 + j]) == byte // 16 - 8


def test_int4_of_a_known_group():
    w = torch.zeros(1, 2, 256)
    w[0, 0, :4] = torch.tensor([8.0, -8.0, 1.5, -2.5])  # amax 8: scale 1, ties to even
    w[0, 0, 128:131] = torch.tensor([-0.5, 0.4375, 0.03])  # amax 0.5: scale 1 / 16
    tiny = quantize_int4(torch.full((1, 1, 128), 1e-14))
    assert tiny.scale.item() == pytest.approx(1e-12 / 8) and not dequantize(tiny).any()
    projection = quantize_int4(w)
    assert torch.equal(projection.scale, torch.tensor([[[1.0, 0.0625], [1.0, 1.0]]]))
    q = unpack_int4(projection.weight)
    assert q[0, 0, :4].tolist() == [7, -8, 2, -2] and not q[0, 0, 4:128].any()
    assert q[0, 0, 128:131].tolist() == [-8, 7, 0] and not q[0, 1].any()
    assert torch.equal(
        dequantize(projection), q.float() * projection.scale.repeat_interleave(128, 2)
    )


def test_a_group_has_no_part_in_another():
    w = torch.randn(2, 4, 384)
    changed = w.clone()
    changed[1, 2, 128:256] *= 100
    a, b = quantize_int4(w), quantize_int4(changed)
    different = (a.scale != b.scale).nonzero().tolist()
    assert different == [[1, 2, 1]]
    bytes_ = (a.weight != b.weight).nonzero()
    assert all((e, n) == (1, 2) and 64 <= j < 128 for e, n, j in bytes_.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_channel_scales_are_those_of_quantize_rowwise(dtype):
    w = torch.randn(2, 5, 96).to(dtype)
    w[0, 1] = 0.0
    w[0, 3] = 1e-14  # below the smallest amax; 0 in float16
    w[0, 2, 3], w[1, 0, 0], w[1, 4] = math.inf, math.nan, math.nan
    got = quantize_channel(w)
    want_q, want_scale = reference.quantize_rowwise(w.reshape(10, 96))
    assert torch.equal(got.scale, want_scale.reshape(2, 5)) and got.scale[0, 1] == 1.0
    same = got.weight.view(torch.uint8) == want_q.reshape(2, 5, 96).view(torch.uint8)
    assert (same | w.isnan()).all() and torch.equal(got.weight.float().isnan(), w.isnan())


def test_block_scales():
    """Each block of 128 x 128 alone: a channel of that many values has the same scale."""
    w = torch.randn(2, 256, 384)
    w[0, :128, 128:256] = 0.0
    w[1, 130, 383], w[1, 131, 383] = math.inf, math.nan
    got = quantize_block(w)
    assert got.scale.shape == (2, 2, 3) and got.scale[0, 0, 1] == 1.0
    for e, i, j in [(0, 0, 1), (0, 1, 2), (1, 0, 0), (1, 1, 2)]:
        block = w[e, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        q, scale = reference.quantize_rowwise(block.reshape(1, -1))
        assert got.scale[e, i, j] == scale[0]
        part = got.weight[e, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128].reshape(1, -1)
        assert torch.equal(part.float().nan_to_num(9e9), q.float().nan_to_num(9e9))


@pytest.mark.parametrize("quantize", [quantize_channel, quantize_block])
def test_e4m3_of_e4m3_values_is_the_same(quantize):
    """The largest value of a channel or block is 448 scales, so the scale is found again."""
    first = quantize(torch.randn(2, 256, 256))
    again = quantize(dequantize(first))
    assert torch.equal(again.weight.view(torch.uint8), first.weight.view(torch.uint8))
    torch.testing.assert_close(again.scale, first.scale, rtol=2**-22, atol=0)


def test_int4_of_int4_values_is_the_same():
    """With a -8 in each group, whose scale is then found again."""
    q = torch.randint(-8, 8, (2, 5, 384), dtype=torch.int8)
    q[:, :, 100::128] = -8
    first = Projection(weight=pack_int4(q), scale=torch.rand(2, 5, 3) + 1e-3)
    again = quantize_int4(dequantize(first))
    assert torch.equal(again.weight, first.weight) and torch.equal(again.scale, first.scale)


ERRORS = {"e4m3_channel": 2.7e-2, "e4m3_block": 2.8e-2, "int4_group": 0.107}


@pytest.mark.parametrize("format", FORMATS)
def test_error_of_quantisation(format):
    """Of Gaussian weights; the int4 figure is in quantize_int4's docstring."""
    w = torch.randn(1, 512, 1024, generator=torch.Generator().manual_seed(0))
    projection = {
        "e4m3_channel": quantize_channel, "e4m3_block": quantize_block, "int4_group": quantize_int4
    }[format](w)  # fmt: skip
    error = (dequantize(projection) - w).norm() / w.norm()
    assert 0.9 * ERRORS[format] < error < ERRORS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_in_float64_is_exact(format):
    projection = _vllm(format)[0].gate
    exact, rounded = dequantize(projection, torch.float64), dequantize(projection)
    assert rounded.dtype == torch.float32 and torch.equal(exact.float(), rounded)
    e, n, k = 1, 200, 77
    q = unpack_int4(projection.weight) if format == "int4_group" else projection.weight
    scale = projection.scale
    at = {"e4m3_channel": (e, n), "e4m3_block": (e, n // 128, k // 128)}.get(
        format, (e, n, k // 128)
    )
    assert exact[e, n, k].item() == float(q[e, n, k]) * float(scale[at])


@pytest.mark.parametrize("quantize", [quantize_channel, quantize_block, quantize_int4])
@pytest.mark.parametrize("shape", [(0, 128, 256), (2, 0, 128), (2, 128, 0)], ids=str)
def test_empty_weights(quantize, shape):
    projection = quantize(torch.zeros(shape))
    assert projection.shape == shape and dequantize(projection).shape == shape


def test_views_of_any_strides_are_quantised_alike():
    w = torch.randn(2, 256, 128)
    for quantize in (quantize_channel, quantize_block, quantize_int4):
        a, b = quantize(w), quantize(w.transpose(1, 2).contiguous().transpose(1, 2))
        assert torch.equal(dequantize(a), dequantize(b)) and b.weight.is_contiguous()


def test_weights_with_grad_pass_without_grad_mode_only():
    experts = _vllm()[0]
    experts.down.weight.requires_grad_()
    with torch.no_grad():
        check_experts("moe", experts, H, BF16)
    with pytest.raises(NotImplementedError, match="moe: experts.down.weight must not require grad"):
        check_experts("moe", experts, H, BF16)


def _with(experts, part, **changes):
    parts = _parts(experts)
    old = parts[part]
    parts[part] = Projection(**{"weight": old.weight, "scale": old.scale, **changes})
    return Experts(**parts)


def _bad(format, part, x_dtype=BF16, H=H, **changes):
    def run():
        experts = _vllm(format)[0]
        made = {k: v(getattr(_parts(experts)[part], k)) for k, v in changes.items()}
        check_experts("moe", _with(experts, part, **made), H, x_dtype)

    return run


def _transposed(w):
    return w.transpose(1, 2).contiguous().transpose(1, 2)


W13, W2 = torch.zeros(2, 256, 128), torch.zeros(2, 128, 128)
BAD = {
    "no experts": (lambda: check_experts("moe", (W13, W2), 128, BF16), TypeError,
                   "moe: experts must be Experts, got <class 'tuple'>"),
    "a tensor": (lambda: check_experts("moe", Experts(gate=W13, up=W13, down=W2), 128, BF16),
                 TypeError, "moe: experts.gate must be a Projection, got"),
    "rank": (_bad("plain", "gate", weight=lambda w: w[0]), ValueError,
             "moe: experts.gate.weight must be 3-D, got (256, 128)"),
    "H": (_bad("plain", "gate", H=64), ValueError,
          "moe: experts.gate.weight must have shape (3, 256, 64), got (3, 256, 128)"),
    "F": (_bad("plain", "up", weight=lambda w: w[:, 1:]), ValueError,
          "moe: experts.up.weight must have shape (3, 256, 128), got (3, 255, 128)"),
    "E": (_bad("plain", "down", weight=lambda w: w[1:]), ValueError,
          "moe: experts.down.weight must have shape (3, 128, 256), got (2, 128, 256)"),
    "dtype": (_bad("plain", "down", x_dtype=torch.float16), TypeError,
              "moe: experts.gate.weight must be torch.float16, got torch.bfloat16"),
    "int8": (_bad("plain", "gate", weight=lambda w: w.to(torch.int8)), TypeError,
             "moe: experts.gate.weight must be torch.bfloat16, got torch.int8"),
    "strides": (_bad("plain", "down", weight=lambda w: w.repeat(1, 2, 2)[:, ::2, ::2]), ValueError,
                "moe: experts.down.weight must have stride 1 in one of its last two dimensions"),
    "up like gate": (_bad("plain", "up", weight=_transposed), ValueError,
                     "moe: experts.up.weight must have the strides of experts.gate.weight, "),
    "scale like gate": (_bad("e4m3_channel", "up", scale=lambda s: s[:, :1].expand(-1, F)),
                        ValueError, "moe: experts.up.scale must have the strides of"),
    "plain with scale": (_bad("plain", "up", scale=lambda s: torch.ones(E, F)), ValueError,
                         "moe: experts.up.scale must be None for weights in torch.bfloat16"),
    "no scale": (_bad("e4m3_channel", "up", scale=lambda s: None), TypeError,
                 "moe: experts.up.scale must be a torch.Tensor, got None"),
    "no int4 scale": (_bad("int4_group", "down", scale=lambda s: None), TypeError,
                      "moe: experts.down.scale must be a torch.Tensor, got None"),
    "mixed": (_bad("e4m3_block", "down", weight=lambda w: w.float().bfloat16(),
                   scale=lambda s: None), TypeError,
              "moe: experts.gate, up and down must have one format, got e4m3_block, e4m3_block, "
              "plain"),
    "e4m3 of fp32 x": (_bad("e4m3_channel", "gate", x_dtype=torch.float32), TypeError,
                       "moe: x must be float16 or bfloat16 for e4m3_channel weights, got "
                       "torch.float32"),
    "int4 of fp32 x": (_bad("int4_group", "gate", x_dtype=torch.float32), TypeError,
                       "moe: x must be float16 or bfloat16 for int4_group weights"),
    "e4m3 strides": (_bad("e4m3_channel", "down", weight=_transposed), ValueError,
                     "moe: experts.down.weight must be contiguous in its last dimension"),
    "int4 strides": (_bad("int4_group", "down", weight=_transposed), ValueError,
                     "moe: experts.down.weight must be contiguous in its last dimension"),
    "scale dtype": (_bad("e4m3_channel", "gate", scale=lambda s: s.bfloat16()), TypeError,
                    "moe: experts.gate.scale must be torch.float32, got torch.bfloat16"),
    "scale shape": (_bad("e4m3_channel", "down", scale=lambda s: s[:, 1:]), ValueError,
                    "moe: experts.down.scale must have shape (3, 128), got (3, 127)"),
    "block scale": (_bad("e4m3_block", "down", scale=lambda s: s[:, :, :1]), ValueError,
                    "moe: experts.down.scale must have shape (3, 1, 2), got (3, 1, 1)"),
    "int4 scale": (_bad("int4_group", "gate", scale=lambda s: s[:, 1:]), ValueError,
                   "moe: experts.gate.scale must have shape (3, 256, 1), got (3, 255, 1)"),
    "int4 scale dtype": (_bad("int4_group", "gate", scale=lambda s: s.double()), TypeError,
                         "moe: experts.gate.scale must be torch.float32 or torch.float16 or"),
    "block K": (lambda: check_experts("moe", _cut("e4m3_block", 64), H, BF16), ValueError,
                "moe: experts.gate must have K, and with blocks N, a multiple of 128, got (E, N, "
                "K) = (3, 192, 128)"),
    "int4 K": (lambda: check_experts("moe", _cut("int4_group", 64), H, BF16), ValueError,
               "moe: experts.down must have K, and with blocks N, a multiple of 128, got (E, N, "
               "K) = (3, 128, 192)"),
    "devices": (_bad("plain", "down", weight=lambda w: w.to("meta")), ValueError,
                "moe: all tensors must be on one device, got experts.gate.weight on cpu"),
    "from_vllm rank": (lambda: Experts.from_vllm(W13[0], W2), ValueError,
                       "Experts.from_vllm: w13 must be 3-D, got (256, 128)"),
    "from_hf list": (lambda: Experts.from_hf([1.0], W2), TypeError,
                     "Experts.from_hf: gate_up_proj must be a torch.Tensor, got <class 'list'>"),
    "dense rank": (lambda: Experts.dense(W13, W13, W2), ValueError,
                   "Experts.dense: gate_proj must be 2-D, got (2, 256, 128)"),
    "odd 2F": (lambda: Experts.from_vllm(W13[:, 1:], W2), ValueError,
               "Experts.from_vllm: w13 must have 2F columns, gate then up, got 255"),
    "scale form": (lambda: Experts.from_vllm(W13.to(E4M3), W2.to(E4M3), torch.ones(2, 255), None),
                   ValueError, "Experts.from_vllm: the scale of w13 must be one value, (2,), "
                   "(2, 256), (2, 256, 1) or blocks of 128 x 128, got (2, 255)"),
    "half a block": (lambda: Experts.from_vllm(
        torch.zeros(2, 384, 128).to(E4M3), torch.zeros(2, 128, 192).to(E4M3),
        torch.ones(2, 3, 1), None), ValueError,
        "Experts.from_vllm: F must be a multiple of 128 for w13's blocks to end with gate, got"),
    "block sizes": (lambda: quantize_block(torch.zeros(1, 128, 130)), ValueError,
                    "quantize_block: w must have N and K multiples of 128, got (1, 128, 130)"),
    "int4 sizes": (lambda: quantize_int4(torch.zeros(1, 3, 64)), ValueError,
                   "quantize_int4: w must have K a multiple of 128, got (1, 3, 64)"),
    "int4 NaN": (lambda: quantize_int4(torch.full((1, 1, 128), math.nan)), ValueError,
                 "quantize_int4: w must be finite, got NaN or infinite weights"),
    "channel dtype": (lambda: quantize_channel(torch.zeros(1, 2, 3).double()), TypeError,
                      "quantize_channel: w must be torch.float32 or"),
    "channel rank": (lambda: quantize_channel(torch.zeros(2, 3)), ValueError,
                     "quantize_channel: w must have shape (E, N, K), got (2, 3)"),
    "pack size": (lambda: pack_int4(torch.zeros(64, dtype=torch.int8)), ValueError,
                  "pack_int4: q must have a last dimension that is a multiple of 128, got (64,)"),
    "pack dtype": (lambda: pack_int4(torch.zeros(128)), TypeError,
                   "pack_int4: q must be torch.int8, got torch.float32"),
    "unpack size": (lambda: unpack_int4(torch.zeros(2, 32, dtype=torch.uint8)), ValueError,
                    "unpack_int4: packed must have a last dimension that is a multiple of 64"),
    "format": (lambda: quantize_experts(_vllm()[0], "int8"), ValueError,
               "quantize_experts: format must be one of e4m3_channel, e4m3_block, int4_group, got "
               "'int8'"),
    "twice": (lambda: quantize_experts(_vllm("int4_group")[0], "int4_group"), TypeError,
              "quantize_experts: experts must be plain, got int4_group"),
}  # fmt: skip


def _cut(format, columns):
    """Experts of F = 192 whose tensors fit one another, but not the format."""
    experts = _vllm(format)[0]
    divide = 2 if format == "int4_group" else 1
    gate, up = (
        Projection(weight=p.weight[:, :-columns], scale=p.scale[:, :-columns])
        for p in (experts.gate, experts.up)
    )
    down = experts.down
    down = Projection(weight=down.weight[:, :, : -columns // divide], scale=down.scale[:, :, :1])
    return Experts(gate=gate, up=up, down=down)


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    run, error, message = BAD[name]
    with pytest.raises(error) as raised:
        run()
    assert str(raised.value).startswith(message)
