"""What the mixture of experts cannot do without: bytes and FLOPs from shapes; see cost.py.

    moe(tokens_per_expert=(300, 0, 12), tokens=312, hidden=5120, ffn=1024, itemsize=2)

The weights of an expert count once if any row needs them, with their scales. `format` is that of
expert_weights.py; itemsize is that of 16- and 32-bit activations.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama4_triton.kernels.counting_sort import tile_capacity

from .cost import FP32, INT32, Compulsory

__all__ = [
    "down_bytes",
    "grouped_gemm_combine",
    "grouped_gemm_swiglu",
    "moe",
    "route",
    "router",
    "sort_by_expert",
    "up_bytes",
]

GROUP = 128  # rows and columns of a block of e4m3 weights, columns of an int4 group


def _matrix_bytes(N: int, K: int, format: str, itemsize: int) -> int:
    """(N, K) weights and their fp32 scales."""
    scales = {
        "plain": 0, "e4m3_channel": N, "e4m3_block": N * K // GROUP**2, "int4_group": N * K // GROUP
    }[format]  # fmt: skip
    half_bytes = {"plain": 2 * itemsize, "int4_group": 1}.get(format, 2)
    return N * K * half_bytes // 2 + scales * FP32


def up_bytes(hidden: int, ffn: int, format: str = "plain", itemsize: int = 2) -> int:
    """Gate and up of one expert, with scales."""
    return 2 * _matrix_bytes(ffn, hidden, format, itemsize)


def down_bytes(hidden: int, ffn: int, format: str = "plain", itemsize: int = 2) -> int:
    return _matrix_bytes(hidden, ffn, format, itemsize)


def _row_bytes(columns: int, quantized: str | None, itemsize: int) -> int:
    """One row of x or z: as it is, or e4m3 with a scale per "row" or per "group" of 128."""
    if quantized is None:
        return columns * itemsize
    return columns + FP32 * (1 if quantized == "row" else columns // GROUP)


def router(
    *,
    tokens: int,
    experts: int,
    hidden: int,
    itemsize: int,
    splits: int,
    quantized: str | None = None,
) -> Compulsory:
    """splits: slices of the hidden size, whose sums are results of the operator."""
    written = splits * tokens * experts * FP32
    if quantized:
        written += tokens * _row_bytes(hidden, quantized, itemsize)
    return Compulsory(
        flops=2 * tokens * experts * hidden,
        read=(tokens + experts) * hidden * itemsize,
        written=written,
    )


def route(
    *,
    tokens: int,
    experts: int,
    top_k: int,
    itemsize: int,
    block_m: int,
    splits: int = 1,
    kept: int | None = None,
) -> Compulsory:
    """splits: partial sums of the logits, of itemsize 4; kept: experts of this GPU."""
    slots = tokens * top_k
    return Compulsory(
        read=splits * tokens * experts * itemsize,
        written=slots * (INT32 + FP32) + _order_bytes(slots, kept or experts, block_m),
    )


def sort_by_expert(*, slots: int, rows: int, experts: int, block_m: int) -> Compulsory:
    """slots: tokens * top_k; rows: those with an expert here, the others' weights are not read."""
    return Compulsory(
        read=rows * FP32,
        index=slots * INT32,
        written=slots * (INT32 + FP32) + _order_bytes(slots, experts, block_m),
    )


def _order_bytes(slots: int, experts: int, block_m: int) -> int:
    """row_slot and tiles, the offsets of experts and the number of tiles."""
    return _table_bytes(slots, experts, block_m) + (experts + 2) * INT32


def _table_bytes(slots: int, experts: int, block_m: int) -> int:
    """row_slot and tiles, as the grouped GEMMs read them."""
    return (slots + 4 * int(tile_capacity(slots, experts, block_m))) * INT32


def grouped_gemm_swiglu(
    *,
    tokens_per_expert: Sequence[int],
    tokens: int,
    hidden: int,
    ffn: int,
    itemsize: int,
    block_m: int,
    slots: int | None = None,
    format: str = "plain",
    x_quantized: str | None = None,
    z_quantized: bool = False,
) -> Compulsory:
    """What one GPU's experts make of their rows, and zeros in the rows of other GPUs' experts.

    Args:
        tokens: those with at least one expert here; each is gathered once, however many it has.
        slots: rows of the result; None: all have their expert here.
        x_quantized: "row" or "group"; z_quantized: by group.
    """
    rows, active = sum(tokens_per_expert), sum(count > 0 for count in tokens_per_expert)
    slots = rows if slots is None else slots
    x_row = _row_bytes(hidden, x_quantized, itemsize)
    z_row = _row_bytes(ffn, "group" if z_quantized else None, itemsize)
    return Compulsory(
        flops=2 * rows * hidden * 2 * ffn,
        read=tokens * x_row + active * up_bytes(hidden, ffn, format, itemsize) + slots * FP32,
        index=_table_bytes(slots, len(tokens_per_expert), block_m),
        written=slots * z_row,
        pieces=8 + (tokens if x_quantized else 0),  # each scale is a piece of its own
    )


def grouped_gemm_combine(
    *,
    tokens_per_expert: Sequence[int],
    tokens: int,
    hidden: int,
    ffn: int,
    itemsize: int,
    block_m: int,
    has_residual: bool = False,
    slots: int | None = None,
    format: str = "plain",
    z_quantized: bool = False,
) -> Compulsory:
    """tokens: all of them; each gets its row of the result. slots: as above."""
    rows, active = sum(tokens_per_expert), sum(count > 0 for count in tokens_per_expert)
    slots = rows if slots is None else slots
    z_row = _row_bytes(ffn, "group" if z_quantized else None, itemsize)
    return Compulsory(
        flops=2 * rows * ffn * hidden,
        read=rows * z_row
        + active * down_bytes(hidden, ffn, format, itemsize)
        + has_residual * tokens * hidden * itemsize,
        index=_table_bytes(slots, len(tokens_per_expert), block_m),
        written=tokens * hidden * itemsize,
    )


def moe(
    *,
    tokens_per_expert: Sequence[int],
    tokens: int,
    hidden: int,
    ffn: int,
    itemsize: int,
    format: str = "plain",
    has_residual: bool = False,
    has_shared: bool = False,
    routed_by: str = "logits",
    experts: int | None = None,
    top_k: int = 1,
) -> Compulsory:
    """The layer, from x to the sum; what passes between its launches is workspace.

    Args:
        tokens_per_expert: of the experts here.
        routed_by: "w_router", (experts, hidden) and part of the layer then; "logits"; "topk_ids".
        experts: of all GPUs; None: those here.
    """
    rows, active = sum(tokens_per_expert), sum(count > 0 for count in tokens_per_expert)
    E = experts or len(tokens_per_expert)
    weights = up_bytes(hidden, ffn, format, itemsize) + down_bytes(hidden, ffn, format, itemsize)
    index, flops = 0, 6 * (rows + has_shared * tokens) * hidden * ffn
    if routed_by == "w_router":
        routed = E * hidden * itemsize
        flops += 2 * tokens * E * hidden
    elif routed_by == "logits":
        routed = tokens * E * itemsize
    else:
        index, routed = tokens * top_k * INT32, rows * FP32
    return Compulsory(
        flops=flops,
        read=(1 + has_residual) * tokens * hidden * itemsize
        + (active + has_shared) * weights
        + routed,
        index=index,
        written=tokens * hidden * itemsize,
    )
