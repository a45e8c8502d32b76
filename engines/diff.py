"""The first layer and operation at which an engine and this project depart, and why.

    found = diff("transformers", checkpoint, token_ids, steps=4, dtype=torch.float32,
                 device=device)
    found.first                 # a Row, or None
    found.reason                # "parity field temperature: with ..."

The engine runs the prompt and some greedy steps; this project's model follows with the same
tokens. Both keep every operation of every layer (trace.py), which are compared in the order of
execution (comparison.py). What comes after the first departure departs because of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama4_triton.model.checkpoint import load_config, load_model, scan
from llama4_triton.model.config import Llama4Config
from llama4_triton.model.fp8_checkpoint import has_e4m3
from llama4_triton.model.llama4 import Llama4
from llama4_triton.model.presets import PRESETS, Parity, parity_of

from . import trace_own
from .comparison import Row, compare, first_departure, of_errors, of_values
from .reasons import Evidence, likely_reason

__all__ = ["ENGINES", "Difference", "Engine", "diff"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """An engine to compare with: its preset, and the module of this folder that runs it.

    The module has `load(checkpoint, dtype, device)` and `observe(model, prompt, steps,
    continuation=None) -> (Trace, tokens)`, as trace_transformers.py.
    """

    parity: str
    module: str


ENGINES = {"transformers": Engine(parity="hf", module="trace_transformers")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What was compared, and the first departure."""

    config: Llama4Config
    parity: Parity
    tokens: tuple[int, ...]  # the engine's greedy ones
    rows: tuple[Row, ...]  # in the order of execution
    first: Row | None
    reason: str  # "" without a departure


def diff(
    engine: str,
    checkpoint: Path,
    prompt: Sequence[int],
    *,
    steps: int = 4,
    dtype: torch.dtype = torch.float32,
    parity: Parity | str | None = None,
    tolerance: float | None = None,
    device: torch.device,
    status: Callable[[str], None] = lambda message: None,
) -> Difference:
    """Run the token ids `prompt` and `steps` greedy tokens through both engines and compare.

    Args:
        dtype: of both models' weights. Other than float32, routing may tie and end the comparison.
        parity: what this project follows; None: the engine's own preset.
        tolerance: of the largest value of each operation; None: see comparison.py, in half types
            by another run of the engine with its weights widened to fp32.
        device: of both models, one beside the other.
        status: told what is going on.
    Raises:
        ValueError: an unknown engine or parity, no prompt, a bad checkpoint.
        ModuleNotFoundError: the engine is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"diff: --engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if not prompt or steps < 0:
        raise ValueError(f"diff: must have a prompt and steps >= 0, got {len(prompt)} and {steps}")
    theirs = ENGINES[engine]
    followed = parity_of(theirs.parity if parity is None else parity)
    stock_engine: Any = importlib.import_module(f"{__package__}.{theirs.module}")
    config = load_config(checkpoint)
    if has_e4m3(scan(checkpoint, config)):
        raise ValueError("diff: checkpoint must have 16-bit or fp32 weights, got e4m3 ones")
    status("loading the checkpoint twice")
    own_model = load_model(
        checkpoint, Llama4, config=config, dtype=dtype, device=device, parity=followed
    )
    stock_model = stock_engine.load(checkpoint, dtype, device)

    status(f"{engine}: {len(prompt)} prompt tokens and {steps} steps")
    stock, tokens = stock_engine.observe(stock_model, prompt, steps)
    if tolerance is not None or dtype == torch.float32:
        tolerances = of_values(stock) if tolerance is None else of_values(stock, tolerance)
    else:
        status(f"{engine}: again in float32")
        for parameter in stock_model.parameters():  # .to(dtype) would convert its buffers too
            parameter.data = parameter.data.float()
        exact, _ = stock_engine.observe(stock_model, prompt, steps, tokens)
        tolerances = of_errors(stock, exact, dtype)
    blocks = [list(prompt), *([token] for token in tokens)]
    status("the kernels")
    own = trace_own.observe(own_model, blocks)
    rows = compare(stock, own, tolerances)
    first = first_departure(rows)

    def rerun(changed: Parity) -> list[Row]:
        status(f"looking for the reason: {changed}")
        model = trace_own.with_parity(own_model, changed, config)
        return compare(stock, trace_own.observe(model, blocks), tolerances)

    reason = ""
    if first is not None:
        evidence = Evidence(
            engine=engine, stock=stock, own=own, stock_model=stock_model, own_model=own_model,
            config=config, parity=followed, engine_parity=PRESETS[theirs.parity], rerun=rerun,
        )  # fmt: skip
        reason = likely_reason(first, evidence)
    return Difference(
        config=config, parity=followed, tokens=tuple(tokens), rows=tuple(rows), first=first,
        reason=reason,
    )  # fmt: skip
