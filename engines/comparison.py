"""Two traces side by side: how far each place is off, and how far it may be.

    rows = compare(stock, own, tolerances)
    first = first_departure(rows)               # None: the engines agree

Tolerances are one number per operation of a layer, for all of its tokens and steps:
fp32     2e-4 of the largest value: another order of sums makes 4e-6 in four layers of tiny
         configurations; the margin is for deeper models.
half     4 times the stock engine's own error, which a run of the same weights in fp32 shows. Two
         engines that round alike are at most twice that apart; again twice, because the largest of
         few errors varies (1.9 was the most of six runs). At least one unit in the last place of
         the largest value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .trace import Place, Trace

__all__ = ["Row", "Tolerances", "compare", "first_departure", "of_errors", "of_values"]

RELATIVE = 2e-4
ERRORS = 4.0
EXACT = "router: experts"  # numbers, not values

Tolerances = Mapping[tuple[int | None, str], float]  # of (layer, operation)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One place in both engines."""

    place: Place
    error: float  # the largest |difference|; of chosen experts, how many tokens have others
    at: tuple[int, ...]  # where it is: token, and head, column or expert
    largest: float  # of the stock engine's values
    tolerance: float

    @property
    def departs(self) -> bool:
        return not self.error <= self.tolerance  # True for NaN


def of_values(stock: Trace, relative: float = RELATIVE) -> Tolerances:
    """`relative` of the largest value."""
    return {key: relative * value for key, value in _largest(stock).items()}


def of_errors(stock: Trace, exact: Trace, dtype: torch.dtype) -> Tolerances:
    """By the error of `stock`, computed in `dtype`, against `exact`."""
    own = _largest({place: exact[place] - value for place, value in stock.items()})
    ulp = torch.finfo(dtype).eps
    return {key: max(ERRORS * own[key], ulp * size) for key, size in _largest(stock).items()}


def compare(stock: Trace, own: Trace, tolerances: Tolerances) -> list[Row]:
    """A row per place of `stock`, in the order of its execution."""
    rows = []
    for place, want in stock.items():
        got = own.get(place)
        tolerance = 0.0 if place.op == EXACT else tolerances[place.layer, place.op]
        error: float = math.inf
        at: tuple[int, ...] = ()
        if got is not None and got.shape == want.shape:
            error, at = _difference(got, want, count=place.op == EXACT)
        rows.append(Row(place=place, error=error, at=at, largest=_size(want), tolerance=tolerance))
    return rows


def first_departure(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.departs), None)


def _difference(
    got: torch.Tensor, want: torch.Tensor, *, count: bool
) -> tuple[float, tuple[int, ...]]:
    """The largest |difference| and where; or of how many rows, and which is the first."""
    same = (got == want) | (got.isnan() & want.isnan())
    if count:
        rows = (~same).any(-1)
        return float(rows.sum()), (int(rows.int().argmax()),)
    error = torch.where(same, 0.0, (got - want).abs())
    flat = error.nan_to_num(nan=math.inf).argmax()
    at = tuple(int(index) for index in torch.unravel_index(flat, error.shape))
    return float(error[at]), at


def _largest(trace: Trace) -> dict[tuple[int | None, str], float]:
    """By layer and operation, over all steps."""
    sizes: dict[tuple[int | None, str], float] = {}
    for (_, layer, op), value in trace.items():
        sizes[layer, op] = max(sizes.get((layer, op), 0.0), _size(value))
    return sizes


def _size(x: torch.Tensor) -> float:
    return float(x.nan_to_num(0.0, 0.0, 0.0).abs().max())
