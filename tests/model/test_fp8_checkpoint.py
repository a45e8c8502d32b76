"""Checkpoints with e4m3 experts: what is loaded is what the files say, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from support.fp8_checkpoints import QUANTIZATION, fp8_state, save_fp8_checkpoint, stands_for

from llama4_triton.model import checkpoint
from llama4_triton.model.checkpoint import CheckpointError, load_config, load_model, load_state
from llama4_triton.model.config import ConfigError, Llama4Config, tiny_maverick
from llama4_triton.model.fp8_checkpoint import loaded_bytes
from llama4_triton.model.llama4 import Llama4
from llama4_triton.model.reference import Llama4 as Reference
from llama4_triton.model.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.no_kernels

E4M3 = torch.float8_e4m3fn
# Layers 1 and 3 have experts, three of an odd width.
CONFIG = tiny_maverick(
    vocab_size=97, hidden_size=48, intermediate_size=33, num_hidden_layers=4, num_local_experts=3
)
EXPERTS = "model.layers.1.feed_forward.experts"
STYLES = {
    "experts": {},
    "every-linear": dict(every_linear=True),
    "fp32-scales": dict(scale_dtype=torch.float32),
    "mixed-layers": dict(plain_layers=(3,)),
}


def multiplied_out(state):
    """load_state's tensors, with e4m3 experts and their scales as fp32 weights."""
    wide = {}
    for name, values in state.items():
        if not name.endswith("_scale"):
            scale = state.get(name.removesuffix("_proj") + "_scale")
            wide[name] = values.float() if scale is None else values.float() * scale[:, None, :]
    return wide


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "text-only"])
@pytest.mark.parametrize("style", STYLES)
def test_what_is_loaded_is_what_the_files_stand_for(tmp_path, style, nested):
    stored = fp8_state(CONFIG, **STYLES[style])
    save_fp8_checkpoint(tmp_path, CONFIG, stored, nested=nested)
    state = dict(load_state(tmp_path, load_config(tmp_path), dtype=torch.float32))
    want = stands_for(CONFIG, stored)
    got = multiplied_out(state)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    experts = {name: values.dtype for name, values in state.items() if ".experts." in name}
    quantized = {name for name, dtype in experts.items() if dtype == E4M3}
    layers = [1] if style == "mixed-layers" else [1, 3]
    assert quantized == {
        f"model.layers.{i}.feed_forward.experts.{leaf}_proj"
        for i in layers
        for leaf in ("gate_up", "down")
    }
    # 8-bit tensor cores want K dense, which is what from_hf's transposed view then has.
    assert all(state[name].stride(1) == 1 for name in quantized)


@pytest.mark.parametrize("model_class", [Llama4, Reference], ids=["kernels", "reference"])
def test_parameters_of_a_loaded_model(tmp_path, model_class):
    save_fp8_checkpoint(tmp_path, CONFIG, fp8_state(CONFIG, every_linear=True, plain_layers=(3,)))
    seen = []
    model = load_model(tmp_path, model_class, progress=lambda *counts: seen.append(counts))
    E, H, F = CONFIG.num_local_experts, CONFIG.hidden_size, CONFIG.intermediate_size
    experts = {
        n: (tuple(p.shape), p.dtype) for n, p in model.get_submodule(EXPERTS).named_parameters()
    }
    assert experts == {
        "gate_up_proj": ((E, H, 2 * F), E4M3),
        "gate_up_scale": ((E, 2 * F), torch.float32),
        "down_proj": ((E, F, H), E4M3),
        "down_scale": ((E, H), torch.float32),
    }
    others = [p.dtype for n, p in model.named_parameters() if not n.startswith(EXPERTS)]
    assert set(others) == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    tensors = checkpoint.scan(tmp_path, CONFIG)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert seen[-1] == (total, total) and len(seen) == len(tensors)
    in_memory = sum(p.nbytes for p in model.parameters())
    assert loaded_bytes(tensors, torch.bfloat16) == in_memory


def test_experts_are_read_one_projection_at_a_time(tmp_path, monkeypatch):
    """No more than one stored tensor, and its scale, is alive beside what is made of them."""
    import weakref

    save_fp8_checkpoint(tmp_path, CONFIG, fp8_state(CONFIG))
    alive: list[weakref.ref] = []
    most = 0

    def counting(tensor, read=checkpoint.read_tensor):
        nonlocal most
        values = read(tensor)
        alive.append(weakref.ref(values))
        most = max(most, sum(each() is not None for each in alive))
        return values

    monkeypatch.setattr(checkpoint, "read_tensor", counting)
    names = [name for name, _ in load_state(tmp_path, CONFIG)]
    assert f"{EXPERTS}.gate_up_scale" in names
    assert most <= 2


def test_without_a_type_other_e4m3_weights_become_bf16(tmp_path):
    save_fp8_checkpoint(tmp_path, CONFIG, fp8_state(CONFIG, every_linear=True))
    state = dict(load_state(tmp_path, CONFIG))
    assert state["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_merged_16_bit_experts_beside_e4m3_ones(tmp_path):
    stored = fp8_state(CONFIG, plain_layers=(3,))
    merged = stands_for(CONFIG, stored)
    for name in [name for name in stored if ".layers.3." in name and ".experts." in name]:
        del stored[name]
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.3.feed_forward.experts.{leaf}"
        stored[name] = merged[name].bfloat16().contiguous()
    save_fp8_checkpoint(tmp_path, CONFIG, stored)
    got = multiplied_out(dict(load_state(tmp_path, CONFIG)))
    assert all(torch.equal(got[name], merged[name]) for name in merged)


GATE = f"{EXPERTS}.1.gate_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def _drop(*names):
    return lambda s: [s.pop(name) for name in names]


def _set(name, values):
    return lambda s: s.update({name: values})


HEADERS = {
    "no scale of an expert": (_drop(GATE + "_scale"), r"none named '.*\.1\.gate_.*_scale' and 0"),
    "no scale of another": (_drop(QUERY + "_scale"), r"none named '.*q_proj\.weight_scale' and 0"),
    "no weight": (_drop(GATE, GATE + "_scale"), r"none named '.*\.1\.gate_proj\.weight' and 0"),
    "scales in one dimension": (
        _set(GATE + "_scale", torch.ones(33)), r"must have shape \(33, 1\), got \(33,\)"
    ),
    "scales of the other side": (
        _set(GATE + "_scale", torch.ones(48, 1)), r"must have shape \(33, 1\), got \(48, 1\)"
    ),
    "one scale": (_set(GATE + "_scale", torch.ones(1, 1)), r"must have shape \(33, 1\)"),
    "e4m3 scales": (
        _set(GATE + "_scale", torch.ones(33, 1).to(E4M3)), "must be F32, F16 or BF16, got F8_E4M3"
    ),
    "transposed expert": (
        _set(GATE, torch.ones(48, 33).to(E4M3)), r"must have shape \(33, 48\), got \(48, 33\)"
    ),
    "e5m2": (
        _set(GATE, torch.ones(33, 48).to(torch.float8_e5m2)),
        "must be F32, F16, BF16 or F8_E4M3, got F8_E5M2",
    ),
    "scales of 16-bit weights": (
        _set(QUERY, torch.ones(160, 48)), r"q_proj\.weight_scale' must belong to an F8_E4M3"
    ),
    "one expert in 16 bits": (
        lambda s: (_drop(GATE + "_scale")(s), _set(GATE, torch.ones(33, 48))(s)),
        r"of one layer must be all F8_E4M3 or all not, got both at '.*experts\.1\.gate_proj",
    ),
    "merged as well": (
        _set(f"{EXPERTS}.down_proj", torch.ones(3, 33, 48)),
        r"must be merged or apart, got '.*experts\.down_proj' and parts",
    ),
    "one side merged": (
        lambda s: (
            [s.pop(n) for n in list(s) if n.startswith(EXPERTS) and "down" in n],
            _set(f"{EXPERTS}.down_proj", torch.ones(3, 33, 48))(s),
        ),
        r"all F8_E4M3 or all not, got both at '.*experts\.down_proj'",
    ),
    "no weight of a scale": (_drop(GATE), r"gate_proj.weight_scale' must belong to an F8_E4M3"),
    "merged in e4m3": (
        _set(f"{EXPERTS}.down_proj", torch.ones(3, 33, 48).to(E4M3)), "must be F32, F16 or BF16"
    ),
    "an expert too many": (
        _set(f"{EXPERTS}.3.gate_proj.weight", torch.ones(33, 48)), "must belong to the config's"
    ),
    "static activation scales": (
        _set(f"{EXPERTS}.1.gate_proj.input_scale", torch.ones(1)), "of FP8, weight_scale of"
    ),
    "e4m3 norm": (
        _set("model.norm.weight", torch.ones(48).to(E4M3)), "must be F32, F16 or BF16, got F8_E4M3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADERS)
def test_faults_that_headers_show(tmp_path, monkeypatch, fault):
    change, match = HEADERS[fault]
    state = fp8_state(CONFIG, every_linear=True)
    change(state)
    save_fp8_checkpoint(tmp_path, CONFIG, state)
    monkeypatch.setattr(checkpoint, "read_tensor", lambda *_: pytest.fail("data was read"))
    with pytest.raises(CheckpointError, match=match) as error:
        load_state(tmp_path, CONFIG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("weight", [GATE, QUERY], ids=["expert", "attention"])
def test_scales_must_be_finite_and_positive(tmp_path, weight, value):
    state = fp8_state(CONFIG, every_linear=True)
    state[weight + "_scale"][17] = value
    save_fp8_checkpoint(tmp_path, CONFIG, state)
    match = f"{weight}_scale' must be finite and positive".replace(".", r"\.")
    with pytest.raises(CheckpointError, match=match):
        load_model(tmp_path, Llama4)


def test_16_bit_state_is_as_before(tmp_path):
    save_tiny_checkpoint(tmp_path, CONFIG)
    model = load_model(tmp_path, Llama4)
    assert not any("_scale" in name for name in model.state_dict())


CONFIGS = {
    "method": (
        {"quant_method": "fbgemm_fp8"},
        "quant_method must be 'compressed-tensors', got 'fbg",
    ),
    "format": ({"format": "pack-quantized"}, "format must be 'float-quantized', got 'pack-quant"),
    "cache": ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be None"),
    "groups": ({"config_groups": [1]}, "config_groups must be an object, got list"),
    "no weights": (
        {"config_groups": {"g": {}}},
        "config_groups.g.weights must be an object, got N",
    ),
}


def _group(part, **changes):
    group = QUANTIZATION["config_groups"]["group_0"]
    return {"config_groups": {"g": group | {part: group[part] | changes}}}


CONFIGS |= {
    "blocks": (_group("weights", strategy="block"), "weights.strategy must be 'channel', got 'blo"),
    "integers": (_group("weights", type="int"), "weights.type must be 'float', got 'int'"),
    "static": (_group("input_activations", dynamic=False), "dynamic must be True, got False"),
}


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "text-only"])
@pytest.mark.parametrize("fault", CONFIGS)
def test_other_ways_of_quantising_are_refused(fault, nested):
    changes, match = CONFIGS[fault]
    quantization = {"quantization_config": QUANTIZATION | changes}
    text = CONFIG.to_hf()
    data = {"text_config": text} | quantization if nested else text | quantization
    with pytest.raises(ConfigError, match=match):
        Llama4Config.from_hf(data)
