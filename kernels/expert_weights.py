"""The weights of experts as the grouped GEMMs read them: three projections, each with its scales.

    gate (E, F, H), up (E, F, H), down (E, H, F)            output features first: y = W x

Formats and what they stand for are in weight_formats.py, whose functions are offered here too.
Checkpoints' tensors, of transformers, vLLM, SGLang and nn.Linear, become `Experts` by views; no
constructor copies. What a kernel needs of them is checked by `check_experts`, once per call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._check import check_devices, require
from .weight_formats import (
    GROUP,
    Projection,
    check_projection,
    dequantize,
    make_projection,
    pack_int4,
    quantize_block,
    quantize_channel,
    quantize_int4,
    unpack_int4,
)

__all__ = [
    "GROUP",
    "Experts",
    "Projection",
    "check_experts",
    "dequantize",
    "pack_int4",
    "quantize_block",
    "quantize_channel",
    "quantize_experts",
    "quantize_int4",
    "unpack_int4",
]

QUANTIZERS = {
    "e4m3_channel": quantize_channel,
    "e4m3_block": quantize_block,
    "int4_group": quantize_int4,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The weights of E experts, as strided views of a checkpoint's tensors."""

    gate: Projection  # (E, F, H)
    up: Projection  # (E, F, H)
    down: Projection  # (E, H, F)

    @classmethod
    def from_hf(
        cls,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        gate_up_scale: torch.Tensor | None = None,
        down_scale: torch.Tensor | None = None,
    ) -> Experts:
        """From transformers' gate_up_proj (E, H, 2F) and down_proj (E, F, H).

        Scales: one for all, (E,), (E, 1, N) or (E, N, 1) per channel, or transposed as the weights
        are. e4m3 and int4 weights in this layout must be transposed views of (E, N, K) memory.
        """
        op = "Experts.from_hf"
        for name, w in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
            _check_rank(op, name, w, 3)
        return cls._from_merged(
            op, ("gate_up_proj", "down_proj"),
            gate_up_proj.transpose(1, 2), _rows_first(gate_up_scale, gate_up_proj),
            down_proj.transpose(1, 2), _rows_first(down_scale, down_proj),
        )  # fmt: skip

    @classmethod
    def from_vllm(
        cls,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
    ) -> Experts:
        """From vLLM's and SGLang's w13 (E, 2F, H) and w2 (E, H, F).

        w13_scale: one for all, (E,), (E, 2) for gate and up, (E, 2F) or (E, 2F, 1) per channel, or
            (E, 2F / 128, H / 128) per block; int4: (E, 2F, H / 128). w2_scale likewise.
        """
        op = "Experts.from_vllm"
        for name, w in (("w13", w13), ("w2", w2)):
            _check_rank(op, name, w, 3)
        return cls._from_merged(op, ("w13", "w2"), w13, w13_scale, w2, w2_scale)

    @classmethod
    def dense(
        cls,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        gate_scale: torch.Tensor | None = None,
        up_scale: torch.Tensor | None = None,
        down_scale: torch.Tensor | None = None,
    ) -> Experts:
        """One expert, as a shared one, from nn.Linear weights: (F, H), (F, H) and (H, F).

        Scales: one, (N,) or (N, 1) per channel, (N / 128, K / 128) blocks; int4: (N, K / 128).
        """
        op = "Experts.dense"
        projections = []
        for name, w, scale in (
            ("gate_proj", gate_proj, gate_scale),
            ("up_proj", up_proj, up_scale),
            ("down_proj", down_proj, down_scale),
        ):
            _check_rank(op, name, w, 2)
            scale = None if scale is None else scale.unsqueeze(0)
            projections.append(make_projection(op, name, w.unsqueeze(0), scale))
        return cls(gate=projections[0], up=projections[1], down=projections[2])

    @classmethod
    def _from_merged(
        cls,
        op: str,
        names: tuple[str, str],
        w13: torch.Tensor,
        w13_scale: torch.Tensor | None,
        w2: torch.Tensor,
        w2_scale: torch.Tensor | None,
    ) -> Experts:
        """From gate rows followed by up rows, (E, 2F, H), and (E, H, F)."""
        two_f = w13.shape[1]
        require(two_f % 2 == 0, op, f"{names[0]} must have 2F columns, gate then up", two_f)
        scales: list[torch.Tensor | None]
        if w13_scale is not None and tuple(w13_scale.shape) == (len(w13), 2):
            scales = [s.expand(-1, two_f // 2) for s in w13_scale.chunk(2, dim=1)]
        else:
            merged = make_projection(op, names[0], w13, w13_scale)
            if merged.format == "e4m3_block":
                must = f"F must be a multiple of {GROUP} for {names[0]}'s blocks to end with gate"
                require(two_f % (2 * GROUP) == 0, op, must, two_f // 2)
            scales = [None, None] if merged.scale is None else [*_halves(merged.scale)]
        gate, up = (
            Projection(weight=w, scale=s) for w, s in zip(_halves(w13), scales, strict=True)
        )
        return cls(gate=gate, up=up, down=make_projection(op, names[1], w2, w2_scale))

    @property
    def num_experts(self) -> int:
        return self.gate.weight.shape[0]

    @property
    def hidden(self) -> int:
        """H."""
        return self.gate.shape[2]

    @property
    def width(self) -> int:
        """F."""
        return self.gate.shape[1]

    @property
    def format(self) -> str:
        """Of all three projections; `check_experts` requires that they agree."""
        return self.gate.format


def _check_rank(op: str, name: str, w: torch.Tensor, rank: int) -> None:
    require(isinstance(w, torch.Tensor), op, f"{name} must be a torch.Tensor", type(w), TypeError)
    require(w.ndim == rank, op, f"{name} must be {rank}-D", tuple(w.shape))


def _rows_first(scale: torch.Tensor | None, w: torch.Tensor) -> torch.Tensor | None:
    """Transpose the scales of w (E, K, N) as w will be, unless they are (E, N, 1) already."""
    if scale is None or scale.ndim != 3 or tuple(scale.shape[1:]) == (w.shape[2], 1):
        return scale
    return scale.transpose(1, 2)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of what has them along dimension 1."""
    middle = x.shape[1] // 2
    return x[:, :middle], x[:, middle:]


def check_experts(
    op: str, experts: Experts, H: int, x_dtype: torch.dtype, *, name: str = "experts"
) -> None:
    """Check that `experts` map (.., H) to (.., H) in `x_dtype`, in one format and on one device.

    gate and up must have the same strides: one launch reads both. The message calls `experts`
    `name`.

    Raises:
        ValueError: shapes, strides or devices.   TypeError: dtypes.
    """
    require(isinstance(experts, Experts), op, f"{name} must be Experts", type(experts), TypeError)
    parts = {"gate": experts.gate, "up": experts.up, "down": experts.down}
    for part, projection in parts.items():
        must = f"{name}.{part} must be a Projection"
        require(isinstance(projection, Projection), op, must, type(projection), TypeError)
        _check_rank(op, f"{name}.{part}.weight", projection.weight, 3)
    formats = {part: projection.format for part, projection in parts.items()}
    must = f"{name}.gate, up and down must have one format"
    require(len(set(formats.values())) == 1, op, must, ", ".join(formats.values()), TypeError)
    E, F = experts.gate.weight.shape[:2]
    for part, (N, K) in {"gate": (F, H), "up": (F, H), "down": (H, F)}.items():
        check_projection(op, f"{name}.{part}", parts[part], (E, N, K), x_dtype)
    for what in ("weight", "scale"):
        gate, up = (getattr(parts[part], what) for part in ("gate", "up"))
        if gate is not None:
            strides = _strides(gate), _strides(up)
            must = f"{name}.up.{what} must have the strides of {name}.gate.{what}, {strides[0]}"
            require(strides[0] == strides[1], op, must, strides[1])
    check_devices(
        op,
        **{f"{name}.{part}.weight": projection.weight for part, projection in parts.items()},
        **{f"{name}.{part}.scale": projection.scale for part, projection in parts.items()},
    )


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides that matter: 0 where there is but one index."""
    return tuple(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))


def quantize_experts(experts: Experts, format: str) -> Experts:
    """All three projections of plain `experts` in e4m3_channel, e4m3_block or int4_group."""
    op = "quantize_experts"
    must = f"format must be one of {', '.join(QUANTIZERS)}"
    require(format in QUANTIZERS, op, must, repr(format))
    parts = experts.gate, experts.up, experts.down
    for part in parts:
        require(part.format == "plain", op, "experts must be plain", part.format, TypeError)
    gate, up, down = (QUANTIZERS[format](part.weight) for part in parts)
    return Experts(gate=gate, up=up, down=down)
