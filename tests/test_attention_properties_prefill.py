"""attention_prefill against float64, over drawn batches; needles in e4m3 sums.

A family is what is compiled: types, head_dim, heads, pages, tiles. Within one, lengths, cached
prefixes, chunks, empty sequences and whether the schedule is made beforehand are drawn from the
number of the case, the same in every run. The compiled code runs all cases, the interpreter every
few of them at smaller widths.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import pytest
import torch
from support.attention import Problem, assert_attention_close, make_problem
from support.attention_prefill import Quantized, assert_quantized_close, quantized

from llama4_triton.kernels import reference
from llama4_triton.kernels._launch import SM_90, assume_device
from llama4_triton.kernels.attention_prefill import AttentionPrefillConfig, attention_prefill
from llama4_triton.kernels.attention_schedule import prefill_schedule
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.rope import Temperature

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TUNED = Temperature(attn_scale=0.1, floor_scale=16.0)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the cases of one family have in common."""

    rows: int  # of a row tile
    D: int = 128
    heads: tuple[int, int] = (5, 1)
    page_size: int = 64
    dtype: torch.dtype = BF16
    kind: str = ""  # of the scales of an e4m3 cache; "": a cache of q's dtype
    layout: str = "nhd"
    queries: bool = True  # in e4m3 where the cache is
    temperature: Temperature | None = None
    cases: int = 16
    interpreted: int = 4


FAMILIES = {
    "bf16-G5": Family(rows=128),
    "bf16-G8-D64-page-16": Family(rows=64, D=64, heads=(8, 1), page_size=16),
    "fp16-G4-page-256": Family(rows=16, heads=(4, 1), page_size=256, dtype=F16),
    "fp32-G1-D64-page-32": Family(
        rows=16, D=64, heads=(2, 2), page_size=32, dtype=F32, temperature=TUNED
    ),
    "bf16-G16-D256": Family(rows=128, D=256, heads=(16, 1), cases=10, interpreted=3),
    "e4m3-head-transposed": Family(
        rows=128, kind="head", layout="transposed_v", temperature=TUNED, interpreted=3
    ),
    "e4m3-token-transposed-page-32": Family(
        rows=128, kind="token", layout="transposed_v", page_size=32, interpreted=3
    ),
    "e4m3-token-D64-page-16": Family(
        rows=64, D=64, heads=(4, 2), kind="token", page_size=16, interpreted=3
    ),
    "e4m3-head-D256-G1": Family(
        rows=64, D=256, heads=(1, 1), kind="head", page_size=128, cases=10, interpreted=3
    ),
    "fp16-over-e4m3": Family(
        rows=64, heads=(4, 1), dtype=F16, kind="head", queries=False, interpreted=3
    ),
}


def _lengths(draw: random.Random, tile: int, chunk: int, most: int) -> tuple[int, int]:
    """(new, cached) of one sequence: around tiles and chunks, primes, nothing."""
    near = (chunk - 1, chunk, chunk + 1) if chunk else (tile,)
    new = draw.choice((0, 1, 2, tile - 1, tile, tile + 1, 7, 31, 97, *near))
    cached = draw.choice((0, 0, 1, 13, tile - 1, 64, 101, *near, 2 * chunk + 3))
    return min(new, most), min(cached, 2 * most)


def _draw(
    name: str, number: int, small: bool, device: torch.device
) -> tuple[Problem | Quantized, random.Random]:
    family = FAMILIES[name]
    draw = random.Random(f"{name}-{number}")
    tile = min(family.rows, 32) if small else family.rows
    chunk = draw.choice((0, 0, 16, 33, 64, 128))
    most = 40 if small else 200
    lengths = [_lengths(draw, tile, chunk, most) for _ in range(draw.randint(1, 4))]
    if draw.random() < 0.3:  # others' next tokens beside it
        lengths += [(1, draw.randrange(1, 150)) for _ in range(3)]
    torch.manual_seed(number)
    problem = make_problem(
        [new for new, _ in lengths], [new + cached for new, cached in lengths],
        Hq=family.heads[0], Hkv=family.heads[1], D=32 if small else family.D,
        page_size=family.page_size, chunk_size=chunk, dtype=family.dtype, device=device,
        spread=draw.choice((0.1, 1.0, 4.0)),
    )  # fmt: skip
    if not family.kind:
        return problem, draw
    given = quantized(problem, kind=family.kind, layout=family.layout, q=family.queries)
    return given, draw


def _positions(given: Problem | Quantized) -> torch.Tensor:
    bounds, lens = given.cu_seqlens.tolist(), given.seq_lens.tolist()
    return torch.cat(
        [
            torch.arange(n - (b - a), n)
            for a, b, n in zip(bounds[:-1], bounds[1:], lens, strict=True)
        ]
    )


CASES = [(name, number) for name, family in FAMILIES.items() for number in range(family.cases)]


@pytest.mark.parametrize("name, number", CASES, ids=[f"{name}-{i}" for name, i in CASES])
def test_matches_float64(device, executor, name, number):
    family, small = FAMILIES[name], executor == "interpreter"
    if small and number >= family.interpreted:
        pytest.skip("the compiled code runs the rest")
    given, draw = _draw(name, number, small, device)
    T = len(given.q)
    rows = min(family.rows, 32) if small else family.rows
    options: dict[str, object] = dict(temperature=family.temperature)
    if small:
        options["config"] = AttentionPrefillConfig(
            BLOCK_M=rows, BLOCK_N=32, num_warps=4, num_stages=2
        )
    if small or draw.random() < 0.8:  # otherwise by the mean number of rows
        options["schedule"] = prefill_schedule(
            given.cu_seqlens, given.seq_lens, T, chunk_size=given.chunk_size, block_m=rows
        )
    if isinstance(given, Quantized):
        options["q_scale"] = given.q_scale
    with assume_device(SM_90):
        got = attention_prefill(
            given.q, given.kv, given.cu_seqlens, given.seq_lens, chunk_size=given.chunk_size,
            checked=True, **options,
        )  # fmt: skip
    if isinstance(given, Quantized):
        assert_quantized_close(got, given, family.temperature)
        return
    if family.temperature is not None and T:
        factor = reference.query_temperature(
            _positions(given), family.temperature.attn_scale, family.temperature.floor_scale
        )
        q = (given.q.double() * factor.to(device)[:, None, None]).to(given.q.dtype)
        given = dataclasses.replace(given, q=q)
    assert_attention_close(got, given.expected(), given.same_dtype())


def _cut_sum(p: torch.Tensor, v: torch.Tensor, keys: int) -> torch.Tensor:
    """p @ v as tensor cores of 14 bits add: 32 products at a time to what is there.

    All 33 are cut off 13 binary digits below the largest. Every `keys` products the sum is added to
    another in full, from where it starts anew.
    """
    whole = torch.zeros(v.shape[1], dtype=torch.float64)
    for first in range(0, len(p), keys):
        acc = torch.zeros_like(whole)
        for k in range(first, min(first + keys, len(p)), 32):
            terms = torch.cat([p[k : k + 32, None] * v[k : k + 32], acc[None]])
            largest = terms.abs().amax(0)
            unit = 2.0 ** (torch.floor(torch.log2(largest.clamp(min=1e-30))) - 13)
            acc = torch.trunc(terms / unit).sum(0) * unit
        whole += acc
    return whole


@pytest.mark.compiled_only
@pytest.mark.parametrize("seed", range(3))
def test_needles_survive_fp8_accumulators(executor, seed):
    """What many weak keys say together, against what a few strong ones say.

    Element 2j + 1 of the values is 15/16 in the strong keys and w_j in the weak ones; element 2j is
    1 and 0. So 2j + 1 is larger if the weak keys are counted. Added to a sum that holds the strong
    ones, each is cut off; a tile of 128 of them by itself is not.
    """
    if executor != "ptx":
        pytest.skip("needs an executor whose FP8 sums have few bits")
    from ptxrun import Options, ptx_device
    from support.proxy_fence import fence_before_barrier

    strong, n, D = 64, 4096, 64
    draw = torch.Generator().manual_seed(seed)
    w = torch.randint(12, 33, (D // 2,), generator=draw) / 16  # 0.75 to 2
    k, v = torch.zeros(n, D), torch.zeros(n, D)
    k[:strong, 0] = 8.0
    k[strong:, 0] = 1.5 + torch.randint(0, 2, (n - strong,), generator=draw) / 8
    v[:strong, 0::2], v[:strong, 1::2] = 1.0, 15 / 16
    v[strong:, 1::2] = w.to(torch.float8_e4m3fn).float()
    cache = torch.stack([k, v]).view(2, n // 64, 64, 1, D).to(torch.float8_e4m3fn)
    one = torch.ones(1)
    q = torch.zeros(1, 1, D)
    q[0, 0, 0] = 1.0
    given = Quantized(
        q=q.to(torch.float8_e4m3fn),
        q_scale=torch.ones(1, 1),
        kv=PagedKV(
            k_cache=cache[0], v_cache=cache[1], k_scale=one, v_scale=one,
            block_table=torch.arange(n // 64, dtype=torch.int32)[None],
        ),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.tensor([n], dtype=torch.int32),
        chunk_size=0,
    )  # fmt: skip
    with ptx_device(Options(strict=True, fp8acc=13), on_launch=fence_before_barrier):
        out, _ = attention_prefill(
            given.q, given.kv, given.cu_seqlens, given.seq_lens, q_scale=given.q_scale,
            sm_scale=1.0, out_dtype=F32,
        )  # fmt: skip
    exact, _ = given.expected(sm_scale=1.0)
    assert (exact[0, 0, 1::2] > exact[0, 0, 0::2]).all()
    p = 256 * torch.exp(k[:, 0].double() - 8.0)
    rounded = p.float().to(torch.float8_e4m3fn).double()
    found = out[0, 0].double()
    assert (found[1::2] > found[0::2]).all()
    torch.testing.assert_close(
        found, _cut_sum(rounded, v.double(), 64) / p.sum(), rtol=1e-5, atol=0
    )
    lost = _cut_sum(rounded, v.double(), n)
    assert (lost[1::2] < lost[0::2]).float().mean() >= 0.2
