"""FP8 e4m3 matrix product with row-wise scales, accumulated accurately by default.

    y[m, n] = dt(x_scale[m] * w_scale[n] * sum_k x_q[m, k] * w_q[n, k])

Layout: x_q (M, K) and w_q (N, K), any row stride, dense rows: the tensor cores take FP8 operands
with K innermost only. x_scale (M,) and w_scale (N,) are fp32 and multiply (quantize.py makes
them). y (M, N) is contiguous.
Tiling: one program per BLOCK_M x BLOCK_N tile of y, ordered in groups of GROUP_M row tiles so that
neighbours share weights in L2. SWAP_AB computes the transposed tile: the tensor cores want at
least 64 rows in their first operand, which a few tokens do not fill and weight rows do.
Accuracy: Hopper's FP8 tensor cores keep about 14 bits while they accumulate. So each BLOCK_K <= 128
products are summed there from zero and then added to an fp32 accumulator in registers.
fast_accum leaves the whole sum to the tensor cores, for an error that grows with K.
Source: promotion every 128 of K as in DeepSeek-V3's and DeepGEMM's FP8 matmuls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._check import FLOATS, check_architecture, check_devices, check_tensor, require
from ._debug import is_checked
from ._launch import SM_90, DeviceProperties, device_properties, launch
from ._library import define
from ._names import named, nbytes
from ._remembered import remembered
from ._sizes import flat, tiles

__all__ = ["Fp8MatmulConfig", "default_config", "fp8_matmul", "slow_path_reason"]

PROMOTE_K = 128  # most products that may be summed before promotion to fp32
ALIGNMENT = 16  # bytes moved by one asynchronous copy


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8MatmulConfig:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    SWAP_AB: bool
    num_warps: int
    num_stages: int


def default_config(
    M: int,
    N: int,
    *,
    fast_accum: bool,
    aligned: bool = True,
    properties: DeviceProperties = SM_90,
) -> Fp8MatmulConfig:
    """Pick tiles from the shape: few tokens are bound by reading weights, many by arithmetic."""
    if not aligned:  # one-byte loads through registers, which larger tiles would spill
        return _config(64, 64, 64, warps=4, stages=2)
    if M <= 64:
        # 64 weight rows per program: N = 5120 makes 80 programs, 128 rows would make 40 of them.
        # Stages instead of programs keep enough bytes in flight.
        return _config(max(16, triton.next_power_of_2(M)), 64, 128, swap=True, warps=4, stages=6)
    # Promotion needs registers for a second accumulator, which leaves 128 columns without spills;
    # tensor cores that do not read shared memory need them for the operands.
    block_n = 256 if fast_accum and N >= 256 and properties.has_wide_mma else 128
    stages = min(4, properties.shared_bytes // ((128 + block_n) * 128))
    return _config(128, block_n, 128, warps=8, stages=stages)


_default_tiles = tiles(default_config)


def _config(
    m: int, n: int, k: int, *, swap: bool = False, warps: int, stages: int
) -> Fp8MatmulConfig:
    return Fp8MatmulConfig(
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, SWAP_AB=swap, num_warps=warps, num_stages=stages
    )


def _cost(args: Mapping[str, Any]) -> tuple[int, int]:
    tensors = [args[f"{name}_ptr"] for name in ("x", "x_scale", "w", "w_scale", "y")]
    return nbytes(*tensors), 2 * args["M"] * args["N"] * args["K"]


@triton.jit(do_not_specialize=["M"], **named("fp8_matmul", "x_ptr", _cost))
def _fp8_matmul_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, y_ptr,
    M, N, K,
    stride_x_m, stride_w_n, stride_y_m,
    FAST_ACCUM: tl.constexpr, SWAP_AB: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,): program t computes one BLOCK_M x BLOCK_N tile of y.

    FAST_ACCUM sums all of K in the tensor cores; SWAP_AB computes y's tile transposed.
    """
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    in_group = pid - group * GROUP_M * tiles_n
    pid_m = group * GROUP_M + in_group % group_rows
    pid_n = in_group // group_rows

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x_m + offs_k[None, :]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * stride_w_n + offs_k[None, :]

    if SWAP_AB:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in tl.range(0, K, BLOCK_K):
        mask_k = offs_k[None, :] < K - k0
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k, other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k, other=0.0)  # (BLOCK_N, BLOCK_K)
        if SWAP_AB:
            left, right = w, x.T
        else:
            left, right = x, w.T
        if FAST_ACCUM:
            acc = tl.dot(left, right, acc)
        else:
            acc += tl.dot(left, right)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    if SWAP_AB:
        acc = acc.T
    x_scale = tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)
    w_scale = tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0)
    y = acc * x_scale[:, None] * w_scale[None, :]

    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_y_m + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def fp8_matmul(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = False,
    strict: bool = False,
    checked: bool = False,
    config: Fp8MatmulConfig | None = None,
) -> torch.Tensor:
    """Multiply two row-wise quantised e4m3 matrices, x @ w.T.

    Args:
        x_q: (M, K) float8_e4m3fn, dense rows.   x_scale: (M,) fp32.
        w_q: (N, K) float8_e4m3fn, dense rows.   w_scale: (N,) fp32.
        out_dtype: bf16, fp16 or fp32.
        fast_accum: accumulate all of K in the tensor cores, about 14 bits; see Numerics.
        strict: raise instead of taking the slow path (see `slow_path_reason`).
        checked: also read the scales, which synchronises, and refuse any that is not positive and
            finite.
        config: tile configuration; None takes `default_config(M, N, ...)`.
    Returns:
        (M, N) in out_dtype.
    Raises:
        ValueError: shapes, strides, devices, config; scales if checked; alignment if strict.
        TypeError: dtypes.   UnsupportedArchitectureError: a GPU before sm_89.
    Numerics: products exact; fp32 sums of at most 128 products in the tensor cores, then fp32 adds
        in the order of K; scales in fp32; one rounding to out_dtype. With fast_accum and operands
        of one sign, a model of Hopper's accumulator gives 9 % relative error at K = 5120 (against
        0.06 %). A NaN affects its own row or column only. Deterministic.
    Cost: 2*M*N*K flops; bytes = (M + N)*K + 4*(M + N) + M*N*itemsize.
    Source: see the module; reference: kernels/reference.py:fp8_matmul.
    """
    op = "fp8_matmul"
    _check(op, x_q, x_scale, w_q, w_scale, out_dtype, fast_accum, strict, config)
    if is_checked(checked, x_q):
        _check_scales(op, x_scale=x_scale, w_scale=w_scale)
    return _fp8_matmul(x_q, x_scale, w_q, w_scale, out_dtype, fast_accum, config and flat(config))


@remembered
def _check(
    op: str,
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    strict: bool,
    config: Fp8MatmulConfig | None,
) -> None:
    check_tensor(op, "x_q", x_q, ("M", "K"), (torch.float8_e4m3fn,))
    M, K = x_q.shape
    check_tensor(op, "w_q", w_q, ("N", K), (torch.float8_e4m3fn,))
    N = w_q.shape[0]
    check_tensor(op, "x_scale", x_scale, (M,), (torch.float32,))
    check_tensor(op, "w_scale", w_scale, (N,), (torch.float32,))
    check_devices(op, x_q=x_q, x_scale=x_scale, w_q=w_q, w_scale=w_scale)
    require(
        out_dtype in FLOATS, op, "out_dtype must be one of fp32, fp16, bf16", out_dtype, TypeError
    )
    check_architecture(op, x_q)
    reason = slow_path_reason(x_q, w_q) if strict else None
    if reason is not None:
        raise ValueError(f"{op}: {reason} (strict=True refuses the slow path)")
    if config is not None:
        must = f"config.BLOCK_K must be at most {PROMOTE_K} without fast_accum"
        require(fast_accum or config.BLOCK_K <= PROMOTE_K, op, must, config.BLOCK_K)


def slow_path_reason(x_q: torch.Tensor, w_q: torch.Tensor) -> str | None:
    """Say why these operands are read byte by byte instead of 16 bytes at a time, or return None.

    The slow path is the same kernel with smaller tiles, compiled for addresses that need not be
    multiples of 16. Storages are taken to start at one, as every allocator of torch's makes them;
    torch.compile cannot trace an offset into one, so `strict` code that it compiles takes that as
    even too.
    """
    K = x_q.shape[1]
    if K % ALIGNMENT:
        return f"K must be divisible by {ALIGNMENT}, got {K}"
    for name, x in (("x_q", x_q), ("w_q", w_q)):
        if x.stride(0) % ALIGNMENT:
            return f"{name} must have a row stride divisible by {ALIGNMENT}, got {x.stride(0)}"
        if not torch.compiler.is_compiling() and x.storage_offset() % ALIGNMENT:
            return (
                f"{name} must have a storage offset divisible by {ALIGNMENT}, "
                f"got {x.storage_offset()}"
            )
    return None


def _check_scales(op: str, **scales: torch.Tensor) -> None:
    for name, scale in scales.items():
        bad = ~(torch.isfinite(scale) & (scale > 0.0))
        if bad.any():
            row = int(bad.int().argmax())
            require(False, op, f"{name} must be positive and finite", f"{scale[row]} in row {row}")


def _fp8_matmul_impl(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    config: list[int] | None,
) -> torch.Tensor:
    M, K = x_q.shape
    N = w_q.shape[0]
    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SWAP_AB, num_warps, num_stages = config or _default_tiles(
        M,
        N,
        fast_accum=fast_accum,
        aligned=slow_path_reason(x_q, w_q) is None,
        properties=device_properties(x_q.device),
    )
    y = torch.empty((M, N), dtype=out_dtype, device=x_q.device)
    if K == 0:
        return y.zero_()
    launch(
        _fp8_matmul_kernel, (-(-M // BLOCK_M) * -(-N // BLOCK_N),),
        x_q, x_scale, w_q, w_scale, y,
        M, N, K,
        x_q.stride(0), w_q.stride(0), y.stride(0),
        FAST_ACCUM=fast_accum, SWAP_AB=bool(SWAP_AB),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=GROUP_M,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return y


def _fp8_matmul_fake(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    config: list[int] | None,
) -> torch.Tensor:
    return x_q.new_empty((x_q.shape[0], w_q.shape[0]), dtype=out_dtype)


_fp8_matmul = define(
    "fp8_matmul(Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, ScalarType out_dtype,"
    " bool fast_accum, int[]? config) -> Tensor",
    _fp8_matmul_impl,
    _fp8_matmul_fake,
)
