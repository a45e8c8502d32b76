"""Kernels against the reference on one checkpoint: hidden state per layer, and the logits.

Both models run the same steps in this process, each with its own cache; after every layer the
hidden state h + x is compared, so that a fault shows where it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .cache import KVCache, Step

__all__ = ["THRESHOLD", "ParityRow", "compare"]

# fp32 against fp32 with another order of sums: the 17 tiny configurations of the tests differ by
# 1.6e-6 to 3.0e-6 at logits of about 4; the margin is for deeper models.
THRESHOLD = 2e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityRow:
    """Largest |difference| of one quantity over all steps, beside the reference's largest value."""

    what: str
    max_abs_diff: float
    max_abs: float
    threshold: float = THRESHOLD

    @property
    def ok(self) -> bool:
        return self.max_abs_diff <= self.threshold  # False for NaN


def compare(
    model: nn.Module, reference: nn.Module, steps: Sequence[Sequence[int]], *, page_size: int = 16
) -> list[ParityRow]:
    """Feed the token blocks `steps` of one sequence through both; one row per layer, then logits.

    Raises:
        ValueError: no steps.
    """
    if not steps:
        raise ValueError("compare: steps must have at least one block of tokens, got none")
    config = model.config
    outputs: list[dict[str, torch.Tensor]] = []
    for each in (model, reference):
        cache = KVCache.for_lengths(
            config,  # type: ignore[arg-type]
            [sum(map(len, steps))],
            page_size=page_size,
            dtype=torch.float32,
            device=next(each.parameters()).device,
        )
        parts = [_observe(each, cache.step([block], logits="all"), cache) for block in steps]
        outputs.append({what: torch.cat([part[what] for part in parts]) for what in parts[0]})
    rows = []
    for what, want in outputs[1].items():
        got = outputs[0][what].to(want.device)
        rows.append(
            ParityRow(
                what=what,
                max_abs_diff=float((got - want).abs().max()),
                max_abs=float(want.abs().max()),
            )
        )
    return rows


def _observe(model: nn.Module, step: Step, cache: KVCache) -> dict[str, torch.Tensor]:
    """Hidden states by layer and the logits of one forward call."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(model.get_submodule("model.layers").children()):

        def record(
            _module: nn.Module,
            _inputs: object,
            out: tuple[torch.Tensor, torch.Tensor],
            what: str = f"layer {index}",
        ) -> None:
            seen[what] = out[0] + out[1]

        handles.append(layer.register_forward_hook(record))
    try:
        logits = model(step, cache)
    finally:
        for handle in handles:
            handle.remove()
    return seen | {"logits": logits}
