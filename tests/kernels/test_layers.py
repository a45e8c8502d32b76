"""Layers of transformers' Llama 4 against its own forwards, and what `kernels` demands of them."""

from __future__ import annotations

import pytest
import torch

from llama4_triton.kernels import layers
from llama4_triton.kernels.expert_weights import Experts, quantize_experts
from llama4_triton.kernels.moe import moe

hf = pytest.importorskip(
    "transformers.models.llama4.modeling_llama4", reason="transformers is a dev dependency"
)

H, F, E = 40, 24, 4


def _host(cls, *args):
    """A layer of transformers with weights of which sums stay near 1."""
    module = cls(*args)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
    return module


@pytest.fixture
def config():
    from transformers import Llama4TextConfig

    return Llama4TextConfig(
        hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2
    )


# fp32 sums of at most H + 2F terms near 1 in another order: 2**-24 * sqrt(88) per term of the
# result, with room for the products of three matrices.
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, H), (5, H), (0, H)], ids=["batch", "flat", "no-tokens"])
def test_moe_is_that_of_transformers(config, device, shape):
    module = _host(hf.Llama4TextMoe, config)
    x = torch.randn(shape)
    seen = []
    module.router.register_forward_hook(lambda *hooked: seen.append(hooked[2][1]))
    with torch.no_grad():
        expected, expected_logits = module(x)
        out, logits = layers.moe_forward(module, x)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert torch.equal(logits, expected_logits)
    assert len(seen) == 2 and torch.equal(seen[1], logits)


def test_moe_takes_experts_that_were_made_before(config, device):
    module = _host(hf.Llama4TextMoe, config).to(torch.bfloat16)
    x, parts = torch.randn(3, H, dtype=torch.bfloat16), module.experts
    plain = Experts.from_hf(parts.gate_up_proj.detach(), parts.down_proj.detach())
    shared = Experts.dense(*(p.detach() for p in module.shared_expert.parameters()))
    with torch.no_grad():
        before, logits = layers.moe_forward(module, x)
        module._llama4_triton_experts = quantize_experts(plain, "e4m3_channel")
        module._llama4_triton_shared = quantize_experts(shared, "e4m3_channel")
        out, _ = layers.moe_forward(module, x)
    experts, shared = module._llama4_triton_experts, module._llama4_triton_shared
    want = moe(x, experts, top_k=2, logits=logits, shared=shared, score_dtype=x.dtype)
    assert torch.equal(out, want)
    assert not torch.equal(out, before)


def test_norm_and_mlp_are_those_of_transformers(config, device):
    norm, mlp = _host(hf.Llama4TextRMSNorm, H), _host(hf.Llama4TextMLP, config)
    x = torch.randn(2, 3, 2 * H)[..., :H]  # rows with a gap between them
    with torch.no_grad():
        torch.testing.assert_close(layers.rms_norm_forward(norm, x), norm(x), **CLOSE)
        torch.testing.assert_close(layers.mlp_forward(mlp, x), mlp(x), **CLOSE)


@pytest.mark.no_kernels
def test_training_is_refused(config):
    module = _host(hf.Llama4TextRMSNorm, H)
    with pytest.raises(NotImplementedError, match="weight must not require grad"):
        layers.rms_norm_forward(module, torch.randn(1, H))


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", ["Llama4TextMoe", "Llama4TextRMSNorm", "Llama4TextMLP"])
def test_layers_are_what_hugging_face_kernels_accepts(name):
    validate = pytest.importorskip(
        "kernels.layer.layer", reason="Hugging Face's kernels is a dev dependency"
    )._validate_layer
    layer = getattr(layers, name)
    validate(check_cls=getattr(hf, name), cls=layer, repo="kernels/layers.py")
    assert layer.can_torch_compile and not layer.has_backward


@pytest.mark.interpreter_only  # without `device`, whose poisoned torch.empty cannot be traced
@pytest.mark.parametrize("name", ["Llama4TextMoe", "Llama4TextRMSNorm", "Llama4TextMLP"])
def test_layers_compile_into_one_graph(name, config):
    args = (H,) if name == "Llama4TextRMSNorm" else (config,)
    module, x = _host(getattr(hf, name), *args), torch.randn(3, H)
    forward = getattr(layers, name).forward
    with torch.no_grad():
        expected = forward(module, x)
        compiled = torch.compile(forward, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(module, x), expected, rtol=0, atol=0)
