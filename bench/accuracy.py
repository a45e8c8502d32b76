"""How close a kernel's result must be to a float64 reference on the same (quantised) inputs.

No single measure sees every fault: DeepGEMM's calc_diff and torch's bf16 defaults both let a
truncating store and 1 % of the columns 1 % off pass. `measure` asks four questions at once:

    element    max |e| / (u |ref| + 1e-5 max|ref|)      u = 2**-8 in bf16: half an ulp at worst
    frobenius  ||e|| / ||ref||                          over everything
    row        ||e_r|| / ||ref_r||                      the worst row of at least 32 elements
    bias       |sum e sign(ref)| / sum |ref|            a rounding has none

and that NaN and infinities are where the reference has them, so that poisoned memory shows.
`Exact`, `Within` and `Rounded` say which of this holds for one output of an operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "E4M3_NEIGHBOUR",
    "E4M3_SCALE",
    "Bound",
    "Errors",
    "Exact",
    "Rounded",
    "Within",
    "assert_close",
    "assert_close_as",
    "measure",
    "measure_all",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """One rounding to nearest of an fp32 sum.

    The relative error of a float in [2**e, 2**(e+1)) is uniform within +-2**(e-p) / value. Its rms
    over Gaussian results is `rms`, measured 1.65e-3 in bf16 for any K; frobenius and row leave 20 %
    and, for as few as 32 elements, 60 %. The `absolute` part of the element bound is for sums that
    cancel: fp32 accumulation costs 3e-6 of the largest result at K = 16384.
    """

    unit: float
    rms: float
    frobenius: float
    row: float
    bias: float
    element: float = 1.05
    absolute: float = 1e-5


BF16 = Bounds(unit=2.0**-8, rms=1.65e-3, frobenius=2.0e-3, row=2.6e-3, bias=3e-4)
# Three more bits divide everything by 8; the fp32 accumulation adds up to 1e-6 to that.
FP16 = Bounds(unit=2.0**-11, rms=2.1e-4, frobenius=2.5e-4, row=3.3e-4, bias=4e-5)
BOUNDS = {torch.bfloat16: BF16, torch.float16: FP16}
FP32_FROBENIUS = 1e-6  # measured 6e-8 to 3e-7 for K = 128 to 16384
ROUNDINGS = {"gemm": 1, "norm": 2}  # of results to the output's type, one after the other
SIGMAS = 6  # of Gaussian noise that an element may be off by: one in 10**9 is
# Hopper's tensor cores keep about 14 bits of an FP8 sum, and cut the rest off at each instruction,
# which adds 32 products.
FP8_BITS, FP8_PRODUCTS = 14, 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Measured errors, each with the bound it must stay within, and where the worst element is."""

    values: dict[str, float]
    bounds: dict[str, float]
    worst: str

    @property
    def broken(self) -> list[str]:
        """Names of the measures which are out of bounds (a NaN is)."""
        return [name for name, value in self.values.items() if not value <= self.bounds[name]]

    def __str__(self) -> str:
        marks = {name: " <-" for name in self.broken}
        rows = (
            f"{name} {value:.3g} (bound {self.bounds[name]:.3g}){marks.get(name, '')}"
            for name, value in self.values.items()
        )
        return f"{', '.join(rows)}; worst {self.worst}"


def measure(
    actual: torch.Tensor,
    reference: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    k: int = 0,
    magnitude: torch.Tensor | None = None,
    kind: str = "gemm",
    noise: float = 0.0,
    fp32: float = FP32_FROBENIUS,
) -> Errors:
    """Measure `actual` against the float64 `reference`; arguments as of `assert_close`.

    Args:
        noise: rms of errors that are there before the last rounding, relative to the rms of the
            row, whatever the size of the element.
        fp32: the Frobenius bound of float32 results.
    """
    dtype = actual.dtype if dtype is None else dtype
    if reference.dtype != torch.float64:
        raise TypeError(f"close: reference must be torch.float64, got {reference.dtype}")
    if actual.shape != reference.shape:
        raise ValueError(f"close: shapes differ: {tuple(actual.shape)}, {tuple(reference.shape)}")
    want = reference.detach()
    got = actual.detach().to(want.device).double()
    special = _special(got, want)
    if special is not None:
        return special
    ok = want.isfinite()
    want = want.where(ok, 0.0)
    error = (got - want).where(ok, 0.0)
    if dtype == torch.float32:
        return _measure_fp32(got, want, error, k, magnitude, fp32)
    if dtype not in BOUNDS:
        raise TypeError(f"close: no bounds for {dtype}, only for {', '.join(map(str, BOUNDS))}")
    return _measure_rounded(got, want, error, BOUNDS[dtype], ROUNDINGS[kind], noise, dtype)


def assert_close(
    actual: torch.Tensor,
    reference: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    k: int = 0,
    magnitude: torch.Tensor | None = None,
    kind: str = "gemm",
) -> Errors:
    """Assert that `actual` is `reference` but for the roundings it cannot avoid.

    Args:
        actual: the kernel's result.
        reference: float64, of the same quantised inputs.
        dtype: whose rounding is allowed; `actual.dtype` unless given.
        k: length of the sums (float32 results: with `magnitude`).
        magnitude: sum |a||b| of each element: a float32 result may be off by k * 2**-24 of it.
        kind: "gemm", one rounding; "norm", two (as the model's RMSNorm has).
    Returns:
        The measured errors, to print.
    """
    return _asserted(
        measure(actual, reference, dtype=dtype, k=k, magnitude=magnitude, kind=kind), actual
    )


def assert_close_as(
    actual: torch.Tensor,
    reference: torch.Tensor,
    peer: torch.Tensor,
    *,
    factor: float = 2.0,
    rms_factor: float = 1.5,
) -> Errors:
    """Assert that `actual` is as close as `peer`, PyTorch's own result in the same type.

    FlashAttention's rule, for results of several roundings that no formula bounds well: largest
    error <= factor * peer's + 2 |(ref + 0.3) - 0.3 - ref| in that type; rms <= rms_factor * peer's.
    """
    got, other = actual.detach().cpu().double(), peer.detach().cpu().double()
    want = reference.detach().cpu().double()
    typed = want.to(peer.dtype)
    grain = 2 * ((typed + 0.3) - 0.3 - typed).abs().max().item()
    error = (got - want).abs()
    own, theirs = error, (other - want).abs()
    values = {"max": own.max().item(), "rms": own.pow(2).mean().sqrt().item()}
    bounds = {
        "max": factor * theirs.max().item() + grain,
        "rms": rms_factor * theirs.pow(2).mean().sqrt().item() + grain * 2**-8,
    }
    return _asserted(Errors(values=values, bounds=bounds, worst=_worst(error, got, want)), actual)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exact:
    """Equal in every element; NaN equals NaN."""

    def measure(self, actual: torch.Tensor, reference: torch.Tensor) -> Errors:
        got, want = _pair(actual, reference)
        different = ~((got == want) | got.isnan() & want.isnan())
        return Errors(
            values={"different": float(different.sum())},
            bounds={"different": 0.0},
            worst=_worst(different.double(), got, want),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Within:
    """|e| <= absolute + relative * |ref|, for values that are not results of a sum."""

    absolute: float = 0.0
    relative: float = 0.0

    def measure(self, actual: torch.Tensor, reference: torch.Tensor) -> Errors:
        got, want = _pair(actual, reference)
        special = _special(got, want)
        if special is not None:
            return special
        allowed = self.absolute + self.relative * want.abs()
        tiny = torch.finfo(torch.float64).tiny
        ratio = ((got - want).abs() / allowed.clamp_min(tiny)).where(want.isfinite(), 0.0)
        return Errors(
            values={"element": ratio.max().item()},
            bounds={"element": 1.0},
            worst=_worst(ratio, got, want),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """A sum in fp32 and `roundings` to the output's type; see `measure`."""

    roundings: int = 1
    noise: float = 0.0  # rms, relative to the row's; for roundings within the operator
    fp32: float = FP32_FROBENIUS
    fp8_sum: int = 0  # products added in FP8 tensor cores before promotion to fp32; 0: none

    def measure(self, actual: torch.Tensor, reference: torch.Tensor) -> Errors:
        cut = 0.0
        if self.fp8_sum and actual.is_cuda:  # what executes kernels on a CPU adds exactly
            cut = -(-self.fp8_sum // FP8_PRODUCTS) * 2.0 ** (1 - FP8_BITS)
        errors = measure(
            actual,
            reference,
            kind={count: kind for kind, count in ROUNDINGS.items()}[self.roundings],
            noise=max(self.noise, cut),
            fp32=self.fp32 + cut,
        )
        if "bias" in errors.bounds:
            errors.bounds["bias"] += cut  # bits that are cut off all err towards zero
        return errors


Bound = Exact | Within | Rounded

# e4m3 of values that are off by a last bit: the neighbour, or a denormal two steps away; and the
# scale, which has the largest value's error.
E4M3_NEIGHBOUR = Within(relative=2.0**-3, absolute=2.0**-8)
E4M3_SCALE = Within(relative=2.0**-7)


def measure_all(
    actual: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], bounds: Sequence[Bound]
) -> list[Errors]:
    """Measure every output of an operator with its bound."""
    return [
        bound.measure(got, want) for got, want, bound in zip(actual, reference, bounds, strict=True)
    ]


def _asserted(errors: Errors, actual: torch.Tensor) -> Errors:
    if errors.broken:
        raise AssertionError(f"{tuple(actual.shape)} {actual.dtype}: {errors}")
    return errors


def _pair(actual: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if actual.shape != reference.shape:
        raise ValueError(f"close: shapes differ: {tuple(actual.shape)}, {tuple(reference.shape)}")
    want = reference.detach()
    return actual.detach().to(want.device).double(), want.double()


def _special(got: torch.Tensor, want: torch.Tensor) -> Errors | None:
    """The verdict where NaN or infinities differ, or where there is nothing to measure."""
    same = (got == want) | got.isnan() & want.isnan()
    special = ~(want.isfinite() & got.isfinite()) & ~same
    count = int(special.sum())
    if count == 0 and want.numel():
        return None
    first = _coordinate(special.flatten().int().argmax(), want) if want.numel() else ()
    worst = f"{count} elements are NaN or infinite in one of the two, e.g. {first}"
    return Errors(values={"finite": float(count)}, bounds={"finite": 0.0}, worst=worst)


def _measure_rounded(
    got: torch.Tensor,
    want: torch.Tensor,
    error: torch.Tensor,
    bound: Bounds,
    roundings: int,
    noise: float,
    dtype: torch.dtype,
) -> Errors:
    largest = want.abs().max().item()
    smallest_step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = roundings * bound.unit * want.abs() + bound.absolute * largest + smallest_step / 2
    if noise and want.dim():
        allowed = allowed + SIGMAS * noise * want.pow(2).mean(-1, keepdim=True).sqrt()
    ratio = error.abs() / allowed.clamp_min(torch.finfo(torch.float64).tiny)
    grow = math.sqrt(roundings + (noise / bound.rms) ** 2)
    rows, row_bounds = _relative(error, want, bound.rms * grow, bound.row * grow, bound.absolute)
    whole, whole_bound = _relative(
        error.reshape(1, -1), want.reshape(1, -1), bound.rms * grow, bound.frobenius * grow, 0.0
    )
    values = {"element": ratio.max().item(), "frobenius": whole.item()}
    bounds = {"element": bound.element, "frobenius": whole_bound.item()}
    if want.dim() >= 2 and want.shape[-1] >= 32:
        worst = (rows / row_bounds).argmax()
        values["row"], bounds["row"] = rows[worst].item(), row_bounds[worst].item()
    total = want.abs().sum().item()
    if total > 0:
        count = total**2 / want.pow(2).sum().item()
        values["bias"] = abs((error * want.sign()).sum().item()) / total
        # Five standard deviations, where there are too few elements for the fixed bound.
        bounds["bias"] = max(bound.bias, 5 * bound.rms / math.sqrt(count)) * grow
    return Errors(values=values, bounds=bounds, worst=_worst(ratio, got, want))


def _measure_fp32(
    got: torch.Tensor,
    want: torch.Tensor,
    error: torch.Tensor,
    k: int,
    magnitude: torch.Tensor | None,
    frobenius: float,
) -> Errors:
    norm = want.norm().item()
    values = {"frobenius": error.norm().item() / norm if norm else error.norm().item()}
    bounds = {"frobenius": frobenius}
    ratio = error.abs()
    if magnitude is not None:
        allowed = max(k, 1) * 2.0**-24 * magnitude.detach().to(want.device).double()
        ratio = error.abs() / allowed.clamp_min(torch.finfo(torch.float32).tiny)
        values["element"], bounds["element"] = ratio.max().item(), 1.0
    return Errors(values=values, bounds=bounds, worst=_worst(ratio, got, want))


def _relative(
    error: torch.Tensor, want: torch.Tensor, rms: float, bound: float, absolute: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """||e|| / ||ref|| along the last dimension, and its bound.

    Where few elements carry the norm, the mean of their squared errors spreads: by 1.2 / sqrt(n)
    of itself, n = (sum ref**2)**2 / sum ref**4 being their number; six times that is allowed.
    """
    square = want.pow(2).sum(-1)
    norm = square.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    count = (square.pow(2) / want.pow(4).sum(-1).clamp_min(torch.finfo(torch.float64).tiny)).clamp(
        1
    )
    spread = rms * (1 + 6 * 1.2 / count.sqrt()).sqrt()
    # A row that is small beside the largest result may consist of cancelled sums.
    cancelled = absolute * want.abs().max() * math.sqrt(want.shape[-1]) / norm
    relative = (error.norm(dim=-1) / norm).reshape(-1)
    return relative, (spread.clamp_min(bound) + cancelled).reshape(-1)


def _coordinate(flat: torch.Tensor, like: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat, like.shape))


def _worst(ratio: torch.Tensor, got: torch.Tensor, want: torch.Tensor) -> str:
    if not want.numel():
        return "nothing"
    at = _coordinate(ratio.flatten().argmax(), want)
    return f"element {at}: got {got[at].item():.9g}, expected {want[at].item():.9g}"
