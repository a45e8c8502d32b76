"""Which path an operator takes: by call, context or environment; the bits of the reference path."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from llama4_triton.kernels import _environment, _launch, _library, _paths, _records, reference
from llama4_triton.kernels._paths import features, path, path_report, use
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.attention_decode_schedule import decode_schedule
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.convert_layout import convert_layout
from llama4_triton.kernels.expert_weights import Experts, quantize_experts
from llama4_triton.kernels.fp8_matmul import fp8_matmul
from llama4_triton.kernels.gather_rows import gather_rows
from llama4_triton.kernels.grouped_gemm import GroupedGemmConfig, grouped_gemm_swiglu
from llama4_triton.kernels.grouped_gemm_combine import grouped_gemm_combine
from llama4_triton.kernels.merge_attention import merge_attention
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.quantize import quantize_groupwise, quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.rms_norm_quantize import rms_norm_quantize
from llama4_triton.kernels.rope import RopeTable, Temperature
from llama4_triton.kernels.rope_and_cache import rope_and_cache
from llama4_triton.kernels.router import router
from llama4_triton.kernels.routing import route, sort_by_expert
from llama4_triton.kernels.swiglu import swiglu

pytestmark = pytest.mark.no_kernels

CPU = torch.device("cpu")
T, E, H, F, TOP_K = 5, 3, 7, 6, 2
PAGE, HQ, HKV, D = 4, 4, 2, 6


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """As in a new process with no variable set and no selftest made."""
    for name in ("PATH", "DEBUG", "NO_JIT"):
        monkeypatch.delenv(f"LLAMA4_TRITON_{name}", raising=False)
    monkeypatch.setenv("LLAMA4_TRITON_HOME", str(tmp_path))
    monkeypatch.setattr(_paths, "_chosen", None)
    _environment.environment.cache_clear()
    _records._covered.cache_clear()
    yield
    _environment.environment.cache_clear()
    _records._covered.cache_clear()


def test_fast_is_the_default():
    assert {path(op) for op in _paths.OPS} == {"fast"}


def test_every_operator_is_listed_and_has_a_reference_path():
    from llama4_triton.kernels import _reference_path

    assert set(_library.implementations) == set(_paths.OPS)
    assert all(hasattr(_reference_path, f"_{op}") for op in _library.implementations)


def test_a_call_holds_from_then_on_in_every_thread():
    use(rms_norm="safe", attention_decode="reference")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(path("rms_norm")))
    thread.start()
    thread.join()
    assert seen == ["safe"]
    assert (path("attention_decode"), path("attention_prefill")) == ("reference", "fast")


def test_a_context_restores_what_was_before_even_after_an_error():
    use(swiglu="safe")
    with pytest.raises(MemoryError), use(all="reference"):
        assert path("swiglu") == path("moe") == "reference"
        with use(swiglu="fast"):
            assert (path("swiglu"), path("moe")) == ("fast", "reference")
        assert path("swiglu") == "reference"
        raise MemoryError
    assert (path("swiglu"), path("moe")) == ("safe", "fast")


def test_what_is_named_wins_over_all():
    use(all="reference", moe="fast", route="safe")
    assert (path("moe"), path("route"), path("rms_norm")) == ("fast", "safe", "reference")


@pytest.mark.parametrize(
    "paths, message",
    [
        ({"mow": "safe"}, r"^use: operator must be all or one of add_rms_norm, .*, got 'mow'$"),
        ({"moe": "slow"}, r"^use: moe must be one of safe, fast, reference, got 'slow'$"),
        ({"rms_norm": "safe", "all": ""}, r"^use: all must be one of .*, got ''$"),
    ],
    ids=["operator", "path", "empty"],
)
def test_unknown_names_are_refused_and_nothing_changes(paths, message):
    with pytest.raises(ValueError, match=message):
        use(**paths)
    assert {path(op) for op in _paths.OPS} == {"fast"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("safe", {"moe": "safe", "route": "safe", "rms_norm": "safe"}),
        (
            "moe=safe, attention_prefill=reference",
            {"moe": "safe", "attention_prefill": "reference", "rms_norm": "fast"},
        ),
        ("reference,rms_norm=fast", {"moe": "reference", "rms_norm": "fast"}),
        ("", {"moe": "fast"}),
    ],
    ids=["one", "several", "both", "empty"],
)
def test_the_environment_chooses(monkeypatch, text, expected):
    monkeypatch.setenv("LLAMA4_TRITON_PATH", text)
    assert {op: path(op) for op in expected} == expected
    with use(all="safe"):
        assert path("attention_prefill") == "safe"
    assert {op: path(op) for op in expected} == expected


@pytest.mark.parametrize("text", ["slow", "moe=slow", "mow=safe", "moe", "moe=", "=safe"])
def test_a_bad_variable_is_one_clear_error_at_first_use(monkeypatch, text):
    monkeypatch.setenv("LLAMA4_TRITON_PATH", text)
    for _ in range(2):  # not half understood the second time
        with pytest.raises(ValueError, match=r"^LLAMA4_TRITON_PATH: .* must be .*, got '"):
            rms_norm(torch.ones(1, 4), torch.ones(4), 1e-5)


def test_the_variable_is_not_read_at_import():
    code = "import llama4_triton.kernels._paths, llama4_triton.kernels.rms_norm; print('imported')"
    env = {"LLAMA4_TRITON_PATH": "nonsense", "LLAMA4_TRITON_DEBUG": "2", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize("name", ["DEBUG", "NO_JIT"])
def test_a_switch_is_0_or_1(monkeypatch, name):
    monkeypatch.setenv(f"LLAMA4_TRITON_{name}", "yes")
    message = f"^environment: LLAMA4_TRITON_{name} must be 0 or 1, got 'yes'$"
    with pytest.raises(ValueError, match=message):
        _environment.environment()


def test_the_environment_is_read_in_one_file():
    root = Path(_paths.__file__).parents[1]
    files = {
        file.name
        for folder in ("kernels", "model", "autotune", "bench")
        for file in (root / folder).glob("*.py")
        if re.search(r"\bLLAMA4_TRITON_\w+\"", file.read_text())
        and re.search(r"\b(environ|getenv)\b", file.read_text())
    }
    assert files == {"_environment.py"}


# The reference path: the operator's own shapes, dtypes and strides, the reference's own bits.


def _randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype)


def _experts(H=H, F=F):
    return Experts.from_hf(_randn(E, H, 2 * F), _randn(E, F, H))


def _shared():
    return Experts.dense(_randn(F, H), _randn(F, H), _randn(H, F))


def _ids():
    ids = torch.randint(0, E, (T, TOP_K), dtype=torch.int32)
    ids[1, 0], ids[2, 1] = -1, E + 4  # dropped
    return ids


def _kv(pages=6, batch=2, dtype=torch.bfloat16):
    return PagedKV(
        k_cache=_randn(pages, PAGE, HKV, D, dtype=dtype),
        v_cache=_randn(pages, PAGE, HKV, D, dtype=dtype),
        block_table=torch.randperm(pages).int().reshape(batch, -1),
    )


def _case_rms_norm():
    x, w = _randn(T, H), _randn(H)
    return lambda: rms_norm(x, w, 1e-5), lambda: reference.rms_norm(x, w, 1e-5)


def _case_add_rms_norm():
    x, r, w = _randn(T, H), _randn(T, H), _randn(H)
    return lambda: add_rms_norm(x, r, w, 1e-5), lambda: reference.add_rms_norm(x, r, w, 1e-5)


def _case_rms_norm_quantize():
    x, w = _randn(T, H), _randn(H)

    def expected():
        y = reference.rms_norm(x, w, 1e-5)
        return y, *reference.quantize_rowwise(y)

    def got():
        y, _, *quantized = rms_norm_quantize(x, w, 1e-5)
        return y, *quantized

    return got, expected


def _case_add_rms_norm_quantize():
    x, r, w = _randn(T, H), _randn(T, H), _randn(H)

    def expected():
        y, h = reference.add_rms_norm(x, r, w, 1e-5)
        return y, h, *reference.quantize_rowwise(y)

    return lambda: rms_norm_quantize(x, w, 1e-5, residual=r), expected


def _case_gather_rows():
    x, rows = _randn(T, H), torch.tensor([4, -1, 0, 9], dtype=torch.int32)
    return lambda: gather_rows(x, rows), lambda: reference.gather_rows(x, rows)


def _case_swiglu():
    gate, up = _randn(T, 2 * F).split(F, dim=1)
    return lambda: swiglu(gate, up), lambda: reference.swiglu(gate, up)


def _case_quantize_rowwise():
    x = _randn(T, H)
    x[2], x[3, 1] = 0.0, torch.inf
    return lambda: quantize_rowwise(x), lambda: reference.quantize_rowwise(x)


def _case_quantize_groupwise():
    x = _randn(T, 256)
    x[2], x[3, 1] = 0.0, torch.inf
    return lambda: quantize_groupwise(x), lambda: reference.quantize_groupwise(x)


def _case_fp8_matmul():
    x, x_scale = reference.quantize_rowwise(_randn(T, H))
    w, w_scale = reference.quantize_rowwise(_randn(F, H))
    given = (x, x_scale, w, w_scale)
    dtype = torch.float16
    return (
        lambda: fp8_matmul(*given, out_dtype=dtype),
        lambda: reference.fp8_matmul(*given, out_dtype=dtype),
    )


def _case_rope_and_cache(options, dtype):
    q, k, v = _randn(T, HQ + 2 * HKV, D, dtype=dtype).split([HQ, HKV, HKV], dim=1)
    kv = _kv(dtype=dtype)
    caches = kv.k_cache.clone(), kv.v_cache.clone()
    other = PagedKV(k_cache=caches[0], v_cache=caches[1], block_table=kv.block_table)
    positions = torch.arange(T, dtype=torch.int32) + 5
    slots = torch.tensor([3, -1, 0, 23, 7])
    beyond = slots.clone()
    beyond[1] = 6 * PAGE  # not written either

    def got():
        return rope_and_cache(q, k, v, kv, positions, beyond, **options), kv.k_cache, kv.v_cache

    def expected():
        return reference.rope_and_cache(q, k, v, other, positions, slots, **options), *caches

    return got, expected


def _case_rope_local():
    table = RopeTable(cos_sin=torch.randn(8, D), period=8)
    options = dict(rope=table, qk_norm_eps=1e-5, temperature=None)
    return _case_rope_and_cache(options, torch.bfloat16)


def _case_rope_global():
    options = dict(
        rope=None, qk_norm_eps=None, temperature=Temperature(attn_scale=0.1, floor_scale=4.0)
    )
    return _case_rope_and_cache(options, torch.bfloat16)


def _case_rope_none():
    """fp32 and nothing to do: the reference returns q itself, an operator must not."""
    options = dict(rope=None, qk_norm_eps=None, temperature=None)
    return _case_rope_and_cache(options, torch.float32)


def _case_rope_e4m3():
    q, k, v = _randn(T, HQ + 2 * HKV, D).split([HQ, HKV, HKV], dim=1)
    shapes = (6, PAGE, HKV, D), (6, HKV, D, PAGE)
    positions, slots = torch.arange(T, dtype=torch.int32), torch.tensor([3, -1, 0, 23, 7])
    options = dict(rope=None, qk_norm_eps=1e-5, temperature=None, quantize_q=True)

    def run(operator):
        k_cache, v_cache = (torch.zeros(s).to(torch.float8_e4m3fn) for s in shapes)
        k_scale, v_scale = torch.zeros(6, PAGE, HKV), torch.zeros(6, PAGE, HKV)
        kv = PagedKV(k_cache=k_cache, v_cache=v_cache, block_table=torch.zeros(1, 6).int(),
                     k_scale=k_scale, v_scale=v_scale, layout="transposed_v")  # fmt: skip
        out = operator(q, k, v, kv, positions, slots, **options)
        return *out, k_cache, v_cache, k_scale, v_scale

    return lambda: run(rope_and_cache), lambda: run(reference.rope_and_cache)


def _case_convert_layout():
    v = _randn(6, PAGE, HKV, D).to(torch.float8_e4m3fn)
    out = torch.zeros(6, HKV, D, PAGE).to(v.dtype)
    pages = torch.tensor([4, -1, 6, 0], dtype=torch.int32)

    def expected():
        want = torch.zeros(out.shape, dtype=v.dtype)
        want[[0, 4]] = reference.convert_layout(v, "transposed_v")[[0, 4]]
        return want

    return lambda: convert_layout(v, layout="transposed_v", out=out, pages=pages), expected


def _case_attention_prefill():
    q, kv = _randn(T, HQ, D), _kv()
    given = (q, kv, torch.tensor([0, 2, 5]).int(), torch.tensor([7, 12]).int())
    options = dict(chunk_size=5, sm_scale=0.3)
    return (
        lambda: attention_prefill(*given, **options),
        lambda: reference.attention_prefill(*given, **options),
    )


def _case_attention_decode():
    given = (_randn(2, HQ, D), _kv(), torch.tensor([0, 11]).int())
    return lambda: attention_decode(*given), lambda: reference.attention_decode(*given)


def _case_decode_schedule():
    lens = torch.tensor([3000, 0, 70]).int()

    def run():
        made = decode_schedule(lens, chunk_size=0, capacity=4096, num_kv_heads=1, page_size=64)
        count = int(made.count)
        return made.items[:count], made.spans, made.count

    def exact():
        items, spans = reference.decode_schedule(
            lens, chunk_size=0, unit=128, shortest=512, wanted=8
        )
        return tuple(torch.tensor(x).int() for x in (items, spans, [len(items)]))

    return run, exact


def _case_merge_attention():
    given = torch.randn(3, 2, HQ, D), torch.randn(3, 2, HQ)
    return lambda: merge_attention(*given), lambda: reference.merge_attention(*given)


def _routing(ids, weights, block_m):
    """What sort_by_expert returns, from the reference's parts."""
    offsets, row_slot = reference.sort_by_expert(ids, E)
    table = reference.tile_table(offsets, ids.numel(), block_m)
    return offsets, row_slot, torch.tensor(table), torch.tensor([len(table)])


def _parts(routing):
    used = int(routing.tile_count)
    assert (routing.tiles[used:] == torch.tensor([-1, 0, 0, 0])).all()
    tables = routing.expert_offsets, routing.row_slot, routing.tiles[:used].long()
    return *tables, routing.tile_count.long(), routing.expert_ids, routing.expert_weights


def _case_route():
    logits = _randn(T, E)
    logits[1], logits[2, 0] = torch.nan, torch.nan

    def expected():
        ids, weights = reference.route(logits, TOP_K)
        return *_routing(ids, weights, 16), ids, weights

    return lambda: _parts(route(logits, TOP_K)), expected


def _case_sort_by_expert():
    ids, weights = _ids(), torch.rand(T, TOP_K)
    routed = (ids >= 0) & (ids < E)
    return (
        lambda: _parts(sort_by_expert(ids, weights, E, block_m=32)),
        lambda: (
            *_routing(ids, weights, 32),
            torch.where(routed, ids, -1),
            torch.where(routed, weights, 0.0),
        ),
    )


def _case_grouped_gemm_swiglu():
    x, experts, ids, weights = _randn(T, H), _experts(), _ids(), torch.rand(T, TOP_K)
    routing = sort_by_expert(ids, weights, E)
    return (
        lambda: grouped_gemm_swiglu(x, experts, routing),
        lambda: reference.grouped_gemm_swiglu(x, experts, ids, routing.expert_weights),
    )


def _case_grouped_gemm_swiglu_e4m3():
    (x, scale), ids = reference.quantize_groupwise(_randn(T, 128)), _ids()
    experts = quantize_experts(_experts(128, 128), "e4m3_block")
    routing = sort_by_expert(ids, torch.rand(T, TOP_K), E, block_m=64)
    options = dict(x_scale=scale, weight_on="output", out_dtype=torch.float16)
    config = GroupedGemmConfig(
        BLOCK_M=64, BLOCK_N=256, BLOCK_K=128, GROUP_M=1, num_warps=8, num_stages=2
    )

    def expected():
        z = reference.grouped_gemm_swiglu(x, experts, ids, routing.expert_weights, **options)
        return reference.quantize_groupwise(z)

    def got():
        return grouped_gemm_swiglu(x, experts, routing, quantize_z=True, config=config, **options)

    return got, expected


def _case_grouped_gemm_combine():
    z, experts, ids, residual = _randn(T * TOP_K, F), _experts(), _ids(), _randn(T, H)
    routing = sort_by_expert(ids, torch.rand(T, TOP_K), E)
    return (
        lambda: grouped_gemm_combine(z, experts, routing, residual=residual),
        lambda: reference.grouped_gemm_combine(z, experts, ids, residual),
    )


def _case_grouped_gemm_combine_e4m3():
    z, ids = _randn(T * TOP_K, 128), _ids()
    experts = quantize_experts(_experts(128, 128), "e4m3_channel")
    routing = sort_by_expert(ids, torch.rand(T, TOP_K), E)
    return (
        lambda: grouped_gemm_combine(z, experts, routing),
        lambda: reference.grouped_gemm_combine(z, experts, ids, activation="group"),
    )


def _case_moe():
    x, experts, logits, residual = _randn(T, H), _experts(), _randn(T, E), _randn(T, H)
    options = dict(logits=logits, residual=residual, scoring="softmax", renormalize=True)

    def expected():
        given = reference.route(logits, TOP_K, scoring="softmax", renormalize=True)
        return reference.moe_layer(x, experts, *given, residual=residual)

    return lambda: moe(x, experts, top_k=TOP_K, **options), expected


def _case_moe_from_the_router():
    """The shared expert, a part of the experts, and tokens that are not valid."""
    x, w_router, valid = _randn(T, H), _randn(2 * E, H), torch.tensor([3], dtype=torch.int32)
    experts, shared = _experts(), _shared()
    options = dict(w_router=w_router, shared=shared, expert_range=(1, E), num_valid_tokens=valid)
    options["score_dtype"] = x.dtype

    def expected():
        logits = x.float() @ w_router.float().T
        given = reference.route(
            logits, 1, expert_range=(1, E), num_valid_tokens=valid, logits_dtype=x.dtype,
            score_dtype=x.dtype,
        )  # fmt: skip
        return reference.moe_layer(x, experts, *given, shared=shared)

    return lambda: moe(x, experts, top_k=1, **options), expected


def _case_moe_of_e4m3():
    """With a routing made elsewhere, of which some is dropped, and x in e4m3 already."""
    x, ids, weights = _randn(T, 256), _ids(), torch.rand(T, TOP_K)
    x_q, scale = reference.quantize_rowwise(x * 2)
    experts = quantize_experts(_experts(256, 128), "e4m3_channel")
    options = dict(topk_ids=ids, topk_weights=weights, weight_on="output")

    def expected():
        return reference.moe_layer(
            x_q, experts, ids, weights, x_scale=scale, weight_on="output", z_activation="group",
            z_dtype=x.dtype, out_dtype=x.dtype,
        )  # fmt: skip

    given = dict(top_k=TOP_K, x_quantized=(x_q, scale), **options)
    return lambda: moe(x, experts, **given), expected


def _case_moe_of_e4m3_on_sm_80():
    """Weights are decoded; x and z stay as they are, whatever is given."""
    x, logits = _randn(T, 256), _randn(T, E)
    experts = quantize_experts(_experts(256, 128), "e4m3_block")
    x_quantized = torch.zeros(T, 256).to(torch.float8_e4m3fn), torch.ones(T, 2)

    def got():
        with _launch.assume_device(dataclasses.replace(_launch.SM_90, capability=(8, 0))):
            return moe(x, experts, top_k=1, logits=logits, x_quantized=x_quantized)

    return got, lambda: reference.moe_layer(x, experts, *reference.route(logits, 1))


def _case_router():
    x, w = _randn(T, 300), _randn(E, 300)

    def got():
        output = router(x, w, split_k=2, quantize="row")
        return output.partials, output.x_q, output.x_scale

    def expected():
        # Ten blocks of 32, which is what unaligned rows get, in two slices.
        return reference.router(x, w, 160), *reference.quantize_rowwise(x)

    return got, expected


CASES = {name[6:]: case for name, case in list(globals().items()) if name.startswith("_case_")}
del CASES["rope_and_cache"]  # by its three variants


@pytest.fixture
def no_launch():
    def refuse(kernel, grid, *args, **kwargs):
        raise AssertionError(f"{kernel.__name__} was launched")

    with _launch.intercept(refuse):
        yield


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_path_is_the_reference(no_launch, case):
    with use(all="reference"):
        call, expected = case()
        got, want = call(), expected()
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for have, wanted in zip(got, want, strict=True):
        assert have.is_contiguous()
        assert torch.equal(_bits(have), _bits(wanted.to(have.dtype)))


def _bits(x):
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.uint8)
    return x.nan_to_num(nan=12345.0) if x.is_floating_point() else x


def test_a_launch_is_seen_by_these_tests(no_launch):
    with pytest.raises(AssertionError, match="_rms_norm_kernel was launched"):
        _case_rms_norm()[0]()


def test_the_reference_path_returns_no_argument():
    q = torch.randn(1, HQ, D)
    k, v = torch.randn(1, HKV, D), torch.randn(1, HKV, D)
    kv = PagedKV(k_cache=torch.zeros(1, PAGE, HKV, D), v_cache=torch.zeros(1, PAGE, HKV, D),
                 block_table=torch.zeros(1, 1).int())  # fmt: skip
    off = dict(rope=None, qk_norm_eps=None, temperature=None)
    with use(all="reference"):
        out = rope_and_cache(q, k, v, kv, torch.zeros(1).int(), torch.zeros(1).long(), **off)
    assert torch.equal(out, q) and out.data_ptr() != q.data_ptr()


def test_a_wrong_reference_is_no_result(monkeypatch):
    monkeypatch.setattr(reference, "rms_norm", lambda x, weight, eps: x[:1])
    message = r"^rms_norm: the reference must return .*\(2, 4\), got .*\(1, 4\)$"
    with pytest.raises(RuntimeError, match=message), use(rms_norm="reference"):
        rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)


def test_traced_code_follows_the_path(no_launch):
    """The path is chosen inside the flat operator: nothing is compiled again when it changes."""
    x, w = torch.randn(T, H), torch.randn(H)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="eager")
    with pytest.raises(AssertionError, match="was launched"):
        compiled(x, w, 1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True), use(all="reference"):
        assert torch.equal(compiled(x, w, 1e-5), reference.rms_norm(x, w, 1e-5))


def test_every_operator_can_be_traced(no_launch):
    experts, table = _experts(), RopeTable(cos_sin=torch.randn(8, D), period=8)
    options = dict(rope=table, qk_norm_eps=None, temperature=None)
    kv, index, slots = _kv(), torch.tensor([0, 2, 5]).int(), torch.arange(T)
    # Given, since Dynamo may have met torch.empty for the first time while a test had replaced it.
    space = torch.empty(T * TOP_K * H)

    def step(x, w, logits, q, k, v):
        y, h = add_rms_norm(gather_rows(x, index), x[:3], w, 1e-5)
        z = moe(x, experts, top_k=TOP_K, logits=logits, residual=swiglu(x, x), workspace=space)
        x_q, scale = quantize_rowwise(h)
        p = fp8_matmul(x_q, scale, x_q, scale)
        q = rope_and_cache(q, k, v, kv, slots.int(), slots, **options)
        a, _ = attention_prefill(q, kv, index, index[1:])
        d, _ = attention_decode(q[:2], kv, index[1:], workspace=space)
        return y, z, p, a, d

    q, k, v = _randn(T, HQ, D), _randn(T, HKV, D), _randn(T, HKV, D)
    given = _randn(T, H), _randn(H), _randn(T, E), q, k, v
    with use(all="reference"):
        want = step(*given)
        got = torch.compile(step, fullgraph=True, backend="eager")(*given)
    assert all(torch.equal(have, wanted) for have, wanted in zip(got, want, strict=True))


# What the fast path may use, and the selftest's records.


@pytest.fixture
def gpu(monkeypatch):
    """A GPU by name; some operators whose fast path uses more than the safe one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_records, "driver_version", lambda: "550.54.15")
    monkeypatch.setitem(_paths.OPS, "fp8_matmul", frozenset({"tma", "pdl"}))
    monkeypatch.setitem(_paths.OPS, "moe", frozenset({"tma"}))
    return torch.device("cuda", 0)


def test_what_nothing_models_waits_for_a_selftest(gpu):
    assert features("rms_norm", gpu) == frozenset()
    assert features("moe", gpu) == {"tma"}
    assert features("fp8_matmul", gpu) == {"tma"}
    _records.write_record(gpu, {"pdl", "tma"})
    assert features("fp8_matmul", gpu) == {"tma", "pdl"}
    assert features("fp8_matmul", torch.device("cuda")) == {"tma", "pdl"}
    with use(all="safe"):
        assert features("fp8_matmul", gpu) == frozenset()
    with use(all="reference"):
        assert features("fp8_matmul", gpu) == frozenset()


def test_a_record_of_something_else_does_not_count(gpu, monkeypatch):
    _records.write_record(gpu, {"pdl"})
    monkeypatch.setattr(_records, "driver_version", lambda: "560.1.2")
    _records._covered.cache_clear()
    assert features("fp8_matmul", gpu) == {"tma"}


def test_a_record_under_another_name_does_not_count(gpu):
    file = _records.write_record(gpu, {"pdl"})
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"source": "another"}))
    assert features("fp8_matmul", gpu) == {"tma"}


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"features": 3}', "\xff{"])
def test_a_damaged_record_covers_nothing(gpu, text):
    file = _records.write_record(gpu, {"pdl"})
    file.write_text(text, encoding="latin-1")
    _records._covered.cache_clear()
    assert features("fp8_matmul", gpu) == {"tma"}


def test_a_record_is_read_once(gpu, monkeypatch):
    _records.write_record(gpu, {"pdl"})
    features("fp8_matmul", gpu)
    monkeypatch.setattr(_records, "record_path", lambda device: pytest.fail("read again"))
    assert features("fp8_matmul", gpu) == {"tma", "pdl"}


def test_where_a_record_is(gpu, tmp_path):
    file = _records.write_record(gpu, {"tma"}, {"cases": 3})
    assert file.parent == tmp_path / "selftest"
    assert re.fullmatch(r"nvidia-h100-80gb-hbm3-[0-9a-f]{16}\.json", file.name)
    assert file.stem == _records.record_key(gpu)
    record = json.loads(file.read_text())
    assert record["driver"] == "550.54.15" and record["report"] == {"cases": 3}
    assert record["source"] == _records.source_hash()
    assert [f.name for f in file.parent.iterdir()] == [file.name]  # no temporary is left


def test_the_key_depends_on_all_that_a_record_holds_for(gpu, monkeypatch):
    keys = {_records.record_key(gpu)}
    for name in ("driver_version", "source_hash"):
        monkeypatch.setattr(_records, name, lambda: "another")
        keys.add(_records.record_key(gpu))
    for module in (torch, _records.triton):
        monkeypatch.setattr(module, "__version__", "0.0.1")
        keys.add(_records.record_key(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    keys.add(_records.record_key(gpu))
    assert len(keys) == 6


@pytest.mark.parametrize(
    "text, version",
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release", "570.86"),
    ],
    ids=["closed", "open"],
)
def test_driver_version(monkeypatch, tmp_path, text, version):
    file = tmp_path / "version"
    file.write_text(f"{text}\nGCC version:  gcc version 12.2.0\n")
    monkeypatch.setattr(_records, "DRIVER", file)
    assert _records.driver_version.__wrapped__() == version


def test_report_says_why(gpu):
    report = path_report(gpu)
    assert set(report) == set(_paths.OPS)
    assert report["rms_norm"] == ("fast", "the default; the same as safe")
    assert report["moe"] == ("fast", "the default")
    assert report["fp8_matmul"][1].startswith("the default; without pdl: not covered by a selftest")
    _records.write_record(gpu, {"pdl"})
    use(attention_decode="reference")
    assert path_report(gpu)["fp8_matmul"] == ("fast", "the default")
    assert path_report(gpu)["attention_decode"] == ("reference", "chosen by use()")


def test_report_names_the_variable(monkeypatch):
    monkeypatch.setenv("LLAMA4_TRITON_PATH", "moe=safe")
    assert path_report(CPU)["moe"] == ("safe", "chosen by LLAMA4_TRITON_PATH")
