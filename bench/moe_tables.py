"""Formulas of the mixture of experts as tables: padding beside vLLM's, the price of invariance.

    padded_rows((300, 0, 12), 64)                       # 320 + 64
    python -m llama4_triton.bench.moe_tables            # batch_invariant=True against the default

Padding is a matter of the routing and of the rows per tile alone, so that it can be compared with
another implementation by formula. vLLM pads each expert's rows to BLOCK_SIZE_M
(moe_align_block_size), which its tuned files give for some numbers of tokens, of which the nearest
is taken (fused_moe.py, get_moe_configs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llama4_triton.kernels.moe_plan import WEIGHT_BYTES, MoePlan, plan

from .moe_layer import MoeLayer
from .shapes import MAVERICK, MODELS, SCOUT, TextShape, routing_counts

__all__ = ["VLLM_BLOCK_M", "block_ms", "invariance_table", "padded_rows", "plan_of", "vllm_block_m"]

# vllm 0.33.0, model_executor/layers/fused_moe/configs, NVIDIA_H100_80GB_HBM3, as far as needed:
# E=16,N=1024 (bf16) and E=128,N=1024,dtype=fp8_w8a8. Tokens: BLOCK_SIZE_M.
VLLM_BLOCK_M = {
    SCOUT.name: {1: 16, 4: 16, 16: 16, 64: 16, 256: 64, 1024: 128, 4096: 128},
    MAVERICK.name: {1: 16, 4: 16, 16: 16, 64: 16, 256: 16, 1024: 16, 4096: 64},
}
FORMATS = {SCOUT.name: "plain", MAVERICK.name: "e4m3_channel"}  # that those files are for


def vllm_block_m(shape: TextShape, tokens: int) -> int:
    table = VLLM_BLOCK_M[shape.name]
    return table[min(table, key=lambda key: abs(key - tokens))]


def padded_rows(tokens_per_expert: Sequence[int], block_m: int) -> int:
    """Rows of tiles that are computed, where each expert's rows begin a tile."""
    return sum(-(-count // block_m) * block_m for count in tokens_per_expert)


def plan_of(layer: MoeLayer) -> MoePlan:
    """What `moe` chooses for it on an H100."""
    in_e4m3 = layer.format.startswith("e4m3")
    return plan(
        T=layer.T, H=layer.shape.hidden, F=layer.F, E=layer.E, top_k=layer.top_k,
        dtype=layer.dtype, multiplied=torch.float8_e4m3fn if in_e4m3 else layer.dtype,
        format=layer.format, has_shared=layer.has_shared, fast_accum=layer.fast_accum,
        batch_invariant=layer.batch_invariant,
    )  # fmt: skip


def block_ms(layer: MoeLayer) -> tuple[int, int]:
    """Rows per tile of GEMM 1 and of GEMM 2."""
    chosen = plan_of(layer)
    return chosen.up.BLOCK_M, chosen.down.BLOCK_M


def padded_flops(layer: MoeLayer, counts: Sequence[int]) -> int:
    """Of the routed experts' two GEMMs, padding of rows included."""
    up, down = (padded_rows(counts, block_m) for block_m in block_ms(layer))
    return (4 * up + 2 * down) * layer.shape.hidden * layer.F


def weight_bytes(layer: MoeLayer, counts: Sequence[int]) -> int:
    """Requested: per tile of rows its expert's weights, and the shared expert's per its tiles.

    Without scales. The shared GEMM 1 reads its weights per tile of tokens. So does GEMM 2 where it
    is a launch's own; concatenated along K it is read once per tile of routed rows.
    """
    chosen = plan_of(layer)
    down = int(layer.shape.hidden * layer.F * WEIGHT_BYTES.get(layer.format, 1))
    up = 2 * down
    up_tiles, down_tiles = (
        sum(-(-count // block_m) for count in counts) for block_m in block_ms(layer)
    )
    total = up_tiles * up + down_tiles * down
    if not layer.has_shared:
        return total
    if chosen.beside is not None:
        tiles = [-(-layer.T // part.BLOCK_M) for part in (chosen.beside.up, chosen.beside.down)]
        return total + tiles[0] * up + tiles[1] * down
    if chosen.regime == "few":
        return total + up + down
    return total + -(-layer.T // chosen.up.BLOCK_M) * up + down_tiles * down


def invariance_table(tokens: Sequence[int] = (1, 64, 1024), routing: str = "uniform") -> str:
    """What batch_invariant=True costs, in Markdown: bytes of weights requested, FLOPs, launches."""
    lines = [
        "| model | tokens | weights requested, MB | | padded GFLOP | | launches | |",
        "|---|---|---|---|---|---|---|---|",
        "| | | default | invariant | default | invariant | default | invariant |",
    ]
    for shape in MODELS:
        for T in tokens:
            counts = routing_counts(routing, T, shape.experts)
            cells = []
            layers = [MoeLayer(shape=shape, T=T)]
            layers += [replace(layers[0], batch_invariant=True)]
            cells += [f"{weight_bytes(layer, counts) / 1e6:.0f}" for layer in layers]
            cells += [f"{padded_flops(layer, counts) / 1e9:.1f}" for layer in layers]
            cells += [str(len(layer.record().launches)) for layer in layers]
            lines.append(f"| {shape.name} | {T} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(invariance_table(), end="")
