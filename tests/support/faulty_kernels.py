"""Kernels made to break one requirement on machine code each; none of them is ever run."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["faulty_gemm_kernel"]


@triton.jit
def faulty_gemm_kernel(
    a_ptr, b_ptr, bytes_ptr, c_ptr,
    K, stride_a_m, stride_b_k, stride_bytes_n, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FAULT: tl.constexpr,
):  # fmt: skip
    """One tile of a @ b, with one FAULT: "", or what the branches below say."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * stride_a_m + offs_k[None, :]
    b_ptrs = b_ptr + offs_k[:, None] * stride_b_k + offs_n[None, :]
    bytes_ptrs = bytes_ptr + offs_k[:, None] * 3 + offs_n[None, :] * stride_bytes_n

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    small = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    for _k0 in tl.range(0, K, BLOCK_K):
        a = tl.load(a_ptrs)
        if FAULT == "loads":  # single bytes, which nothing asynchronous can move
            b = tl.load(bytes_ptrs).to(a.dtype)
        else:
            b = tl.load(b_ptrs)
        if FAULT == "tf32":
            acc = tl.dot(a, b, acc, input_precision="tf32")
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        if FAULT == "mma.sync":  # 16 rows are too few for wgmma
            small = tl.dot(tl.full((16, BLOCK_K), 1.0, dtype=a.dtype), b, small)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_b_k
        bytes_ptrs += BLOCK_K * 3

    if FAULT == "mma.sync":
        acc += tl.sum(small, axis=0)[None, :]
    if FAULT == "division":
        acc = acc / scale
    c_ptrs = c_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :]
    if FAULT == "atomics":
        tl.atomic_add(c_ptrs, acc)
    elif FAULT == "scratch":  # a descriptor made on the device lives in global memory
        desc = tl.make_tensor_descriptor(
            c_ptr, shape=[BLOCK_M, BLOCK_N], strides=[BLOCK_N, 1], block_shape=[BLOCK_M, BLOCK_N]
        )
        desc.store([0, 0], acc)
    else:
        tl.store(c_ptrs, acc)
