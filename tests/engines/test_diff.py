"""diff: engines that agree, the first departure of those that do not, and the reasons shown."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.tiny_configs import CASES, make_tokens

from llama4_triton.engines import comparison, trace_transformers
from llama4_triton.engines.comparison import compare, first_departure, of_errors, of_values
from llama4_triton.engines.diff import diff
from llama4_triton.engines.reasons import Evidence, likely_reason, located
from llama4_triton.engines.trace import OPS, Place
from llama4_triton.model.presets import PRESETS
from llama4_triton.model.tiny import save_tiny_checkpoint

no_kernels = pytest.mark.no_kernels

# A RoPE and a NoPE layer, the second dense; 11 tokens are more than a chunk of 8.
CONFIG = replace(
    CASES["scout"], num_hidden_layers=2, no_rope_layers=(1, 0), moe_layers=(0,),
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
)  # fmt: skip
QUERIES = Place(0, 1, "attention: queries")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), CONFIG, nested=True)


@pytest.fixture
def changed_stock(monkeypatch):
    """Change transformers' model after loading it."""

    def apply(change):
        load = trace_transformers.load

        def loaded(*args):
            model = load(*args)
            with torch.no_grad():
                change(model.model.layers[1])
            return model

        monkeypatch.setattr(trace_transformers, "load", loaded)

    return apply


def _diff(checkpoint, *, steps=0, **options):
    (tokens,) = make_tokens(CONFIG, [11])
    where = torch.device("cpu")
    return diff("transformers", checkpoint, tokens, steps=steps, device=where, **options)


# On the interpreter only: every other executor runs the same models in tests/model.
@pytest.mark.interpreter_only
@pytest.mark.unsanitized
class TestRuns:
    def test_the_engines_agree_in_prefill_and_decode(self, checkpoint):
        found = _diff(checkpoint, steps=1)
        assert found.first is None and found.reason == "" and found.parity == PRESETS["hf"]
        assert {row.place.op for row in found.rows} == set(OPS)
        assert {row.place.step for row in found.rows} == {0, 1} and len(found.tokens) == 1
        assert all(row.largest > 0.4 or row.place.op == "router: experts" for row in found.rows)
        assert max(row.error for row in found.rows) <= 1e-5

    def test_bf16_is_judged_by_the_error_of_the_engine_itself(self, checkpoint):
        found = _diff(checkpoint, dtype=torch.bfloat16)
        assert found.first is None, found.reason
        rows = {row.place: row for row in found.rows}
        assert rows[QUERIES].error > 1e-3  # which float32's tolerance would refuse
        assert rows[QUERIES].tolerance < 0.1 * rows[QUERIES].largest

    def test_a_preset_that_differs_is_named_by_its_field(self, checkpoint):
        found = _diff(checkpoint, parity="meta")
        assert found.first.place == QUERIES
        assert found.reason == (
            "parity field temperature: with temperature=config in place of off the engines agree"
        )
        assert located(QUERIES, CONFIG) == (
            "layer 1 (NoPE, global), attention: queries, in the prefill"
        )

    def test_a_weight_that_differs_is_named(self, checkpoint, changed_stock):
        changed_stock(lambda layer: layer.self_attn.o_proj.weight[3, 5].add_(0.05))
        found = _diff(checkpoint)
        assert found.first.place == Place(0, 1, "attention: output")
        assert found.first.at[1] == 3
        assert found.reason == (
            "weights: model.layers.1.self_attn.o_proj.weight differs between the engines by up to "
            "5.0e-02"
        )

    def test_what_no_field_explains_is_unknown(self, checkpoint, changed_stock):
        changed_stock(lambda layer: setattr(layer.self_attn, "scaling", 1.1 * 16**-0.5))
        found = _diff(checkpoint)
        assert found.first.place == Place(0, 1, "attention: output")
        token, column = found.first.at
        assert found.reason == f"unknown: largest error at token {token}, column {column}"


@no_kernels
@pytest.mark.parametrize(
    "engine, options, match",
    [
        ("vllm", {}, "^diff: --engine must be one of transformers, got 'vllm'$"),
        ("transformers", dict(parity="trt"), "parity: must be one of default, hf"),
        ("transformers", dict(steps=-1), "steps >= 0, got 2 and -1"),
    ],
    ids=["engine", "parity", "steps"],
)
def test_bad_input(engine, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        diff(engine, tmp_path, [1, 2], device=torch.device("cpu"), **options)


@no_kernels
def test_a_missing_engine_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="needs transformers: pip install 'transformers"):
        trace_transformers.load(tmp_path, torch.float32, torch.device("cpu"))


# What is said of traces that are made up.

LOGITS, EXPERTS = (Place(0, 0, f"router: {what}") for what in ("logits", "experts"))
NORM = Place(0, 1, "input norm")


def _trace():
    logits = torch.tensor([[0.5, 0.25, -1.0], [1.0, 1.0 - 2e-6, 0.0]])
    return {LOGITS: logits, EXPERTS: torch.tensor([[0.0], [0.0]]), NORM: torch.ones(2, 3)}


def _reason(stock, own, rerun=None):
    rows = compare(stock, own, of_values(stock))
    first = first_departure(rows)
    evidence = Evidence(
        engine="transformers", stock=stock, own=own, config=CONFIG, parity=PRESETS["hf"],
        engine_parity=PRESETS["hf"], rerun=rerun or (lambda parity: rows),
        stock_model=torch.nn.Module(), own_model=torch.nn.Module(),
    )  # fmt: skip
    return first, likely_reason(first, evidence)


@no_kernels
def test_a_tie_of_the_router_is_told_from_a_wrong_choice():
    stock, own = _trace(), _trace()
    own[LOGITS] = own[LOGITS] + torch.tensor([[0.0] * 3, [-1.5e-6, 1.5e-6, 0.0]])
    own[EXPERTS] = torch.tensor([[0.0], [1.0]])
    first, reason = _reason(stock, own)
    assert (first.place, first.error, first.at) == (EXPERTS, 1.0, (1,))
    assert reason.startswith("router tie at token 1: the logits of choices 1 and 2 are 2.0e-06")
    own[LOGITS] = stock[LOGITS]  # the same logits, and another choice
    assert _reason(stock, own)[1] == "unknown: largest error at token 1"


@no_kernels
def test_no_number_and_no_counterpart():
    stock, own = _trace(), _trace()
    own[NORM][1, 2] = math.nan
    first, reason = _reason(stock, own)
    assert first.place == NORM and first.at == (1, 2)
    assert reason == "no number: this project has NaN or infinity at token 1"
    stock[NORM][1, 2] = math.nan  # in both: no departure
    assert first_departure(compare(stock, own, of_values(stock))) is None
    del own[NORM]
    first, reason = _reason(stock, own)
    assert first.place == NORM and reason.startswith("structure: ")


@no_kernels
def test_a_field_that_only_defers_the_departure_is_named_with_what_follows():
    stock, own = _trace(), _trace()
    own[LOGITS], own[NORM] = own[LOGITS] + 1, own[NORM] + 1
    later = compare(stock, own | {LOGITS: stock[LOGITS]}, of_values(stock))
    asked = []

    def rerun(parity):
        asked.append(parity)
        return later if parity.score_dtype == "float32" else compare(stock, own, of_values(stock))

    _, reason = _reason(stock, own, rerun=rerun)
    assert reason.startswith("parity field score_dtype: with score_dtype=float32 in place of model")
    assert reason.endswith(
        "the first departure is layer 1 (NoPE, global), input norm, in the prefill"
    )
    assert len(asked) <= 3


@no_kernels
def test_tolerances():
    stock = {Place(0, 0, "MoE"): torch.tensor([4.0, -8.0]), Place(1, 0, "MoE"): torch.tensor([2.0])}
    key = 0, "MoE"
    assert of_values(stock) == {key: pytest.approx(comparison.RELATIVE * 8)}
    exact = {place: value + 0.25 for place, value in stock.items()}
    assert of_errors(stock, exact, torch.bfloat16) == {key: 1.0}
    ulp = torch.finfo(torch.bfloat16).eps * 8
    assert of_errors(stock, stock, torch.bfloat16) == {key: ulp}
    moved = {place: value + ulp for place, value in stock.items()}
    assert first_departure(compare(stock, moved, {key: ulp})) is None
    assert first_departure(compare(stock, moved, {key: 0.9 * ulp})).at == (0,)
