"""rope_and_cache and its tables: values, positions up to ten million, slots, strides, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention import FAR, far_memory

from llama4_triton.kernels import reference
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.rope import (
    RopeScaling,
    RopeTable,
    Temperature,
    build_rope_table,
    rope_inv_freq,
)
from llama4_triton.kernels.rope_and_cache import (
    RopeAndCacheConfig,
    default_config,
    rope_and_cache,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SCOUT = RopeScaling(
    factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192
)
TEMPERATURE = Temperature(attn_scale=0.1, floor_scale=8192)
SMALL = RopeAndCacheConfig(BLOCK_T=16, num_warps=1)


def _cache(num_pages, page_size, Hkv, D, dtype, device) -> PagedKV:
    """Views of one tensor, every element NaN: what is not written stays so."""
    pages = torch.full((num_pages, 2, page_size, Hkv, D), torch.nan, dtype=dtype, device=device)
    table = torch.zeros(1, num_pages, dtype=torch.int32, device=device)
    return PagedKV(k_cache=pages[:, 0], v_cache=pages[:, 1], block_table=table)


def _qkv(T, Hq, Hkv, D, dtype, device):
    """q, k, v as views of one fused projection."""
    fused = torch.randn(T, (Hq + 2 * Hkv) * D, device=device).to(dtype)
    parts = fused.split([Hq * D, Hkv * D, Hkv * D], dim=1)
    return [part.unflatten(1, (-1, D)) for part in parts]


def _slots(T, num_slots, device):
    """Distinct slots in random order, every fifth token skipped."""
    slots = torch.randperm(num_slots)[:T]
    slots[::5] = -1
    return slots.to(device)


def _wide(x):
    return x.double() if isinstance(x, torch.Tensor) else x


def _expect(q, k, v, kv, positions, slots, *, rope, **options):
    """The reference on float64 inputs, and the caches after it."""
    wide = PagedKV(
        k_cache=torch.full_like(kv.k_cache, torch.nan, dtype=torch.float64),
        v_cache=torch.full_like(kv.v_cache, torch.nan, dtype=torch.float64),
        block_table=kv.block_table,
    )
    rope = rope and RopeTable(cos_sin=rope.cos_sin.double(), period=rope.period)
    q_out = reference.rope_and_cache(
        q.double(), k.double(), v.double(), wide, positions, slots, rope=rope, **options
    )
    return q_out, wide


def _check(got, want, dtype):
    """One rounding to dtype of an fp32 value that is itself right to a few units of fp32."""
    assert got.dtype == dtype and torch.equal(got.isnan(), want.isnan())
    half_unit = {F32: 0.0, F16: 2**-11, BF16: 2**-8}[dtype]
    torch.testing.assert_close(
        got.double(), want, rtol=half_unit * 1.01 + 1e-6, atol=2e-6, equal_nan=True
    )


# id: (T, Hq, Hkv, D, page_size, dtype, rope period or None, norm, temperature)
CASES = {
    "local-scout": (21, 5, 1, 128, 64, BF16, 8192, 1e-5, None),
    "local-maverick-fp16": (9, 4, 2, 64, 16, F16, 8192, None, None),
    "global": (21, 5, 1, 128, 64, BF16, None, None, TEMPERATURE),
    "absolute-fp32": (21, 5, 1, 128, 16, F32, 0, 1e-5, None),
    "all-fp32-D24-page-5": (19, 4, 2, 24, 5, F32, 7, 1e-6, TEMPERATURE),
    "nothing-D2-page-1": (3, 2, 1, 2, 1, F32, None, None, None),
    "D256-bf16": (2, 2, 1, 256, 16, BF16, 32, 1e-5, None),
    "no-token": (0, 2, 1, 128, 64, BF16, 8192, 1e-5, None),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(device, name):
    T, Hq, Hkv, D, page_size, dtype, period, eps, temperature = CASES[name]
    q, k, v = _qkv(T, Hq, Hkv, D, dtype, device)
    kv = _cache(-(-2 * T // page_size) + 1, page_size, Hkv, D, dtype, device)
    slots = _slots(T, kv.num_pages * page_size, device)
    positions = torch.randint(0, 100_000, (T,), dtype=torch.int32).to(device)
    inv_freq = rope_inv_freq(5e5, D, scaling=SCOUT, device=device)
    rope = RopeTable.for_chunk(inv_freq, period) if period else None
    if period == 0:
        rope = RopeTable.for_positions(inv_freq, positions)
    options = dict(rope=rope, qk_norm_eps=eps, temperature=temperature)
    config = SMALL if T == 21 else None  # the default configuration in the other cases
    got = rope_and_cache(q, k, v, kv, positions, slots, **options, checked=True, config=config)
    want, caches = _expect(q, k, v, kv, positions, slots, **options)
    _check(got, want, dtype)
    _check(kv.k_cache, caches.k_cache, dtype)
    assert torch.equal(kv.v_cache.double().nan_to_num(), caches.v_cache.nan_to_num())


@settings(
    derandomize=True,
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    T=st.integers(0, 18),
    period=st.sampled_from([0, 1, 5, 64, 8192]),
    floor_scale=st.sampled_from([1.0, 3.0, 8192.0]),
    base=st.sampled_from([0, 8185, 1_048_570, 10_485_740]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_property_matches_float64(device, T, period, floor_scale, base, scale):
    q, k, v = (x * scale for x in _qkv(T, 2, 1, 16, F32, device))
    kv = _cache(4, 16, 1, 16, F32, device)
    positions = torch.arange(base, base + T, dtype=torch.int32, device=device)
    inv_freq = rope_inv_freq(1e4, 16, device=device)
    table = RopeTable.for_chunk(inv_freq, max(period, 1))
    rope = table if period else RopeTable.for_positions(inv_freq, positions)
    temperature = Temperature(attn_scale=0.1, floor_scale=floor_scale)
    options = dict(rope=rope, qk_norm_eps=1e-5, temperature=temperature)
    slots = _slots(T, 64, device)
    got = rope_and_cache(q, k, v, kv, positions, slots, **options, config=SMALL)
    want, caches = _expect(q, k, v, kv, positions, slots, **options)
    _check(got, want, F32)
    _check(kv.k_cache, caches.k_cache, F32)


def test_temperature_steps_exactly(device):
    """1 up to 8190; the first step at 8191; every step at p + 1 = 8192 n up to ten million."""
    positions = [0, 8190, 8191, 8192, 8193, 16_382, 16_383, 16_384, 131_071, 1_048_575]
    positions += [10_485_758, 10_485_759]
    expected = [1 + 0.1 * math.log((p + 1) // 8192 + 1) for p in positions]
    assert expected[1] == 1.0 and round(expected[-1], 6) == 1.715540
    T = len(positions)
    q = torch.ones(T, 1, 16, device=device)
    out = rope_and_cache(
        q, q, q, _cache(1, 16, 1, 16, F32, device),
        torch.tensor(positions, dtype=torch.int32, device=device),
        torch.full((T,), -1, device=device),
        rope=None, qk_norm_eps=None, temperature=TEMPERATURE, config=SMALL,
    )  # fmt: skip
    want = torch.tensor(expected, dtype=torch.float64, device=device)
    assert ((out[:, 0, 0].double() - want).abs() / want).max() <= 1e-6
    assert (out[:2] == 1.0).all()
    assert torch.equal(out, out[:, :, :1].expand_as(out))


def test_temperature_steps_exactly_at_any_floor_scale(device):
    """41 * fp32(1 / 41) is below 1: a product in place of the quotient steps too late."""
    positions = torch.arange(40, 41 * 12, 41, dtype=torch.int32, device=device)
    q = torch.ones(len(positions), 1, 16, device=device)
    out = rope_and_cache(
        q, q, q, _cache(1, 16, 1, 16, F32, device), positions,
        torch.full_like(positions, -1, dtype=torch.int64), rope=None, qk_norm_eps=None,
        temperature=Temperature(attn_scale=0.1, floor_scale=41.0), config=SMALL,
    )  # fmt: skip
    steps = torch.arange(1, len(positions) + 1, dtype=torch.float64, device=device)
    want = 1 + 0.1 * torch.log(steps + 1)
    torch.testing.assert_close(out[:, 0, 0].double(), want, rtol=1e-6, atol=0)


def _score_error(positions, table, device):
    """Of q . k over all pairs of tokens, against float64 angles at the absolute positions."""
    T, inv_freq = len(positions), rope_inv_freq(5e5, 128, scaling=SCOUT, device=device)
    q, k, v = _qkv(T, 1, 1, 128, F32, device)
    angle = positions.double()[:, None] * inv_freq.double()
    exact = RopeTable(cos_sin=torch.cat((angle.cos(), angle.sin()), dim=1), period=0)
    options = dict(qk_norm_eps=None, temperature=None)
    args, kv = (positions, torch.arange(T, device=device)), _cache(4, 16, 1, 128, F32, device)
    got = rope_and_cache(q, k, v, kv, *args, rope=table(inv_freq), **options, config=SMALL)
    want, caches = _expect(q, k, v, kv, *args, rope=exact, **options)

    def scores(q_out, k_cache):
        return q_out[:, 0].double() @ k_cache.flatten(0, 1)[:T, 0].double().T

    difference = scores(got, kv.k_cache) - scores(want, caches.k_cache)
    return float(difference.abs().max())


@pytest.mark.parametrize("p", [8190, 8191, 16_383, 1_048_575, 10_485_759])
def test_chunk_relative_scores_are_exact_at_any_position(device, p):
    """Pairs of 60 tokens all over the chunk that ends at or holds p; q . k has deviation 11."""
    base = p // 8192 * 8192
    positions = torch.tensor([8190, 8191, 0, 1, *range(64, 8192, 148)])[:60].sort().values + base
    positions = positions.to(torch.int32).to(device)
    error = _score_error(positions, lambda f: RopeTable.for_chunk(f, 8192), device)
    absolute = _score_error(positions, lambda f: RopeTable.for_positions(f, positions), device)
    # Rotations cost 6 roundings of products whose magnitudes add up to about 82.
    assert error <= 82 * 6 * 2**-24, f"{error:.2e}; with absolute positions {absolute:.2e}"
    if p > 10**7:  # fp32 angles have steps of 0.5 to 1 there, as transformers has them
        assert 2.0 < absolute < 10.0, f"{absolute:.2e}"


def test_positions_around_a_chunk_boundary(device):
    """8192 and 8193 rotate like 0 and 1; 8190 and 8191 like themselves."""
    inv_freq = rope_inv_freq(5e5, 16, device=device)
    q = torch.randn(1, 1, 16, device=device).expand(4, 1, 16).contiguous()
    rotated = []
    for positions in ([8190, 8191, 8192, 8193], [8190, 8191, 0, 1]):
        rotated.append(
            rope_and_cache(
                q, q, q, _cache(1, 16, 1, 16, F32, device),
                torch.tensor(positions, dtype=torch.int32, device=device),
                torch.full((4,), -1, device=device),
                rope=RopeTable.for_chunk(inv_freq, 8192), qk_norm_eps=None, temperature=None,
                config=SMALL,
            )
        )  # fmt: skip
    assert torch.equal(*rotated)
    assert torch.equal(rotated[0][2], q[2])  # no rotation at the chunk's start
    assert not torch.equal(rotated[0][1], rotated[0][2])


def test_skipped_slots_and_neighbours_stay_untouched(device):
    """Negative slots, slots beyond the cache, padding tokens at negative positions."""
    q, k, v = _qkv(6, 2, 1, 16, F32, device)
    kv = _cache(3, 16, 1, 16, F32, device)
    slots = torch.tensor([-1, 17, 48, -(2**40), 2**40, 40], device=device)
    positions = torch.tensor([-5, 3, 4, -(2**31), 6, 7], dtype=torch.int32, device=device)
    rope = RopeTable.for_chunk(rope_inv_freq(1e4, 16, device=device), 64)
    out = rope_and_cache(
        q, k, v, kv, positions, slots, rope=rope, qk_norm_eps=1e-5, temperature=None, config=SMALL
    )
    assert out.isfinite().all()
    written = ~kv.v_cache.flatten(0, 1).isnan().all(-1).flatten()
    assert written.nonzero().flatten().tolist() == [17, 40]
    assert torch.equal(written, kv.k_cache.flatten(0, 1).isfinite().all(-1).flatten())
    assert torch.equal(kv.v_cache[1, 1], v[1]) and torch.equal(kv.v_cache[2, 8], v[5])


def test_a_bad_token_affects_itself_only(device):
    q, k, v = _qkv(5, 2, 1, 16, F32, device)
    args = (torch.arange(5, dtype=torch.int32, device=device), torch.arange(5, device=device))
    options = dict(rope=None, qk_norm_eps=1e-5, temperature=TEMPERATURE, config=SMALL)
    clean_kv, kv = (_cache(1, 16, 1, 16, F32, device) for _ in range(2))
    clean = rope_and_cache(q, k, v, clean_kv, *args, **options)
    q, k = q.clone(), k.clone()
    q[2, 0, 3], k[3, 0, 5] = torch.nan, torch.inf
    got = rope_and_cache(q, k, v, kv, *args, **options)
    assert got[2, 0].isnan().all() and torch.equal(got[2, 1], clean[2, 1])
    others = torch.tensor([0, 1, 4], device=device)
    assert torch.equal(got[others], clean[others])
    assert torch.equal(kv.k_cache[0, others], clean_kv.k_cache[0, others])


def test_offsets_are_int64(device):
    """Masked lanes compute addresses too; in 32 bits the interpreter reports their overflow."""
    q, k, v = (x.contiguous() for x in _qkv(1, 2, 1, 16, F32, device))
    args = (torch.zeros(1, dtype=torch.int32, device=device), torch.tensor([17], device=device))
    options = dict(rope=None, qk_norm_eps=1e-5, temperature=None, config=SMALL)
    near, far = (_cache(2, 16, 1, 16, F32, device) for _ in range(2))
    want = rope_and_cache(q, k, v, near, *args, **options)
    q, k, v = (x.as_strided(x.shape, (2**30, 16, 1)) for x in (q, k, v))
    got = rope_and_cache(q, k, v, far, *args, **options)
    assert torch.equal(got, want)
    assert torch.equal(far.k_cache.nan_to_num(), near.k_cache.nan_to_num())


def test_writes_slots_beyond_two_to_the_31(request, device):
    memory = far_memory(request, device)
    q, k, v = _qkv(3, 1, 1, 16, BF16, device)
    rows = memory.as_strided((3, 1, 16), (FAR, 16, 1), 1024)  # tokens that far apart
    rows.copy_(q)
    pages = [memory.as_strided((3, 16, 1, 16), (FAR, 16, 16, 1), i * 256) for i in (0, 1)]
    table = torch.zeros(1, 3, dtype=torch.int32, device=device)
    slots = torch.tensor([47, 16, 33], device=device)
    out = rope_and_cache(
        rows, k, v, PagedKV(k_cache=pages[0], v_cache=pages[1], block_table=table),
        torch.zeros(3, dtype=torch.int32, device=device), slots,
        rope=None, qk_norm_eps=None, temperature=None, config=SMALL,
    )  # fmt: skip
    assert torch.equal(out, q)
    for page, new in zip(pages, (k, v), strict=True):
        assert torch.equal(page[[2, 1, 2], [15, 0, 1]], new)


def test_ten_repeats_are_bitwise_equal(device):
    q, k, v = _qkv(5, 2, 1, 16, F32, device)
    positions = torch.arange(5, dtype=torch.int32, device=device)
    rope = RopeTable.for_chunk(rope_inv_freq(1e4, 16, device=device), 64)
    results = []
    for _ in range(10):
        kv = _cache(1, 16, 1, 16, F32, device)
        out = rope_and_cache(
            q, k, v, kv, positions, torch.arange(5, device=device), rope=rope, qk_norm_eps=1e-5,
            temperature=None, config=SMALL,
        )  # fmt: skip
        results.append(torch.cat((out.flatten(), kv.k_cache.flatten().nan_to_num())))
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_host_sync(device):
    from support.no_sync import no_host_sync

    q, k, v = _qkv(5, 2, 1, 16, F32, device)
    positions = torch.arange(5, dtype=torch.int32, device=device)
    slots, kv = torch.arange(5, device=device), _cache(1, 16, 1, 16, F32, device)
    inv_freq = rope_inv_freq(1e4, 16, device=device)
    with no_host_sync():
        rope = RopeTable.for_positions(inv_freq, positions)
        rope_and_cache(
            q, k, v, kv, positions, slots, rope=rope, qk_norm_eps=1e-5, temperature=None,
            config=SMALL,
        )  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("scaled", ["default", "scout", "smooth-band"])
def test_table_is_transformers_bit_for_bit(scaled):
    """The angles of Llama4TextRotaryEmbedding, whose own module makes the expected ones."""
    modeling = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    from transformers import Llama4TextConfig

    scaling = {
        "default": None,
        "scout": SCOUT,
        "smooth-band": RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    }[scaled]  # fmt: skip
    parameters = {"rope_theta": 5e5, "rope_type": "default"}
    if scaling is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": 8192,
        }
    config = Llama4TextConfig(head_dim=128, rope_parameters=parameters)
    rotary = modeling.Llama4TextRotaryEmbedding(config)
    inv_freq = rope_inv_freq(5e5, 128, scaling=scaling)
    assert torch.equal(inv_freq, rotary.inv_freq)
    positions = torch.tensor([0, 1, 8191, 131_071, 1_048_575, 10_485_759], dtype=torch.int32)
    angle = positions[:, None].float() * rotary.inv_freq
    cos, sin = build_rope_table(inv_freq, positions).chunk(2, dim=1)
    assert torch.equal(cos, angle.cos()) and torch.equal(sin, angle.sin())
    # torch.polar may pick another vector of the sine than torch.sin: one unit in the last place.
    turn = rotary(torch.empty(1), positions[None])[0]
    torch.testing.assert_close(torch.complex(cos, sin), turn, rtol=0, atol=2**-23)


@pytest.mark.no_kernels
def test_scout_scaling_divides_the_long_wavelengths_only():
    plain, scaled = rope_inv_freq(5e5, 128), rope_inv_freq(5e5, 128, scaling=SCOUT)
    long = 2 * math.pi / plain > 8192
    assert int(long.sum()) == 29
    assert torch.equal(scaled, torch.where(long, plain / 16, plain))


@pytest.mark.no_kernels
def test_a_wavelength_on_the_empty_band_is_not_scaled():
    """Where both factors are equal, transformers' formula is 0/0 for such a wavelength."""
    context = (2 * math.pi / torch.ones(1)).item()
    scaling = RopeScaling(
        factor=16.0,
        low_freq_factor=1.0,
        high_freq_factor=1.0,
        original_max_position_embeddings=context,
    )
    assert torch.equal(rope_inv_freq(5e5, 2, scaling=scaling), torch.ones(1))


@pytest.mark.no_kernels
@pytest.mark.parametrize("D", [2, 24, 64, 88, 128, 256])
@pytest.mark.parametrize("T", [0, 1, 256, 257, 8192])
def test_default_config_is_launchable(T, D):
    for v_run in (1, 8, 16, 32):
        config = default_config(T, D, v_run)
        assert config.BLOCK_T & (config.BLOCK_T - 1) == 0 and config.num_warps in (1, 4, 8)
        assert T <= 256 or D > 128 or config.BLOCK_T >= v_run


def _arguments(**changes):
    """Valid arguments of rope_and_cache: T=3, Hq=4, Hkv=2, D=8, 2 pages of 4; then `changes`."""
    kv = {"k_cache": torch.zeros(2, 4, 2, 8), "v_cache": torch.zeros(2, 4, 2, 8)}
    table = torch.zeros(1, 2, dtype=torch.int32)
    arguments = {
        "q": torch.zeros(3, 4, 8),
        "k": torch.zeros(3, 2, 8),
        "v": torch.zeros(3, 2, 8),
        "positions": torch.zeros(3, dtype=torch.int32),
        "slot_mapping": torch.arange(3),
        "rope": RopeTable(cos_sin=torch.zeros(5, 8), period=5),
        "qk_norm_eps": 1e-5,
        "temperature": TEMPERATURE,
    }
    for name, value in changes.items():
        (kv if name in kv else arguments)[name] = value
    return arguments | {"kv": arguments.get("kv", PagedKV(**kv, block_table=table))}


def _table(rows, D=8, period=5, dtype=F32):
    return dict(rope=RopeTable(cos_sin=torch.zeros(rows, D, dtype=dtype), period=period))


def _one_page_for_all():
    k_cache, v_cache = torch.zeros(2, 1, 4, 2, 8).expand(2, 3, 4, 2, 8)
    return PagedKV(k_cache=k_cache, v_cache=v_cache, block_table=torch.zeros(1, 2).int())


def _one_cache_for_both():
    cache = torch.zeros(2, 4, 2, 8)
    return PagedKV(k_cache=cache, v_cache=cache, block_table=torch.zeros(1, 2).int())


BAD_INPUT = {
    "q-type": (dict(q=None), TypeError, "q must be a torch.Tensor, got NoneType"),
    "q-dtype": (dict(q=torch.zeros(3, 4, 8).long()), TypeError, "q must be torch.float32 or"),
    "q-rank": (dict(q=torch.zeros(3, 32)), ValueError, r"q must have shape \(T, Hq, D\)"),
    "q-heads-strided": (
        dict(q=torch.zeros(3, 8, 8)[:, ::2]), ValueError, r"q must have dense heads, stride\(1\)",
    ),
    "D-odd": (dict(q=torch.zeros(3, 4, 5)), ValueError, "q must have an even head_dim in 2..256"),
    "k-shape": (dict(k=torch.zeros(3, 4, 8)), ValueError, r"k must have shape \(3, 2, 8\), got"),
    "v-dtype": (dict(v=torch.zeros(3, 2, 8).half()), TypeError, "v must be torch.float32, got"),
    "kv-type": (dict(kv=None), TypeError, "kv must be a PagedKV"),
    "cache-dtype": (
        dict(k_cache=torch.zeros(2, 4, 2, 8).half()), TypeError, "kv.k_cache must have the dtype",
    ),
    "cache-shape": (dict(k_cache=torch.zeros(2, 4, 2, 6)), ValueError, "kv.k_cache must have sha"),
    "cache-overlaps-itself": (
        dict(kv=_one_page_for_all()), ValueError, "kv.k_cache must not overlap itself, got strides",
    ),
    "caches-are-one": (
        dict(kv=_one_cache_for_both()), ValueError, "kv.v_cache must be another tensor than",
    ),
    "positions-dtype": (
        dict(positions=torch.zeros(3).long()), TypeError, "positions must be torch.int32, got",
    ),
    "positions-shape": (
        dict(positions=torch.zeros(4, dtype=torch.int32)), ValueError, r"positions must have shap",
    ),
    "slots-dtype": (
        dict(slot_mapping=torch.zeros(3, dtype=torch.int32)), TypeError, "slot_mapping must be tor",
    ),
    "table-short": (_table(4), ValueError, "rope.cos_sin must be contiguous with at least 5 rows"),
    "table-absolute": (_table(2, period=0), ValueError, "rope.cos_sin must be .* least 3 rows"),
    "table-columns": (_table(5, D=4), ValueError, r"rope.cos_sin must have shape \(rows, 8\)"),
    "table-dtype": (_table(5, dtype=BF16), TypeError, "rope.cos_sin must be torch.float32"),
    "period": (_table(5, period=-1), ValueError, "rope.period must be >= 0, got -1"),
    "eps": (dict(qk_norm_eps=-1.0), ValueError, "qk_norm_eps must be finite and >= 0, got -1.0"),
    "scale-nan": (
        dict(temperature=Temperature(attn_scale=float("nan"), floor_scale=1.0)), ValueError,
        "temperature.attn_scale must be finite, got nan",
    ),
    "floor-scale": (
        dict(temperature=Temperature(attn_scale=0.1, floor_scale=0.0)), ValueError,
        "temperature.floor_scale must be finite and > 0, got 0.0",
    ),
    "device": (
        dict(slot_mapping=torch.zeros(3, dtype=torch.int64, device="meta")), ValueError,
        "all tensors must be on one device",
    ),
    "checked-slot": (
        dict(slot_mapping=torch.tensor([0, 8, 1]), checked=True), IndexError,
        "slot_mapping must be < num_pages \\* page_size == 8, got 8",
    ),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_launch(name):
    changes, error, match = BAD_INPUT[name]
    with pytest.raises(error, match="^rope_and_cache: .*" + match):
        rope_and_cache(**_arguments(**changes))
