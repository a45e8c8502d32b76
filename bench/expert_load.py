"""What reaches the experts of one GPU: tokens, a routing histogram, the weights' layout.

Nothing here depends on a value on the device: which expert each token goes to is decided on the
host from `routing_counts` and a seed, so the same inputs can be made of fake tensors.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from llama4_triton.kernels.counting_sort import tile_capacity
from llama4_triton.kernels.expert_weights import Experts
from llama4_triton.kernels.routing import Routing, default_block_m

from . import expert_weights
from .case import BF16, F32
from .hollow import computed
from .shapes import SCOUT, routing_counts

__all__ = [
    "Load", "make_experts", "make_ids", "make_logits", "make_router", "make_routing", "make_shared"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """T tokens, their routing, and the experts of one GPU."""

    T: int
    E: int  # on this GPU
    top_k: int = 1
    routing: str = "uniform"
    H: int = SCOUT.hidden
    F: int = SCOUT.ffn
    ep: int = 1
    block_m: int | None = None
    layout: str = "hf"  # of plain weights; others have one
    format: str = "plain"
    dtype: torch.dtype = BF16

    @property
    def rows(self) -> int:
        """Rows that have an expert here."""
        return sum(self.counts())

    def counts(self) -> list[int]:
        """Tokens per expert; choice k of a token goes k experts further."""
        counts = routing_counts(self.routing, self.T, self.E * self.ep, ep=self.ep)
        return [sum(counts[(e - k) % self.E] for k in range(self.top_k)) for e in range(self.E)]

    @property
    def active(self) -> int:
        return sum(count > 0 for count in self.counts())

    def ids(self, seed: int) -> list[list[int]]:
        """(T, top_k) expert ids on the host; -1 for what another GPU does."""
        counts = routing_counts(self.routing, self.T, self.E * self.ep, ep=self.ep)
        first = [e for e, count in enumerate(counts) for _ in range(count)]
        first += [-1] * (self.T - len(first))
        random.Random(seed).shuffle(first)
        return [[(e + k) % self.E if e >= 0 else -1 for k in range(self.top_k)] for e in first]

    def tile_rows(self) -> int:
        return self.block_m or default_block_m(self.T * self.top_k, self.E)

    def suffix(self) -> str:
        """What differs from the plain case."""
        return (
            f"T{self.T}-{self.routing.replace(' ', '-')}"
            + (f"-k{self.top_k}" if self.top_k > 1 else "")
            + (f"-ep{self.ep}" if self.ep > 1 else "")
            + (f"-{self.layout}" if self.layout != "hf" and self.format == "plain" else "")
            + (f"-{self.format}" if self.format != "plain" else "")
        )


def make_ids(load: Load, device: torch.device, seed: int) -> torch.Tensor:
    return torch.tensor(load.ids(seed), dtype=torch.int32, device=device).view(load.T, load.top_k)


def make_logits(load: Load, device: torch.device, seed: int) -> torch.Tensor:
    """Logits whose top k are the load's: about 2 for the first choice, one less for each next."""
    ids = make_ids(load, device, seed).long()
    logits = torch.randn(load.T, load.E, device=device).mul_(0.25).clamp_(-1, 1).sub_(8)
    wanted = torch.rand(load.T, load.top_k, device=device).mul_(0.5).add_(2)
    wanted -= torch.arange(load.top_k, device=device)
    return logits.scatter_(1, ids, wanted).to(load.dtype)


def make_router(load: Load, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, H) and w_router (E, H) of all GPUs, whose products choose what the load says.

    Coordinate e of x is about 3 for the first expert of a token, less for the next, and only the
    router's row e reads it. The other coordinates add about 0.3 to a logit. Both are multiples of
    powers of two, of few bits: every order of the sum gives the same logit, so that its rounding
    and what follows from it are the reference's. Real inside of `hollow`, which routing needs.
    """
    T, H, E = load.T, load.H, load.E * load.ep
    unit = 2.0 ** round(math.log2(0.25 / H**0.5))
    ids = make_ids(load, device, seed).long()
    # A token of another GPU's expert chooses the first of those.
    ids = torch.where(ids >= 0, ids, torch.arange(load.top_k, device=device) + load.E)
    with computed():
        x = torch.randn(T, H, device=device).mul_(32).round_().clamp_(-127, 127).div_(32)
        wanted = torch.arange(load.top_k, dtype=F32, device=device).mul_(-0.75).add_(3)
        x.narrow(1, 0, E).zero_()
        x.scatter_(1, ids, wanted.repeat(T, 1))
        w_router = torch.randn(E, H, device=device).sign_().mul_(unit)
        w_router.narrow(1, 0, E).zero_().diagonal().fill_(1.0)
        return x.to(load.dtype), w_router.to(load.dtype)


def make_experts(load: Load, device: torch.device) -> Experts:
    """Weights that keep z and the output near 1."""
    return expert_weights.make_weights(
        E=load.E, H=load.H, F=load.F, dtype=load.dtype, device=device,
        format=load.format, layout=load.layout if load.format == "plain" else "vllm",
    )  # fmt: skip


def make_shared(load: Load, device: torch.device) -> Experts:
    """A shared expert of the same width in the same format."""
    return expert_weights.make_shared(
        H=load.H, F=load.F, dtype=load.dtype, device=device, format=load.format
    )


def make_routing(load: Load, weights: torch.Tensor, seed: int) -> Routing:
    """The `Routing` of the load, made on the host: a GEMM's case does not depend on the sort."""
    device, block_m, R = weights.device, load.tile_rows(), load.T * load.top_k
    ids = load.ids(seed)
    groups = [e if e >= 0 else load.E for row in ids for e in row]
    row_slot = sorted(range(R), key=lambda slot: (groups[slot], slot))
    offsets = [0]
    for e in range(load.E + 1):
        offsets.append(offsets[-1] + groups.count(e))
    by_work = sorted(range(load.E), key=lambda e: (offsets[e] - offsets[e + 1], e))
    tiles = [
        (e, offsets[e], offsets[e + 1], i)
        for e in (*by_work, load.E)
        for i in range(-(-(offsets[e + 1] - offsets[e]) // block_m))
    ]
    unused = tile_capacity(R, load.E, block_m) - len(tiles)

    def int32(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    expert_ids = int32(ids).view(load.T, load.top_k)
    return Routing(
        expert_ids=expert_ids,
        expert_weights=torch.where(expert_ids >= 0, weights, 0.0),
        expert_offsets=int32(offsets[: load.E + 1]),
        row_slot=int32(row_slot),
        tiles=int32(tiles + [(-1, 0, 0, 0)] * unused).view(-1, 4),
        tile_count=int32([len(tiles)]),
        block_m=block_m,
        num_experts=load.E,
        top_k=load.top_k,
    )
