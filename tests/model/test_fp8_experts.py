"""The model with e4m3 experts, loaded from a checkpoint: kernels against the plain reference.

bf16 moves what is rounded to e4m3 across the points at which its rounding changes, in the kernels
as in the reference. So both are measured against fp32 with the same routing and the same rounding
to e4m3, and the kernels may be off by twice what the reference in bf16 is, as without e4m3.
"""

from __future__ import annotations

import pytest
import torch
from support.fp8_checkpoints import fp8_state, save_fp8_checkpoint, stands_for
from support.tiny_configs import make_tokens, packed

from llama4_triton.kernels import expert_weights
from llama4_triton.kernels.reference import moe_layer
from llama4_triton.model.checkpoint import load_model
from llama4_triton.model.config import tiny_maverick
from llama4_triton.model.llama4 import Llama4
from llama4_triton.model.reference import Llama4 as Reference
from llama4_triton.model.reference import forced_routing, recorded_routing

pytestmark = pytest.mark.unsanitized

# Layers 1 and 3 have experts, three of an odd width; chunks of 8.
CONFIG = tiny_maverick(
    vocab_size=97, hidden_size=48, intermediate_size=33, num_hidden_layers=4, num_local_experts=3,
    attention_chunk_size=8, floor_scale=4,
)  # fmt: skip
STYLES = {
    "experts": {},
    "every-linear": dict(every_linear=True),
    "mixed-layers": dict(plain_layers=(3,)),
}
NAMES = ("gate_up_proj", "down_proj", "gate_up_scale", "down_scale")


@pytest.fixture
def saved(style, tmp_path):
    state = fp8_state(CONFIG, **STYLES[style])
    return save_fp8_checkpoint(tmp_path, CONFIG, state), state


def _experts(model):
    return model.get_submodule("model.layers.1.feed_forward.experts")


@pytest.mark.parametrize("length", [1, 19])  # the kernels of a few tokens, and of more
@pytest.mark.parametrize("style", STYLES)
def test_bf16_logits_err_no_more_than_twice_the_reference(saved, style, length, device, executor):
    if executor == "ptx" and style != "experts":
        pytest.skip("the other styles run the same compiled kernels")
    directory, _ = saved
    (tokens,) = make_tokens(CONFIG, [length])
    exact_model = load_model(directory, Reference, dtype=torch.float32)
    with recorded_routing(exact_model) as routing:
        exact = packed(exact_model, [tokens])[0]
    reference = load_model(directory, Reference)
    with forced_routing(reference, routing):
        reference_error = packed(reference, [tokens])[0].float() - exact
    model = load_model(directory, Llama4, device=device)
    routing = {i: tuple(part.to(device) for part in parts) for i, parts in routing.items()}
    with forced_routing(model, routing):
        error = packed(model, [tokens], device=device)[0].float().cpu() - exact
    assert float(error.norm()) <= 2 * float(reference_error.norm())
    assert float(error.abs().max()) <= 2 * float(reference_error.abs().max())
    assert float(reference_error.abs().max()) > 1e-3


@pytest.mark.no_kernels
@pytest.mark.parametrize("style", STYLES)
def test_reference_is_that_of_the_weights_multiplied_out_but_for_rounding_x_and_z(saved):
    """e4m3 has 4 significant bits, 2.6 % rms, and two MoE layers round x and z.

    Four independent roundings are 5.2 % of what the experts add, and that is a part of the logits.
    """
    directory, state = saved
    (tokens,) = make_tokens(CONFIG, [19])
    plain = Reference(CONFIG)
    plain.load_state_dict(stands_for(CONFIG, state), strict=True)
    with recorded_routing(plain) as routing:
        want = packed(plain, [tokens])[0]
    model = load_model(directory, Reference, dtype=torch.float32)
    with forced_routing(model, routing):
        got = packed(model, [tokens])[0]
    relative = float((got - want).norm() / want.norm())
    assert 1e-3 < relative < 0.052


@pytest.mark.no_kernels
@pytest.mark.parametrize("style", ["experts"])
def test_reference_rounds_as_the_operators_reference_does(saved):
    """Two plain definitions in fp32; they sum in other orders: 1e-5 of values near 1."""
    experts = _experts(load_model(saved[0], Reference, dtype=torch.float32))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(19, CONFIG.hidden_size, generator=generator)
    residual = torch.randn(x.shape, generator=generator)
    ids = torch.randint(0, CONFIG.num_local_experts, (19, 1), generator=generator).int()
    weights = torch.rand(19, 1, generator=generator)
    want = moe_layer(
        x,
        expert_weights.Experts.from_hf(*(experts.get_parameter(name) for name in NAMES)),
        ids, weights, residual=residual, activation="row", z_activation="group",
    )  # fmt: skip
    got = experts(x, (ids, weights), residual=residual)
    assert float((got - want).abs().max()) <= 1e-5
    assert float((want - residual).abs().max()) > 0.1


def test_float32_is_refused_in_one_line(tmp_path, device):
    save_fp8_checkpoint(tmp_path, CONFIG, fp8_state(CONFIG))
    model = load_model(tmp_path, Llama4, dtype=torch.float32, device=device)
    with pytest.raises(TypeError, match=r"^moe: x must be float16 or bfloat16 for e4m3_channel"):
        packed(model, [[1, 2, 3]], device=device)
