"""Which layer, and which operator in it, is the first to depart from the reference.

    found = bisect(model, reference, [tokens[:9], tokens[9:]])
    print(found.first)        # layer 3: grouped_gemm_combine: ...

Two comparisons in one run of the same steps. The hidden state after every layer against the plain
model (model/parity.py) shows where the result goes wrong. And every call of an operator is done
again by kernels/reference.py in float64, on the very inputs it got, so that an operator answers
for its own error only, however wrong what it was given. Where layers depart and no operator does,
the fault is in the plain PyTorch between them: then the first module is named whose output does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama4_triton.kernels import _reference_path
from llama4_triton.kernels._library import NAMESPACE
from llama4_triton.model.cache import KVCache
from llama4_triton.model.config import Llama4Config, tiny_maverick, tiny_scout
from llama4_triton.model.parity import THRESHOLD, ParityRow, compare
from llama4_triton.model.tiny import tiny_state

from .accuracy import BOUNDS, Bound, Exact, Rounded, Within

__all__ = ["Bisection", "Departure", "bisect", "tiny_models"]

WIDE = (torch.float32, torch.float16, torch.bfloat16)
SCRATCH = ("workspace",)  # written, and nobody's result


@dataclass(frozen=True, kw_only=True, slots=True)
class Departure:
    """One result that is not what it must be."""

    where: str  # "embedding", "layer 3", "head"
    what: str  # an operator, or a module's path
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.message}"


@dataclass(kw_only=True, slots=True)
class Bisection:
    """What was compared, and what departs, in the order of execution."""

    rows: list[ParityRow] = field(default_factory=list)  # per layer, then the logits
    calls: int = 0  # of operators
    departures: list[Departure] = field(default_factory=list)

    @property
    def first(self) -> Departure | None:
        return self.departures[0] if self.departures else None


def bisect(
    model: nn.Module, reference: nn.Module, steps: Sequence[Sequence[int]], *, page_size: int = 16
) -> Bisection:
    """Feed the token blocks `steps` of one sequence to both models and look at every operator.

    Args:
        model, reference: of model/llama4.py and model/reference.py with the same weights, fp32.
    Raises:
        ValueError: no steps.
    """
    checker = _Checker()
    with torch.no_grad(), checker.located(model), checker:
        rows = compare(model, reference, steps, page_size=page_size)
    found = Bisection(rows=rows, calls=checker.calls, departures=checker.departures)
    if not found.departures and not all(row.ok for row in rows):
        found.departures += _first_module(model, reference, steps, page_size)
    return found


def tiny_models() -> dict[str, tuple[Llama4Config, dict[str, torch.Tensor]]]:
    """Name -> configuration and weights of a tiny Scout and a tiny Maverick."""
    configs = {"tiny Scout": tiny_scout(), "tiny Maverick": tiny_maverick()}
    return {name: (config, tiny_state(config)) for name, config in configs.items()}


class _Checker(TorchDispatchMode):
    """Does every call of an operator again in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.departures: list[Departure] = []
        self.where = "embedding"

    @contextmanager
    def located(self, model: nn.Module) -> Iterator[None]:
        """Know which layer of `model` is running."""
        handles = []
        layers = list(model.get_submodule("model.layers").children())
        for index, layer in enumerate(layers):

            def enter(_module: nn.Module, _inputs: object, where: str = f"layer {index}") -> None:
                self.where = where

            def leave(_module: nn.Module, _inputs: object, _out: object) -> None:
                self.where = "head"

            handles.append(layer.register_forward_pre_hook(enter))
            handles.append(layer.register_forward_hook(leave))

        def begin(_module: nn.Module, _inputs: object) -> None:
            self.where = "embedding"

        handles.append(model.register_forward_pre_hook(begin))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        written = [
            i
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.name not in SCRATCH
            if args[i] is not None
        ]
        before = {i: args[i].clone() for i in written}
        wide = tuple(_wide(before.get(i, arg)) for i, arg in enumerate(args))
        out = func(*args, **(kwargs or {}))
        got = [out] if isinstance(out, torch.Tensor) else list(out)
        want = list(_reference_path.compute(name, wide))
        for i in written:  # only what either of the two has written: the rest is not theirs
            changed = _differ(args[i], before[i]) | _differ(wide[i].to(args[i].dtype), before[i])
            got.append(args[i][changed])
            want.append(wide[i][changed])
        self.calls += 1
        for number, (mine, right) in enumerate(zip(got, want, strict=True)):
            if not mine.numel():  # an output that was not asked for
                continue
            errors = _bound(name, number, mine.dtype).measure(mine, right.to(torch.float64))
            if errors.broken:
                message = f"output {number}: {errors}"
                self.departures.append(Departure(where=self.where, what=name, message=message))
                break
        return out


def _differ(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ~((x == y) | x.isnan() & y.isnan())


def _wide(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_wide(part) for part in arg]
    if isinstance(arg, torch.Tensor) and arg.dtype in WIDE:
        return arg.double()
    return torch.float64 if arg in WIDE else arg


def _bound(name: str, output: int, dtype: torch.dtype) -> Bound:
    """Of one output of a flat operator, written arguments last; as in the operators' cases."""
    one = BOUNDS[dtype].rms if dtype in BOUNDS else 0.0
    if not dtype.is_floating_point or name in ("gather_rows", "quantize_rowwise", "sort_by_expert"):
        return Exact()
    if name == "route":
        return Within(relative=2e-6)
    if name.startswith("attention"):  # out and lse
        return Rounded(noise=one, fp32=4e-6) if output == 0 else Within(absolute=1e-5)
    if name in ("rms_norm", "swiglu"):
        return Rounded(roundings=2)
    if name == "moe":  # z is rounded within, and from 5 to 512 tokens the shared expert's result
        return Rounded(roundings=2, noise=one)
    if name == "add_rms_norm" and output == 0:
        return Rounded(roundings=2, noise=one)  # of h as well
    return Rounded()


def _first_module(
    model: nn.Module, reference: nn.Module, steps: Sequence[Sequence[int]], page_size: int
) -> list[Departure]:
    """The first module, in the order in which they end, whose outputs differ."""
    seen = []
    for each in (model, reference):
        cache = KVCache.for_lengths(
            each.config,  # type: ignore[arg-type]
            [sum(map(len, steps))],
            page_size=page_size,
            dtype=torch.float32,
            device=next(each.parameters()).device,
        )
        outputs: dict[tuple[int, str], torch.Tensor] = {}
        with torch.no_grad(), _observed(each, outputs) as step_number:
            for number, block in enumerate(steps):
                step_number[0] = number
                each(cache.step([block], logits="all"), cache)
        seen.append(outputs)
    mine, theirs = seen
    for (step, path), got in mine.items():
        want = theirs.get((step, path))
        if want is None or want.shape != got.shape:
            continue
        difference = float((got.double() - want.to(got.device).double()).abs().max())
        if not difference <= THRESHOLD:
            parts = path.split(".")
            where = f"layer {parts[2]}" if path.startswith("model.layers.") else "head"
            message = f"step {step}: max |diff| {difference:.1e}, threshold {THRESHOLD:.0e}"
            return [Departure(where=where, what=path, message=message)]
    return []


@contextmanager
def _observed(
    model: nn.Module, outputs: dict[tuple[int, str], torch.Tensor]
) -> Iterator[list[int]]:
    """Keep the first output tensor of every module, by step and path."""
    number = [0]
    handles = []
    for path, module in model.named_modules():

        def keep(_module: nn.Module, _inputs: object, out: Any, path: str = path) -> None:
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, torch.Tensor) and first.is_floating_point():
                outputs.setdefault((number[0], path), first.detach().clone())

        handles.append(module.register_forward_hook(keep))
    try:
        yield number
    finally:
        for handle in handles:
            handle.remove()
