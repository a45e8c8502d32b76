"""What the MoE layer touches at full size, counted, beside what the formulas say; interpreter only.

    row = moe_traffic("scout", 4096)                    # one of 8 GPUs, bf16, uniform routing
    python -m llama4_triton.bench.moe_traffic           # the table of docs/moe.md, in minutes

DRAM is modelled (l2.py), not measured. It stands against two sums:

* the layer's: x, the router, active experts and the shared one, and out, each once;
* the products': what the router, the shared GEMM 1, GEMM 1 and GEMM 2 each read and write, once
  each. It counts x up to three times, x_q and z twice: more than the layer's where these do not
  stay in L2 between one product and the next, which no order of programs in a launch can change.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import cost_experts as cost
from .l2 import dram_bytes
from .moe_layer import MoeLayer
from .moe_tables import plan_of, weight_bytes
from .shapes import MODELS, routing_counts

__all__ = ["MoeTraffic", "moe_traffic", "products_bytes", "traffic_table"]

TP = 8
WEIGHTS = {
    "w[0]",
    "w[1]",
    "shared_w[0]",
    "shared_w[1]",
}  # of a launch's arguments; [2], [3]: scales
TABLE = (
    *[("scout", T, format, "uniform") for T in (1, 4, 64) for format in ("plain", "e4m3_channel")],
    *[("scout", 64, format, "uniform") for format in ("e4m3_block", "int4_group")],
    *[("scout", 64, "plain", routing) for routing in ("skewed", "one-hot")],
    *[("scout", 1024, format, "uniform") for format in ("plain", "e4m3_channel")],
    *[("scout", 4096, format, "uniform") for format in ("plain", "e4m3_channel")],
    ("scout", 16_384, "plain", "uniform"),
    *[("maverick", 64, format, "uniform") for format in ("plain", "e4m3_channel", "int4_group")],
    *[("maverick", 4096, format, "uniform") for format in ("plain", "e4m3_channel")],
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeTraffic:
    """Bytes of one layer; ratios are against what is compulsory."""

    id: str
    launches: int
    compulsory: int
    unique: float  # distinct sectors of operands and outputs, against compulsory
    workspace: float  # distinct sectors of it, against compulsory
    weights: int  # requested
    weights_formula: (
        int  # ceil(rows / BLOCK_M) of each expert times its bytes, and the shared one's
    )
    padded: float  # FLOPs of tl.dot, against the ideal ones
    dram: float  # modelled, against the layer's bytes
    dram_products: float  # against the products'


def products_bytes(layer: MoeLayer, counts: Sequence[int]) -> int:
    """Operands and results of each of the four products, once each."""
    H, F, T = layer.shape.hidden, layer.F, layer.T
    active = sum(count > 0 for count in counts)
    in_e4m3 = layer.format.startswith("e4m3")
    x, z = T * H * 2, T * F * 2
    x_q = T * H + 4 * T * (H // 128 if layer.format == "e4m3_block" else 1) if in_e4m3 else x
    if plan_of(layer).quantize_z:
        z = T * F + 4 * T * (F // 128)
    up = cost.up_bytes(H, F, layer.format)
    down = cost.down_bytes(H, F, layer.format)
    router = x + layer.shape.experts * H * 2 + (x_q if in_e4m3 else 0)
    ups = 2 * x_q + (active + 1) * up + 2 * z
    downs = 2 * z + (active + 1) * down + T * H * 2
    return router + ups + downs


def moe_traffic(model: str, T: int, format: str = "plain", routing: str = "uniform") -> MoeTraffic:
    """Count a layer of `model` on one of 8 GPUs, in an interpreting process."""
    from .hollow import hollow
    from .ops import find
    from .traffic import measure
    from .traffic_gates import as_h100

    shape = next(shape for shape in MODELS if shape.name == model)
    layer = MoeLayer(shape=shape, T=T, tp=TP, format=format)
    counts = routing_counts(routing, T, shape.experts)
    suffix = f"-{format}" if format != "plain" else ""
    case = find(f"moe-{model}-tp{TP}-T{T}-{routing.replace(' ', '-')}{suffix}")
    with as_h100(), hollow():
        inputs = case.make(torch.device("cpu"), 0)
    with as_h100():
        traffic = measure(lambda: case.run(inputs))
    if traffic.trace is None:
        raise RuntimeError(f"{case.id}: nothing was launched")
    total = dram_bytes(traffic.trace).total
    compulsory = case.cost.bytes
    unique = traffic.unique
    return MoeTraffic(
        id=case.id,
        launches=len(traffic.launches),
        compulsory=compulsory,
        unique=sum(n for role, n in unique.items() if role != "workspace") / compulsory,
        workspace=unique["workspace"] / compulsory,
        weights=sum(t.requested for t in traffic.tensors if WEIGHTS & set(t.names)),
        weights_formula=weight_bytes(layer, counts),
        padded=traffic.flops / case.cost.flops,
        dram=total / compulsory,
        dram_products=total / products_bytes(layer, counts),
    )


def traffic_table(rows: Sequence[tuple[str, int, str, str]] = TABLE) -> str:
    """The counted rows in Markdown."""
    lines = [
        "| model | tokens | format | routing | compulsory MB | unique | workspace |"
        " weights requested / formula, MB | DRAM of layer's | of products' |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, T, format, routing in rows:
        row = moe_traffic(model, T, format, routing)
        lines.append(
            f"| {model} | {T} | {format} | {routing} | {row.compulsory / 1e6:.0f} |"
            f" {row.unique:.4f} | {row.workspace:.2%} |"
            f" {row.weights / 1e6:.1f} / {row.weights_formula / 1e6:.1f} |"
            f" {row.dram:.3f} | {row.dram_products:.3f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("moe_traffic: TRITON_INTERPRET must be 1")
    traffic_table()
