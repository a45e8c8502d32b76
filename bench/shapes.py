"""The one list of Llama 4 workloads: what a GPU is asked for, per step.

Scout 17Bx16E and Maverick 17Bx128E, text part. Tensor parallelism over `tp` GPUs divides heads and
FFN widths, not the hidden size; expert parallelism over `ep` GPUs divides the experts. Source: the
models' config.json.

A `Workload` is one forward step of one model on one of `tp` GPUs: how many tokens each sequence
gets and how many it has in the cache already. `routing_counts` says how many tokens go to each
expert under the four histograms that all figures are given for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = [
    "CONTEXTS",
    "MAVERICK",
    "MODELS",
    "PARALLEL",
    "ROUTINGS",
    "SCOUT",
    "TENSOR_PARALLEL",
    "TOKENS",
    "WORKLOADS",
    "TextShape",
    "Workload",
    "linears",
    "routing_counts",
]

PARALLEL = (1, 2, 4, 8)  # GPUs: of tensor or of expert parallelism
TENSOR_PARALLEL = (1, 8)  # the two ends, where only those are looked at
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384)  # in one step: decode batches, then prefill
CONTEXTS = (8192, 131_072, 1_048_576, 10_485_760)  # tokens of one sequence
ROUTINGS = ("uniform", "skewed", "one-hot", "one per expert")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextShape:
    """Sizes of the text model that decide the operators' shapes."""

    name: str
    experts: int
    ffn_dense: int  # width of the MLP in layers without experts; 0 where all layers have them
    context: int = 1_048_576  # tokens the model was trained for
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


SCOUT = TextShape(name="scout", experts=16, ffn_dense=0, context=10_485_760)
MAVERICK = TextShape(name="maverick", experts=128, ffn_dense=16_384)
MODELS = (SCOUT, MAVERICK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One forward step on one GPU."""

    shape: TextShape
    tp: int
    kind: str  # "prefill", "chunked prefill", "decode" or "mixed"
    new_tokens: tuple[int, ...]  # per sequence
    cached_tokens: tuple[int, ...]  # per sequence, before the step

    @property
    def id(self) -> str:
        longest = max(a + b for a, b in zip(self.new_tokens, self.cached_tokens, strict=True))
        return (
            f"{self.shape.name}-tp{self.tp}-{self.kind.replace(' ', '-')}"
            f"-B{len(self.new_tokens)}-T{self.tokens}-{_short(longest)}"
        )

    @property
    def tokens(self) -> int:
        return sum(self.new_tokens)


def _short(n: int) -> str:
    for unit, suffix in ((1 << 20, "M"), (1 << 10, "k")):
        if n >= unit:
            return f"{n // unit}{suffix}"
    return str(n)


def _steps(shape: TextShape) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(kind, new tokens, cached tokens): the batches and contexts that are looked at."""
    for context in CONTEXTS:
        if context <= shape.context:
            yield "decode", (1,), (context - 1,)
    for B, context in ((4, 131_072), (16, 32_768), (64, 8192), (256, 4096), (512, 2048)):
        yield "decode", (1,) * B, (context - 1,) * B
    for T in (16, 64, 256, 1024, 4096, 16_384):
        yield "prefill", (T,), (0,)
    yield "prefill", (512,) * 8, (0,) * 8
    for context in (131_072, 1_048_576):
        yield "chunked prefill", (8192,), (context - 8192,)
    # Continuous batching: one sequence's prompt beside others' next tokens.
    yield "mixed", (2048, *(1,) * 63), (0, *(8191,) * 63)
    yield "mixed", (200, *(1,) * 7), (7000, *(131_071,) * 7)


WORKLOADS = tuple(
    Workload(shape=shape, tp=tp, kind=kind, new_tokens=new, cached_tokens=cached)
    for shape in MODELS
    for tp in PARALLEL
    for kind, new, cached in _steps(shape)
)


def linears(shape: TextShape, tp: int = 1) -> dict[str, tuple[int, int]]:
    """Return (N, K) of each dense projection x (T, K) @ w (N, K).T on one of `tp` GPUs."""
    if tp not in PARALLEL:
        raise ValueError(f"linears: tp must be one of {PARALLEL}, got {tp}")
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


def routing_counts(
    routing: str, slots: int, experts: int, *, ep: int = 1, seed: int = 0
) -> tuple[int, ...]:
    """How many of `slots` routed rows each of the experts on one of `ep` GPUs gets.

    uniform: every slot draws an expert at random (seeded); skewed: expert e is drawn with weight
    1 / (e + 1); one-hot: expert 0 gets all; one per expert: slot i goes to expert i % experts.
    With ep > 1 the counts are those of the first GPU's experts; the other slots are elsewhere.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing_counts: routing must be one of {ROUTINGS}, got {routing!r}")
    if experts % ep:
        raise ValueError(f"routing_counts: ep must divide the experts ({experts}), got {ep}")
    chosen: Sequence[int]
    draw = random.Random(seed)
    if routing == "uniform":
        chosen = [draw.randrange(experts) for _ in range(slots)]
    elif routing == "skewed":
        weights = [1 / (expert + 1) for expert in range(experts)]
        chosen = draw.choices(range(experts), weights, k=slots)
    elif routing == "one-hot":
        chosen = [0] * slots
    else:
        chosen = [slot % experts for slot in range(slots)]
    counts = [0] * experts
    for expert in chosen:
        counts[expert] += 1
    return tuple(counts[: experts // ep])
