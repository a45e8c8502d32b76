"""transformers' Llama 4 on the kernels: same logits, same tokens, taken out without a trace."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import transformers
from support.tiny_hf import CHUNK, HF_CASES, image_inputs, image_model, text_model

from llama4_triton.engines import transformers_attention
from llama4_triton.engines.transformers import Report, patch, unpatch

# fp32 against fp32 with sums in another order, as in model/parity.py.
TOLERANCE = 2e-4

pytestmark = pytest.mark.unsanitized


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    unpatch()


def tokens(*lengths: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 90, (len(lengths), max(lengths)), generator=generator)


def left_padded(*lengths: int) -> dict[str, torch.Tensor]:
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return dict(input_ids=tokens(*lengths), attention_mask=mask.long())


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    return model(use_cache=False, **inputs).logits


def both(model, run):
    """What `run` gives with transformers' own code and with the kernels, which no call left."""
    want = run(model)
    with patch(model) as report:
        got = run(model)
    assert not report.fallbacks, str(report)
    return got, want


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.abs().max() > 0.5 and got.shape == want.shape
    error = (got - want).abs().max()
    assert error <= TOLERANCE, f"logits differ by {error:.1e}"


@pytest.mark.parametrize("name", HF_CASES)
def test_forward_and_greedy_generation(device, name):
    """A prompt over three chunks, and decode across another boundary."""
    model = text_model(name)
    ids = tokens(2 * CHUNK + 3)
    assert_same(*both(model, lambda m: logits(m, input_ids=ids)))
    got, want = both(model, lambda m: m.generate(ids, max_new_tokens=4, do_sample=False))
    assert torch.equal(got, want)


@pytest.fixture
def named(request, executor):
    """A configuration; interpreted, which is slow, only Scout's unless `--long`."""
    name = request.param
    if name != "scout" and executor == "interpreter" and not request.config.getoption("--long"):
        pytest.skip("for compiled code")
    return name


every_config = pytest.mark.parametrize("named", HF_CASES, indirect=True)


@every_config
def test_left_padded_batch(device, named):
    """Rows begin at different places of a chunk; padding is nobody's key."""
    model, inputs = text_model(named, "sdpa"), left_padded(9, 6, 1)
    keep = inputs["attention_mask"].bool()
    got, want = both(model, lambda m: logits(m, **inputs))
    assert_same(got[keep], want[keep])


@every_config
@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_generation(device, cache, named):
    model, inputs = text_model(named, "sdpa"), left_padded(9, 6)
    options = dict(max_new_tokens=4, do_sample=False, cache_implementation=cache)
    if cache == "static" and transformers.__version__ < "5.23":
        with pytest.raises(TypeError, match="block_sequence_ids"):  # its own code, unpatched
            model.generate(**inputs, **options)
        return
    got, want = both(model, lambda m: m.generate(**inputs, **options))
    assert torch.equal(got, want)


def test_blocks_through_a_cache(device):
    """Prefill in pieces, some of them of decode's size, then single tokens; logits of each."""
    from transformers import DynamicCache

    model, ids = text_model("maverick", "sdpa"), tokens(19, 19)
    pieces = (7, 3, 1, 1, 5, 1, 1)

    @torch.no_grad()
    def run(m):
        cache, out, first = DynamicCache(config=m.config), [], 0
        for size in pieces:
            out.append(m(ids[:, first : first + size], past_key_values=cache).logits)
            first += size
        return torch.cat(out, dim=1)

    assert_same(*both(model, run))


def test_beam_search(device):
    model = text_model("scout", "sdpa")
    options = dict(max_new_tokens=3, num_beams=2, do_sample=False)
    got, want = both(model, lambda m: m.generate(tokens(6), **options))
    assert torch.equal(got, want)


def test_sampling(device):
    model = text_model("scout", "sdpa")

    def run(m):
        torch.manual_seed(3)
        return m.generate(tokens(6), max_new_tokens=3, do_sample=True, temperature=0.9)

    got, want = both(model, run)
    assert torch.equal(got, want)


def test_image_and_text(device):
    model = image_model()
    inputs = image_inputs(model)
    assert_same(*both(model, lambda m: logits(m, **inputs)))
    got, want = both(model, lambda m: m.generate(**inputs, max_new_tokens=3, do_sample=False))
    assert torch.equal(got, want)
    with patch(model):
        assert model.config.vision_config._attn_implementation != transformers_attention.NAME


def test_router_logits_are_kept(device):
    model, ids = text_model("maverick"), tokens(5)

    def run(m):
        with torch.no_grad():
            return m.model(ids, output_router_logits=True, use_cache=False)["router_logits"]

    got, want = both(model, run)
    assert len(got) == len(want) == 1
    assert_same(got[0], want[0])


def test_quantized_experts(device):
    """e4m3 by channel: another model, near the original; its experts are its own again after."""
    model, ids = text_model("scout").to(torch.bfloat16), tokens(9)
    want, names = logits(model, input_ids=ids), list(model.state_dict())
    with patch(model, quantize="e4m3_channel") as report:
        assert list(model.state_dict()) == names and not report.left
        got = logits(model, input_ids=ids)
    error = (got - want).norm() / want.norm()
    assert 1e-3 < error < 0.2
    assert not any(
        hasattr(layer.feed_forward, "_llama4_triton_experts") for layer in _layers(model)
    )


def _layers(model):
    return model.model.layers


@pytest.mark.no_kernels
def test_unpatch_restores_the_very_same_objects():
    model = text_model("maverick", "sdpa")
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: parameter for name, parameter in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    report = patch(model)
    assert {type(m) for m in model.modules()} != set(classes.values())
    assert all(isinstance(m, classes[name]) for name, m in model.named_modules())
    assert model.config._attn_implementation == transformers_attention.NAME
    report.unpatch()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.config._attn_implementation == "sdpa"
    report.unpatch()  # again: nothing


@pytest.mark.no_kernels
def test_a_patched_model_is_not_kept_alive():
    model = text_model("scout")
    patch(model)
    alive = weakref.ref(model.model)
    del model
    gc.collect()
    assert alive() is None
    unpatch()


@pytest.mark.no_kernels
@pytest.mark.parametrize("quantize", [None, "int4_group"])
def test_what_is_saved_is_unchanged(tmp_path, quantize):
    model = text_model("scout")
    if quantize:  # groups of 128
        model = _wide_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "stock")
    with patch(model, quantize=quantize):
        model.save_pretrained(tmp_path / "patched")
        assert type(pickle.loads(pickle.dumps(_layers(model)[0].feed_forward))) is type(
            _layers(model)[0].feed_forward
        )
        assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    stock, patched = (sorted((tmp_path / x).iterdir()) for x in ("stock", "patched"))
    assert [p.name for p in stock] == [p.name for p in patched]
    for a, b in zip(stock, patched, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def _wide_model():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    small = HF_CASES["scout"].to_hf() | dict(hidden_size=128, intermediate_size=128)
    return Llama4ForCausalLM(Llama4TextConfig(**small)).eval()


@pytest.mark.no_kernels
def test_is_idempotent_and_says_what_it_did():
    model = text_model("maverick")
    first = patch(model)
    assert patch(model) is first and patch(model.model) is first
    kinds = {what for _, what in first.replaced}
    assert kinds == {
        "Llama4TextMoe by moe, with its shared expert",
        "Llama4TextMLP by swiglu",
        "Llama4TextRMSNorm by rms_norm",
        "attention by attention_prefill, attention_decode",
    }
    assert "2 x attention" in str(first) and not first.left
    second = patch(model, norm=False, attention=False)
    assert second is not first
    assert {what.split()[0] for _, what in second.replaced} == {"Llama4TextMoe", "Llama4TextMLP"}
    assert model.config._attn_implementation == "eager"
    unpatch(model)
    assert not any("transformers_layers" in type(m).__module__ for m in model.modules())


@pytest.mark.no_kernels
def test_reports_what_stays():
    model = text_model("scout")
    moe_layer, other = (layer.feed_forward for layer in _layers(model))
    moe_layer.shared_expert.up_proj = torch.nn.Sequential(moe_layer.shared_expert.up_proj)
    other.experts.act_fn = torch.nn.GELU()
    _layers(model)[0].input_layernorm.forward = lambda x: x  # what accelerate's offloading does
    report = patch(model, attention=False)
    assert dict(report.left) == {
        "model.layers.0.feed_forward":
            "shared_expert.up_proj is Sequential, not a plain nn.Linear",
        "model.layers.1.feed_forward": "its activation is GELU, not SiLU",
        "model.layers.0.input_layernorm": "the forward of it is wrapped (offloading?)",
    }  # fmt: skip
    assert "left      model.layers.1.feed_forward" in str(report)


FALLBACKS = {
    "holes": (
        lambda ids: dict(attention_mask=(torch.arange(9) != 4).long()[None]),
        "an attention_mask with holes",
    ),
    "packed": (
        lambda ids: dict(position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])),
        "a mask with packed sequences, blocks or functions of the caller's",
    ),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_masks_that_it_does_not_know_are_transformers_own(device, name):
    model, ids = text_model("scout", "sdpa"), tokens(9)
    extra, reason = FALLBACKS[name]
    want = logits(model, input_ids=ids, **extra(ids))
    with patch(model) as report, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = logits(model, input_ids=ids, **extra(ids))
        assert report.fallbacks == {reason: 2}  # one mask of each kind
        assert reason in str(report)
    keep = extra(ids).get("attention_mask", torch.ones(1, 9)).bool()
    assert_same(got[keep], want[keep])


def test_a_4d_mask_of_the_caller(device):
    model, ids = text_model("scout", "sdpa"), tokens(6)
    mask = torch.ones(6, 6).tril()[None, None].bool()
    assert_same(*both(model, lambda m: logits(m, input_ids=ids, attention_mask=mask)))


def test_right_padding(device):
    model, ids = text_model("scout", "sdpa"), tokens(9, 9)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    got, want = both(model, lambda m: logits(m, input_ids=ids, attention_mask=mask))
    assert_same(got[mask.bool()], want[mask.bool()])


@pytest.mark.no_kernels
def test_gradients_are_transformers_own():
    model, ids = text_model("maverick", "sdpa"), tokens(5)
    model.train()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with patch(model) as report:
        with pytest.warns(UserWarning, match="gradients are recorded"):
            model(ids, labels=ids, use_cache=False).loss.backward()
        assert all(reason.endswith("call under torch.no_grad()") for reason in report.fallbacks)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, want[name]), name


@pytest.mark.no_kernels
def test_autocast_is_transformers_own():
    model, ids = text_model("scout", "sdpa"), tokens(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(ids, use_cache=False).logits
        with patch(model, attention=False, norm=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(model(ids, use_cache=False).logits, want)


@pytest.mark.no_kernels
def test_models_that_are_loaded_are_patched(tmp_path):
    from transformers import Llama4ForCausalLM

    text_model("scout").save_pretrained(tmp_path)
    constructor = _text_class().__init__
    with patch(None) as report:
        assert patch(None) is report
        model = Llama4ForCausalLM.from_pretrained(tmp_path)
        assert model.config._attn_implementation == transformers_attention.NAME
        assert type(model.model) is _text_class()
        made = patch(model)
        assert len(made.replaced) == 2 + 5 + 2
        assert patch(Llama4ForCausalLM(model.config)).replaced == made.replaced  # unloaded
    assert not any("transformers_layers" in type(m).__module__ for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert _text_class().__init__ is constructor
    again = Llama4ForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def _text_class():
    from transformers.models.llama4.modeling_llama4 import Llama4TextModel

    return Llama4TextModel


@pytest.mark.no_kernels
def test_bad_input():
    with pytest.raises(ValueError, match="patch: model must hold a Llama4TextModel .* got Linear"):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="patch: quantize must be None or one of .* got 'int8'"):
        patch(text_model("scout"), quantize="int8")
    model = text_model("scout")
    with pytest.raises(TypeError, match="patch: quantize must be None for .* got torch.float32"):
        patch(model, quantize="int4_group")
    assert not any("transformers_layers" in type(m).__module__ for m in model.modules())
    with pytest.raises(ValueError, match="patch: quantize must be None where there is no model"):
        patch(None, quantize="int4_group")


@pytest.mark.no_kernels
def test_a_missing_transformers_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="run `pip install transformers` first"):
        patch(None)


@pytest.mark.no_kernels
def test_an_untested_version_is_said():
    report = Report(version="9.9.9", options={})
    assert str(report) == "transformers 9.9.9 (tested: 5.16.1, 5.19.0, 5.23.0)"


@pytest.mark.interpreter_only
def test_compiles_without_a_break():
    """A forward with a cache, traced whole; the operators stay opaque."""
    model, ids = text_model("scout", "sdpa"), tokens(9)
    want = logits(model, input_ids=ids)
    from transformers import DynamicCache

    with patch(model), torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        got = compiled(ids, past_key_values=DynamicCache(config=model.config)).logits
    assert_same(got, want)


def test_reports_print(device):
    out = io.StringIO()
    with patch(text_model("scout")) as report:
        print(report, file=out)
    assert out.getvalue().startswith("transformers 5.")
