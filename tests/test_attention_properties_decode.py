"""175 seeded problems of decode attention, executed as compiled; 30 of them interpreted as well.

Lengths at tiles, chunks and primes, groups 1 to 16, heads of 64 to 256, pages of 16 to 256, one to
eight new rows, both layouts, e4m3 by head and by token, splits even and fixed. And needles whose
margin one level of fp8 accumulation loses in tensor cores that keep 14 bits, two levels do not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from support.decode import SPLIT, Decode, make_decode, transposed

from llama4_triton.kernels.attention_decode_schedule import DecodeScheduleConfig
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.rope import Temperature

BF16, F16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
EXECUTED, INTERPRETED = 175, 30
TILE, CHUNK = 64, 256
LENGTHS = (
    0, 1, 2, 3, 5, 7, 31, 37, TILE - 1, TILE, TILE + 1, 97, 127, 2 * TILE, 2 * TILE + 1, 131, 197,
    CHUNK - 1, CHUNK, CHUNK + 1, 281, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 613,
)  # fmt: skip
# Few shapes, since each is compiled; what varies freely are lengths, rows, splits and values.
SHAPES = (  # group, KV heads, D, page size, layout, scales, dtype, most new rows
    (5, 1, 128, 64, "nhd", "", BF16, 8),
    (5, 2, 128, 16, "nhd", "", BF16, 3),
    (4, 2, 64, 128, "nhd", "", F16, 4),
    (8, 1, 128, 256, "nhd", "head", BF16, 2),
    (16, 1, 64, 16, "nhd", "token", BF16, 1),
    (1, 2, 256, 64, "nhd", "", BF16, 7),
    (5, 1, 128, 64, "transposed_v", "head", BF16, 6),
    (5, 2, 128, 64, "transposed_v", "token", BF16, 3),
    (8, 1, 64, 32, "transposed_v", "token", F16, 2),
    (16, 1, 128, 256, "transposed_v", "head", BF16, 8),
    (1, 1, 256, 16, "transposed_v", "head", BF16, 5),
    (4, 2, 128, 16, "transposed_v", "", BF16, 4),
)
TEMPERATURE = Temperature(attn_scale=0.1, floor_scale=32.0)


@dataclass(frozen=True)
class Drawn:
    seq_lens: list[int]
    q_lens: list[int] | None
    chunk_size: int
    shape: tuple
    split_tokens: int
    spread: float
    temperature: Temperature | None


def draw(seed: int) -> Drawn:
    rng = random.Random(seed)
    seq_lens = [rng.choice(LENGTHS) for _ in range(rng.choice((1, 2, 3, 5)))]
    shape = SHAPES[seed % len(SHAPES)]
    q_lens = None
    if rng.random() < 0.5:
        q_lens = [min(n, rng.randint(0, shape[-1])) for n in seq_lens]
    return Drawn(
        seq_lens=seq_lens,
        q_lens=q_lens,
        chunk_size=rng.choice((0, 0, CHUNK)),
        shape=shape,
        split_tokens=rng.choice((0, 0, 256, 512)),
        spread=rng.choice((0.1, 1.0, 3.0)),
        temperature=TEMPERATURE if shape[0] % 2 else None,
    )


def run(drawn: Drawn, device: torch.device) -> None:
    group, Hkv, D, page_size, layout, scales, dtype, most = drawn.shape
    problem = make_decode(
        drawn.seq_lens, drawn.q_lens, Hq=group * Hkv, Hkv=Hkv, D=D, page_size=page_size,
        chunk_size=drawn.chunk_size, dtype=dtype, scales=scales, layout=layout,
        temperature=drawn.temperature, spread=drawn.spread, device=device,
    )  # fmt: skip
    if drawn.q_lens is not None:
        problem = replace(problem, max_q_len=most)
    unit = max(TILE, page_size)
    splits: DecodeScheduleConfig = replace(SPLIT, UNIT=unit, MIN_SPLIT=unit)
    problem.check(problem.run(splits=splits, split_tokens=drawn.split_tokens))


@pytest.mark.compiled_only
@pytest.mark.parametrize("first", range(0, EXECUTED, 25))
def test_seeded_problems_as_compiled(executor, device, first):
    if executor not in ("ptx", "cuda"):
        pytest.skip("needs an executor of compiled code")
    _run_seeds(range(first, first + 25), device)


@pytest.mark.interpreter_only
def test_seeded_problems_interpreted(device):
    _run_seeds(range(INTERPRETED), device)


def _run_seeds(seeds, device):
    for seed in seeds:
        torch.manual_seed(seed)
        drawn = draw(seed)
        try:
            run(drawn, device)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {drawn}") from error


@pytest.mark.no_kernels
def test_what_is_drawn():
    """Every length, number of rows, chunk and shape comes up, in the interpreted part too."""
    every = [draw(seed) for seed in range(EXECUTED)]
    assert {n for d in every for n in d.seq_lens} == set(LENGTHS)
    assert {n for d in every for n in d.q_lens or ()} == set(range(9))
    assert {d.shape[0] for d in every[:INTERPRETED]} == {1, 4, 5, 8, 16}
    assert {d.shape[2] for d in every[:INTERPRETED]} == {64, 128, 256}
    assert {d.chunk_size for d in every[:INTERPRETED]} == {0, CHUNK}


# Needles whose margin is lost in sums of 14 bits.


NEEDLES, HAY = 20, 2048


def _needles() -> tuple[Decode, torch.Tensor]:
    """One in the 2048 keys of each of 20 sequences, and what it says: a sign per element of v.

    All other values are 1, the needle's 1 or 1 - 2^-4, exact in e4m3. Its key is like any other,
    so it moves the result by 2^-15 of itself: below the last of 14 bits of the whole sum, far
    above the last bit of a tile's.
    """
    pages = HAY // TILE
    k = torch.randn(NEEDLES * pages, TILE, 1, 128) * 0.5
    v = torch.ones(NEEDLES * pages, TILE, 1, 128)
    said = torch.stack([(torch.randperm(128) < 64) * 2.0 - 1.0 for _ in range(NEEDLES)])
    for b in range(NEEDLES):
        place = int(torch.randint(0, HAY, ()))
        v[b * pages + place // TILE, place % TILE, 0] -= 0.0625 * (said[b] < 0)
        k[b * pages + place // TILE, place % TILE, 0] = 0.0  # a middling score
    kv = PagedKV(
        k_cache=k.to(E4M3), v_cache=v.to(E4M3), k_scale=torch.ones(1), v_scale=torch.ones(1),
        block_table=torch.arange(NEEDLES * pages, dtype=torch.int32).view(NEEDLES, pages),
    )  # fmt: skip
    problem = Decode(
        q=torch.randn(NEEDLES, 1, 128).to(BF16), kv=transposed(kv),
        seq_lens=torch.full((NEEDLES,), HAY, dtype=torch.int32), cu_seqlens_q=None, max_q_len=1,
        chunk_size=0, temperature=None,
    )  # fmt: skip
    return problem, said


def _found(problem: Decode, said: torch.Tensor) -> int:
    """In how many sequences every element tells the needle's sign."""
    out, _ = problem.run(split_tokens=HAY, out_dtype=torch.float32)
    out = out[:, 0]
    middle = (out.amax(1, keepdim=True) + out.amin(1, keepdim=True)) / 2
    return int(((out > middle) == (said > 0)).all(1).sum())


@pytest.mark.compiled_only
def test_needles_under_sums_of_14_bits(executor):
    if executor != "ptx":
        pytest.skip("needs an executor that cuts sums of e4m3 (--executor ptx)")
    from ptxrun import Options, ptx_device
    from support.faulty_decode import faulty

    problem, said = _needles()
    with ptx_device(Options(strict=True)):
        assert _found(problem, said) == NEEDLES
    with ptx_device(Options(strict=True, fp8acc=13)):
        assert _found(problem, said) == NEEDLES
        with faulty("one-level"):
            assert _found(problem, said) <= 0.8 * NEEDLES
