"""rope_and_cache with e4m3 caches and q: every kind of scale, both layouts, special values."""

from __future__ import annotations

import mmap

import pytest
import torch

from llama4_triton.kernels import reference
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.rope import RopeTable, Temperature, rope_inv_freq
from llama4_triton.kernels.rope_and_cache import (
    RopeAndCacheConfig,
    default_config,
    rope_and_cache,
)

BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
TEMPERATURE = Temperature(attn_scale=0.1, floor_scale=8192.0)
OFF = dict(rope=None, qk_norm_eps=None, temperature=None)
SMALL = RopeAndCacheConfig(BLOCK_T=16, num_warps=1)
UNTOUCHED = 0x55  # what every byte of the caches holds that nothing was written to


def _cache(pages, page, Hkv, D, dtype, layout, kind, device) -> PagedKV:
    """All bytes UNTOUCHED; static scales of K and V differ, and from head to head."""
    shapes = [(pages, page, Hkv, D)] * 2
    if layout == "transposed_v":
        shapes[1] = (pages, Hkv, D, page)
    k, v = (
        torch.full((*s, dtype.itemsize), UNTOUCHED, dtype=torch.uint8, device=device)
        .view(dtype)
        .squeeze(-1)
        for s in shapes
    )
    scales = [None, None]
    if kind == "token":
        scales = [torch.full((pages, page, Hkv), torch.nan, device=device) for _ in range(2)]
    elif kind:
        heads = torch.arange(1, (Hkv if kind == "head" else 1) + 1, device=device)
        scales = [heads * 0.01, heads * 0.03]
    table = torch.zeros(1, pages, dtype=torch.int32, device=device)
    k_scale, v_scale = scales
    return PagedKV(
        k_cache=k, v_cache=v, block_table=table, k_scale=k_scale, v_scale=v_scale, layout=layout
    )


def _qkv(T, Hq, Hkv, D, dtype, device):
    fused = torch.randn(T, Hq + 2 * Hkv, D, device=device).to(dtype)
    return fused.split([Hq, Hkv, Hkv], dim=1)


def _slots(T, num_slots, device):
    slots = torch.randperm(num_slots)[:T]
    slots[::5] = -1
    slots[1::7] = num_slots + 3  # beyond the cache: not written either
    return slots.to(device)


def _rows(kv: PagedKV):
    """(k, v) as (slots, Hkv, D) and the scales as (slots, Hkv) or per head."""
    v = kv.v_cache.permute(0, 3, 1, 2) if kv.layout == "transposed_v" else kv.v_cache
    scales = (kv.k_scale, kv.v_scale)
    if kv.scale_kind == "token":
        scales = tuple(s.flatten(0, 1) for s in scales)
    return (kv.k_cache.flatten(0, 1), v.flatten(0, 1)), scales


def _bytes(x):
    return x.contiguous().view(torch.uint8)


# id: (T, Hq, Hkv, D, page_size, dtype, rope period, norm, temperature)
SHAPES = {
    "local-scout": (21, 5, 1, 128, 64, BF16, 8192, 1e-5, None),
    "global-fp16-D64": (19, 4, 2, 64, 16, F16, None, None, TEMPERATURE),
    "all-fp32-D24-page-5": (19, 4, 3, 24, 5, F32, 7, 1e-6, TEMPERATURE),
    "nothing-D2-page-1": (3, 2, 1, 2, 1, F32, None, None, None),
    "one-token-D256": (1, 2, 2, 256, 16, BF16, 32, 1e-5, None),
    "no-token": (0, 2, 1, 128, 64, BF16, 8192, 1e-5, None),
}


@pytest.mark.parametrize("layout", ["nhd", "transposed_v"])
@pytest.mark.parametrize("kind", ["tensor", "head", "token"])
@pytest.mark.parametrize("name", SHAPES)
def test_quantises_the_unrounded_values(device, name, kind, layout):
    """What the same kernel gives in fp32, quantised by the reference; and nothing else written."""
    T, Hq, Hkv, D, page, dtype, period, eps, temperature = SHAPES[name]
    q, k, v = _qkv(T, Hq, Hkv, D, dtype, device)
    pages = -(-2 * T // page) + 1
    kv = _cache(pages, page, Hkv, D, E4M3, layout, kind, device)
    slots = _slots(T, pages * page, device)
    positions = torch.randint(0, 10_000_000, (T,), dtype=torch.int32).to(device)
    inv_freq = rope_inv_freq(5e5, D, device=device)
    rope = RopeTable.for_chunk(inv_freq, period) if period else None
    options = dict(rope=rope, qk_norm_eps=eps, temperature=temperature)
    options["config"] = SMALL if T == 21 else default_config(T, D)
    before = _cache(pages, page, Hkv, D, E4M3, layout, kind, device)
    q_q, q_scale = rope_and_cache(q, k, v, kv, positions, slots, **options, quantize_q=True)

    wide = _cache(pages, page, Hkv, D, F32, "nhd", None, device)
    q_wide = rope_and_cache(q.float(), k.float(), v.float(), wide, positions, slots, **options)
    # Compiled for fp32, the sum of a norm is in another order.
    slack = 0.0 if eps is None else 4e-6
    assert q_q.dtype == E4M3 and q_q.shape == q.shape
    _assert_quantised(q_q, q_scale, q_wide, slack, dynamic=True)
    (values, scales), (exact, _), (old, old_scales) = _rows(kv), _rows(wide), _rows(before)
    written = torch.zeros(pages * page, dtype=torch.bool, device=device)
    written[slots[(slots >= 0) & (slots < pages * page)]] = True
    for got, scale, want, kept, kept_scale in zip(
        values, scales, exact, old, old_scales, strict=True
    ):
        if kind == "token":
            _assert_quantised(got[written], scale[written], want[written], slack, dynamic=True)
            assert scale[~written].isnan().all()
        else:
            _assert_quantised(got[written], scale, want[written], slack, dynamic=False)
            assert torch.equal(scale, kept_scale)
        assert torch.equal(_bytes(got[~written]), _bytes(kept[~written]))


def _assert_quantised(x_q, scale, exact, slack, *, dynamic):
    """Bits of a value between `exact` * (1 - slack) and `exact` * (1 + slack), and its scale."""
    y = exact / scale[..., None]
    if dynamic:
        want_scale = reference.quantize_heads(exact)[1]
        torch.testing.assert_close(scale, want_scale, rtol=slack, atol=0)
        y = exact * (1.0 / scale)[..., None]
    low, high = ((y * f).clamp(-448.0, 448.0).to(E4M3).float() for f in (1.0 - slack, 1.0 + slack))
    got = x_q.float()
    assert ((got >= torch.minimum(low, high)) & (got <= torch.maximum(low, high))).all()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
def test_transposed_pages_hold_what_plain_ones_do(device, dtype):
    q, k, v = _qkv(21, 2, 2, 64, dtype, device)
    slots = _slots(21, 48, device)
    caches = [_cache(6, 8, 2, 64, dtype, name, None, device) for name in ("nhd", "transposed_v")]
    for kv in caches:
        rope_and_cache(q, k, v, kv, slots.int(), slots, **OFF, config=SMALL)
    (plain, _), (transposed, _) = map(_rows, caches)
    for a, b in zip(plain, transposed, strict=True):
        assert torch.equal(_bytes(a), _bytes(b))


def test_error_of_a_token_is_within_half_a_step_of_float64(device):
    """Half of 2**-3 relative, or half of the smallest step, 2**-9, in units of the scale."""
    T, D = 40, 128
    q, k, v = _qkv(T, 2, 1, D, BF16, device)
    q, k = q * torch.logspace(-6, 6, T)[:, None, None].to(q), k * 100
    kv = _cache(1, 64, 1, D, E4M3, "transposed_v", "token", device)
    positions = torch.arange(10_485_720, 10_485_720 + T, dtype=torch.int32, device=device)
    inv_freq = rope_inv_freq(5e5, D, device=device)
    options = dict(qk_norm_eps=1e-5, temperature=TEMPERATURE)
    slots = torch.arange(T, device=device)
    rope = RopeTable.for_chunk(inv_freq, 8192)
    q_q, q_scale = rope_and_cache(
        q, k, v, kv, positions, slots, rope=rope, **options, quantize_q=True, config=SMALL
    )
    wide = PagedKV(
        k_cache=torch.zeros(1, 64, 1, D, dtype=torch.float64, device=device),
        v_cache=torch.zeros(1, 64, 1, D, dtype=torch.float64, device=device),
        block_table=kv.block_table,
    )
    rope = RopeTable(cos_sin=rope.cos_sin.double(), period=8192)
    exact_q = reference.rope_and_cache(
        q.double(), k.double(), v.double(), wide, positions, slots, rope=rope, **options
    )
    (k_q, v_q), (k_scale, v_scale) = _rows(kv)
    for x_q, scale, exact in (
        (q_q, q_scale, exact_q),
        (k_q[:T], k_scale[:T], wide.k_cache[0, :T]),
        (v_q[:T], v_scale[:T], wide.v_cache[0, :T]),
    ):
        unit = scale.double()[..., None]
        torch.testing.assert_close(
            unit, exact.abs().amax(-1, keepdim=True) / 448, rtol=2e-6, atol=0
        )
        error = (x_q.double() * unit - exact).abs()
        assert (error <= (exact.abs() * 2**-4 + unit * 2**-10) * 1.001).all()


def test_special_values(device):
    """NaN stays NaN, infinities saturate, a row of zeros or without a finite value has scale 1."""
    nan, inf = torch.nan, torch.inf
    rows = torch.tensor(
        [[0.0, -0.0], [nan, 2.0], [inf, -4.0], [nan, inf], [1e-30, 0.0], [3e38, -1e38]],
        device=device,
    )
    T = len(rows)
    x = rows[:, None]
    slots = torch.arange(T, device=device)
    dynamic = _cache(1, 8, 1, 2, E4M3, "nhd", "token", device)
    q_q, q_scale = rope_and_cache(
        x, x, x, dynamic, slots.int(), slots, **OFF, quantize_q=True, config=SMALL
    )
    want_q, want_scale = reference.quantize_rowwise(rows)
    assert want_scale[[0, 3]].tolist() == [1.0, 1.0]
    (k_q, v_q), scales = _rows(dynamic)
    for got, scale in ((q_q[:, 0], q_scale[:, 0]), *zip((k_q[:T, 0], v_q[:T, 0]),
                       (scales[0][:T, 0], scales[1][:T, 0]), strict=True)):  # fmt: skip
        assert torch.equal(got.float().nan_to_num(7.0), want_q.float().nan_to_num(7.0))
        assert torch.equal(got.float().isnan(), rows.isnan())
        assert torch.equal(scale, want_scale)

    static = _cache(1, 8, 1, 2, E4M3, "transposed_v", "tensor", device)
    rope_and_cache(x, x, x, static, slots.int(), slots, **OFF, config=SMALL)
    (k_q, v_q), (k_scale, v_scale) = _rows(static)
    for got, scale in ((k_q, k_scale), (v_q, v_scale)):
        want = (rows / scale).clamp(-448, 448)
        assert want[2].tolist() == [448.0, float((-4.0 / scale).clamp(min=-448))]
        assert torch.equal(got[:T, 0].float().isnan(), rows.isnan())
        assert torch.equal(got[:T, 0].float().nan_to_num(7), want.to(E4M3).float().nan_to_num(7))


def test_a_bad_token_affects_itself_only(device):
    q, k, v = _qkv(5, 2, 2, 16, F32, device)
    slots = torch.arange(5, device=device)
    options = dict(OFF, qk_norm_eps=1e-5, quantize_q=True, config=SMALL)
    results = []
    for bad in (False, True):
        if bad:
            q[2, 0, 3], k[3, 1, 5], v[1, 0, 0] = torch.nan, torch.inf, torch.nan
        kv = _cache(1, 8, 2, 16, E4M3, "transposed_v", "token", device)
        q_out = rope_and_cache(q, k, v, kv, slots.int(), slots, **options)
        (k_q, v_q), (k_scale, v_scale) = _rows(kv)
        results.append([*q_out, k_q[:5], v_q[:5], k_scale[:5], v_scale[:5]])
    touched = [(2, 0), (2, 0), (3, 1), (1, 0), (3, 1), (1, 0)]
    for (token, head), clean, got in zip(touched, *results, strict=True):
        same = _bytes(clean.unsqueeze(-1)).flatten(2) == _bytes(got.unsqueeze(-1)).flatten(2)
        same[token, head] = True
        assert same.all()


def test_ten_repeats_are_bitwise_equal(device):
    q, k, v = _qkv(5, 2, 1, 16, F32, device)
    slots = torch.arange(5, device=device)
    results = []
    for _ in range(10):
        kv = _cache(1, 8, 1, 16, E4M3, "transposed_v", "token", device)
        q_out = rope_and_cache(
            q, k, v, kv, slots.int(), slots, **OFF, quantize_q=True, config=SMALL
        )
        parts = (*q_out, kv.k_cache, kv.v_cache, kv.k_scale, kv.v_scale)
        results.append(torch.cat([_bytes(x).flatten() for x in parts]))
    assert all(torch.equal(result, results[0]) for result in results)


def _lazy(numel, dtype, device):
    """Memory of which only what is written exists: what is read elsewhere is the page of zeros."""
    if device.type == "cuda":
        return torch.zeros(numel, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, numel * dtype.itemsize, flags=flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


@pytest.mark.unsanitized  # the shadow of all these rows takes longer than the test
@pytest.mark.parametrize(
    "stride, first",
    [(7168, 299_593), (5120, 419_430)],
    ids=["fused-qkv-7168", "q-5120"],
)
def test_rows_where_their_offset_overflows_int32(device, executor, stride, first):
    """q, k and v in rows of `stride` elements; slots of 1024 beyond the 2,097,152nd."""
    T, page = first + 3, 64
    assert (first + 1) * stride >= 2**31 > first * stride
    rows = _lazy(T * stride, BF16, device).view(T, stride)
    rows[-3:, :48] = torch.randn(3, 48, device=device).to(BF16)
    q, k, v = rows[:, :48].unflatten(1, (3, 16)).split(1, dim=1)
    pages = 2_097_152 // page + 2
    k_cache, v_cache = (_lazy(pages * page * 1024, E4M3, device) for _ in range(2))
    kv = PagedKV(
        k_cache=k_cache.as_strided((pages, page, 1, 16), (page * 1024, 1024, 16, 1)),
        v_cache=v_cache.as_strided((pages, 1, 16, page), (page * 1024, 1024, page, 1)),
        block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
        k_scale=torch.ones(pages, page, 1, device=device),
        v_scale=torch.ones(pages, page, 1, device=device),
        layout="transposed_v",
    )
    slots = torch.full((T,), -1, device=device)
    slots[-3:] = torch.tensor([2_097_151, 2_097_152, 2_097_217], device=device)
    positions = torch.zeros(T, dtype=torch.int32, device=device)
    config = RopeAndCacheConfig(BLOCK_T=32768 if executor == "interpreter" else 512, num_warps=4)
    out, scale = rope_and_cache(
        q, k, v, kv, positions, slots, **OFF, quantize_q=True, config=config
    )
    want = [reference.quantize_heads(x[-3:].float()) for x in (q, k, v)]
    assert torch.equal(_bytes(out[-3:]), _bytes(want[0][0]))
    assert torch.equal(scale[-3:], want[0][1])
    page_of, offset = slots[-3:] // page, slots[-3:] % page
    assert torch.equal(_bytes(kv.k_cache[page_of, offset]), _bytes(want[1][0]))
    assert torch.equal(_bytes(kv.v_cache[page_of, :, :, offset]), _bytes(want[2][0]))
    assert torch.equal(kv.v_scale[page_of, offset], want[2][1])


@pytest.mark.interpreter_only
def test_opcheck():
    op = torch.ops.llama4_triton.rope_and_cache.default
    for kind, layout, quantize_q in (
        ("token", "nhd", True), ("head", "transposed_v", False), (None, "transposed_v", True),
    ):  # fmt: skip
        dtype = E4M3 if kind else BF16
        kv = _cache(2, 4, 2, 16, dtype, layout, kind, "cpu")
        q, k, v = (x.contiguous() for x in _qkv(3, 2, 2, 16, BF16, "cpu"))
        args = (
            q, k, v, kv.k_cache, kv.v_cache, kv.k_scale, kv.v_scale, layout == "transposed_v",
            torch.arange(3, dtype=torch.int32), torch.arange(3), None, 0, None, None, None,
            quantize_q, [16, 1],
        )  # fmt: skip
        # test_schema multiplies what is written in place, which PyTorch cannot for e4m3.
        torch.library.opcheck(op, args, test_utils="test_faketensor")


def _kv(**changes):
    kv = dict(
        k_cache=torch.zeros(2, 4, 2, 8, dtype=E4M3), v_cache=torch.zeros(2, 4, 2, 8, dtype=E4M3),
        block_table=torch.zeros(1, 2, dtype=torch.int32), k_scale=torch.ones(2, 4, 2),
        v_scale=torch.ones(2, 4, 2),
    )  # fmt: skip
    return PagedKV(**kv | changes)


ONE = torch.ones(2, 4, 2)
BAD_INPUT = {
    "scale-missing": (dict(k_scale=None), ValueError, "kv.k_scale must be given for e4m3 caches"),
    "scale-shape": (dict(k_scale=torch.ones(3)), ValueError, r"kv.k_scale must be fp32 of shape"),
    "scale-dtype": (dict(k_scale=torch.ones(2).half()), TypeError, "kv.k_scale must be fp32"),
    "scales-differ": (dict(v_scale=torch.ones(1)), ValueError, "kv.v_scale must have the shape"),
    "scale-is-shared": (dict(k_scale=ONE, v_scale=ONE), ValueError, "kv.v_scale must be another"),
    "scale-overlaps": (
        dict(k_scale=torch.ones(4, 2).expand(2, 4, 2), v_scale=torch.ones(4, 2).expand(2, 4, 2)),
        ValueError, "kv.k_scale must not overlap itself",
    ),
    "layout": (dict(layout="hnd"), ValueError, "kv.layout must be one of nhd, transposed_v"),
    "transposed-shape": (
        dict(layout="transposed_v"), ValueError, r"kv.v_cache must have shape \(2, 2, 8, 4\)",
    ),
    "v-overlaps": (
        dict(layout="transposed_v", v_cache=torch.zeros(2, 8, 4, dtype=E4M3).expand(2, 2, 8, 4)),
        ValueError, "kv.v_cache must not overlap itself",
    ),
}  # fmt: skip


@pytest.mark.no_kernels
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_launch(name):
    changes, error, match = BAD_INPUT[name]
    x = torch.zeros(3, 2, 8)
    slots = torch.arange(3)
    with pytest.raises(error, match="^rope_and_cache: .*" + match):
        rope_and_cache(x, x, x, _kv(**changes), slots.int(), slots, **OFF)
