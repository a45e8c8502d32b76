"""Random paged attention problems, everything that must not be read poisoned, and their bounds.

Pages nobody owns, slots behind a sequence's end and keys before the live range are NaN; table
entries outside the live range are ids far beyond the cache. A kernel that looks at one of them
gives NaN, or an address that the executors refuse.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import pytest
import torch

from llama4_triton.bench.accuracy import assert_close_as
from llama4_triton.kernels import reference
from llama4_triton.kernels.paged_kv import PagedKV

__all__ = [
    "FAR", "Problem", "assert_attention_close", "dense_rows", "far_memory", "make_problem",
]  # fmt: skip

STALE = 2**30  # a page id that no cache has
FAR = 2**30 + 16  # a stride of which two are beyond int32


def far_memory(request: pytest.FixtureRequest, device: torch.device) -> torch.Tensor:
    """bf16 memory for three rows at stride FAR, 4 GiB; on the CPU only touched pages exist."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("device") == "races":
        pytest.skip("the race shadow of 4 GiB would take 32 GiB")
    numel = 2 * FAR + 4096
    if device.type == "cuda":
        return torch.empty(numel, dtype=torch.bfloat16, device=device)
    return torch.frombuffer(mmap.mmap(-1, 2 * numel), dtype=torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Problem:
    q: torch.Tensor  # (T, Hq, D)
    kv: PagedKV
    cu_seqlens: torch.Tensor
    seq_lens: torch.Tensor
    chunk_size: int

    def last_rows(self) -> torch.Tensor:
        """The last new token of every sequence: what decode computes."""
        return self.q[self.cu_seqlens[1:].long() - 1]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in float64."""
        wide = PagedKV(
            k_cache=self.kv.k_cache.double(),
            v_cache=self.kv.v_cache.double(),
            block_table=self.kv.block_table,
        )
        return reference.attention_prefill(
            self.q.double(), wide, self.cu_seqlens, self.seq_lens, chunk_size=self.chunk_size
        )

    def same_dtype(self) -> torch.Tensor:
        """PyTorch's own answer in the dtype of q; the measure of what is attainable."""
        out = torch.zeros_like(self.q)
        bounds = self.cu_seqlens.tolist()
        for b, seq_len in enumerate(self.seq_lens.tolist()):
            q = self.q[bounds[b] : bounds[b + 1]].transpose(0, 1)
            p = torch.arange(seq_len - q.shape[1], seq_len, device=q.device)[:, None]
            start = p // self.chunk_size * self.chunk_size if self.chunk_size else 0 * p
            if q.shape[1] == 0 or seq_len == 0:
                continue
            t = torch.arange(int(start.clamp(min=0).min()), seq_len, device=q.device)
            pages = self.kv.block_table[b].long()[t // self.kv.page_size]
            k = self.kv.k_cache[pages, t % self.kv.page_size].transpose(0, 1)
            v = self.kv.v_cache[pages, t % self.kv.page_size].transpose(0, 1)
            mask = (t <= p) & (t >= start)
            rows = torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, enable_gqa=True
            )
            out[bounds[b] : bounds[b + 1]] = rows[0].transpose(0, 1)
        return out


def make_problem(
    q_lens: list[int],
    seq_lens: list[int],
    *,
    Hq: int,
    Hkv: int,
    D: int,
    page_size: int,
    chunk_size: int,
    dtype: torch.dtype,
    device: torch.device,
    spread: float = 1.0,
) -> Problem:
    """K and V are views of one (pages, 2, page_size, Hkv, D) tensor; pages in random order."""
    B, capacity = len(q_lens), max([*seq_lens, 1])
    max_pages = -(-capacity // page_size)
    pages = torch.randperm(B * max_pages + 2).tolist()
    cache = torch.full((len(pages), 2, page_size, Hkv, D), torch.nan, dtype=dtype)
    table = torch.full((B, max_pages + 1), STALE, dtype=torch.int32)
    for b, (q_len, seq_len) in enumerate(zip(q_lens, seq_lens, strict=True)):
        oldest = max(seq_len - q_len, 0)
        oldest = oldest // chunk_size * chunk_size if chunk_size else 0
        for i in range(oldest // page_size, -(-seq_len // page_size)):
            table[b, i] = pages.pop()
            first, last = max(oldest - i * page_size, 0), min(seq_len - i * page_size, page_size)
            new = torch.randn(2, last - first, Hkv, D)
            cache[table[b, i], :, first:last] = new.to(dtype)
    cache = cache.to(device)
    q = (torch.randn(sum(q_lens), Hq, D) * spread).to(dtype)
    return Problem(
        q=q.to(device),
        kv=PagedKV(k_cache=cache[:, 0], v_cache=cache[:, 1], block_table=table.to(device)),
        cu_seqlens=torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32).to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        chunk_size=chunk_size,
    )


def dense_rows(B: int, Hkv: int, D: int) -> PagedKV:
    """bf16 rows of a cache of transformers' kind, on a GPU that is recorded."""
    k, v = (
        torch.empty(B, Hkv, 4097, D, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        for _ in range(2)
    )
    origin = torch.empty(B, 1, dtype=torch.int32, device="cuda")
    return PagedKV(k_cache=k, v_cache=v, block_table=origin, layout="dense")


def assert_attention_close(
    got: tuple[torch.Tensor, torch.Tensor],
    want: tuple[torch.Tensor, torch.Tensor],
    same_dtype: torch.Tensor,
) -> None:
    """FlashAttention's rule for out, against PyTorch in the same dtype; LSE to 1e-5 absolute.

    fp32 out: 4e-6 more than twice PyTorch's error. Scores of magnitude 10 carry 2^-21 into the
    exponent, 5e-7 relative in each probability, and a GPU's ex2.approx 2^-22 more.
    """
    (out, lse), (ref, lse_ref) = got, want
    assert out.shape == ref.shape and lse.shape == lse_ref.shape and lse.dtype == torch.float32
    if not out.numel():
        return
    if out.dtype == torch.float32:
        error, floor = (out.double() - ref).abs().max(), (same_dtype.double() - ref).abs().max()
        assert error <= 2 * floor + 4e-6, f"error {error:.3e}, PyTorch's {floor:.3e}"
    else:
        assert_close_as(out, ref, same_dtype)
    assert torch.equal(lse == -torch.inf, lse_ref == -torch.inf)
    visible = lse_ref > -torch.inf
    lse_error = (lse.double() - lse_ref)[visible].abs()
    assert not (lse_error > 1e-5).any() and not lse_error.isnan().any(), lse_error.max()
