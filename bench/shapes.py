"""The one list of Llama 4 workload shapes: what each operator sees per GPU, per step.

Scout 17Bx16E and Maverick 17Bx128E, text part, tensor parallel over `tp` GPUs: heads and FFN
widths are divided, the hidden size is not. Source: the models' config.json.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MAVERICK", "MODELS", "SCOUT", "TENSOR_PARALLEL", "TOKENS", "TextShape", "linears"]

TENSOR_PARALLEL = (1, 8)
TOKENS = (1, 16, 64, 256, 1024, 4096)  # in one step: decode batches, then prefill


@dataclass(frozen=True, kw_only=True, slots=True)
class TextShape:
    """Sizes of the text model that decide the operators' shapes."""

    name: str
    experts: int
    ffn_dense: int  # width of the MLP in layers without experts; 0 where all layers have them
    hidden: int = 5120
    layers: int = 48
    heads: int = 40
    kv_heads: int = 8
    head_dim: int = 128
    top_k: int = 1
    ffn: int = 8192  # of each routed expert and of the shared expert
    chunk: int = 8192  # attention chunk of local layers
    vocab: int = 202_048
    eps: float = 1e-5


SCOUT = TextShape(name="scout", experts=16, ffn_dense=0)
MAVERICK = TextShape(name="maverick", experts=128, ffn_dense=16_384)
MODELS = (SCOUT, MAVERICK)


def linears(shape: TextShape, tp: int = 1) -> dict[str, tuple[int, int]]:
    """Return (N, K) of each dense projection x (T, K) @ w (N, K).T on one of `tp` GPUs."""
    if tp not in TENSOR_PARALLEL:
        raise ValueError(f"linears: tp must be one of {TENSOR_PARALLEL}, got {tp}")
    queries = shape.heads * shape.head_dim // tp
    keys = shape.kv_heads * shape.head_dim // tp
    out = {
        "qkv": (queries + 2 * keys, shape.hidden),
        "o": (shape.hidden, queries),
        "shared_gate_up": (2 * shape.ffn // tp, shape.hidden),
        "shared_down": (shape.hidden, shape.ffn // tp),
    }
    if shape.ffn_dense:
        out["dense_gate_up"] = (2 * shape.ffn_dense // tp, shape.hidden)
        out["dense_down"] = (shape.hidden, shape.ffn_dense // tp)
    return out
