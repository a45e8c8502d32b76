"""Cases of the operators on dense rows: norms, quantisation, FP8 products."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels._launch import device_properties
from llama4_triton.kernels.fp8_matmul import PROMOTE_K, fp8_matmul
from llama4_triton.kernels.fp8_matmul import default_config as fp8_config
from llama4_triton.kernels.gather_rows import gather_rows
from llama4_triton.kernels.quantize import quantize_groupwise, quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.rms_norm_quantize import rms_norm_quantize
from llama4_triton.kernels.swiglu import swiglu

from . import cost
from .accuracy import E4M3_NEIGHBOUR, E4M3_SCALE, Exact, Rounded
from .case import BF16, F16, F32, Case, Inputs, Outputs, dtype_name, randn, seeded
from .shapes import MAVERICK, MODELS, PARALLEL, SCOUT, TOKENS, linears

__all__ = [
    "fp8_matmul_cases",
    "gather_cases",
    "norm_cases",
    "norm_quantize_cases",
    "quantize_cases",
    "swiglu_cases",
]

H = SCOUT.hidden  # the same in both models


def norm_cases(size: str) -> Iterator[Case]:
    if size == "real":
        for T in TOKENS:
            yield _rms_norm(f"rms_norm-T{T}", T, BF16)
            yield _add_rms_norm(f"add_rms_norm-T{T}", T, BF16)
    else:
        for dtype in (BF16, F16, F32):
            yield _rms_norm(f"rms_norm-small-{dtype_name(dtype)}", 3, dtype)
            yield _add_rms_norm(f"add_rms_norm-small-{dtype_name(dtype)}", 3, dtype)


def _norm_inputs(T: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    with seeded(device, seed):
        x = randn(T, H, dtype=F32, device=device).mul_(3).to(dtype)
        residual = randn(T, H, dtype=dtype, device=device)
        return dict(x=x, residual=residual, weight=randn(H, dtype=dtype, device=device))


def _rms_norm(id: str, T: int, dtype: torch.dtype) -> Case:
    def exact(i: Inputs) -> Outputs:
        return (reference.rms_norm(i["x"].double(), i["weight"].double(), SCOUT.eps),)

    return Case(
        op="rms_norm",
        id=id,
        make=lambda device, seed=0: _norm_inputs(T, dtype, device, seed),
        run=lambda i: (rms_norm(i["x"], i["weight"], SCOUT.eps),),
        reference=exact,
        bounds=(Rounded(roundings=2),),
        cost_of=lambda: cost.rms_norm(tokens=T, hidden=H, itemsize=dtype.itemsize),
    )


def _add_rms_norm(id: str, T: int, dtype: torch.dtype) -> Case:
    def exact(i: Inputs) -> Outputs:
        h = (i["x"].float() + i["residual"].float()).to(dtype)
        return reference.rms_norm(h.double(), i["weight"].double(), SCOUT.eps), h

    return Case(
        op="add_rms_norm",
        id=id,
        make=lambda device, seed=0: _norm_inputs(T, dtype, device, seed),
        run=lambda i: add_rms_norm(i["x"], i["residual"], i["weight"], SCOUT.eps),
        reference=exact,
        bounds=(Rounded(roundings=2), Exact()),
        cost_of=lambda: cost.add_rms_norm(tokens=T, hidden=H, itemsize=dtype.itemsize),
    )


def gather_cases(size: str) -> Iterator[Case]:
    if size == "real":
        for T in TOKENS:
            yield _gather(f"gather_rows-embedding-T{T}", SCOUT.vocab, T, BF16)
    else:
        for dtype in (BF16, F16, F32):
            yield _gather(f"gather_rows-small-{dtype_name(dtype)}", 37, 5, dtype)


def _gather(id: str, V: int, T: int, dtype: torch.dtype) -> Case:
    # One in five is no row of x, as where a vocabulary is divided over GPUs; of the others one in
    # four repeats. Which ones is decided on the host, so that every device reads as many.
    outside = T // 5
    distinct = (T - outside) - (T - outside) // 4

    def rows(seed: int) -> list[int]:
        draw = random.Random(seed)
        chosen = draw.sample(range(V), distinct)
        chosen += draw.choices(chosen, k=T - outside - distinct)
        chosen += [-1 if i % 2 else V for i in range(outside)]
        draw.shuffle(chosen)
        return chosen

    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            x = randn(V, H, dtype=dtype, device=device)
        return dict(x=x, rows=torch.tensor(rows(seed), device=device))

    return Case(
        op="gather_rows",
        id=id,
        make=make,
        run=lambda i: (gather_rows(i["x"], i["rows"]),),
        reference=lambda i: (reference.gather_rows(i["x"], i["rows"]),),
        bounds=(Exact(),),
        cost_of=lambda: cost.gather_rows(
            rows=T, distinct=distinct, hidden=H, itemsize=dtype.itemsize, index_itemsize=cost.INT64
        ),
    )


def swiglu_cases(size: str) -> Iterator[Case]:
    if size == "real":
        widths = {s.ffn // tp for s in MODELS for tp in PARALLEL}
        widths |= {s.ffn_dense // tp for s in MODELS for tp in PARALLEL} - {0}
        for F in sorted(widths):
            for T in TOKENS:
                yield _swiglu(f"swiglu-F{F}-T{T}", T, F, BF16)
    else:
        for dtype in (BF16, F16, F32):
            yield _swiglu(f"swiglu-small-{dtype_name(dtype)}", 3, 2048, dtype)


def _swiglu(id: str, T: int, F: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            gate, up = (randn(T, F, dtype=dtype, device=device) for _ in range(2))
        return dict(gate=gate, up=up)

    return Case(
        op="swiglu",
        id=id,
        make=make,
        run=lambda i: (swiglu(i["gate"], i["up"]),),
        reference=lambda i: (reference.swiglu(i["gate"].double(), i["up"].double()),),
        bounds=(Rounded(roundings=2),),
        cost_of=lambda: cost.swiglu(tokens=T, width=F, itemsize=dtype.itemsize),
    )


def norm_quantize_cases(size: str) -> Iterator[Case]:
    dtypes = (BF16,) if size == "real" else (BF16, F16, F32)
    for dtype in dtypes:
        for T in TOKENS if size == "real" else (3,):
            word = f"T{T}" if size == "real" else f"small-{dtype_name(dtype)}"
            yield _rms_norm_quantize(f"rms_norm_quantize-{word}", T, dtype, False)
            yield _rms_norm_quantize(f"add_rms_norm_quantize-{word}", T, dtype, True)


def _rms_norm_quantize(id: str, T: int, dtype: torch.dtype, has_residual: bool) -> Case:

    def run(i: Inputs) -> Outputs:
        residual = i["residual"] if has_residual else None
        y, h, *quantized = rms_norm_quantize(i["x"], i["weight"], SCOUT.eps, residual=residual)
        return (y, *quantized) if h is None else (y, *quantized, h)

    def exact(i: Inputs) -> Outputs:
        h = i["x"]
        if has_residual:
            h = (h.float() + i["residual"].float()).to(dtype)
        y = reference.rms_norm(h.double(), i["weight"].double(), SCOUT.eps)
        quantized = reference.quantize_rowwise(y.to(dtype))
        return (y, *quantized, h) if has_residual else (y, *quantized)

    bounds = (Rounded(roundings=2), E4M3_NEIGHBOUR, E4M3_SCALE, Exact())
    return Case(
        op="add_rms_norm_quantize" if has_residual else "rms_norm_quantize",
        id=id,
        make=lambda device, seed=0: _norm_inputs(T, dtype, device, seed),
        run=run,
        reference=exact,
        bounds=bounds if has_residual else bounds[:3],
        cost_of=lambda: cost.rms_norm_quantize(
            tokens=T, hidden=H, itemsize=dtype.itemsize, has_residual=has_residual
        ),
    )


def quantize_cases(size: str) -> Iterator[Case]:
    widths = sorted({K for s in MODELS for tp in PARALLEL for _, K in linears(s, tp).values()})
    for K in widths:
        for T in TOKENS if size == "real" else (3,):
            word = f"T{T}" if size == "real" else "small"
            yield _quantize(f"quantize_rowwise-{word}-K{K}", T, K, BF16)
            yield _quantize(f"quantize_groupwise-{word}-K{K}", T, K, BF16)
    if size == "small":
        for dtype in (F16, F32):
            for op in _QUANTIZERS:
                yield _quantize(f"{op}-small-{dtype_name(dtype)}", 3, H, dtype)


_QUANTIZERS = {
    "quantize_rowwise": (quantize_rowwise, reference.quantize_rowwise, cost.quantize_rowwise),
    "quantize_groupwise": (
        quantize_groupwise, reference.quantize_groupwise, cost.quantize_groupwise,
    ),
}  # fmt: skip


def _quantize(id: str, M: int, K: int, dtype: torch.dtype) -> Case:
    op = id.partition("-")[0]
    run, exact, cost_of = _QUANTIZERS[op]

    def make(device: torch.device, seed: int = 0) -> Inputs:
        with seeded(device, seed):
            return dict(x=randn(M, K, dtype=dtype, device=device))

    return Case(
        op=op,
        id=id,
        make=make,
        run=lambda i: run(i["x"]),
        reference=lambda i: exact(i["x"]),
        bounds=(Exact(), Exact()),
        cost_of=lambda: cost_of(rows=M, width=K, itemsize=dtype.itemsize),
    )


def fp8_matmul_cases(size: str) -> Iterator[Case]:
    if size == "small":
        # Rows that differ in the tile they get; 80 columns are ragged in every tile.
        for M, like in ((1, 1), (17, 17), (40, 64), (70, 4096)):
            yield _fp8(f"fp8_matmul-small-T{M}", M, 80, 640, like=(like, H))
            yield _fp8(f"fp8_matmul-small-T{M}-fast", M, 80, 640, like=(like, H), fast_accum=True)
        for dtype in (F16, F32):
            id = f"fp8_matmul-small-{dtype_name(dtype)}"
            yield _fp8(id, 70, 80, 640, like=(4096, H), out_dtype=dtype)
        return
    for shape in MODELS:
        for tp in PARALLEL:
            for name, (N, K) in linears(shape, tp).items():
                if shape is MAVERICK and not name.startswith("dense"):
                    continue  # as Scout's
                for T in TOKENS:
                    id = f"fp8_matmul-{shape.name}-tp{tp}-{name}-T{T}"
                    yield _fp8(f"{id}-promoted", T, N, K)
                    yield _fp8(f"{id}-fast", T, N, K, fast_accum=True)


def _fp8(
    id: str,
    M: int,
    N: int,
    K: int,
    *,
    fast_accum: bool = False,
    out_dtype: torch.dtype = BF16,
    like: tuple[int, int] | None = None,
) -> Case:
    """like: the sizes (M, N) whose default configuration is taken."""

    def make(device: torch.device, seed: int = 0) -> Inputs:
        def operand(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
            magnitude = torch.rand(rows, 1, device=device).mul_(2).sub_(1).exp2_()
            return reference.quantize_rowwise(
                randn(rows, K, dtype=F32, device=device).mul_(magnitude)
            )

        with seeded(device, seed):
            (x_q, x_scale), (w_q, w_scale) = operand(M), operand(N)
        config = None
        if like:
            properties = device_properties(device)
            config = fp8_config(*like, fast_accum=fast_accum, properties=properties)
        return dict(x_q=x_q, x_scale=x_scale, w_q=w_q, w_scale=w_scale, config=config)

    def exact(i: Inputs) -> Outputs:
        operands = (i["x_q"], i["x_scale"], i["w_q"], i["w_scale"])
        return (reference.fp8_matmul(*operands, out_dtype=torch.float64),)

    return Case(
        op="fp8_matmul",
        id=id,
        make=make,
        run=lambda i: (fp8_matmul(**i, out_dtype=out_dtype, fast_accum=fast_accum, strict=True),),
        reference=exact,
        bounds=(Rounded(fp8_sum=K if fast_accum else min(K, PROMOTE_K)),),
        cost_of=lambda: cost.fp8_matmul(M=M, N=N, K=K, out_itemsize=out_dtype.itemsize),
    )
