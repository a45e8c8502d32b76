"""e4m3 weights of checkpoints in compressed-tensors' style: names, checks, what is made of them.

    W[n, k] = weight[n, k] * weight_scale[n]       weight (N, K) e4m3, weight_scale (N, 1), a float

Such checkpoints have the experts one by one, `experts.{e}.{gate,up,down}_proj.weight`, each (N, K)
as nn.Linear has it. A layer's become one tensor and its scales, for `Experts.from_hf`:

    gate_up_proj (E, H, 2F) e4m3, gate_up_scale (E, 2F) fp32: of (E, 2F, H) memory, gate first
    down_proj    (E, F, H)  e4m3, down_scale    (E, H)  fp32: of (E, H, F) memory

Nothing of them is rounded: bf16 scales are exact in fp32. Other projections (attention, shared
expert, dense MLP) that are e4m3 become weight * weight_scale in the model's type, one rounding
after the product in fp32. What is e4m3 is said by the types of the tensors; where it is, there must
be a weight_scale. Layers may differ, the projections of one layer's experts may not.
Source: Meta's Llama-4-Maverick-FP8 and llm-compressor's FP8-dynamic checkpoints, as vLLM reads
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from .safetensors_file import DTYPES, CheckpointError, Tensor, show

__all__ = [
    "FLOATS",
    "dtypes_of",
    "has_e4m3",
    "loaded_bytes",
    "model_tensors",
    "stored_names",
    "stored_shapes",
]

E4M3 = "F8_E4M3"
FLOATS = ("F32", "F16", "BF16")
SCALE = "_scale"
# The parts of the model's tensor, in the order of its rows.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

Shapes = dict[str, tuple[int, ...]]


def _may_be_e4m3(name: str) -> bool:
    """A projection with the layout of nn.Linear."""
    return name.endswith("_proj.weight")


def dtypes_of(name: str) -> tuple[str, ...]:
    """The types that the stored tensor `name` may have."""
    return (*FLOATS, E4M3) if _may_be_e4m3(name) else FLOATS


def _parts(name: str, num_experts: int) -> list[list[str]]:
    """By expert the weights that make up the model's tensor `name`; none if it is no experts'."""
    owner, _, leaf = name.rpartition(".")
    if not owner.endswith(".experts"):
        return []
    return [[f"{owner}.{e}.{part}.weight" for part in _PARTS[leaf]] for e in range(num_experts)]


def stored_shapes(expected: Shapes) -> Shapes:
    """What a file may hold for the model's tensors `expected`: these, experts apart, and scales."""
    shapes = dict(expected)
    for name, shape in expected.items():
        for weights in _parts(name, shape[0]):
            rows = shape[2] // len(weights)
            shapes |= {weight: (rows, shape[1]) for weight in weights}
    scales = {name + SCALE: (shape[0], 1) for name, shape in shapes.items() if _may_be_e4m3(name)}
    return shapes | scales


def stored_names(expected: Shapes, found: Mapping[str, Tensor]) -> list[str]:
    """The names of `found` that must be there, in the order of the model's.

    Raises:
        CheckpointError: experts both merged and apart, or in two types; scales without e4m3.
    """
    names: list[str] = []
    kinds: dict[str, bool] = {}  # whether a layer's experts are e4m3
    for name, shape in expected.items():
        weights = [weight for expert in _parts(name, shape[0]) for weight in expert]
        apart = any(weight in found for weight in weights)
        if apart and name in found:
            raise CheckpointError(
                f"checkpoint: experts must be merged or apart, got {show(name)} and parts of it"
            )
        if not apart:
            weights = [name]
        for weight in weights:
            names.append(weight)
            if weight not in found:
                continue
            quantized = found[weight].dtype == E4M3
            if quantized:
                names.append(weight + SCALE)
            owner, experts, _ = weight.partition(".experts.")
            if experts and kinds.setdefault(owner, quantized) != quantized:
                raise CheckpointError(
                    "checkpoint: the experts of one layer must be all F8_E4M3 or all not, got both "
                    f"at {show(weight)}"
                )
    for name in found.keys() - set(names):
        raise CheckpointError(
            f"checkpoint: {show(name)} must belong to an F8_E4M3 weight, got no such weight"
        )
    return names


def has_e4m3(tensors: Mapping[str, Tensor], part: str = "") -> bool:
    """Whether one of `checkpoint.scan`'s tensors, with `part` in its name, is e4m3."""
    return any(tensor.dtype == E4M3 and part in name for name, tensor in tensors.items())


def loaded_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """What a model in `dtype` with the `tensors` of `checkpoint.scan` takes."""
    total = 0
    for name, tensor in tensors.items():
        numel, of_experts = math.prod(tensor.shape), ".experts." in name
        if name.endswith(SCALE):
            total += numel * torch.float32.itemsize if of_experts else 0
        else:
            total += numel * (1 if of_experts and tensor.dtype == E4M3 else dtype.itemsize)
    return total


def model_tensors(
    name: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    read: Callable[[Tensor], torch.Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensor `name`, and the scales of experts that are e4m3.

    One stored tensor at a time is held beside what is made.

    Args:
        tensors: of `checkpoint.scan`.
        dtype: of what is not e4m3 experts; None keeps the file's, and makes bf16 of e4m3.
    Raises:
        CheckpointError: a scale that is not finite and positive.
    """
    if name in tensors:
        values = read(tensors[name])
        if tensors[name].dtype == E4M3:
            values = values.float() * _scale(tensors[name + SCALE], read)[:, None]
            dtype = dtype or torch.bfloat16
        yield name, values.to(device=device, dtype=dtype or values.dtype)
        return
    E, K, N = shape
    experts = _parts(name, E)
    stored = tensors[experts[0][0]].dtype
    kept = DTYPES[stored] if stored == E4M3 or dtype is None else dtype
    merged = torch.empty(E, N, K, dtype=kept, device=device)
    scales = torch.empty(E, N, dtype=torch.float32, device=device)
    for e, weights in enumerate(experts):
        rows = N // len(weights)
        for i, weight in enumerate(weights):
            here = slice(i * rows, (i + 1) * rows)
            merged[e, here] = read(tensors[weight])
            if stored == E4M3:
                scales[e, here] = _scale(tensors[weight + SCALE], read)
    yield name, merged.transpose(1, 2)
    if stored == E4M3:
        yield name.removesuffix("_proj") + SCALE, scales


def _scale(tensor: Tensor, read: Callable[[Tensor], torch.Tensor]) -> torch.Tensor:
    """(N,) fp32."""
    scale = read(tensor).float().squeeze(1)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(
            f"checkpoint: {show(tensor.name)} must be finite and positive, got other values"
        )
    return scale
