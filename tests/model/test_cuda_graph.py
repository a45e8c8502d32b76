"""A decode step in a CUDA graph: captured once, replayed at other lengths, with the same bits."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from support.tiny_configs import CASES, build, make_tokens

from llama4_triton.kernels.prepared import prepare
from llama4_triton.kernels.rms_norm import add_rms_norm
from llama4_triton.model.cache import KVCache
from llama4_triton.model.llama4 import Llama4

pytestmark = pytest.mark.unsanitized

README = Path(__file__).resolve().parents[2] / "README.md"


def _started(config, prompts, device):
    """A cache of these prompts, and the model."""
    model = build(Llama4, config).to(device)
    cache = KVCache.for_lengths(
        config, [len(prompt) + 12 for prompt in prompts], page_size=4, device=device,
        dtype=torch.float32,
    )  # fmt: skip
    cache.begin(len(prompts))
    model(cache.step(prompts), cache)
    return model, cache


@pytest.mark.gpu_only
@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_a_captured_step_serves_the_next_ones(name, device):
    """Two sequences of different lengths, over a chunk's end."""
    prompts = make_tokens(CASES[name], [5, 14])
    model, cache = _started(CASES[name], prompts, device)
    plain, uncaptured = _started(CASES[name], prompts, device)
    tokens = [[[3 + i], [50 - i]] for i in range(10)]
    step = cache.step(tokens[0])
    model(step, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(step, cache)
    for i, new in enumerate(tokens):
        if i:
            step.copy_(cache.step(new))
        graph.replay()
        assert torch.equal(logits, plain(uncaptured.step(new), uncaptured)), f"step {i}"


@pytest.mark.gpu_only
def test_a_prepared_call_can_be_captured(device):
    x, residual, weight = (
        torch.randn(*shape, device=device) for shape in ((3, 40), (3, 40), (40,))
    )
    step = prepare(add_rms_norm, x, residual, weight, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(step.result, add_rms_norm(x, residual, weight, 1e-5), strict=True):
        assert torch.equal(got, want)


class Graph:
    """Runs what was captured again, where there is no GPU."""

    def __init__(self, run):
        self.run = run

    def replay(self):
        for mine, new in self.run():
            mine.copy_(new)


@pytest.mark.interpreter_only
def test_the_example_runs(monkeypatch):
    """With a graph that calls the model again when it is replayed."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "CUDAGraph" in block)
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 12
    config = CASES["scout"]
    names = dict(model=build(Llama4, config), prompt=make_tokens(config, [5])[0])
    again = Graph(lambda: [(names["logits"], names["model"](names["step"], names["cache"]))])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: again)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    exec(code.replace('"cuda"', '"cpu"'), names)

    model, cache = _started(config, [names["prompt"]], "cpu")
    model(cache.step([[7]]), cache)
    assert torch.equal(names["logits"], model(cache.step([[8]]), cache))


@pytest.mark.no_kernels
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tokens=[[1, 2], [3]]), r"new.max_q_len must be 1, got 2"),
        (dict(tokens=[[1]], rows=[0]), r"new.input_ids must have shape \(2,\), got \(1,\)"),
        (dict(tokens=[[1], [2]], logits="all"), r"new.logits_rows must have shape \(2,\)"),
    ],
    ids=["tokens", "sequences", "logits"],
)
def test_a_step_of_other_shapes_is_refused(changes, message):
    cache = KVCache.for_lengths(CASES["scout"], [9, 9], page_size=4, dtype=torch.float32)
    cache.begin(2)
    step = cache.step([[1], [2]])
    before = step.seq_lens.clone()
    tokens = changes.pop("tokens")
    with pytest.raises(ValueError, match=rf"^Step.copy_: {message}"):
        step.copy_(cache.step(tokens, **changes))
    assert torch.equal(step.seq_lens, before)
