"""The parity table: each layer and the logits, over all steps, and a NaN is a failure."""

from __future__ import annotations

import pytest
import torch
from support.tiny_configs import CASES, build, make_tokens

from llama4_triton.model.parity import THRESHOLD, ParityRow, compare
from llama4_triton.model.reference import Llama4 as Reference

pytestmark = pytest.mark.no_kernels

CONFIG = CASES["maverick"]


def test_a_model_equals_itself_in_every_row():
    (tokens,) = make_tokens(CONFIG, [13])
    rows = compare(build(Reference, CONFIG), build(Reference, CONFIG), [tokens[:9], tokens[9:]])
    assert [row.what for row in rows] == [f"layer {i}" for i in range(4)] + ["logits"]
    assert all(row.max_abs_diff == 0.0 and row.ok and row.max_abs > 1.0 for row in rows)


def test_a_difference_shows_where_it_begins_and_in_which_step():
    (tokens,) = make_tokens(CONFIG, [13])
    other = build(Reference, CONFIG)
    with torch.no_grad():
        other.model.layers[2].self_attn.o_proj.weight[3, 5] += 0.05
    rows = compare(build(Reference, CONFIG), other, [tokens[:12], tokens[12:]])
    assert [row.ok for row in rows] == [True, True, False, False, False]


@pytest.mark.parametrize(
    "diff, ok",
    [(0.0, True), (THRESHOLD, True), (2 * THRESHOLD, False), (float("nan"), False)],
    ids=["zero", "edge", "above", "nan"],
)
def test_verdict(diff, ok):
    assert ParityRow(what="x", max_abs_diff=diff, max_abs=1.0).ok is ok


def test_nothing_to_compare():
    model = build(Reference, CONFIG)
    with pytest.raises(ValueError, match="steps must have at least one block"):
        compare(model, model, [])
