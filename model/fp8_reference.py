"""One expert with e4m3 weights in plain PyTorch: what reference.py's experts do with them.

    g, u = s * (round(x) @ W_gate_up)              round: to e4m3, one scale per row
    y    = round(dt(silu(g) * u)) @ W_down         round: to e4m3, one scale per 128 of a row

W = weight * scale of each output channel; s is the routing weight, which multiplies the input and
so may follow the product. Sums are in fp32. A scale is amax / 448 (1 if all is 0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["e4m3_expert"]

GROUP = 128
E4M3_MAX = 448.0


def e4m3_expert(
    x: torch.Tensor, routing_weight: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """y (n, H) fp32 of x (n, H) in dt, with weights (n,); gate_up (H, 2F) and down (F, H) fp32."""
    gate, up = (_rounded(x, x.shape[1]) @ gate_up * routing_weight[:, None]).chunk(2, dim=-1)
    return _rounded((F.silu(gate) * up).to(x.dtype), GROUP) @ down


def _rounded(x: torch.Tensor, size: int) -> torch.Tensor:
    """What x (n, K), rounded to e4m3 with a scale per `size` of a row, stands for; fp32."""
    K = x.shape[1]
    groups = F.pad(x.float(), (0, -K % size)).unflatten(1, (-1, size))
    amax = groups.abs().amax(2, keepdim=True)
    scale = torch.where(amax > 0.0, amax.clamp(min=1e-12) / E4M3_MAX, 1.0)
    x_q = (groups * (1.0 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (x_q.float() * scale).flatten(1)[:, :K]
