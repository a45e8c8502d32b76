"""One operator on one workload: how to make its inputs, run it, and judge what it gives.

    case = next(cases("small"))            # bench/ops.py has the list
    inputs = case.make(torch.device("cpu"))
    errors = measure_all(case.run(inputs), case.reference(inputs), case.bounds)

`make` calls nothing that depends on a value, so it works on fake tensors of any size as well as on
memory; one seed gives the same values on one kind of device. What an operator must not look at is
poisoned where it exists: NaN in dead slots of the cache, page ids that no cache has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from .accuracy import Bound
from .cost import Compulsory

__all__ = [
    "BF16",
    "F16",
    "F32",
    "Case",
    "Inputs",
    "Outputs",
    "dtype_name",
    "randn",
    "seeded",
    "tensors_of",
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Inputs = dict[str, Any]
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    op: str  # "fp8_matmul": key of OPS, and a name that kernels/_paths.py knows
    id: str  # unique: "fp8_matmul-scout-tp8-qkv-T16-promoted"
    make: Callable[..., Inputs]  # (device, seed=0)
    run: Callable[[Inputs], Outputs]  # the public operator
    reference: Callable[[Inputs], Outputs]  # kernels/reference.py in float64
    bounds: tuple[Bound, ...]  # one per output
    cost_of: Callable[[], Compulsory]  # cost.py's formula of these sizes; called when asked

    @property
    def cost(self) -> Compulsory:
        return self.cost_of()

    def __str__(self) -> str:
        return self.id


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from `seed`, on the CPU and on `device`, and leave the generators as they were."""
    real = device.type == "cuda" and torch.cuda.is_available()
    with torch.random.fork_rng(devices=[device] if real else []):
        torch.manual_seed(seed)
        yield


def randn(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal values of that type."""
    return torch.randn(shape, dtype=dtype, device=device)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Every tensor in `value`: an operator's inputs, or anything made of such."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def dtype_name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", F16: "fp16", F32: "fp32"}[dtype]
