"""Why two engines depart at a place: only what can be shown, in one line.

In this order: an engine has no number there; the weights that the operation reads differ; the
router's choice was a tie within the error of its logits; a model with one field of the parity
preset changed does not depart there. Else the reason is unknown, and the largest error is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from llama4_triton.model.config import Llama4Config
from llama4_triton.model.presets import Parity

from .comparison import EXACT, Row, first_departure
from .trace import OPS, Place, Trace

__all__ = ["Evidence", "likely_reason", "located"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What there is to look at."""

    engine: str
    stock: Trace
    own: Trace
    stock_model: nn.Module
    own_model: nn.Module
    config: Llama4Config  # the checkpoint's
    parity: Parity  # that `own` followed
    engine_parity: Parity
    rerun: Callable[[Parity], Sequence[Row]]  # the comparison again, with another parity


def located(place: Place, config: Llama4Config) -> str:
    """In words: "layer 3 (NoPE, global), attention: queries, in the prefill"."""
    step = "the prefill" if place.step == 0 else f"decode step {place.step}"
    if place.layer is None:
        return f"{place.op}, in {step}"
    kind = "NoPE, global"
    if config.is_rope_layer(place.layer):
        chunk = config.attention_chunk_size
        kind = "RoPE, global" if chunk is None else f"RoPE, chunks of {chunk}"
    return f"layer {place.layer} ({kind}), {place.op}, in {step}"


def likely_reason(row: Row, evidence: Evidence) -> str:
    """The first of the module's reasons that the evidence shows."""
    for look in (_structure, _no_number, _weights, _tie, _parity):
        found = look(row, evidence)
        if found:
            return found
    token, *rest = row.at
    return f"unknown: largest error at {_position(row.place.op, token, rest)}"


def _position(op: str, token: int, rest: list[int]) -> str:
    last = "expert" if op.startswith("router") else "column"
    names = ["head", last] if len(rest) == 2 else [last]
    return ", ".join(f"{n} {i}" for n, i in zip(("token", *names), (token, *rest), strict=False))


def _structure(row: Row, evidence: Evidence) -> str:
    if row.at:
        return ""
    return f"structure: {evidence.engine} and this project do not compute the same things here"


def _no_number(row: Row, evidence: Evidence) -> str:
    for name, trace in (("this project", evidence.own), (evidence.engine, evidence.stock)):
        bad = ~trace[row.place].flatten(1).isfinite().all(1)
        if bool(bad.any()):
            return f"no number: {name} has NaN or infinity at token {int(bad.int().argmax())}"
    return ""


def _weights(row: Row, evidence: Evidence) -> str:
    """Both engines name the text model's parameters as the checkpoint does."""
    own = dict(evidence.own_model.named_parameters())
    layer = row.place.layer
    prefix = "model." if layer is None else f"model.layers.{layer}."
    for name, theirs in evidence.stock_model.named_parameters():
        read = any(name.startswith((f"{prefix}{m}.", f"{m}.")) for m in OPS[row.place.op])
        if not read or name not in own:
            continue
        difference = float((own[name].detach() - theirs.detach()).abs().max())
        if difference != 0.0:
            return f"weights: {name} differs between the engines by up to {difference:.1e}"
    return ""


def _tie(row: Row, evidence: Evidence) -> str:
    """Of the first token with other experts: are the logits nearer than the engines'?"""
    if row.place.op != EXACT:
        return ""
    (token,) = row.at
    place = row.place._replace(op="router: logits")
    stock, own = (trace[place][token] for trace in (evidence.stock, evidence.own))
    top_k = evidence.stock[row.place].shape[1]
    ordered = stock.sort(descending=True).values
    gap, error = float(ordered[top_k - 1] - ordered[top_k]), float((stock - own).abs().max())
    if gap > 2 * error:
        return ""
    return (
        f"router tie at token {token}: the logits of choices {top_k} and {top_k + 1} are "
        f"{gap:.1e} apart, those of the engines {error:.1e}"
    )


def _parity(row: Row, evidence: Evidence) -> str:
    for name, changed in _changes(evidence):
        first = first_departure(evidence.rerun(changed))
        order = list(evidence.stock)
        if first is not None and order.index(first.place) <= order.index(row.place):
            continue
        was, now = getattr(evidence.parity, name), getattr(changed, name)
        then = "the engines agree"
        if first is not None:
            then = f"the first departure is {located(first.place, evidence.config)}"
        return f"parity field {name}: with {name}={now} in place of {was} {then}"
    return ""


def _changes(evidence: Evidence) -> Iterator[tuple[str, Parity]]:
    """One field changed, of those that can change one unpadded sequence; the engine's way first."""
    parity, engine, config = evidence.parity, evidence.engine_parity, evidence.config
    on = parity.applied(config).attn_temperature_tuning
    flipped = "off" if on else "on"
    if engine.applied(config).attn_temperature_tuning != on:
        flipped = engine.temperature
    others: dict[str, Any] = {
        "temperature": flipped,
        "score_dtype": "float32" if parity.score_dtype == "model" else "model",
        "rope_positions": "chunk" if parity.rope_positions == "absolute" else "absolute",
    }
    for name in sorted(others, key=lambda name: others[name] != getattr(engine, name)):
        yield name, replace(parity, **{name: others[name]})
